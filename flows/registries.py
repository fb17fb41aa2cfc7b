"""Where the registry is: what a config or an option names, else the environment, else the folder in neft's home."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flows.home import Home
from neft.errors import InputError

if TYPE_CHECKING:
    from flows.config import RegistrySpec
    from registry import Registry

URL, ARTIFACTS, PASSWORD = "NEFT_REGISTRY_URL", "NEFT_REGISTRY_ARTIFACTS", "NEFT_REGISTRY_PASSWORD"


@dataclass(frozen=True)
class Where:
    """A registry's place: a folder, or the URL of a database with the store of its files."""

    location: Path | None
    url: str | None = None
    artifacts: str | None = None

    @classmethod
    def found(cls, location: Path | None = None) -> Where:
        """The folder that is named, else what the environment names, else the folder in neft's home.

        Raises:
            InputError: the environment names a database without a store of its files, or the other way round.
        """
        if location is not None:
            return cls(location)
        url, artifacts = os.environ.get(URL), os.environ.get(ARTIFACTS)
        if bool(url) != bool(artifacts):
            given, missing = (URL, ARTIFACTS) if url else (ARTIFACTS, URL)
            raise InputError(
                f"{given} is set but {missing} is not; a registry at a URL needs both, its database and the store of "
                "its files"
            )
        if not url or not artifacts:
            return cls(Home.find().registry)
        check_store(ARTIFACTS, artifacts)
        return cls(None, url, artifacts)

    @classmethod
    def of(cls, spec: RegistrySpec) -> Where:
        """The place that a config names, or `found` where it names none."""
        if spec.url is not None:
            return cls(None, spec.url, spec.artifacts)
        return cls.found(spec.location)

    @property
    def arguments(self) -> dict[str, Any]:
        """What `Registry.open` and `Registry.upgrade` take."""
        if self.url is None:
            return {"location": self.location}
        from registry.database import with_password

        return {"url": with_password(self.url, os.environ.get(PASSWORD)), "artifacts": self.artifacts}

    def open(self) -> Registry:
        """The registry there, made where there is none."""
        from registry import Registry

        return Registry.open(**self.arguments)

    def check_there(self) -> None:
        """
        Raises:
            InputError: there is no registry in the folder. A database says so itself, when it is opened.
        """
        if self.location is not None and not (self.location / "registry.db").exists():
            raise InputError(
                f"there is no registry in {self.location}; run a stream first, or name its folder with --registry"
            )

    @property
    def locks(self) -> Path:
        """The folder of the locks of this machine's runs."""
        if self.location is not None:
            return self.location
        from registry.database import split_password

        name, _ = split_password(str(self.url))
        return Home.find().path / "locks" / hashlib.sha256(name.encode()).hexdigest()[:12]


def check_store(key: str, artifacts: str) -> None:
    """
    Args:
        key: where the URL of the store was given.

    Raises:
        InputError: it holds a password, which would be shown and recorded.
    """
    if "://" in artifacts and urlsplit(artifacts).password is not None:
        raise InputError(
            f"{key} holds a password; leave it out, and give it in fsspec's own configuration or variables"
        )


def keep_password(spec: RegistrySpec) -> None:
    """Leave the password of a config's URL in the environment of this process and of those that it starts.

    A config is handed on, and recorded, without it.
    """
    if spec.url is None:
        return
    from registry.database import split_password

    _, password = split_password(spec.url)
    if password is not None:
        os.environ[PASSWORD] = password
