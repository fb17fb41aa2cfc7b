"""Tests. No telemetry leaves them, no hub is asked, and libraries are quiet."""

import os

# Set before Prefect or MLflow is imported anywhere: they read the environment then.
os.environ.update(
    DO_NOT_TRACK="true",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    MLFLOW_DISABLE_TELEMETRY="true",
    HF_HUB_OFFLINE="1",
    MLFLOW_LOGGING_LEVEL="ERROR",
)
