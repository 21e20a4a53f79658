"""OpenAI-compatible API at `/v1`: embeddings, models, files, batches."""
