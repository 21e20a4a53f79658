"""The dispatcher. Its leader schedules pending chunks, sweeps expired leases, ends jobs, and runs background tasks."""
