"""Alembic's environment: runs on the connection, and in the transaction, that `registry.database` has begun."""

from alembic import context

from registry.database import VERSION_TABLE
from registry.schema import Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    render_as_batch=connection.dialect.name == "sqlite",
)
with context.begin_transaction():
    context.run_migrations()
