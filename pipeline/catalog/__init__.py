"""Catalogue of models and vector spaces, and API keys."""
