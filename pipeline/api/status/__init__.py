"""Status API at `/api`: jobs, submissions, workers, models, usage and keys."""
