"""The processes that take messages and touch a GPU.

runner/         the worker: Celery's app and its one task, transport of messages and what is believed of one, heartbeat,
                and run_chunk: claim → read → encode → commit, the heart
encoders/       a model on its device: layout and proof before it is added, library and reading, batching, a cache
                local, library, reading and proof are the only imports of torch
upstream/       a gateway in an encoder's place: client, rate limiter and circuit breaker (Lua), state, attempts, probe
engine/         the encoder behind HTTP for the api: a fair queue, batches across requests, a parent that replaces it
watchdog        what a chunk's batches and the renewal of its lease tell each other; instrumentation: what is counted
oneshot         a model in a process of its own, for doors that never import torch
"""
