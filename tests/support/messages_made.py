"""Messages as Celery writes them to Redis, and as others might."""

import base64
import json
import pickle
from pathlib import Path
from typing import Any
from uuid import uuid4

MARK = "the text of a document"
QUEUE = "embed.static"
_TASK = "vectormill.run_chunk"
_MORE: dict[str, Any] = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def message(body: Any = None, **fields: Any) -> dict[str, Any]:
    """Return a call of our task for a chunk that doesn't exist. Fields replace its parts, or leave them out (`...`)."""
    body = [[str(uuid4()), 1], {}, _MORE] if body is None else body
    whole = {
        "body": body if isinstance(body, str) else base64.b64encode(json.dumps(body).encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": head(argsrepr=MARK),
        "properties": {
            "body_encoding": "base64",
            "delivery_tag": str(uuid4()),
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
            "priority": 0,
        },
        **fields,
    }
    return {name: part for name, part in whole.items() if part is not ...}


def head(**fields: Any) -> dict[str, Any]:
    """Return the headers of a call of our task."""
    return {"lang": "py", "task": _TASK, "id": str(uuid4()), **fields}


def command(method: Any, arguments: Any = None, **fields: Any) -> dict[str, Any]:
    """Return a broadcast command."""
    return message({"method": method, "arguments": arguments or {}, **fields}, headers={"clock": 1, "expires": 0})


class Evil:
    """Object that creates a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.touch, (self.place,)


def no_calls(place: Path) -> dict[str, tuple[Any, str]]:
    """Return messages that aren't a call of our task, each with the reason that its refusal must give."""
    pickled = base64.b64encode(pickle.dumps([[Evil(place), 1], {}, _MORE])).decode()
    nested = base64.b64encode(("[" * 2_000).encode()).decode()
    job = str(uuid4())
    celerys, plain, two = "isn't a message of Celery's", "isn't plain JSON", "with two arguments"
    packed, text = "isn't JSON in base64", "a text of at most"
    return {
        "a number": (7, celerys),
        "a list": ([1, 2], celerys),
        "empty": ({}, celerys),
        "no headers": (message(headers=...), celerys),
        "headers of another type": (message(headers=[MARK]), celerys),
        "pickle": (message(pickled, **{"content-type": "application/x-python-serialize"}), plain),
        "pickle that says it is JSON": (message(pickled), packed),
        "packed": (message(headers=head(compression="application/x-gzip")), plain),
        "another task": (message(headers=head(task="celery.backend_cleanup")), "another task"),
        "a task of a strange type": (message(headers=head(task=[MARK])), "another task"),
        "no id": (message(headers={"task": _TASK}), "its task isn't a UUID"),
        "an id of a strange type": (message(headers=head(id={"a": 1})), "its task isn't a UUID"),
        "no body": (message(""), packed),
        "a body of another type": ({**message(), "body": 7}, text),
        "body isn't base64": (message("§$%"), packed),
        "nested": (message(nested), packed),
        "too large": (message("A" * 2_000_000), text),
        "no call": (message({"method": "shutdown"}), two),
        "no arguments": (message([[], {}, _MORE]), two),
        "too many": (message([[job, 1, 2], {}, _MORE]), two),
        "by name": (message([[job, 1], {"chunk_id": 2}, _MORE]), "more than one call"),
        "a call after it": (message([[job, 1], {}, {**_MORE, "chain": [{"task": _TASK}]}]), "more than one call"),
        "job isn't a UUID": (message([[MARK, 1], {}, _MORE]), "its job isn't a UUID"),
        "chunk isn't a number": (message([[job, "1"], {}, _MORE]), "its chunk isn't"),
        "chunk is a truth": (message([[job, True], {}, _MORE]), "its chunk isn't"),
        "chunk is too high": (message([[job, 2**70], {}, _MORE]), "its chunk isn't"),
    }


def no_commands() -> dict[str, tuple[Any, str]]:
    """Return messages that aren't a command that workers do, each with the reason that its refusal must give."""
    not_done, no_model = "that workers don't do", "its queue isn't a model's"
    refused = "shutdown pool_grow pool_shrink pool_restart autoscale time_limit rate_limit revoke terminate hello"
    return {
        **{method: (command(method), not_done) for method in refused.split()},
        "a number": (7, "isn't a message of Celery's"),
        "a call of our task": (message(), "isn't a command"),
        "no method": (command(None), "isn't a command"),
        "a method of a strange type": (command(["ping"]), "isn't a command"),
        "a queue of anybody's": (command("add_consumer", {"queue": "theirs"}), no_model),
        "a mailbox": (command("add_consumer", {"queue": "embed.a/b.celery.pidbox"}), no_model),
        "no queue": (command("cancel_consumer"), no_model),
        "arguments of a strange type": (command("add_consumer", ["embed.static"]), no_model),
        "a destination of a strange type": (command("ping", destination="me"), "its destination"),
        "a pattern": (command("ping", pattern="(a+)+$", matcher="pcre"), "its destination is a pattern"),
        "a ticket of a strange type": (command("ping", ticket=[1]), "its ticket"),
        "a reply to nowhere": (command("ping", reply_to=[MARK]), "its reply address"),
        "a reply to elsewhere": (command("ping", reply_to={"exchange": "a", "routing_key": "b"}), "its reply address"),
    }
