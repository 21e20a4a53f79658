"""Weights of a model on this machine."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from pipeline.catalog.models import weights_sha256
from pipeline.core.errors import ModelError
from pipeline.core.models import Model

#: Files that are fetched from the hub: weights in a format that can't run code, and the files on how to use them.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsSource:
    """Source of weights: a folder, or a hub id pinned to a commit."""

    path: str | None = None
    hub_id: str | None = None
    revision: str | None = None

    def folder(self) -> Path:
        """Return the folder that holds the weights. Weights of the hub are fetched once and kept in its cache.

        Raises:
            ModelError: the folder doesn't exist, or can't be fetched.
        """
        if self.path is not None:
            folder = Path(self.path)
            if not folder.is_dir():
                raise ModelError(f"no folder {folder} on this machine")
            return folder
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(str(self.hub_id), revision=self.revision, allow_patterns=_WANTED))
        except Exception as error:  # the library raises what its HTTP client and the disk raise
            raise ModelError(f"{self.hub_id} can't be fetched from the hub ({type(error).__name__})") from error


def weights_elements(folder: Path) -> int:
    """Return the number of a model's weights, read from the heads of its files.

    Raises:
        ModelError: a file of weights is damaged.
    """
    from safetensors import SafetensorError, safe_open  # which Flower, that imports this module, may not have

    elements = 0
    for path in folder.rglob("*.safetensors"):
        try:
            with safe_open(path, framework="numpy") as weights:
                elements += sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} isn't safetensors.") from error
    return elements


def folder_of(model: Model) -> Path:
    """Return the folder of a local model's weights. Raises as `WeightsSource.folder`."""
    return WeightsSource(path=model.path, hub_id=model.hub_id, revision=model.revision).folder()


def verified_folder(model: Model) -> Path:
    """Return the folder of a model's weights, after comparing their checksum with the catalogue's.

    Raises:
        ModelError: the folder doesn't exist, or holds other weights.
    """
    folder = folder_of(model)
    if weights_sha256(folder, model.pooling) != model.weights_sha256:
        raise ModelError(f"{model.name}: the files in {folder} are not those that were added to the catalogue")
    return folder
