"""Offline models of tests and benchmarks: one that a wheel brings, and a small one made from it once per checkout."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.cli.bootstrap import bundled_model_folder

_CHECKOUT = Path(__file__).resolve().parents[2]
_MODELS = _CHECKOUT / ".vectormill" / "test-models"

# Makes a static model from a transformer: its word piece embeddings, reduced to some principal components and
# weighted by the rarity of the piece.
_DISTIL = """
import sys
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
source, target, dimensions = sys.argv[1:]
teacher = SentenceTransformer(source, device="cpu")
tokenizer = teacher.tokenizer.backend_tokenizer
vectors = teacher[0].auto_model.get_input_embeddings().weight.detach()
vectors = vectors - vectors.mean(0)
components = torch.linalg.eigh(vectors.T @ vectors).eigenvectors.flip(1)[:, : int(dimensions)]
weights = (vectors @ components) * torch.log(1.0 + torch.arange(len(vectors)))[:, None]
static = StaticEmbedding(tokenizer, embedding_weights=weights.numpy())
SentenceTransformer(modules=[static], device="cpu").save(target)
"""


def make_static_model(source: Path, target: Path, dimensions: int = 256) -> None:
    """Make a model of static embeddings from a transformer; it loads and embeds in no time."""
    command = [sys.executable, "-c", _DISTIL, str(source), str(target), str(dimensions)]
    done = subprocess.run(command, capture_output=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def bundled_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2."""
    folder = bundled_model_folder()
    assert folder, "the extra `embedded` brings it"
    return folder


def static_folder(dimensions: int = 256) -> Path:
    """Return the folder of a model of static embeddings; it loads and embeds in no time."""
    folder = _MODELS / f"static-{dimensions}"
    with _making() as within:
        if not folder.exists():
            made = within / "made"
            make_static_model(bundled_folder(), made, dimensions)
            made.rename(folder)
    return folder


@contextmanager
def _making() -> Iterator[Path]:
    """Yield a temporary folder under a file lock, so that one process makes what all of them need."""
    _MODELS.mkdir(parents=True, exist_ok=True)
    with (_MODELS / "lock").open("w") as lock, TemporaryDirectory(dir=_MODELS) as within:
        flock(lock, LOCK_EX)
        yield Path(within)


def described(name: str, folder: Path) -> dict[str, Any]:
    """Return the catalogue's description of a model, cached until its folder changes."""
    file = _MODELS / f"{name}.json"
    with _making() as within:
        kept: dict[str, Any] = json.loads(file.read_bytes()) if file.exists() else {"path": None}
        if kept["path"] == str(folder) and "device" in kept and folder.stat().st_mtime < file.stat().st_mtime:
            return kept
        command = [sys.executable, "-m", "workers.oneshot", "describe", str(folder)]
        done = subprocess.run(command, capture_output=True, check=False, cwd=_CHECKOUT, env=dict(os.environ))
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        found: dict[str, Any] = json.loads(done.stdout)
        made = within / "description"
        made.write_bytes(done.stdout)
        made.replace(file)
    return found
