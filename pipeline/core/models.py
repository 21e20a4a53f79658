"""Models: catalogue entries, and the upstreams of gateway models."""

from collections.abc import Sequence
from dataclasses import dataclass

#: Most inputs of one request, by OpenAI's own API.
MOST_INPUTS = 2_048


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """Upstream of a model of kind gateway: its address, names and limits."""

    #: Base URL of the API, to which `/embeddings` is added.
    url: str
    #: Name of the model in requests.
    model: str
    #: Name of the model in replies, if it differs.
    reply_model: str | None
    #: Environment variable that holds the API key; `None`: no key is needed.
    key_env: str | None
    #: True if the API can answer in base64.
    base64: bool
    #: The most inputs, and about the most tokens, of one request.
    request_inputs: int
    request_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Catalogue entry, as the encoder and the planner need it."""

    name: str
    slug: str
    #: Folder of the weights on a worker; `None` for a hub id.
    path: str | None
    hub_id: str | None
    revision: str | None
    #: Pooling of a bare transformer's token vectors into one; `None`: the model's folder says.
    pooling: str | None = None
    #: SHA-256 over the files that determine a vector, and over the pooling.
    weights_sha256: str
    weights_bytes: int
    dimensions: int
    #: Longest text that the model reads, special tokens included; `None`: no limit.
    max_item_tokens: int | None
    document_prompt: str
    query_prompt: str
    #: True if vectors have length 1.
    normalised: bool
    #: Vector of the canary text, little-endian float32.
    canary: bytes
    #: Throughput as measured on one slot.
    tokens_per_second: float
    #: Sizes to which its vectors may be shortened.
    matryoshka: Sequence[int] = ()
    #: Upstream of a model of kind gateway; `None`: local weights.
    upstream: Upstream | None = None
