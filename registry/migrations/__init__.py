"""The schema's history, run by Alembic from `registry.database`."""
