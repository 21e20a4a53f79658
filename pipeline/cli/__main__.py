"""`python -m pipeline.cli` is `vectormill`."""

from pipeline.cli import main

main()
