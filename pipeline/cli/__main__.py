"""Entry point of `python -m pipeline.cli`, which is `vectormill`."""

from pipeline.cli import main

main()
