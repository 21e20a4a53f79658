"""Third-party clients and schedulers, in a virtual environment of their own, against real processes of ours."""
