"""Status API at `/api`: jobs, submissions, the fleet, administration."""
