"""Inference engine for the api: a fair queue, batches across requests, and a parent that replaces a dead server."""
