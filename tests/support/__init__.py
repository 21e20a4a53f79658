"""Helpers of several kinds of tests: models, jobs, messages, lines that break, servers that misbehave."""
