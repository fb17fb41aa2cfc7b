"""What the registry costs: `python -m benchmarks.registry` measures look-ups over 10,000 entries of a 7B model's sets.

The entries are made up: sets of a tenth of the feed-forward neurons of a Llama-2-7B shape, in families of a hundred
whose members share most of their neurons, written to the database as the registry writes them, but without files.
Recording and checking out are measured with files, on a 135M shape, in a registry of their own. Each database is
measured in turn; PostgreSQL is the one that `NEFT_TEST_POSTGRES` names, or the one on 127.0.0.1:5432.

python -m benchmarks.registry                     # both databases, about a quarter of an hour
python -m benchmarks.registry --entries 500       # a look at whether it works
"""

from __future__ import annotations

import argparse
import http.client
import random
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyroaring import FrozenBitMap
from sqlalchemy import insert, text
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import machine, summary, write
from benchmarks.peers import SHAPES
from neft.audit import base_fingerprint, state_digest
from neft.models import load_base
from neft.neurons import NeuronSet, NeuronSpace
from neft.overlay import Overlay
from neft.scoring import Scores
from registry import Entry, NewEntry, Registry
from registry.bitmaps import written
from registry.schema import AliasRow, BaseModelRow, EntryRow, MetricRow, NeuronSetRow, NeuronSpaceRow, TaskRow

SEVEN = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
FAMILY, SHARED = 100, 0.7
TASKS = 500
CHAIN, RECORDS = 20, 12
SERVED_SECONDS, CLIENTS = 8.0, 4


# The entries of a 7B model


def seven_space() -> NeuronSpace:
    """The feed-forward neurons of a Llama-2-7B, found in a model without weights."""
    with torch.device("meta"):
        return NeuronSpace.from_model(LlamaForCausalLM(SEVEN))


def made_up(neurons: int, count: int, seed: int = 0) -> Iterator[FrozenBitMap]:
    """Sets of a tenth of the neurons; of a family's, each shares 7 in 10 of its neurons with the family's pool."""
    draw = np.random.default_rng(seed)
    size = neurons // 10
    pool = np.empty(0, dtype=np.int64)
    for number in range(count):
        if number % FAMILY == 0:
            pool = draw.choice(neurons, size, replace=False)
        kept = pool[draw.permutation(size)[: round(SHARED * size)]]
        # Some are drawn twice or are kept already: more than enough are drawn.
        others = np.setdiff1d(draw.integers(neurons, size=size), kept)
        others = others[draw.permutation(len(others))[: size - len(kept)]]
        yield FrozenBitMap(np.concatenate([kept, others]).astype(np.uint32))


def fill(registry: Registry, space: NeuronSpace, count: int) -> None:
    """Write `count` entries of `TASKS` tasks, each task's newest called champion, as `Registry.record` does."""
    fingerprint = uuid.uuid4().hex
    registry.add_base_model(fingerprint, "a 7B shape", "bfloat16", SEVEN.to_dict(), space.model_parameters)
    database = registry._database

    def begin(session: Any) -> list[int]:
        base = session.query(BaseModelRow).filter_by(fingerprint=fingerprint).one()
        description = space.to_dict()
        session.add(NeuronSpaceRow(fingerprint=space.fingerprint, description=description, neurons=len(space)))
        tasks = [TaskRow(name=f"task-{number}", base_model=base) for number in range(min(TASKS, count))]
        session.add_all(tasks)
        session.flush()
        return [task.id for task in tasks]

    tasks = database.write(begin)
    newest: dict[int, int] = {}
    capacity = {site.name: [site.size, site.size - site.size // 10] for site in space.sites}
    for start in range(0, count, 200):
        numbers = range(start, min(start + 200, count))
        bitmaps = list(made_up(len(space), 200, seed=start))[: len(numbers)]

        def write_some(session: Any, numbers: range = numbers, bitmaps: list[FrozenBitMap] = bitmaps) -> None:
            for number, bitmap in zip(numbers, bitmaps, strict=True):
                task = tasks[number % len(tasks)]
                metrics = {"scores": {f"task-{other}": 0.5 + other / 100 for other in range(10)}, "capacity": capacity}
                row = EntryRow(**_columns(task, number, len(tasks), bitmap, space, metrics))
                session.add(row)
                session.flush()
                session.add(NeuronSetRow(entry_id=row.id, space_fingerprint=space.fingerprint, bitmap=written(bitmap)))
                values = [
                    {"entry_id": row.id, "name": f"scores/{name}", "value": value}
                    for name, value in metrics["scores"].items()
                ]
                session.execute(insert(MetricRow), values)
                newest[task] = row.id

        database.write(write_some)
        _say(f"{numbers.stop:,} of {count:,} entries written")
    database.write(
        lambda session: session.add_all(
            AliasRow(task_id=task, name="champion", entry_id=entry) for task, entry in newest.items()
        )
    )


def _columns(
    task: int, number: int, tasks: int, bitmap: FrozenBitMap, space: NeuronSpace, metrics: dict[str, Any]
) -> dict[str, Any]:
    digest = uuid.uuid5(uuid.NAMESPACE_OID, str(number)).hex * 2
    return {
        "task_id": task,
        "version": number // tasks + 1,
        "stream": f"stream-{number % 10}",
        "input_digest": digest,
        "seed": number,
        "data_fingerprint": digest,
        "method": {"scorer": "taylor", "budget": 0.1, "kinds": ["ffn"], "protection": "functional"},
        "training": {"max_steps": 40, "learning_rate": 1e-3},
        "overlay_sha256": digest,
        "overlay_bytes": 1,
        "neuron_count": len(bitmap),
        "parameter_count": len(bitmap) * 3 * SEVEN.hidden_size,
        "space_fingerprint": space.fingerprint,
        "state_digest": digest,
        "metrics": metrics,
        "audit": {"identical": True},
        "versions": {"torch": torch.__version__},
    }


# Look-ups


def lookups(registry: Registry, space: NeuronSpace, count: int) -> dict[str, Any]:
    """Seconds of the look-ups that the bars are about, and of a plain NumPy loop beside the nearest sets."""
    draw = random.Random(0)
    tasks = min(TASKS, count)
    named = [_seconds(lambda: registry.get(f"task-{draw.randrange(tasks)}@champion")) for _ in range(2000)]
    sites = [site.name for site in space.sites]
    cold = _seconds(lambda: registry.owners(sites[0], 0))
    owners = [
        _seconds(lambda: registry.owners(draw.choice(sites), draw.randrange(space.sites[0].size))) for _ in range(100)
    ]
    entry = registry.get("task-7@champion")
    near = [_seconds(lambda: registry.nearest(entry, 10)) for _ in range(20)]
    loop, agrees = _numpy_loop(registry, space, entry, count)
    searched = [
        _seconds(lambda: registry.search("metrics.`scores/task-3` > 0.5 AND alias = 'champion'")) for _ in range(10)
    ]
    return {
        "by_alias": summary(named) | {"p50": float(np.quantile(named, 0.5)), "p99": float(np.quantile(named, 0.99))},
        "owners_first_call": cold,
        "owners": summary(owners),
        "nearest": summary(near),
        "nearest_numpy_loop": loop,
        "nearest_agrees": agrees,
        "search": summary(searched),
    }


def _numpy_loop(registry: Registry, space: NeuronSpace, entry: Entry, count: int) -> tuple[float, bool]:
    """Seconds that the plain loop over all sets takes, counted up from a tenth of them; whether both agree on those."""
    some = [each for each in registry.search(max_results=max(count // 10, 50)).entries if each.id != entry.id]
    starts = np.cumsum([0, *(site.size for site in space.sites)])
    sets = {each.reference: _flat(registry.neurons(each), starts) for each in some}
    mine = _flat(registry.neurons(entry), starts)
    start = time.perf_counter()
    ious = {}
    for reference, numbers in sets.items():
        shared = len(np.intersect1d(mine, numbers, assume_unique=True))
        ious[reference] = shared / (len(mine) + len(numbers) - shared)
    seconds = (time.perf_counter() - start) / len(sets) * count
    found = {each.entry: each.value for each in registry.nearest(entry, count)}
    return seconds, all(abs(found[reference] - value) < 1e-12 for reference, value in ious.items())


def _flat(neurons: NeuronSet, starts: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [neurons[site.name] + start for site, start in zip(neurons.space.sites, starts[:-1], strict=True)]
    )


def database_bytes(registry: Registry, count: int) -> float:
    """Bytes of the whole database over its entries."""
    engine = registry._database._engine
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
            return Path(str(engine.url.database)).stat().st_size / count
        return float(connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one()) / count


# Recording and checking out


def recording(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds to record an entry, files and fsync included; then of checking a chain out, beside reading the model."""
    base = folder / "model"
    model = LlamaForCausalLM(LlamaConfig(**SHAPES["smollm2-135m"].to_dict()))
    model.save_pretrained(base)
    _tokenizer().save_pretrained(base)
    model, _ = load_base(str(base), "float32")
    space = NeuronSpace.from_model(model)
    registry = Registry.open(**arguments)
    fingerprint = base_fingerprint(model)
    registry.add_base_model(fingerprint, str(base), "float32", model.config.to_dict(), space.model_parameters)
    seconds, parent = [], None
    for number in range(max(CHAIN, RECORDS)):
        new = _learnt(model, space, fingerprint, number, parent)
        start = time.perf_counter()
        parent = registry.record(new)
        seconds.append(time.perf_counter() - start)
        _say(f"recorded {parent.reference} in {seconds[-1]:.3f} s")
    assert parent is not None
    overlay = registry.overlay(parent)
    del model
    checkouts, readings = [], []
    for _ in range(5):
        readings.append(_seconds(lambda: load_base(str(base), "float32")))
        checkouts.append(_seconds(lambda: registry.checkout(parent)))
        _say(f"read the model in {readings[-1]:.2f} s, checked {CHAIN} out in {checkouts[-1]:.2f} s")
    registry.close()
    return {
        "record": summary(seconds[-RECORDS:]),
        "overlay_bytes": parent.overlay_file.bytes,
        "parameters": overlay.parameters,
        "read_model": summary(readings),
        "checkout": summary(checkouts),
        "checkout_to_reading": summary([out / read for out, read in zip(checkouts, readings, strict=True)]),
        "chain": CHAIN,
    }


def _learnt(
    model: LlamaForCausalLM, space: NeuronSpace, fingerprint: str, number: int, parent: Entry | None
) -> NewEntry:
    """What a task leaves to record that has changed a tenth of the neurons; the model holds it."""
    torch.manual_seed(number)
    neurons = NeuronSet(space, {site.name: torch.randperm(site.size)[: site.size // 10] for site in space.sites})
    there = Overlay.read(model, neurons)
    overlay = Overlay(neurons, {name: rows + torch.randn_like(rows) * 1e-3 for name, rows in there.values.items()})
    overlay.lay_on(model)
    return NewEntry(
        task=f"task-{number}",
        stream="benchmark",
        base_model=fingerprint,
        parent=parent,
        input_digest=f"benchmark-{number}",
        seed=number,
        data_fingerprint="none",
        method={"scorer": "random"},
        training={},
        neurons=neurons,
        overlay=overlay,
        scores=Scores(space, {site.name: torch.rand(site.size) for site in space.sites}),
        state_digest=state_digest(model),
        metrics={"scores": {f"task-{number}": 0.5}},
        audit={"identical": True},
        versions={},
    )


def _tokenizer() -> Any:
    from tests.tiny import tiny_tokenizer

    return tiny_tokenizer()


# Served


def served(arguments: dict[str, Any], tasks: int) -> dict[str, float]:
    """Look-ups a second over HTTP, by clients in this process, of a server in another."""
    code = (
        "import sys, json, uvicorn; from registry import Registry; from registry.server import create_app; "
        "arguments = json.loads(sys.argv[1]); "
        "uvicorn.run(create_app(Registry.open(**arguments)), host='127.0.0.1', port=int(sys.argv[2]), "
        "log_level='warning')"
    )
    import json

    port = _free_port()
    server = subprocess.Popen([sys.executable, "-c", code, json.dumps(arguments), str(port)])
    try:
        _wait_for(port)
        counts = [0] * CLIENTS
        until = time.monotonic() + SERVED_SECONDS
        threads = [threading.Thread(target=_ask, args=(port, until, counts, each, tasks)) for each in range(CLIENTS)]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"lookups_a_second": sum(counts) / (time.monotonic() - start), "clients": CLIENTS}
    finally:
        server.terminate()
        server.wait(timeout=30)


def _ask(port: int, until: float, counts: list[int], which: int, tasks: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    draw = random.Random(which)
    while time.monotonic() < until:
        connection.request("GET", f"/api/entries/task-{draw.randrange(tasks)}@champion")
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise SystemExit(f"the server answered {answer.status}")
        counts[which] += 1
    connection.close()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int) -> None:
    for _ in range(300):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/api/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server did not start")


# All of it


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def _places(kind: str, folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Two new registries on a database: what `Registry.open` takes."""
    if kind == "sqlite":
        yield tuple({"location": str(folder / name)} for name in ("many", "few"))  # type: ignore[misc]
        return
    from tests.registry.postgres import new_database

    with new_database() as many, new_database() as few:
        yield tuple({"url": url, "artifacts": str(folder / name)} for name, url in (("many", many), ("few", few)))  # type: ignore[misc]


def measured(kind: str, count: int) -> dict[str, Any]:
    """All figures on one database."""
    with tempfile.TemporaryDirectory(prefix="neft-registry-") as name:
        folder = Path(name)
        with _places(kind, folder) as (many, few):
            space = seven_space()
            registry = Registry.open(**many)
            fill(registry, space, count)
            found = lookups(registry, space, count)
            found["bytes_an_entry"] = database_bytes(registry, count)
            registry.close()
            _say(f"{kind}: {found}")
            found |= served(many, min(TASKS, count))
            found |= recording(few, folder)
    return found | {"entries": count, "neurons": len(space), "neurons_a_set": len(space) // 10}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the command line says, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--databases", nargs="+", choices=("sqlite", "postgresql"), default=["sqlite", "postgresql"])
    arguments = parser.parse_args(argv)
    databases = {kind: measured(kind, arguments.entries) for kind in arguments.databases}
    write("registry", {"machine": machine(torch.device("cpu")), "databases": databases})


if __name__ == "__main__":
    main()
