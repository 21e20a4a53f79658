"""The weights of a model on this machine."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.catalog.models import weights_sha256
from pipeline.core.errors import ModelError
from pipeline.core.models import Model

#: What is fetched from the hub: weights that can't run code, and what says how to use them.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A folder, or a hub id pinned to a commit."""

    path: str | None = None
    hub_id: str | None = None
    revision: str | None = None

    def folder(self) -> Path:
        """The folder that holds the weights; those of the hub are fetched once and kept in its cache.

        Raises:
            ModelError: it isn't there, or can't be fetched.
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


def verified_folder(model: Model) -> Path:
    """The folder of a model's weights, which are those that were added to the catalogue.

    Raises:
        ModelError: they aren't there, or others are.
    """
    folder = Source(path=model.path, hub_id=model.hub_id, revision=model.revision).folder()
    if weights_sha256(folder, model.pooling) != model.weights_sha256:
        raise ModelError(f"{model.name}: the files in {folder} are not those that were added to the catalogue")
    return folder
