"""Celery worker: app, task, message transport, heartbeat, and `run_chunk`, which reads, encodes and commits."""
