"""The catalogue: models and their vector spaces, and keys to the api."""
