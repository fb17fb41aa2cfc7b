"""Links: where the page finds the runs that made an entry."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from neft.errors import InputError


@dataclass(frozen=True)
class Links:
    """Base URLs of MLflow's page and of Prefect's; without one, the page shows a run's id as text."""

    mlflow: str | None = None
    prefect: str | None = None

    def __post_init__(self) -> None:
        """
        Raises:
            InputError: what is given is no http or https URL.
        """
        for name, url in asdict(self).items():
            if url is None:
                continue
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise InputError(f"{name} {url!r} is no URL of a page; write http://HOST:PORT")
            object.__setattr__(self, name, url.rstrip("/"))

    def to_dict(self) -> dict[str, str | None]:
        """The links as JSON has them."""
        return asdict(self)
