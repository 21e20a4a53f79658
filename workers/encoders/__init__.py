"""Encoders: a model on this machine, read, proven, batched and kept."""
