"""Worker and engine: the processes that take messages or run models on a GPU.

runner/         the worker: Celery app and its one task, transport and validation of messages, heartbeat, a server that
                forks children, and run_chunk, the core: claim → read → encode → commit
encoders/       a model on its device: checks and proof before it is added, loading, tokenisation, batching, a cache
                only budget, devices, local, library, packed, proof, reading and unpadded import torch
upstream/       client of an upstream as encoder: HTTP, rate limiter and circuit breaker (Lua), state, attempts, probe
engine/         the encoder behind HTTP for the api: a fair queue, batches across requests, a parent that replaces it
watchdog        state that a chunk's batches share with the renewal of its lease
instrumentation metrics and logs of a child process
oneshot         a model in a separate process, for callers that never import torch
"""
