"""Backend of commands that calls an api over HTTP."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

import httpx2 as httpx
from pydantic import BaseModel

from pipeline.catalog.keys import NewKey
from pipeline.catalog.models import DEFAULT_WORKSPACE
from pipeline.core.collection_status import CollectionList, CollectionStatus, Comparison, SyncList, SyncStatus
from pipeline.core.errors import CollectionBusy, ServiceUnreachable, UserError, VectormillError
from pipeline.core.forget_status import ForgetStatus
from pipeline.core.job_status import JobStatus, Receipt
from pipeline.core.jobs import JobState
from pipeline.core.options import JobOptions
from pipeline.ingest.request import JobRequest
from pipeline.ingest.submission import Submitted
from pipeline.jobs.search import Hit, Hits, SearchRequest
from pipeline.jobs.status import Namesake

_LIST_PAGE = 100
_CONNECT_SECONDS = 5.0
#: Timeout of reads and writes. An upload is answered once all its items are in the database, a verification once they
#: are counted.
_MOST_SECONDS = 3_600.0
#: Time between two tries to begin a sync while another one goes on.
_BUSY_SECONDS = 2.0


class _Conflict(UserError):
    """Another sync of the collection goes on."""


class ApiBackend:
    """Backend that calls an api, with the rights of an API key."""

    def __init__(self, url: str, key: str, workspace: str) -> None:
        self._scope = {} if workspace == DEFAULT_WORKSPACE else {"workspace": workspace}
        self._url = url.rstrip("/")
        self._client = httpx.Client(
            base_url=f"{self._url}/api",
            headers={"authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(_MOST_SECONDS, connect=_CONNECT_SECONDS),
        )

    def close(self) -> None:
        """Close the connections to the api."""
        self._client.close()

    def jobs(self, states: Sequence[JobState], limit: int) -> list[JobStatus]:
        """Return the statuses of the newest jobs, newest first, following the api's pagination."""
        rows: list[JobStatus] = []
        after: dict[str, str] = {}
        while len(rows) < limit:
            wanted = {"state": [state.value for state in states], "limit": min(_LIST_PAGE, limit - len(rows)), **after}
            page = self._get("/jobs", **wanted)
            rows += map(JobStatus.model_validate, page["data"])
            if not page["has_more"]:
                break
            after = {"after": page["after"]}
        return rows

    def status(self, job: str) -> JobStatus:
        """Return a job's status."""
        return JobStatus.model_validate(self._get(_path(job)))

    def rejects(self, job: str, limit: int | None) -> list[dict[str, Any]]:
        """Return a job's rejects in index order. The stream is read only as far as `limit`."""
        with self._stream(_path(job, "rejects"), format="jsonl") as reply:
            return [json.loads(line) for line in islice(reply.iter_lines(), limit)]

    def reject_counts(self, job: str) -> dict[str, int]:
        """Return the number of a job's rejects by code."""
        counts: dict[str, int] = self._get(_path(job, "rejects"), limit=1)["counts"]
        return counts

    def receipt(self, job: str, *, verify: bool) -> Receipt:
        """Return a job's receipt, checked against its rows if `verify` is set."""
        return Receipt.model_validate(self._get(_path(job, "receipt"), verify=verify))

    def steer(self, job: str, verb: str) -> tuple[UUID, JobState]:
        """Apply `cancel`, `pause` or `resume` to a job. Return its id and state."""
        found = JobStatus.model_validate(self._post(_path(job, verb)))
        return found.id, found.state

    def prioritise(self, job: str, priority: int) -> UUID:
        """Change a job's priority. Return its id."""
        return UUID(self._post(_path(job, "priority"), json={"priority": priority})["id"])

    def retry(self, job: str) -> tuple[UUID, int]:
        """Reopen an ended job's chunks that can be retried. Return its id, and the number of chunks."""
        found = self._post(_path(job, "retry"))
        return UUID(found["job"]["id"]), found["reopened_chunks"]

    def results(self, job: str, to: Path) -> str:
        """Write a job's vectors to a file, which appears only when it is complete."""
        kind = to.suffix.removeprefix(".")
        if kind not in ("parquet", "jsonl"):
            raise UserError("give a file that ends in .parquet or .jsonl.", field="to", given=str(to))
        partial = to.with_name(f".{to.name}.partial")
        try:
            with self._stream(_path(job, "results"), format=kind) as reply, partial.open("wb") as file:
                for piece in reply.iter_bytes():
                    file.write(piece)
            partial.replace(to)
        except OSError as error:
            raise UserError(f"{error.strerror or error}.", field="to", given=str(to)) from error
        finally:
            partial.unlink(missing_ok=True)
        return f"Vectors written to {to}."

    def models(self, *, everything: bool) -> list[Mapping[str, Any]]:  # noqa: ARG002 - the key decides
        """Return the models that the key may use; with an admin's key, the whole catalogue."""
        rows: list[Mapping[str, Any]] = self._get("/models")["data"]
        return rows

    def collections(self) -> list[CollectionStatus]:
        """Return the states of the workspace's collections, by name."""
        return CollectionList.model_validate(self._get("/collections")).data

    def collection(self, name: str) -> CollectionStatus:
        """Return a collection's state."""
        return CollectionStatus.model_validate(self._get(_collection_path(name)))

    def history(self, name: str, limit: int) -> list[SyncStatus]:
        """Return a collection's newest syncs, newest first."""
        return SyncList.model_validate(self._get(_collection_path(name, "syncs"), limit=limit)).data

    def create_collection(
        self, name: str, model: str | None, options: JobOptions, expect_every: timedelta | None
    ) -> CollectionStatus:
        """Create an empty collection."""
        _refuse_into(options.into)
        wish = options.model_dump(mode="json", exclude_defaults=True) | {"name": name}
        if model is not None:
            wish["model"] = model
        if expect_every is not None:
            wish["expect_every_seconds"] = expect_every.total_seconds()
        return CollectionStatus.model_validate(self._post("/collections", json=wish))

    def drop_collection(self, name: str) -> None:
        """Drop a collection with its view, vectors and history."""
        self._send("DELETE", _collection_path(name), params=self._scope)

    def upgrade_collection(
        self,
        name: str,
        model: str,
        dimensions: int | None,
        into: str | None,
        output: str | None,
    ) -> CollectionStatus:
        """Begin a collection's next version, of another model."""
        _refuse_into(into)
        wish = {"model": model, "dimensions": dimensions, "output": output}
        return CollectionStatus.model_validate(self._post(_collection_path(name, "upgrade"), json=wish))

    def compact(self, name: str) -> None:
        """Let a collection's Parquet files be written anew as one full set."""
        self._post(_collection_path(name, "compact"))

    def abandon_upgrade(self, name: str) -> None:
        """Let a collection's next version go."""
        self._send("DELETE", _collection_path(name, "upgrade"), params=self._scope)

    def compare_versions(self, name: str) -> Comparison:
        """Compare a collection's next version with the current one."""
        return Comparison.model_validate(self._get(_collection_path(name, "comparison")))

    def swap(self, name: str, keep: timedelta | None) -> CollectionStatus:
        """Give readers a collection's next version, and keep the one before for `keep`, or for the default time."""
        wish = {} if keep is None else {"keep_seconds": keep.total_seconds()}
        return CollectionStatus.model_validate(self._post(_collection_path(name, "swap"), json=wish))

    def swap_back(self, name: str) -> CollectionStatus:
        """Undo a swap."""
        return CollectionStatus.model_validate(self._post(_collection_path(name, "swap-back")))

    def forget(self, keys: Iterable[str], collection: str | None) -> ForgetStatus:
        """Request that keys are forgotten; so many as one request may hold."""
        wish = {"keys": list(keys), "collection": collection}
        return ForgetStatus.model_validate(self._post("/forgets", json=wish))

    def forget_status(self, forget_id: UUID) -> ForgetStatus:
        """Return how far a request to forget keys is."""
        return ForgetStatus.model_validate(self._get(f"/forgets/{forget_id}"))

    def allow(self, keys: Iterable[str], collection: str | None) -> int:
        """Let forgotten keys come in again. Return how many of them were forgotten."""
        wish = {"keys": list(keys), "collection": collection}
        return int(self._post("/forgets/allow", json=wish)["allowed"])

    def search(self, wish: SearchRequest, *, job: str | None = None, collection: str | None = None) -> list[Hit]:
        """Return what is nearest to a query, which an engine embeds, in a job or a collection."""
        path = _path(job, "search") if job is not None else _collection_path(str(collection), "search")
        return Hits.model_validate(self._post(path, json=wish.model_dump(mode="json", exclude_defaults=True))).data

    def sync(
        self,
        collection: str,
        wish: BaseModel,
        files: Sequence[Path],
        idempotency_key: str | None,
        *,
        queue: bool,
        on_wait: Callable[[UUID], None],
    ) -> Submitted:
        """Sync a collection: upload files, or without files let the api read the sources that the request names.

        Raises:
            CollectionBusy: without `queue`, another sync goes on.
        """
        told = None
        while True:
            try:
                return self._submit(_collection_path(collection, "syncs"), wish, files, idempotency_key)
            except _Conflict:
                running = self.collection(collection).running
                if running and not queue:
                    raise CollectionBusy(collection, running) from None
                if running and running != told:
                    on_wait(running)
                    told = running
            time.sleep(_BUSY_SECONDS)

    def create_key(self, name: str, *, admin: bool, lives: timedelta | None) -> NewKey:
        """Create a key in the workspace of the api key, which must be an admin's."""
        wish: dict[str, Any] = {"name": name, "admin": admin}
        if lives is not None:
            wish["expires_in_days"] = lives / timedelta(days=1)
        return NewKey(**self._of_keys("POST", "/keys", json=wish).json())

    def keys(self) -> list[dict[str, Any]]:
        """Return the keys of the workspace of the api key, which must be an admin's."""
        rows: list[dict[str, Any]] = self._of_keys("GET", "/keys").json()
        return rows

    def rotate_key(self, key: str, overlap: timedelta) -> NewKey:
        """Create a key that replaces another one, which stays valid for `overlap`."""
        wish = {"overlap_hours": overlap / timedelta(hours=1)}
        return NewKey(**self._of_keys("POST", f"/keys/{_segment(key, 'key')}/rotate", json=wish).json())

    def revoke_key(self, key: str) -> None:
        """Revoke a key now."""
        self._of_keys("DELETE", f"/keys/{_segment(key, 'key')}")

    def _of_keys(self, method: str, path: str, **how: Any) -> httpx.Response:
        if self._scope:
            raise UserError(
                "--workspace: over an api, keys are those of the workspace of VECTORMILL_API_KEY; leave it out, "
                "or set VECTORMILL_DATABASE_URL."
            )
        return self._send(method, path, **how)

    def namesakes(self, job: str) -> list[Namesake]:
        """Return the jobs of this name, newest first, out of the 100 newest whose names contain it."""
        rows = self._get("/jobs", name=job, limit=_LIST_PAGE)["data"]
        return [Namesake(UUID(row["id"]), row["state"]) for row in rows if row["name"] == job]

    def submit(self, wish: JobRequest, files: Sequence[Path], idempotency_key: str | None) -> Submitted:
        """Submit a job: upload its files, or without files let the api read the sources that the request names."""
        return self._submit("/jobs", wish, files, idempotency_key)

    def _submit(self, path: str, wish: BaseModel, files: Sequence[Path], idempotency_key: str | None) -> Submitted:
        headers = {"idempotency-key": idempotency_key} if idempotency_key else {}
        fields = wish.model_dump(mode="json", exclude_defaults=True)
        if not files:
            return self._made(self._send("POST", path, params=self._scope, json=fields, headers=headers))
        with ExitStack() as opened:
            parts = [("file", (path.name, opened.enter_context(path.open("rb")))) for path in files]
            form = {name: _as_field(value) for name, value in fields.items()}
            sent = self._send("POST", path, params=self._scope, data=form, files=parts, headers=headers)
            return self._made(sent)

    @staticmethod
    def _made(reply: httpx.Response) -> Submitted:
        job = reply.json()
        if reply.status_code == HTTPStatus.OK:
            return Submitted(UUID(job["id"]), f"this idempotency key made job {job['id']} before")
        return Submitted(UUID(job["id"]), notices=job.get("notices", ()))

    def _get(self, path: str, **asked: Any) -> Any:
        return self._send("GET", path, params={**asked, **self._scope}).json()

    def _post(self, path: str, **body: Any) -> Any:
        return self._send("POST", path, params=self._scope, **body).json()

    @contextmanager
    def _stream(self, path: str, **asked: Any) -> Iterator[httpx.Response]:
        with _reporting(self._url), self._client.stream("GET", path, params={**asked, **self._scope}) as reply:
            if not reply.is_success:
                reply.read()
            _check(reply)
            yield reply

    def _send(self, method: str, path: str, **how: Any) -> httpx.Response:
        with _reporting(self._url):
            reply = self._client.request(method, path, **how)
        _check(reply)
        return reply


def _refuse_into(table: str | None) -> None:
    if table is not None:
        raise UserError(
            "vectors go into a table of yours only by a command at the database: set VECTORMILL_DATABASE_URL.",
            field="into",
            given=table,
        )


def _collection_path(name: str, more: str = "") -> str:
    return f"/collections/{_segment(name, 'collection')}" + (f"/{more}" if more else "")


def _path(job: str, more: str = "") -> str:
    return f"/jobs/{_segment(job, 'job')}" + (f"/{more}" if more else "")


def _segment(name: str, what: str) -> str:
    """Return a name escaped as one segment of a path. A name that no segment can hold is refused as unknown."""
    if name in ("", ".", ".."):
        raise UserError(f'no {what} "{name}".')
    return quote(name, safe="")


def _as_field(value: Any) -> Any:
    """Return a request's field as a form holds it: a mapping as JSON."""
    if isinstance(value, Mapping):
        return json.dumps(value)
    return value


@contextmanager
def _reporting(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        raise ServiceUnreachable(f"can't reach the api at {url} ({type(error).__name__}).") from error


def _check(reply: httpx.Response) -> None:
    """Raise the error that a reply's problem details describe; do nothing if it succeeded."""
    if reply.is_success:
        return
    field, problem = None, {}
    try:
        problem = reply.json()
        detail, field = str(problem["detail"]), problem.get("field")
    except (ValueError, KeyError, TypeError):
        detail = f"the api answers {reply.status_code}."
    if reply.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR or reply.status_code == HTTPStatus.TOO_MANY_REQUESTS:
        unreachable = reply.status_code != HTTPStatus.INTERNAL_SERVER_ERROR
        raise ServiceUnreachable(detail) if unreachable else VectormillError(detail)
    if field and detail.startswith(field) and ": " in detail:
        given, _, told = detail.removeprefix(field).partition(": ")
        raise UserError(told, field=field, given=given.strip())
    if reply.status_code == HTTPStatus.CONFLICT and problem.get("title") == "collection busy":
        raise _Conflict(detail)
    raise UserError(detail)
