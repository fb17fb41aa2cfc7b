"""Bundles: a chain goes to another registry whole, and nothing of a file that was made up or damaged is written."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shutil
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from neft.audit import state_digest
from neft.errors import FailedError, InputError, NeftError
from neft.files import load_tensors, save_tensors
from neft.memory import Memory
from neft.neurons import NeuronSpace
from neft.overlay import Overlay
from neft.scoring import Scores
from registry import Entry, Registry
from registry.artifacts import FolderStore
from registry.bitmaps import bitmap_of, written
from tests.registry.conftest import Place, Pupil
from tests.registry.postgres import new_database
from tests.registry.test_states import signature


def full(pupil: Pupil, task: str, **fields: Any) -> Entry:
    """An entry that has a file of every kind."""
    scores = Scores(pupil.space, {site.name: torch.rand(site.size) for site in pupil.space.sites})
    kept = {"memory": Memory("replay", {"ids": torch.arange(4)}, {"kept": 4}), "signature": signature(pupil.step)}
    return pupil.record(task, scores=scores, mlflow_run_id="run", prefect_flow_run_id="flow", **kept, **fields)


@pytest.fixture
def elsewhere(place: Place, tmp_path: Path) -> Iterator[Registry]:
    """An empty registry on the other database."""
    if place.kind == "postgresql":
        opened = Registry.open(tmp_path / "elsewhere")
        yield opened
        opened.close()
        return
    with new_database() as url:
        opened = Registry.open(url=url, artifacts=tmp_path / "elsewhere" / "artifacts")
        yield opened
        opened.close()


def same_content(here: Registry, entry: Entry, there: Registry, other: Entry) -> None:
    """Two entries that agree in all but what each registry counts for itself."""
    counted = {"id", "version", "parent_id", "parent", "reused_from", "forgets"}
    first, second = ({k: v for k, v in vars(each).items() if k not in counted} for each in (entry, other))
    assert first == second
    assert here.neurons(entry) == there.neurons(other)
    assert here.tags(entry) == there.tags(other)
    for file in entry.files:
        content = [each.artifacts.fetch(file, "x").read_bytes() for each in (here, there)]
        assert content[0] == content[1]


def test_a_chain_goes_to_a_registry_on_the_other_database(anywhere, elsewhere, base, new_pupil, is_same, tmp_path):
    """With what it forgets and reuses, and next to entries that are there already, which shift the versions."""
    pupil = new_pupil(anywhere, base)
    films = full(pupil, "films", neurons=pupil.of(0, 1), stream="first")
    news = full(pupil, "news", neurons=pupil.of(2), reused_from=films)
    anywhere.set_tag(news, "stage", "prod")
    anywhere.set_alias("news", "champion")
    gone = anywhere.forget(films)
    there = new_pupil(elsewhere, base, step=10)
    there.record("films")

    assert anywhere.export("films", tmp_path / "films.zip") == gone
    imported = elsewhere.import_(tmp_path / "films.zip")

    assert (imported.reference, imported.parent, imported.forgets) == ("films@3", "news@1", "films@2")
    chain = elsewhere.chain(imported)
    assert [each.reference for each in chain] == ["films@2", "news@1", "films@3"]
    assert chain[1].reused_from == "films@2"
    for ours, theirs in zip(anywhere.chain(gone), chain, strict=True):
        same_content(anywhere, ours, elsewhere, theirs)
    assert elsewhere.aliases(chain[1]) == ()
    assert elsewhere.get("news").metrics == news.metrics
    assert is_same(elsewhere.checkout(imported)[0], dict(anywhere.checkout(gone)[0].state_dict()))
    assert elsewhere.router(imported).signatures.keys() == {"news@1"}


def test_importing_again_adds_nothing_and_mends_the_store(anywhere, elsewhere, base, new_pupil, tmp_path):
    pupil = new_pupil(anywhere, base)
    films, news = full(pupil, "films"), full(pupil, "news")
    anywhere.export(films, tmp_path / "films.zip")
    anywhere.export(news, tmp_path / "news.zip")
    first = elsewhere.import_(tmp_path / "films.zip")
    second = elsewhere.import_(tmp_path / "news.zip")
    assert [each.reference for each in elsewhere.list()] == ["films@1", "news@1"]
    assert second.parent_id == first.id
    elsewhere.artifacts.path(films.overlay_file.sha256).unlink()
    assert elsewhere.import_(tmp_path / "news.zip") == second
    assert elsewhere.list() == [first, second]
    elsewhere.checkout(second)
    # Back home too, all of it is known.
    assert anywhere.import_(tmp_path / "news.zip") == news


def test_the_same_entries_give_the_same_bytes(registry, pupil, tmp_path):
    full(pupil, "films")
    for name in ("a.zip", "b.zip"):
        registry.export("films", tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert stat.S_IMODE((tmp_path / "a.zip").stat().st_mode) == 0o644


def test_what_it_was_reused_from_may_stay_behind(registry, base, new_pupil, tmp_path):
    """It is named by its inputs, and found again where it is recorded."""
    source = new_pupil(registry, base).record("source")
    entry = new_pupil(registry, base, step=10).record("films", reused_from=source)
    registry.export(entry, tmp_path / "films.zip")
    registry.export(source, tmp_path / "source.zip")
    for first, reused in ((None, None), ("source.zip", "source@1")):
        other = Registry.open(tmp_path / f"other-{reused}")
        if first:
            other.import_(tmp_path / first)
        assert other.import_(tmp_path / "films.zip").reused_from == reused
        other.close()


def test_another_result_of_the_same_inputs_is_refused(registry, base, new_pupil, tmp_path):
    pupil = new_pupil(registry, base)
    films = pupil.record("films")
    pupil.record("news")
    registry.export("news", tmp_path / "news.zip")
    other = Registry.open(tmp_path / "other")
    twin = new_pupil(other, base, step=5)
    twin.record("films", input_digest=films.input_digest)
    with pytest.raises(FailedError, match=r"films@1 was learnt here from the same inputs.*another state"):
        other.import_(tmp_path / "news.zip")
    assert [each.reference for each in other.list()] == ["films@1"]
    assert len(list(other.artifacts.stored())) == 1
    other.close()


def test_exports_are_refused_before_they_are_begun(registry, pupil, tmp_path):
    films = pupil.record("films")
    (tmp_path / "there.zip").write_text("mine")
    with pytest.raises(InputError, match=r"there.zip exists already; name a new one"):
        registry.export("films", tmp_path / "there.zip")
    assert (tmp_path / "there.zip").read_text() == "mine"
    path = registry.artifacts.path(films.overlay_file.sha256)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FailedError, match=r"the overlay of films@1.*is truncated"):
        registry.export("films", tmp_path / "films.zip")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["registry", "there.zip"]


# --- what is made up ---


@dataclass
class Forgery:
    """A bundle's parts, to be changed and written again."""

    manifest: dict[str, Any]
    files: dict[str, bytes]

    @classmethod
    def of(cls, path: Path) -> Forgery:
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        return cls(json.loads(parts.pop("manifest.json")), parts)

    @property
    def entry(self) -> dict[str, Any]:
        """The last entry, as the manifest has it."""
        return self.manifest["entries"][-1]

    @property
    def space(self) -> dict[str, Any]:
        [space] = self.manifest["spaces"].values()
        return space

    def put(self, kind: str, content: bytes) -> None:
        """Replace a file of the last entry, with all that a bundle says of it made to fit."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.files[f"files/{sha256}.safetensors"] = content
        self.entry["files"][kind] = {"sha256": sha256, "bytes": len(content)}
        named = {file["sha256"] for entry in self.manifest["entries"] for file in entry["files"].values() if file}
        self.files = {name: inside for name, inside in self.files.items() if name[6:70] in named}

    def resaved(self, kind: str, folder: Path, change: Callable[[dict, dict], None], metadata: Any = None) -> None:
        """Change tensors and description of a file of the last entry, with its own digest made to fit."""
        path = folder / "file.safetensors"
        path.write_bytes(self.files[f"files/{self.entry['files'][kind]['sha256']}.safetensors"])
        tensors, description = load_tensors(path, f"neft-{kind}")
        change(tensors, description)
        save_tensors(path, f"neft-{kind}", tensors, description)
        self.put(kind, path.read_bytes())

    def respaced(self) -> None:
        """Give the manifest's space the fingerprint that goes with what it says now."""
        fingerprint = hashlib.sha256(json.dumps(self.space, sort_keys=True).encode()).hexdigest()
        self.manifest["spaces"] = {fingerprint: self.space}
        for entry in self.manifest["entries"]:
            entry["space"] = fingerprint

    def write(self, path: Path, **options: Any) -> None:
        with zipfile.ZipFile(path, "w", **options) as archive:
            archive.writestr("manifest.json", json.dumps(self.manifest))
            for name, content in self.files.items():
                archive.writestr(zipfile.ZipInfo(name), content, options.get("compression"))


@pytest.fixture(scope="module")
def learnt_once(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[Registry]:
    """A registry of two entries, with files of every kind."""
    opened = Registry.open(tmp_path_factory.mktemp("learnt") / "registry")
    pupil = Pupil(opened, base)
    full(pupil, "films")
    full(pupil, "news")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def exported(learnt_once: Registry, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("exported") / "genuine.zip"
    learnt_once.export("news", path)
    return path.read_bytes()


@pytest.fixture
def genuine(exported: bytes, tmp_path: Path) -> Path:
    """A bundle of those two."""
    path = tmp_path / "genuine.zip"
    path.write_bytes(exported)
    return path


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """An empty registry, which what is refused leaves empty."""
    opened = Registry.open(tmp_path_factory.mktemp("empty") / "registry")
    yield opened
    opened.close()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Registry]:
    """An empty registry to import into."""
    opened = Registry.open(tmp_path / "other")
    yield opened
    opened.close()


def refused(registry: Registry, path: Path, says: str, **options: Any) -> None:
    """The file is refused in one sentence, and nothing is written: no row, no file."""
    with pytest.raises(InputError, match=says) as caught:
        registry.import_(path, **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path} cannot be imported: ")
    assert registry.list() == []
    assert list(registry.artifacts.stored()) == []


def test_a_forgery_that_changes_nothing_is_imported(other, genuine, tmp_path):
    """So that what is refused below is refused for its change alone."""
    forgery = Forgery.of(genuine)
    for kind in ("overlay", "scores", "memory", "signature"):
        forgery.resaved(kind, tmp_path, lambda tensors, description: None)
    forgery.respaced()
    forgery.write(tmp_path / "forged.zip")
    assert other.import_(tmp_path / "forged.zip").reference == "news@1"


def _change(**fields: Any) -> Callable[[Forgery], None]:
    return lambda forgery: forgery.entry.update(fields)


def _top(**fields: Any) -> Callable[[Forgery], None]:
    return lambda forgery: forgery.manifest.update(fields)


def _first_gone(forgery: Forgery) -> None:
    forgery.manifest["entries"].pop(0)


def _twice(forgery: Forgery) -> None:
    forgery.manifest["entries"].append(dict(forgery.entry, parent=forgery.entry["input_digest"]))


def _size(forgery: Forgery) -> None:
    forgery.entry["files"]["overlay"]["bytes"] += 1


def _deep(forgery: Forgery) -> None:
    nested: Any = 1.0
    for _ in range(100):
        nested = [nested]
    forgery.entry["metrics"] = {"deep": nested}


def _other_space(forgery: Forgery) -> None:
    forgery.space["model_parameters"] += 1


def _other_neurons(forgery: Forgery) -> None:
    neurons = NeuronSpace.from_dict(forgery.space).none()
    forgery.entry["neurons"] = base64.b64encode(written(bitmap_of(neurons))).decode()


def _part(**fields: Any) -> Callable[[Forgery], None]:
    def change(forgery: Forgery) -> None:
        forgery.space["sites"][0]["parts"][0].update(fields)
        forgery.respaced()

    return change


def _two_widths(forgery: Forgery) -> None:
    wide = json.loads(json.dumps(forgery.space))
    wide["sites"][0]["parts"][0]["width"] += 1
    fingerprint = NeuronSpace.from_dict(wide).fingerprint
    forgery.manifest["spaces"][fingerprint] = wide
    forgery.entry["space"] = fingerprint


MANIFESTS: dict[str, tuple[Callable[[Forgery], None], str]] = {
    "another format": (_top(format="zip"), "format"),
    "a newer version": (_top(version=2), "version"),
    "a key too many": (_change(pickle="cos"), "pickle: Extra inputs"),
    "a task with a version": (_change(task="a@b"), "'a@b' cannot be used"),
    "a task that climbs out": (_change(task="../../x"), "cannot be used"),
    "a task of no text": (_change(task="a\0"), "cannot be used"),
    "text with NUL": (_change(data_fingerprint="a\0"), "NUL"),
    "half a character in a field": (_change(mlflow_run_id="\ud800"), "Invalid JSON"),
    "JSON with NUL": (_change(method={"a": "\0"}), "NUL"),
    "a metric that is no number": (_change(metrics={"accuracy": math.nan}), "metrics: .*JSON|recorded"),
    "a metric beyond numbers": (_change(metrics={"accuracy": math.inf}), "metrics"),
    "JSON that is deep": (_deep, "nested|recursion"),
    "a seed beyond 64 bits": (_change(seed=2**63), "seed"),
    "a seed that is text": (_change(seed="1"), "seed"),
    "a time without a zone": (_change(created_at="2026-01-01T00:00:00"), "created_at"),
    "a time before all times": (_change(created_at="0001-01-01T00:00:00+14:00"), "created_at"),
    "an empty tag": (_change(tags={"": "x"}), "tags"),
    "a parent elsewhere": (_change(parent="nobody"), "not built on the one before it"),
    "a chain without its root": (_first_gone, "not built on the one before it"),
    "an entry that is there twice": (_twice, "stands in it twice"),
    "what is forgotten elsewhere": (_change(forgets="nobody"), "forgets what is not in its chain"),
    "no entries": (_top(entries=[]), "entries"),
    "a checksum that is a path": (_change(state_digest="../" * 21 + "x"), "state_digest"),
    "a size that is not the file's": (_size, "does not have the .* bytes"),
    "a space of another fingerprint": (_other_space, "not the one that its fingerprint says"),
    "no spaces": (_top(spaces={}), "neuron spaces are not those of the entries"),
    "neurons of another set": (_other_neurons, "has other neurons than its entry of task 'news'"),
    "neurons that are no bitmap": (_change(neurons="AAAA"), "has other neurons than its entry"),
    "neurons that are no base64": (_change(neurons="?"), "neurons"),
    "a space with huge repeats": (_part(repeats=2**30), "no model has a site"),
    "a space beyond all integers": (_part(repeats=2**70), "no model has a site"),
    "a space of negative width": (_part(width=-1), "width"),
    "two widths of one matrix": (_two_widths, "have two widths"),
    "a dtype of none": (lambda forgery: forgery.manifest["base_model"].update(dtype="object"), "base_model.dtype"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_is_made_up_is_refused(empty, genuine, tmp_path, case):
    change, says = MANIFESTS[case]
    forgery = Forgery.of(genuine)
    change(forgery)
    forgery.write(tmp_path / "forged.zip")
    refused(empty, tmp_path / "forged.zip", says)


def _not_finite(tensors: dict, description: dict) -> None:
    next(rows for name, rows in tensors.items() if name.startswith("rows/"))[0, 0] = math.nan


def _one_row_less(tensors: dict, description: dict) -> None:
    name = next(name for name in tensors if name.startswith("rows/"))
    tensors[name] = tensors[name][1:]


def _wider(tensors: dict, description: dict) -> None:
    tensors |= {name: torch.zeros(len(rows), 33) for name, rows in tensors.items() if name.startswith("rows/")}


def _whole_numbers(tensors: dict, description: dict) -> None:
    tensors |= {name: rows.int() for name, rows in tensors.items() if name.startswith("rows/")}


def _no_neurons(tensors: dict, description: dict) -> None:
    for name in [name for name in tensors if name.startswith("neurons/")]:
        del tensors[name]


def _unknown_site(tensors: dict, description: dict) -> None:
    tensors["neurons/nowhere"] = torch.zeros(1, dtype=torch.uint16)


def _bomb(tensors: dict, description: dict) -> None:
    """A few neurons that stand for more rows than there is memory."""
    description["space"]["sites"][0]["parts"][0]["repeats"] = 2**40


def _no_space(tensors: dict, description: dict) -> None:
    del description["space"]


def _nan_scores(tensors: dict, description: dict) -> None:
    next(iter(tensors.values()))[0] = math.nan


def _text_for_largest(tensors: dict, description: dict) -> None:
    description["largest"] = dict.fromkeys(description["largest"], "x")


def _short_scores(tensors: dict, description: dict) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name][:-1]


FILES: dict[str, tuple[str, Callable[[dict, dict], None], str]] = {
    "rows that are not finite": ("overlay", _not_finite, "not finite"),
    "a row less": ("overlay", _one_row_less, "do not have the shapes"),
    "rows of another width": ("overlay", _wider, "do not have the shapes"),
    "rows of whole numbers": ("overlay", _whole_numbers, "torch.int32 as rows"),
    "rows without neurons": ("overlay", _no_neurons, "do not have the shapes"),
    "a site of no space": ("overlay", _unknown_site, "no site 'nowhere'"),
    "a space of its own": ("overlay", _bomb, "another neuron space"),
    "no space": ("overlay", _no_space, "is no overlay"),
    "scores that are not finite": ("scores", _nan_scores, "not finite"),
    "scores of a site that is short": ("scores", _short_scores, "must have shape"),
    "scores with text": ("scores", _text_for_largest, "is no scores"),
    "a memory of no policy": ("memory", lambda tensors, described: described.update(policy=1), "which policy"),
    "a memory that is not finite": (
        "memory",
        lambda tensors, described: tensors.update(more=torch.tensor([math.inf])),
        "not finite",
    ),
    "a signature that is not finite": (
        "signature",
        lambda tensors, described: tensors["mean"].fill_(math.nan),
        "not finite",
    ),
    "a signature of two shapes": (
        "signature",
        lambda tensors, described: tensors.update(mean=torch.zeros(7)),
        "do not go together",
    ),
    "a signature without depth": ("signature", lambda tensors, described: described.update(depth=0), "out of range"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_made_up_is_refused(empty, genuine, tmp_path, case):
    kind, change, says = FILES[case]
    forgery = Forgery.of(genuine)
    forgery.resaved(kind, tmp_path, change)
    forgery.write(tmp_path / "forged.zip")
    refused(empty, tmp_path / "forged.zip", says)


def _header(length: int, text: bytes) -> bytes:
    return struct.pack("<Q", length) + text


CONTENTS = {
    "text": b"cos\nsystem\n(S'ls'\ntR.",
    "nothing but a length": _header(2**60, b"{}"),
    "tensors beyond the file": _header(57, b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}  '),
    "a header that is nested": _header(200_000, b"[" * 200_000),
}


@pytest.mark.parametrize("kind", ["overlay", "scores", "memory", "signature"])
@pytest.mark.parametrize("content", CONTENTS)
def test_a_safetensors_file_that_lies_is_refused(empty, genuine, tmp_path, kind, content):
    forgery = Forgery.of(genuine)
    forgery.put(kind, CONTENTS[content])
    forgery.write(tmp_path / "forged.zip")
    refused(empty, tmp_path / "forged.zip", f"is no {kind} that could be used")


def test_a_file_of_another_kind_and_one_without_a_description_are_refused(empty, genuine, tmp_path):
    forgery = Forgery.of(genuine)
    overlay = forgery.files[f"files/{forgery.entry['files']['overlay']['sha256']}.safetensors"]
    forgery.put("memory", overlay)
    forgery.write(tmp_path / "forged.zip")
    refused(empty, tmp_path / "forged.zip", "'neft-overlay', not a 'neft-memory'")
    save_file({"rows/x": torch.zeros(1)}, tmp_path / "bare.safetensors")
    forgery = Forgery.of(genuine)
    forgery.put("overlay", (tmp_path / "bare.safetensors").read_bytes())
    forgery.write(tmp_path / "forged.zip")
    refused(empty, tmp_path / "forged.zip", "is no overlay")


# --- archives ---


@pytest.mark.parametrize(
    "name", ["../../escape", "/etc/escape", "files\\escape", "C:/escape", "files/", "files/x\0.safetensors", "extra"]
)
def test_a_member_that_the_manifest_does_not_name_is_refused(empty, genuine, name, tmp_path):
    with zipfile.ZipFile(genuine, "a") as archive:
        info = zipfile.ZipInfo("x")
        info.filename = info.orig_filename = name
        archive.writestr(info, b"")
    refused(empty, genuine, "is no part of it|is encrypted, or no file")
    assert not (tmp_path.parent / "escape").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_there_twice_is_refused(empty, genuine):
    with zipfile.ZipFile(genuine, "a") as archive:
        name = archive.namelist()[-1]
        archive.writestr(zipfile.ZipInfo(name), archive.read(name))
    refused(empty, genuine, "is there twice")


def test_a_member_that_is_missing_or_altered_is_refused(empty, genuine, tmp_path):
    forgery = Forgery.of(genuine)
    name = f"files/{forgery.entry['files']['memory']['sha256']}.safetensors"
    content = forgery.files.pop(name)
    forgery.write(tmp_path / "missing.zip")
    refused(empty, tmp_path / "missing.zip", f"{name} is missing")
    forgery.files[name] = content[:-1] + bytes([content[-1] ^ 1])
    forgery.write(tmp_path / "altered.zip")
    refused(empty, tmp_path / "altered.zip", f"{name} was altered")


def test_a_compressed_member_is_refused_so_that_no_bomb_is_unpacked(empty, genuine, tmp_path):
    Forgery.of(genuine).write(tmp_path / "small.zip", compression=zipfile.ZIP_DEFLATED)
    refused(empty, tmp_path / "small.zip", "is compressed")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", b" " * 2**27)
    refused(empty, tmp_path / "bomb.zip", "'manifest.json' is compressed")


def test_a_link_and_an_encrypted_member_are_refused(empty, genuine, tmp_path):
    forgery = Forgery.of(genuine)
    name, content = forgery.files.popitem()
    for path, says in (("link.zip", "no file"), ("secret.zip", "encrypted")):
        with zipfile.ZipFile(tmp_path / path, "w") as archive:
            archive.writestr("manifest.json", json.dumps(forgery.manifest))
            for each, inside in forgery.files.items():
                archive.writestr(each, inside)
            info = zipfile.ZipInfo(name)
            if path == "link.zip":
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, content)
            if path == "secret.zip":
                info.flag_bits |= 1
        refused(empty, tmp_path / path, says)


def test_sizes_are_bounded(empty, genuine, tmp_path):
    refused(empty, genuine, r"its files have [\d,]+ bytes, more than the 1,000 that are allowed", max_bytes=1000)
    with zipfile.ZipFile(tmp_path / "long.zip", "w") as archive:
        archive.writestr("manifest.json", b" " * (2**26 + 1))
    refused(empty, tmp_path / "long.zip", r"manifest.json has more than 67108864 bytes")


def test_members_over_one_another_are_refused(empty, genuine, tmp_path):
    """Every entry of the directory points at the same content, so that a small file stands for a large one."""
    forgery = Forgery.of(genuine)
    with zipfile.ZipFile(tmp_path / "over.zip", "w") as archive:
        archive.writestr("manifest.json", json.dumps(forgery.manifest))
        for name, content in forgery.files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
            *_, last = archive.infolist()
            archive.fp.seek(last.header_offset)
            archive.start_dir = last.header_offset
    refused(empty, tmp_path / "over.zip", "lie over one another")


def test_a_directory_that_claims_to_be_huge_is_refused(empty, genuine, tmp_path):
    content = bytearray(genuine.read_bytes())
    end = content.rindex(b"PK\5\6")
    content[end:end] = b"\0" * 2**24
    struct.pack_into("<LL", content, end + 2**24 + 12, 2**24 - 1, end)
    (tmp_path / "huge.zip").write_bytes(content)
    refused(empty, tmp_path / "huge.zip", "its directory has more than 8388608 bytes")


@pytest.mark.parametrize("content", [b"", b"PK\5\6", b"no archive", b"PK\3\4" + b"\0" * 100])
def test_what_is_no_archive_is_refused(empty, tmp_path, content):
    (tmp_path / "not.zip").write_bytes(content)
    refused(empty, tmp_path / "not.zip", "cannot be imported")


def test_what_is_not_there_or_another_archive_is_refused(empty, tmp_path):
    with pytest.raises(InputError, match=r"no such file: .*gone.zip \(a bundle"):
        empty.import_(tmp_path / "gone.zip")
    with pytest.raises(InputError, match="no such file"):
        empty.import_(tmp_path)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(empty, tmp_path / "other.zip", r"it has no manifest.json, so it is not a bundle")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_is_one_sentence_and_leaves_nothing(empty, genuine, tmp_path, data):
    """Bits flipped, bytes cut out or put in, at any place of the file: refused, or, where nobody reads it, imported."""
    content = bytearray(genuine.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    # Half of the damage in the directory and the manifest, where most can go wrong.
    if data.draw(st.booleans()):
        place = data.draw(st.one_of(st.integers(0, 3000), st.integers(len(content) - 1500, len(content) - 1)))
    kind = data.draw(st.sampled_from(["flip", "cut", "put", "end"]))
    if kind == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[place : place + data.draw(st.integers(1, 40))]
    elif kind == "put":
        content[place:place] = data.draw(st.binary(min_size=1, max_size=40))
    else:
        del content[place:]
    path = tmp_path / "damaged.zip"
    path.write_bytes(content)
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    shutil.copytree(Path(empty.artifacts.name).parent, folder, dirs_exist_ok=True)
    with closing(Registry.open(folder)) as fresh:
        try:
            fresh.import_(path)
        except NeftError as error:
            assert "\n" not in str(error)
            assert fresh.list() == []
            assert list(fresh.artifacts.stored()) == []
        else:
            assert len(fresh.list()) == 2


# --- the registry that it comes to ---


def test_a_base_model_that_is_recorded_otherwise_is_refused(other, genuine):
    manifest = Forgery.of(genuine).manifest["base_model"]
    other.add_base_model(manifest["fingerprint"], "elsewhere", "bfloat16", {}, manifest["parameters"])
    refused(other, genuine, "is recorded otherwise here")


def test_a_base_model_keeps_the_name_that_it_has_here(other, genuine):
    manifest = Forgery.of(genuine).manifest["base_model"]
    other.add_base_model(manifest["fingerprint"], "here", manifest["dtype"], {}, manifest["parameters"])
    assert other.import_(genuine).base_model.name == "here"


def test_neurons_that_do_not_fit_what_is_recorded_are_refused(other, genuine, base, new_pupil, tmp_path):
    there = new_pupil(other, base, step=10)
    there.record("there")
    forgery = Forgery.of(genuine)
    forgery.space["sites"][0]["parts"][0]["width"] += 1
    forgery.respaced()
    forgery.manifest["entries"] = forgery.manifest["entries"][:1]
    for kind in ("scores", "memory", "signature"):
        forgery.entry["files"][kind] = None
    forgery.resaved("overlay", tmp_path, lambda tensors, described: _fit(forgery.space, tensors, described))
    forgery.write(tmp_path / "forged.zip")
    with pytest.raises(InputError, match="have two widths, here and in it"):
        other.import_(tmp_path / "forged.zip")
    assert [each.task for each in other.list()] == ["there"]


def _fit(space: dict[str, Any], tensors: dict, description: dict) -> None:
    """Rows and description of a space whose first matrix is wider."""
    description["space"] = space
    name = f"rows/{space['sites'][0]['parts'][0]['module']}"
    tensors[name] = torch.zeros(len(tensors[name]), tensors[name].shape[1] + 1)


def test_a_store_that_cannot_be_written_records_nothing(other, genuine, monkeypatch):
    calls = []

    def put(self: FolderStore, name: str, save: Callable[[Path], None]) -> None:
        calls.append(name)
        if len(calls) == 3:
            raise FailedError("cannot write the overlay: No space left on device")
        return real(self, name, save)

    real = FolderStore.put
    monkeypatch.setattr(FolderStore, "put", put)
    with pytest.raises(FailedError, match="No space left"):
        other.import_(genuine)
    assert other.list() == []
    monkeypatch.undo()
    assert other.import_(genuine).reference == "news@1"


def test_an_imported_overlay_is_the_one_that_was_learnt(learnt_once, other, genuine, base):
    from neft.models import load_base

    model, _ = load_base(str(base))
    head = other.import_(genuine)
    for link in other.chain(head):
        overlay = other.overlay(link)
        assert isinstance(overlay, Overlay)
        overlay.lay_on(model)
        assert state_digest(model) == link.state_digest
    assert replace(head, id=0) == replace(learnt_once.get("news"), id=0)
