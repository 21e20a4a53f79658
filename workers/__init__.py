"""The processes that take messages and touch a GPU.

app, tasks      the Celery app, its signals and its one task
messages        how they are read from Redis; believed: what is believed of one (pure)
run_chunk       claim → read → encode → commit: the heart
counting        what a child counts on the way
batching        which items go through the model together (pure)
encoder         the model on its device; library: as sentence-transformers loads it; reading: texts to ids and features.
                With proof the only imports of torch
layout, proof   what is refused before a model is loaded; whether it is computed as by its library, before it is added
gateway         a client of OpenAI-compatible APIs, in the encoder's place
connection      HTTP to a gateway; inquiry: what doors ask of one
throttle        how fast the fleet may send, in Redis; memory: what a child has learnt of a gateway
requests        requests to a gateway on their way; attempts: as they are written down
residents       the models a child keeps loaded
engine, serving the encoder behind HTTP for the api; batches across its requests
succession      a server that is replaced at once when something kills it
weights         where they are on this machine
presence        how a worker shows itself, and what its parent does when a child dies
oneshot         a model in a process of its own, for doors that never import torch
"""
