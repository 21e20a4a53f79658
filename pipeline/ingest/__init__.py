"""Ingestion: a request becomes a job, and its corpus becomes items and chunks."""
