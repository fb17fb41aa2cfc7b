"""Hostile input at the Python API: it is recorded and found again as it is, or refused in one sentence."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from neft.errors import FailedError, InputError, NeftError
from neft.files import save_tensors
from neft.memory import Memory
from neft.neurons import NeuronSet, NeuronSpace
from neft.overlay import Overlay
from neft.routing import Signature
from neft.scoring import Scores
from registry import Registry
from registry.artifacts import Artifact, FolderStore, Stored, open_store
from registry.text import MOST_BYTES, MOST_LEVELS, check_name, plain
from tests.registry.conftest import Pupil

few = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@contextmanager
def refused(match: str | None = None) -> Iterator[None]:
    """What is within is refused in one sentence."""
    with pytest.raises(NeftError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


# Names

SQL = ("'; DROP TABLE entries; --", 'x" OR 1=1', "%", "_", "\\", "$1", ":name", "{}", "%s", "NULL", "a;b")
STRANGE = ("naïve", "任务", "été", "🦊", "a b", "<script>", "..", "-rf", "A", "a")
ILLEGAL = (
    *("", " ", " a", "a ", "a\0b", "\ud800", "a\nb", "a\tb", "a" * 251, "a@1", "a/b", "../../etc/passwd"),
    *("\u202eevil", "a\u200fb", "a\u200bb", "\x7f", "\u2028", "a\u00a0b"),
)


def test_names_that_are_refused(pupil):
    new = pupil.learn("sst2")
    for field, name in product(("task", "stream"), ILLEGAL):
        with refused(rf"{field} name .* cannot be used; take 1 to 250 printable characters without '@' and '/'"):
            replace(new, **{field: name})


def test_sql_in_names_is_text(anywhere, student):
    first = student.learn("sst2")
    names = [*SQL, *STRANGE]
    for number, name in enumerate(names):
        anywhere.record(replace(first, task=name, stream=name, input_digest=name, mlflow_run_id=name))
        anywhere.set_alias(name, f"alias{number}")
        anywhere.set_tag(name, name, name)
    for number, name in enumerate(names):
        entry = anywhere.get(name)
        assert (entry.task, entry.stream, entry.version, entry.mlflow_run_id) == (name, name, 1, name)
        assert anywhere.get(f"{name}@alias{number}") == anywhere.find(name) == entry
        assert anywhere.tags(entry) == {name: name}
        assert [found.task for found in anywhere.list(task=name)] == [name]
        assert [found.stream for found in anywhere.list(stream=name)] == [name]
        with refused():
            anywhere.get("sst2" + name)
    assert len(anywhere.list()) == len(names)


ODD = ("", "a\0b", "\ud800", "x" * 10_000, "\u202e", "@", "@@", "sst2@", "sst2@-1", "sst2@0", f"sst2@{2**70}", "sst2@²")
ODD += ("sst2@" + "9" * 5000, "sst2@\0", "sst2@x\ud800", "sst2@" + "x" * 10_000, f"sst2@{2**31}", "sst2@1@2", "sst2@٣")


def test_references_that_name_nothing(anywhere, student):
    entry = student.record("sst2")
    for reference in ODD:
        for call in (
            anywhere.get,
            partial(anywhere.set_alias, alias="champion"),
            partial(anywhere.set_tag, key="stage", value="prod"),
            partial(anywhere.delete_alias, alias="champion"),
        ):
            with refused():
                call(reference)
        with refused():
            anywhere.get("sst2", base_model=reference or "none")
    assert anywhere.list() == [entry]
    assert anywhere.tags(entry) == anywhere.aliases_of("sst2") == {}


def test_numbers_that_name_nothing(anywhere, student):
    entry = student.record("sst2")
    new = student.learn("sst2")
    for number in (-1, 0, 2**31, 2**63, 2**70, -(2**70)):
        with refused():
            anywhere.get("sst2", number)
        with refused():
            anywhere.record(replace(new, parent=number))
        with refused():
            anywhere.run(number)
    assert anywhere.list() == [entry]


def test_a_number_that_no_database_keeps(anywhere, student):
    with refused("give a number of at most 64 bits"):
        anywhere.record(replace(student.learn("sst2"), seed=2**63))
    with refused("give a number of at most 64 bits"):
        anywhere.add_base_model("f", "name", "float32", {}, 2**64)
    assert anywhere.list() == []


def test_aliases_that_are_refused(anywhere, student):
    student.record("sst2")
    for alias in ("", "1", "a b", "a@b", "a/b", "a\n", "\u202ea", "é", "a\0", "a" * 251, "-a", "'; --"):
        with refused("alias .* cannot be used"):
            anywhere.set_alias("sst2", alias)
    assert anywhere.aliases_of("sst2") == {}


def test_tags_as_long_as_they_may_be(anywhere, student):
    entry = student.record("sst2")
    draw = np.random.default_rng(0)
    value = "".join(chr(point) for point in draw.integers(0x4E00, 0x9FFF, 5000))  # which no index could compress
    anywhere.set_tag(entry, "键" * 250, value)
    assert anywhere.tags(entry) == {"键" * 250: value}
    for key, text in (("k" * 251, ""), ("k", "v" * 5001), ("", ""), ("a\0", ""), ("a", "\0"), ("\ud800", "")):
        with refused():
            anywhere.set_tag(entry, key, text)
    assert len(anywhere.tags(entry)) == 1


@few
@given(name=st.text(max_size=300))
def test_any_name_is_recorded_as_it_is_or_refused(fuzzed, name):
    opened, first = fuzzed
    try:
        new = replace(first, task=name, stream=name, input_digest="n" + name)
        entry = opened.record(new)
    except InputError:
        with pytest.raises(InputError):
            check_name("name", name)
        with refused():
            opened.get(name)
        return
    assert opened.get(name) == opened.get(f"{name}@1") == entry
    assert (entry.task, entry.stream, entry.version) == (name, name, 1)


@few
@given(key=st.text(min_size=1, max_size=20), value=st.text(max_size=50))
def test_any_tag_is_kept_as_it_is_or_refused(fuzzed, key, value):
    opened, first = fuzzed
    entry = opened.record(first)
    try:
        opened.set_tag(entry, key, value)
    except InputError:
        assert not key.strip() or "\0" in key + value or not (key + value).isprintable()
        return
    assert opened.tags(entry)[key] == value


@pytest.fixture
def fuzzed(anywhere, student):
    """A registry on each database, and an entry to record there under other names."""
    return anywhere, student.learn("sst2")


# JSON


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"x": value}
    return value


BAD_JSON = (
    ({"x": float("nan")}, "Out of range float"),
    ({"x": [float("inf")]}, "Out of range float"),
    ({"x": "a\0b"}, "NUL"),
    ({"a\0b": 1}, "NUL"),
    ({"x": "\\\0"}, "NUL"),
    ({"x": "\ud800"}, "surrogates not allowed"),
    ({"x": b"bytes"}, "not JSON serializable"),
    ({"x": {1, 2}}, "not JSON serializable"),
    ({"x": "y" * MOST_BYTES}, "bytes as JSON, of 1048576 at most"),
    ({"x": 10**5000}, "Exceeds the limit"),
    (nested(MOST_LEVELS + 1), "nested more than 50 deep"),
    (nested(100_000), "nested more than 50 deep"),
)


def test_json_that_is_refused(anywhere, student):
    new = student.learn("sst2")
    for value, says in BAD_JSON:
        for field in ("metrics", "method", "training", "audit", "versions"):
            with refused(rf"{field} cannot be recorded: .*{says}"):
                anywhere.record(replace(new, **{field: value}))
        with refused("config cannot be recorded"):
            anywhere.add_base_model("f", "name", "float32", value, 1)
        with refused("config cannot be recorded"):
            anywhere.start_run(stream="demo", config_digest="c", config=value, tasks=["sst2"])
    assert anywhere.list() == [] == anywhere.streams()


STRANGE_JSON = (
    {},
    nested(MOST_LEVELS - 1),
    {"x": "\\u0000", "y": "\\\\u0000", "z": "\\"},
    {"x": "y" * (MOST_BYTES - 100)},
    {"x": 10**400, "y": -(10**400)},
    {"x" * 10_000: 1.5, "键" * 500: 2},
    {"": 0, "x": None, "y": [], "z": True},
    {"a/b": 1, "a": {"b": 2}},
    {"x": 1e308, "y": 5e-324, "z": -0.0},
    {"'; DROP TABLE entries; --": 1},
)


def test_json_that_is_strange_and_kept(anywhere, student):
    for value in STRANGE_JSON:
        entry = anywhere.record(student.learn("sst2", metrics=value))
        assert entry.metrics == anywhere.get("sst2").metrics == value
        assert json.loads(json.dumps(entry.to_dict()))["metrics"] == value


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@few
@given(value=st.dictionaries(st.text(max_size=8), json_values, max_size=4))
def test_any_json_is_kept_as_it_is_or_refused(fuzzed, value):
    opened, first = fuzzed
    try:
        kept = plain("metrics", value)
    except InputError:
        return
    assert kept == value
    entry = opened.record(replace(first, input_digest=f"j{json.dumps(value)}", metrics=value))
    assert opened.find(entry.input_digest).metrics == value


# Files


def test_no_artifact_leads_out_of_the_store(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for store in (open_store(tmp_path / "store"), open_store(f"memory://{tmp_path.name}")):
        for sha256 in (
            "../../etc/passwd",
            "../secret",
            str(secret),
            "",
            "A" * 64,
            "a" * 63,
            "a" * 64 + "\n",
            "a/" * 32,
        ):
            with refused("names no file of an artifact store"):
                store.fetch(Artifact("overlay", sha256, 1), "sst2@1")
    store = FolderStore(tmp_path / "store")
    for path in ("../secret", "a/../../secret"):
        with refused("lies outside of artifact store"):
            store.remove(Stored(path, None, 1, None))
    artifact = store.put("../../secret", lambda path: path.write_bytes(b"content"))
    assert store.fetch(artifact, "sst2@1").is_relative_to(store.root)
    assert secret.read_text() == "secret"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "store"]


def test_a_folder_or_a_link_in_an_artifacts_place(tmp_path):
    store = FolderStore(tmp_path / "store")
    artifact = store.put("overlay", lambda path: path.write_bytes(b"content"))
    path = store.path(artifact.sha256)
    path.unlink()
    path.mkdir()
    with refused("cannot be read"):
        store.fetch(artifact, "sst2@1")
    path.rmdir()
    path.symlink_to("/etc/passwd")
    with refused("was altered"):
        store.fetch(artifact, "sst2@1")
    assert [stored.path for stored in store.stored()] == [path.relative_to(store.root).as_posix()]


LOADERS: dict[str, Callable[[Path], Any]] = {
    "neft-overlay": Overlay.load,
    "neft-scores": Scores.load,
    "neft-memory": Memory.load,
    "neft-signature": Signature.load,
    "neft-neuron-set": NeuronSet.load,
}


@pytest.fixture(scope="module")
def files(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A good file of each kind."""
    folder = tmp_path_factory.mktemp("files")
    with closing(Registry.open(folder / "registry")) as opened:
        pupil = Pupil(opened, base)
        new = pupil.learn("sst2")
    scores = Scores(pupil.space, {site.name: torch.rand(site.size) for site in pupil.space.sites})
    signature = Signature(torch.zeros(4), torch.eye(4)[:1], torch.ones(1), 1.0, -8.0, 1, None)
    good = (new.overlay, scores, Memory("soft", {"x": torch.rand(3)}), signature, new.neurons)
    found = {}
    for kind, each in zip(LOADERS, good, strict=True):
        each.save(folder / kind)
        found[kind] = (folder / kind).read_bytes()
    return found


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: Any, body: bytes, length: int | None = None) -> bytes:
    written = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(written) if length is None else length) + written + body


def lies(content: bytes) -> Iterator[bytes]:
    """The file with a header that lies, or without some of it."""
    header, body = header_of(content)
    name = next(key for key in header if key != "__metadata__")
    described = header[name]
    for length in (0, 1, 7, len(content), 10**6, 2**40, 2**63, 2**64 - 1):
        yield with_header(header, body, length)
    for changes in (
        {"data_offsets": [0, 2**60]},
        {"data_offsets": [2**60, 2**60 + 8]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [-8, 0]},
        {"data_offsets": [4, described["data_offsets"][1]]},
        {"shape": [2**40, 2**40]},
        {"shape": [0]},
        {"shape": [-1]},
        {"shape": ["x"]},
        {"shape": []},
        {"dtype": "I64"},
        {"dtype": "BOOL"},
        {"dtype": "C64"},
        {"dtype": "F4"},
        {"dtype": "pickle"},
        {"dtype": None},
    ):
        yield with_header(header | {name: described | changes}, body)
    yield with_header({key: value for key, value in header.items() if key != name}, body)
    yield with_header(header | {"other": described}, body)  # offsets that overlap
    for metadata in (None, {}, [], {"neft": "x"}, {"neft": "[]"}, {"neft": "{}"}, {"neft": "[" * 100_000}, {"neft": 1}):
        yield with_header(header | {"__metadata__": metadata}, body)
    for raw in (b"", b"not JSON", b"[]", b"null", b'{"a":' * 50_000, b"\xff\xfe", b"{}" + b" " * 100):
        yield with_header(raw, body)
    for end in (0, 4, 8, 9, 100, len(content) // 2, len(content) - 1):
        yield content[:end]
    yield content + b"\0"
    yield b"\x80\x04\x95pickle"


@pytest.mark.parametrize("kind", LOADERS)
def test_a_file_whose_header_lies_is_refused(files, kind, tmp_path):
    path = tmp_path / "file.safetensors"
    for content in lies(files[kind]):
        path.write_bytes(content)
        with refused(str(path)):
            LOADERS[kind](path)
    path.write_bytes(files[kind])
    LOADERS[kind](path)


@few
@given(data=st.data())
@pytest.mark.parametrize("kind", LOADERS)
def test_no_bytes_crash_a_loader(files, kind, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    content = bytearray(data.draw(st.just(files[kind]) | st.binary(max_size=200)))
    if content:
        for place in data.draw(st.lists(st.integers(0, min(len(content), 4000) - 1), max_size=4)):
            content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.none() | st.integers(0, len(content)))])
    try:
        LOADERS[kind](path)
    except (InputError, FailedError) as error:
        assert "\n" not in str(error)


def crafted(kind: str, good: bytes, tmp_path: Path) -> Iterator[Path]:
    """Files whose digest is right, and whose tensors or description are not what the kind holds."""
    path = tmp_path / "good.safetensors"
    path.write_bytes(good)
    header, _ = header_of(good)
    description = json.loads(header["__metadata__"]["neft"])["description"]
    space = description.get("space")
    others: list[Any] = [None, [], "text", 7, {}, *({key: None} | description for key in description)]
    others += [{name: value for name, value in description.items() if name != left} for left in description]
    others += [description | {key: wrong} for key in description for wrong in (None, [], "x", -1, {}, float("1e308"))]
    if space:
        for changes in ({"size": 2**62}, {"size": -1}, {"size": 0}, {"size": "x"}, {"name": None}, {"kind": "x"}):
            others.append({**description, "space": space | {"sites": [space["sites"][0] | changes]}})
        part = space["sites"][0]["parts"][0]
        for changes in (
            *({"repeats": 2**40}, {"repeats": 0}, {"block": 0}, {"stride": 2**62}, {"side": "x"}, {"module": 1}),
            *({"width": "x"}, {"unknown": 1}),
        ):
            site = space["sites"][0] | {"parts": [part | changes]}
            others.append({**description, "space": space | {"sites": [site, *space["sites"][1:]]}})
        others.append({**description, "space": space | {"sites": space["sites"] * 2}})
        others.append({**description, "space": {}})
    tensors = {name: torch.ones(2, 2) for name in header if name != "__metadata__"}
    wrong = [{}, tensors, {name: torch.ones(()) for name in tensors}, {"other": torch.ones(1)}]
    wrong += [{name: torch.full((5, 32), value) for name in tensors} for value in (float("nan"), True, 3)]
    wrong += [{name: torch.ones(5, 32, dtype=torch.float8_e4m3fn) for name in tensors}]
    rows = load_file(path)
    for number, (held, described) in enumerate(
        [*((rows, other) for other in others), *((w, description) for w in wrong)]
    ):
        made = tmp_path / f"{number}.safetensors"
        save_tensors(made, kind, held, described)
        yield made


@pytest.mark.parametrize("kind", LOADERS)
def test_a_crafted_file_is_loaded_or_refused_in_one_sentence(files, kind, tmp_path):
    outcomes = []
    for path in crafted(kind, files[kind], tmp_path):
        try:
            LOADERS[kind](path)
            outcomes.append("loaded")
        except (InputError, FailedError) as error:
            assert "\n" not in str(error)
            outcomes.append("refused")
    assert outcomes.count("refused") > (3 if kind in ("neft-memory", "neft-signature") else 10)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(registry, pupil, value, tmp_path):
    bad = {site.name: torch.full((site.size,), value) for site in pupil.space.sites}
    with refused("are not finite"):
        Scores(pupil.space, bad)
    new = pupil.learn("sst2")
    first = next(iter(new.overlay.values))
    rows = {name: torch.full_like(each, value) if name == first else each for name, each in new.overlay.values.items()}
    path = tmp_path / "overlay.safetensors"
    Overlay(new.neurons, rows).save(path)
    with refused("holds values that are not finite"):
        Overlay.load(path)


def test_a_neuron_space_with_numbers_of_no_model(pupil):
    described = pupil.space.to_dict()
    for changes in ({"size": 0}, {"size": 2**40}, {"size": True}, {"kind": "x"}, {"parts": []}):
        with refused("no model has a site as the neuron space describes"):
            NeuronSpace.from_dict(described | {"sites": [described["sites"][0] | changes]})
    assert NeuronSpace.from_dict(described) == pupil.space


def test_a_chain_that_comes_back_to_itself(anywhere, student, place):
    entry = student.record("sst2")
    unguarded = {"sqlite": "DROP TRIGGER entries_no_update", "postgresql": "ALTER TABLE entries DISABLE TRIGGER USER"}
    with place.sql() as connection:
        connection.exec_driver_sql(unguarded[place.kind])
        connection.exec_driver_sql("UPDATE entries SET parent_id = id")
    with refused("the chain of entry 1 comes back to entry 1"):
        anywhere.chain(entry)
