"""Encoders of models on this machine: loading, proof, tokenisation, batching and a cache."""
