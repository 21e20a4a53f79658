"""Walk over all operations of an OpenAPI description, with a key that must see nothing of another workspace."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

#: Operations that take a body, name nothing in their path, and create something of the caller's own. Tests of their own
#: cover the names that their bodies may hold.
MAKING = {
    ("post", "/v1/embeddings"),
    ("post", "/v1/files"),
    ("post", "/v1/batches"),
    ("post", "/api/jobs"),
    ("post", "/api/collections"),
    ("post", "/api/forgets"),
    ("post", "/api/forgets/allow"),
    ("post", "/api/keys"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Theirs:
    """Names and secrets of another workspace."""

    #: Path parameter → names of theirs that it can hold.
    named: Mapping[str, Sequence[str]]
    workspace: str
    #: Words that no answer may hold unless they were sent.
    secrets: Sequence[str]


def operations(description: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield `(method, path, operation)` for each operation."""
    for path, found in description["paths"].items():
        for method, operation in found.items():
            yield method, path, operation


def leaks(description: Mapping[str, Any], line: httpx.Client, theirs: Theirs) -> tuple[list[str], int]:
    """Return the leaks to `line`, one sentence each, and the number of operations walked, which is all of them."""
    found: list[str] = []
    walked = 0
    for method, path, operation in operations(description):
        walked += 1
        holes = re.findall("{(.*?)}", path)
        if unknown := [hole for hole in holes if hole not in theirs.named]:
            found.append(f"{method} {path}: whose is {unknown[0]}?")
        elif holes:
            found += _named(line, method, path, holes[0], theirs, _body(operation))
        elif method == "get":
            found += _listed(line, path, operation, theirs)
        elif (method, path) not in MAKING:
            found.append(f"{method} {path}: what may it name?")
    return found, walked


def _body(operation: Mapping[str, Any]) -> Any:
    """Return the example of an operation's body; without one, a body that changes a priority."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    return content.get("schema", {}).get("examples", [{"priority": 1}])[0]


def _named(line: httpx.Client, method: str, path: str, hole: str, theirs: Theirs, body: Any) -> Iterator[str]:
    """Yield leaks of an operation that takes a name.

    A name of theirs must give a 404, or a 403 where only an admin's key may ask, in the same words as a name that never
    existed.
    """
    for name in theirs.named[hole]:
        reply, unknown = (
            line.request(method, path.replace(f"{{{hole}}}", asked), json=body) for asked in (name, "never")
        )
        if reply.status_code not in (404, 403):
            yield f"{method} {path} of {name}: {reply.status_code}"
        elif (reply.status_code, _told(reply)) != (unknown.status_code, _told(unknown).replace("never", name)):
            yield f"{method} {path} of {name}: {_told(reply)}"
        elif any(secret in reply.text.replace(name, "") for secret in theirs.secrets):
            yield f"{method} {path} of {name}: {reply.text}"


def _told(reply: httpx.Response) -> str:
    body = reply.json()
    return str(body["error"]["message"] if "error" in body else body["detail"])


def _listed(line: httpx.Client, path: str, operation: Mapping[str, Any], theirs: Theirs) -> Iterator[str]:
    reply = line.get(path)
    if reply.status_code not in (200, 403):
        yield f"get {path}: {reply.status_code}"
    if shown := [secret for secret in theirs.secrets if secret in reply.text]:
        yield f"get {path} shows {shown[0]}"
    if any(one["name"] == "workspace" for one in operation.get("parameters", ())):
        narrowed = line.get(path, params={"workspace": theirs.workspace})
        if narrowed.status_code != 404:
            yield f"get {path} of the workspace {theirs.workspace}: {narrowed.status_code}"
