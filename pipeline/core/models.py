"""Models: a catalogue entry, and where one behind a gateway is."""

from collections.abc import Sequence
from dataclasses import dataclass

#: Of one request, by OpenAI's own API.
MOST_INPUTS = 2_048


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """Where a model of kind gateway is."""

    #: Of the API, to which `/embeddings` is added.
    url: str
    #: What requests call the model.
    model: str
    #: What replies call it, where that is another name.
    reply_model: str | None
    #: Names the variable with the key; `None`: it asks for none.
    key_env: str | None
    #: Whether it answers base64.
    base64: bool
    #: The most inputs, and about the most tokens, of one request.
    request_inputs: int
    request_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A catalogue entry, as the encoder and the planner need it."""

    name: str
    slug: str
    #: Folder of the weights on a worker, or `None` for a hub id.
    path: str | None
    hub_id: str | None
    revision: str | None
    #: How a bare transformer's token vectors become one; `None`: the folder says.
    pooling: str | None = None
    #: SHA-256 over the files that decide a vector, and over the pooling.
    weights_sha256: str
    weights_bytes: int
    dimensions: int
    #: Longest text the model reads, special tokens included; `None` without bound.
    max_item_tokens: int | None
    document_prompt: str
    query_prompt: str
    #: Whether vectors have length 1.
    normalised: bool
    #: The canary text's vector, little-endian float32.
    canary: bytes
    #: Measured on one slot.
    tokens_per_second: float
    #: Sizes to which its vectors may be shortened.
    matryoshka: Sequence[int] = ()
    #: `None`: local weights.
    upstream: Upstream | None = None
