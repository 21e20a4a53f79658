"""Brings a database's schema up to date."""

from importlib.resources import files

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from pipeline.db import partitions


def alembic_config(connection: Connection) -> Config:
    """Alembic's configuration for `connection`, without a file of its own."""
    config = _config()
    config.attributes["connection"] = connection
    return config


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(files("migrations")))
    config.set_main_option("path_separator", "os")
    return config


def known_revisions() -> list[str]:
    """The revisions of the schema that this version of vectormill knows, oldest first."""
    found = ScriptDirectory.from_config(_config()).walk_revisions()
    return [script.revision for script in found][::-1]


def upgrade(connection: Connection) -> None:
    """Apply what is missing, and make partitions ahead. Safe to run at once from many places."""
    command.upgrade(alembic_config(connection), "head")
    partitions.make_ahead(connection)
