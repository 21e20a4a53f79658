"""The engine, which embeds for the api: a queue that is fair, batches across requests, a parent that replaces it."""
