"""A small model for tests and benchmarks with many documents, made offline."""

import os
import subprocess
import sys
from pathlib import Path

# A static model from a transformer: each word piece's vector by the teacher, its 256 principal components, weighted
# by how rare the piece is.
_DISTIL = """
import sys
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
source, target = sys.argv[1:]
teacher = SentenceTransformer(source, device="cpu").eval()
tokenizer = teacher.tokenizer.backend_tokenizer
pieces = torch.arange(tokenizer.get_vocab_size())
start, end = (torch.full_like(pieces, tokenizer.token_to_id(mark)) for mark in ("[CLS]", "[SEP]"))
with torch.inference_mode():
    vectors = torch.cat([
        teacher({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["sentence_embedding"]
        for ids in torch.stack([start, pieces, end], 1).split(1024)
    ])
    vectors = vectors - vectors.mean(0)
    components = torch.linalg.svd(vectors, full_matrices=False)[2][:256]
    weights = (vectors @ components.T) * torch.log(1.0 + pieces)[:, None]
static = StaticEmbedding(tokenizer, embedding_weights=weights.numpy())
SentenceTransformer(modules=[static], device="cpu").save(target)
"""


def make_static_model(source: Path, target: Path) -> None:
    """Make a model of static embeddings with 256 dimensions from a transformer; it loads and embeds in no time."""
    command = [sys.executable, "-c", _DISTIL, str(source), str(target)]
    done = subprocess.run(command, capture_output=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr.decode()[-2000:]
