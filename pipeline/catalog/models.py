"""Catalogue of models, and of the vector spaces that jobs write into."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from sqlalchemy import Connection, RowMapping

from pipeline.core.errors import ModelError, UnknownModel, UserError
from pipeline.core.models import Model, Upstream
from pipeline.db import models, workers, workspaces

DEFAULT_WORKSPACE = "default"
#: Suffixes of files that decide a vector: weights, tokenisers and configuration.
_DECISIVE = (".safetensors", ".json", ".txt", ".model")
#: Suffixes of weights in formats that can run code when they are loaded.
_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def workspace_id(connection: Connection, name: str = DEFAULT_WORKSPACE) -> int:
    """Return the id of a workspace.

    Raises:
        UserError: there is none of this name.
    """
    found = workspaces.id_of(connection, name)
    if found is None:
        raise UserError(f'no workspace "{name}".')
    return found


def find_row(connection: Connection, workspace: int, name: str | None) -> RowMapping:
    """Return the catalogue's row of a model by name or alias, if a workspace may use it. `None`: the only one that it
    may use.

    Raises:
        UnknownModel: not in the catalogue, or not enabled for the workspace; the message doesn't tell which.
        UserError: none is named, and there are several.
    """
    row = models.find(connection, workspace, name) if name is not None else None
    if row is not None:
        return row
    known = [model["name"] for model in models.of_workspace(connection, workspace)]
    if name is None and len(known) == 1:
        return find_row(connection, workspace, known[0])
    if name is None and known:
        raise UserError(f"name one of {', '.join(known)}.", field="model")
    told = "there is no model yet" if name is None else f'no model "{name}"'
    raise UnknownModel(
        f"{told}; " + (f"available: {', '.join(known)}." if known else "add one with vectormill models add.")
    )


def find_model(connection: Connection, workspace: int, name: str | None) -> Model:
    """Return a model by name or alias, if a workspace may use it; `None`: the only one. Raises as `find_row`."""
    return as_model(find_row(connection, workspace, name))


def as_model(row: RowMapping) -> Model:
    """Return a catalogue row as a `Model`."""
    columns = {field: row[field] for field in Model.__dataclass_fields__ if field != "upstream"}
    return Model(**columns, upstream=as_upstream(row))


def as_upstream(row: RowMapping) -> Upstream | None:
    """Return the upstream of a catalogue row; None if the model is local."""
    if row["kind"] != "gateway":
        return None
    return Upstream(
        url=row["gateway_url"],
        model=row["upstream_model"],
        **{name: row[name] for name in ("reply_model", "key_env", "base64", "request_inputs", "request_tokens")},
    )


def slug_of(name: str) -> str:
    """Return a model's name as part of a queue's name: lower case letters, digits, dots and dashes.

    Raises:
        UserError: the name has no ASCII letter or digit, or more than 200 characters.
    """
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")
    if not slug or len(name) > 200:
        raise UserError(f'"{name}" can\'t name a model: use letters, digits, dots, dashes and slashes, at most 200.')
    return slug


def gateway_url(given: str) -> str:
    """Return the normalised address of an OpenAI-compatible API, to which `/embeddings` is added.

    Raises:
        UserError: it isn't one, or holds a user name or password.
    """
    try:
        parts = urlsplit(given)
        plain = given.isascii() and given.isprintable() and " " not in given and not parts.fragment
        is_one = plain and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # an unclosed bracket, an invalid port
        is_one = False
    if not is_one:
        raise UserError(
            "write the API's address, such as https://api.openai.com/v1.", field="gateway", given=f'"{given}"'
        )
    if parts.username or parts.password:
        raise UserError(
            "addresses are stored, so leave the password out, and name the variable that holds the key.",
            field="gateway",
        )
    path = parts.path.rstrip("/").removesuffix("/embeddings") or "/v1"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def portable(model: Model) -> dict[str, Any]:
    """Return a model as JSON values for another process."""
    return {**asdict(model), "canary": model.canary.hex()}


def from_portable(given: Mapping[str, Any]) -> Model:
    """Return the model that another process has sent by `portable`."""
    upstream = given["upstream"] and Upstream(**given["upstream"])
    return Model(**{**given, "canary": bytes.fromhex(given["canary"]), "upstream": upstream})


def weights_sha256(folder: Path, pooling: str | None = None) -> str:
    """Return the SHA-256 over the files in `folder` that decide a vector, by relative path and content, and over the
    pooling that a bare transformer was given.

    Raises:
        ModelError: the folder has no safetensors weights, a part of the model has only others, or modules.json is
            malformed.
    """
    _check_parts(folder)
    files = sorted(path for path in _files(folder) if path.suffix in _DECISIVE)
    if not any(path.suffix == ".safetensors" for path in files):
        unsafe = next((path.name for path in _files(folder) if path.suffix in _UNSAFE), None)
        hint = f" ({unsafe} could run code when loaded)" if unsafe else ""
        raise ModelError(f"{folder}: no .safetensors weights; vectormill loads no other format{hint}.")
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    if pooling:
        whole.update(f"pooling {pooling}\n".encode())
    return whole.hexdigest()


def _check_parts(folder: Path) -> None:
    """Check that no part of a model would be loaded from another format than safetensors."""
    try:
        listed = json.loads((folder / "modules.json").read_bytes())
        parts = [folder / module["path"] for module in listed]
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}: modules.json isn't a list of modules with their paths.") from error
    for part in parts:
        weights = [path for path in part.glob("*") if path.suffix in (".safetensors", *_UNSAFE)]
        if weights and not any(path.suffix == ".safetensors" for path in weights):
            named = weights[0].relative_to(folder)
            raise ModelError(f"{folder}: {named} isn't .safetensors; vectormill loads no other format.")


def weights_bytes(folder: Path) -> int:
    """Return the size of the weights in `folder`, in bytes."""
    return sum(path.stat().st_size for path in _files(folder) if path.suffix == ".safetensors")


def _files(folder: Path) -> Iterator[Path]:
    return (
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def add_model(connection: Connection, name: str, description: Mapping[str, Any], aliases: Sequence[str] = ()) -> None:
    """Add a local model by a worker's description of it (`workers.oneshot describe`), and enable it for the default
    workspace.

    Raises:
        UserError: the name or an alias is taken.
    """
    columns = {column: value for column, value in description.items() if column not in ("notes", "device")}
    _add(connection, name, {"kind": "local", **columns}, aliases)
    if device := description.get("device"):  # on which it was measured, in float32
        models.record_rate(connection, name, device, "float32", description["tokens_per_second"])


def add_gateway(
    connection: Connection, name: str, upstream: Upstream, description: Mapping[str, Any], aliases: Sequence[str] = ()
) -> None:
    """Add a model that an upstream serves, described by `workers.oneshot gateway`, and enable it for the default
    workspace.

    Raises:
        UserError: the name or an alias is taken.
    """
    # A provider's weights can't be hashed, so address, model id and canary vector stand for them: a provider that
    # changes the weights changes the vector space.
    whole = "\n".join((upstream.url, upstream.model, description["canary"]))
    values = {
        "kind": "gateway",
        "gateway_url": upstream.url,
        "upstream_model": upstream.model,
        **{name: getattr(upstream, name) for name in ("key_env", "request_inputs", "request_tokens")},
        "weights_sha256": hashlib.sha256(whole.encode()).hexdigest(),
        "weights_bytes": 0,
        **description,
    }
    _add(connection, name, values, aliases)


def check_names(connection: Connection, name: str, aliases: Sequence[str]) -> None:
    """Check that no other model, and no collection, has this name or one of these aliases.

    Raises:
        UserError: another one has.
    """
    if used := models.name_in_use(connection, name, [name, *aliases]):
        raise UserError(f'another model, or a collection, is called "{used}", or has it as an alias.')


def _add(connection: Connection, name: str, values: Mapping[str, Any], aliases: Sequence[str]) -> None:
    check_names(connection, name, aliases)
    columns = {"name": name, "slug": slug_of(name), "aliases": list(aliases), **values}
    if not models.add(connection, {**columns, "canary": bytes.fromhex(values["canary"])}):
        raise UserError(f'model "{name}", or one with the same queue name, exists already; remove it first.')
    workers.take_up_model(connection, name)  # workers may have dropped another one of this name
    models.enable(connection, workspace_id(connection), name)


def vector_space_of(
    connection: Connection, model: Model, *, dimensions: int | None, max_item_tokens: int | None
) -> int:
    """Return the id of the vector space that a job with these options writes into.

    Raises:
        UserError: the model can't give these dimensions, or doesn't read that many tokens.
    """
    sizes = sorted({*model.matryoshka, model.dimensions})
    if dimensions is not None and dimensions not in sizes:
        raise UserError(
            f"{model.name} supports {' or '.join(map(str, sizes))} dimensions.",
            field="dimensions",
            given=str(dimensions),
        )
    if max_item_tokens is not None and model.max_item_tokens is not None and max_item_tokens > model.max_item_tokens:
        raise UserError(
            f"{model.name} reads at most {model.max_item_tokens} tokens.",
            field="max_item_tokens",
            given=str(max_item_tokens),
        )
    space = {
        "weights": model.weights_sha256,
        "dimensions": dimensions or model.dimensions,
        "document_prompt": model.document_prompt,
        "max_item_tokens": max_item_tokens or model.max_item_tokens,
        # Vectors shortened to fewer dimensions are normalised to length one again.
        "normalised": model.normalised or dimensions not in (None, model.dimensions),
    }
    fingerprint = hashlib.sha256(json.dumps(space, sort_keys=True).encode()).hexdigest()
    return models.vector_space(connection, {"fingerprint": fingerprint, **space})
