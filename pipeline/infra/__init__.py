"""Infrastructure of every process: settings, logs, metrics, HTTP, storage, leases."""
