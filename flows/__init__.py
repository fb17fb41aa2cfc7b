"""Orchestration: streams as Prefect flows, tracked in MLflow, recorded in the registry, run from the command line."""
