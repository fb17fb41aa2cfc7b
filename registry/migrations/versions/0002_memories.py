"""What a protection policy keeps of a task, and the signature of its inputs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    for name in ("memory", "signature"):
        op.add_column("entries", sa.Column(f"{name}_sha256", sa.String()))
        op.add_column("entries", sa.Column(f"{name}_bytes", sa.BigInteger()))
