"""History of the database schema, as Alembic migrations."""
