"""A request becomes a job: its corpus becomes items and chunks."""
