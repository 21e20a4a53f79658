"""`/api`: jobs, submissions, the fleet, administration."""
