"""Models that can't be loaded, for any reason."""

import pytest

from pipeline.core.errors import ModelError
from pipeline.core.models import Model
from pipeline.core.options import Precision
from workers.encoders.local import LocalEncoder
from workers.encoders.model_cache import Loader, ModelCache

MODEL = Model(
    name="small",
    slug="small",
    path="/models/small",
    hub_id=None,
    revision=None,
    weights_sha256="",
    weights_bytes=1,
    dimensions=4,
    max_item_tokens=256,
    document_prompt="",
    query_prompt="",
    normalised=True,
    canary=b"",
    tokens_per_second=1.0,
)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), ImportError("no libcudnn"), MemoryError()])
def test_what_loading_raises_is_told_as_the_models(error: Exception) -> None:
    class Broken(Loader):
        def weights_bytes(self, model: Model, precision: Precision = Precision.AUTO) -> int:
            return 0

        def load(self, model: Model, precision: Precision = Precision.AUTO) -> LocalEncoder:
            raise error

    with pytest.raises(ModelError, match=f"can't be loaded here .{type(error).__name__}"):
        ModelCache(Broken("cpu", None, "auto"), 2**30).get(MODEL)
