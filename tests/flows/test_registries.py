"""Where a registry is: a config's folder or URL, the environment, neft's home; and a password that nobody sees."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from flows.config import StreamConfig, load_config, validate_config
from flows.registries import Where, keep_password
from neft.errors import InputError
from registry import Registry
from registry.database import database_url, split_password, with_password
from tests.command import Neft
from tests.registry.postgres import new_database
from tests.tiny import write_stream

SECRET = "s3cr%25et"
VARIABLES = ("NEFT_REGISTRY_URL", "NEFT_REGISTRY_ARTIFACTS", "NEFT_REGISTRY_PASSWORD")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        # Set and taken away, so that what a test leaves there is taken away too.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def url() -> Iterator[str]:
    """A new database's URL with a password, which a server that trusts everybody never reads."""
    with new_database() as made:
        parsed = make_url(made)
        yield made if parsed.password else parsed.set(password="s3cr%et").render_as_string(hide_password=False)


def config(folder: Path, **registry: Any) -> StreamConfig:
    return load_config(write_stream(folder, tasks=1, registry=registry))


def test_the_config_comes_before_the_environment_and_that_before_home(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Where.of(config(tmp_path).registry) == Where.found() == Where(home / "registry")
    monkeypatch.setenv("NEFT_REGISTRY_URL", "sqlite:////r/db")
    monkeypatch.setenv("NEFT_REGISTRY_ARTIFACTS", "/r/files")
    assert Where.of(config(tmp_path).registry) == Where.found() == Where(None, "sqlite:////r/db", "/r/files")
    assert Where.found(tmp_path) == Where(tmp_path)
    assert Where.of(config(tmp_path, location="kept").registry) == Where(tmp_path / "kept")
    found = Where.of(config(tmp_path, url="postgresql://u@h/db", artifacts="s3://bucket/files").registry)
    assert found == Where(None, "postgresql://u@h/db", "s3://bucket/files")


def test_relative_places_are_relative_to_the_file(tmp_path: Path) -> None:
    spec = config(tmp_path, url="sqlite:///kept.db", artifacts="files").registry
    assert (spec.url, spec.artifacts) == (f"sqlite:///{tmp_path / 'kept.db'}", str(tmp_path / "files"))
    with closing(Where.of(spec).open()) as registry:
        assert list(registry.list()) == []
    assert (tmp_path / "kept.db").is_file()


@pytest.mark.parametrize("name", VARIABLES[:2])
def test_half_of_an_environment_is_refused(name: str, home: Path, neft: Neft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "sqlite:///r.db")
    outcome = neft("registry", "list")
    assert outcome.code == 2 and f"{name} is set but" in outcome.err


@pytest.mark.parametrize(
    "given",
    [
        {"url": f"postgresql://u:{SECRET}@h/db"},
        {"artifacts": "files"},
        {"location": "kept", "url": f"postgresql://u:{SECRET}@h/db", "artifacts": "files"},
        {"location": "kept", "artifacts": "files"},
    ],
)
def test_a_registry_in_two_places_or_half_a_place_is_refused(tmp_path: Path, given: dict[str, str]) -> None:
    with pytest.raises(InputError, match="registry: give either `location`, a folder, or both") as raised:
        config(tmp_path, **given)
    assert "s3cr" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        (f"mysql://u:{SECRET}@h/db", "names no SQLite file and no PostgreSQL database"),
        (f"postgresql://u:{SECRET}@h:port/db", "is not a database URL"),
        (f"u:{SECRET}@h", "is not a database URL"),
        (f"mysql://u@h/db?password={SECRET}", "names no SQLite file and no PostgreSQL database"),
    ],
)
def test_a_wrong_url_is_refused_without_its_password(tmp_path: Path, url: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as raised:
        config(tmp_path, url=url, artifacts="files")
    assert "s3cr" not in str(raised.value)


def test_a_store_with_a_password_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = f"sftp://u:{SECRET}@h/files"
    with pytest.raises(InputError, match="artifacts holds a password") as raised:
        config(tmp_path, url="postgresql://u@h/db", artifacts=store)
    assert "s3cr" not in str(raised.value)
    monkeypatch.setenv("NEFT_REGISTRY_URL", "postgresql://u@h/db")
    monkeypatch.setenv("NEFT_REGISTRY_ARTIFACTS", store)
    with pytest.raises(InputError, match="NEFT_REGISTRY_ARTIFACTS holds a password"):
        Where.found()


@pytest.mark.parametrize(
    "url",
    [f"postgresql://u:{SECRET}@h:5/db?sslmode=require", f"postgresql://u@h:5/db?password={SECRET}&sslmode=require"],
)
def test_a_password_is_split_off_and_put_back(url: str) -> None:
    bare, password = split_password(url)
    assert password == "s3cr%et" and "s3cr" not in bare
    assert database_url(with_password(bare, password)) == database_url(url)
    assert split_password(bare) == (bare, None)
    assert with_password(url, "other") == url and with_password(bare, None) == bare
    assert with_password("sqlite:////r.db", "x") == "sqlite:////r.db"


def test_a_config_is_handed_on_without_its_password(tmp_path: Path) -> None:
    given = config(tmp_path, url=f"postgresql://u:{SECRET}@h/db", artifacts="files")
    dumped = given.model_dump(mode="json")
    assert "s3cr" not in json.dumps(dumped) and "s3cr" not in repr(given)
    keep_password(given.registry)
    handed = Where.of(validate_config(dumped, "x").registry).arguments
    assert database_url(handed["url"]) == database_url(f"postgresql://u:{SECRET}@h/db")


def flow_parameters() -> str:
    from prefect.client.orchestration import get_client

    async def read() -> str:
        async with get_client() as client:
            return json.dumps([run.parameters for run in await client.read_flow_runs()])

    return asyncio.run(read())


def test_a_stream_is_learnt_into_a_database_whose_password_nobody_sees(
    tmp_path: Path, home: Path, url: str, neft: Neft, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = str(make_url(url).password)
    path = write_stream(tmp_path / "stream", tasks=1, registry={"url": url, "artifacts": "files"}, stream="shared")
    learnt = neft("run", path, "--set", "training.max_steps=1")
    assert learnt.code == 0, learnt.err
    with closing(Registry.open(url=url, artifacts=tmp_path / "stream" / "files")) as registry:
        assert [entry.reference for entry in registry.list()] == ["colours@1"]
        recorded = json.dumps(registry.newest_run("shared").to_dict())
    assert '"registry": {"location": null, "url": "postgresql' in recorded
    assert not (home / "registry" / "registry.db").exists()
    parameters = flow_parameters()
    assert '"shared"' in parameters
    for text in (learnt.out, learnt.err, recorded, parameters):
        assert secret not in text
    for file in home.rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file
    # What is printed leads there.
    shown = next(line for line in learnt.out.splitlines() if "export NEFT_REGISTRY_URL=" in line)
    for part in shown.split()[1:]:
        name, _, value = part.partition("=")
        monkeypatch.setenv(name, value)
    assert "colours@1" in neft("registry", "list").out
    assert neft("report", "shared").code == 0
    assert "nothing to do" in neft("run", path, "--set", "training.max_steps=1").err
