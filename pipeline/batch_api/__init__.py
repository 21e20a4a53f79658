"""OpenAI's batch requests: files become jobs, and their ends files."""
