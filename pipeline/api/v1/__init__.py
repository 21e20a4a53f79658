"""`/v1`, as OpenAI's API is: embeddings, models, files, batches."""
