"""Migrations that bring a database's schema up to date."""

from importlib.resources import files

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from pipeline.db import partitions


def alembic_config(connection: Connection) -> Config:
    """Return Alembic's configuration for `connection`, without a file of its own."""
    config = _config()
    config.attributes["connection"] = connection
    return config


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(files("migrations")))
    config.set_main_option("path_separator", "os")
    return config


def known_revisions() -> list[str]:
    """Return the schema revisions that this version of vectormill knows, oldest first."""
    found = ScriptDirectory.from_config(_config()).walk_revisions()
    return [script.revision for script in found][::-1]


def upgrade(connection: Connection) -> None:
    """Apply the missing migrations, and make partitions ahead. Safe to run concurrently from many places."""
    command.upgrade(alembic_config(connection), "head")
    partitions.make_ahead(connection)
