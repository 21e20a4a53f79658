"""Benchmark of the encoder on one GPU, in minutes and without a network: `make bench-gpu`.

The encoder in bfloat16 is compared with `SentenceTransformer.encode` in three precisions, on models of two sizes and
texts of four kinds; then whole jobs run into Postgres and into Parquet. Models have random weights, with which they
are as fast as trained ones. The most telling rows come first, and each is printed when it is measured.

The encoder needs torch, sentence-transformers, transformers, tokenizers, safetensors, numpy, psutil, structlog and
pydantic, with what these need. The jobs need all of vectormill with its extra `embedded`; or, in place of the extra,
servers at VECTORMILL_DATABASE_URL, where they make a database of their own and drop it, and at VECTORMILL_REDIS_URL.
Where something is missing, the row of the jobs names it.

The operations of a token are 2 × the weights without embeddings. Those of attention itself are left out: at 512 tokens
they are 8 % more in the large model and 22 % more in the small one.

models        the two models, and their tokeniser
texts         the kinds of texts
embedding     a row: rates and vectors of both libraries
pipeline      whole jobs
table         rows and their time
"""
