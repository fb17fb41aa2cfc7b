"""Home: the one folder where neft keeps its registry, MLflow's store and Prefect's database when no server is named."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Home:
    """`NEFT_HOME`, or `.neft` in the working directory."""

    path: Path

    @classmethod
    def find(cls) -> Home:
        return cls(Path(os.environ.get("NEFT_HOME") or ".neft").expanduser().resolve())

    @property
    def registry(self) -> Path:
        return self.path / "registry"

    @property
    def mlflow_uri(self) -> str:
        return f"sqlite:///{self.path / 'mlflow.db'}"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.path / "mlflow-artifacts"

    @property
    def prefect(self) -> Path:
        return self.path / "prefect"
