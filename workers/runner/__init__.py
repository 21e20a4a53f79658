"""The worker: Celery's app and tasks, and `run_chunk`, which claims, reads, encodes and commits."""
