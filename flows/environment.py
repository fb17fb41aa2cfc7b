"""The environment of a run: telemetry off, servers found and answering, logs quiet. Set before Prefect is imported."""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING

from flows.home import Home
from neft.errors import FailedError, InputError

if TYPE_CHECKING:
    from flows.config import StreamConfig

_NO_TELEMETRY = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def prepare(config: StreamConfig, home: Home, debug: bool = False) -> None:
    """Point Prefect and MLflow at their servers, or into `home`; check that servers answer.

    Raises:
        InputError: a URL that is none.
        FailedError: a named server does not answer, or `home` cannot be made.
    """
    try:
        home.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FailedError(
            f"neft's home {home.path} cannot be made: {error}; set NEFT_HOME to another folder"
        ) from error
    silence_telemetry()
    os.environ.setdefault("PREFECT_HOME", str(home.prefect))
    # A first start makes the ephemeral server's database, which takes longer than Prefect waits by default.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    # By default MLflow's client is silent for minutes before it gives up.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    if not debug:
        # Failures are said once, by the command line; Prefect's own lines still reach its server.
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        _quiet()
    if url := config.tracking.prefect or os.environ.get("PREFECT_API_URL"):
        check_server("Prefect", "tracking.prefect (or PREFECT_API_URL)", url)
        os.environ["PREFECT_API_URL"] = url
    uri = mlflow_uri(config, home)
    if uri.startswith(("http://", "https://")):
        check_server("MLflow", "tracking.mlflow (or MLFLOW_TRACKING_URI)", uri)


def silence_telemetry() -> None:
    """Nothing about a run leaves the machine."""
    os.environ.update(_NO_TELEMETRY)


def mlflow_uri(config: StreamConfig, home: Home) -> str:
    """The config's tracking URI, else the environment's, else the store in `home`."""
    return mlflow_store(config.tracking.mlflow, home)


def mlflow_store(named: str | None, home: Home) -> str:
    """The tracking URI that is named, else the environment's, else the store in `home`."""
    return named or os.environ.get("MLFLOW_TRACKING_URI") or home.mlflow_uri


def check_server(server: str, key: str, url: str) -> None:
    """
    Raises:
        InputError: `url` is none.
        FailedError: nothing answers there.
    """
    import httpx

    try:
        answer = httpx.get(f"{url.rstrip('/')}/health", timeout=5)
        # A server that asks for a login, or keeps its health elsewhere, is up.
        if answer.is_server_error:
            answer.raise_for_status()
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise InputError(f"{key}: {url!r} is no URL; give one such as http://127.0.0.1:4200/api") from error
    except httpx.HTTPError as error:
        raise FailedError(
            f"{key}: the {server} server at {url} does not answer ({error}); start it, correct the URL, or leave the "
            "key out to use the local one"
        ) from error


def _quiet() -> None:
    """Hold back what libraries print on every run and no user can act on."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|trl|peft|mlflow)\..*")
    for name in ("alembic", "mlflow", "trl", "peft", "torch", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
