"""Streams under the `keystone` policy: no task touches a keystone, or every task nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from flows.config import load_config
from flows.identity import run_digest
from flows.tracking import Tracker
from flows.workbench import Workbench
from neft.audit import state_digest
from neft.errors import FailedError
from neft.keystone import KeystoneSearch
from neft.models import load_base
from neft.neurons import NeuronSet, NeuronSpace
from neft.protection.keystone import KeystoneGuard
from registry import Registry
from tests.learnt import Learnt, learn
from tests.tiny import KEYSTONE_PROMPTS, TASKS, write_stream

RHO, NEW_TOKENS = 0.3, 5
FEW_STEPS = "training.max_steps=2"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The tiny stream, with prompts in a folder beside it."""
    (tmp_path / "stream" / "prompts").mkdir(parents=True)
    (tmp_path / "stream" / "prompts" / "tiny.yaml").write_text(yaml.safe_dump(KEYSTONE_PROMPTS, sort_keys=False))
    return write_stream(tmp_path / "stream")


def guarded(**options: Any) -> str:
    """An override that chooses the policy."""
    choice = {"name": "keystone", "prompts": "prompts/tiny.yaml", "rho": RHO, "new_tokens": NEW_TOKENS, **options}
    return f"method.protection={yaml.safe_dump(choice, default_flow_style=True).strip()}"


def keystones(config: Path) -> NeuronSet:
    """Those of the stream's untouched base model."""
    model, tokenizer = load_base(str(config.parent / "model"))
    search = KeystoneSearch(config.parent / "prompts" / "tiny.yaml", RHO, NEW_TOKENS)
    return search.find(model, tokenizer, NeuronSpace.from_model(model)).neurons


def learnt_sets(learnt: Learnt) -> list[NeuronSet]:
    with learnt.registry() as registry:
        return [registry.neurons(entry) for entry in registry.list()]


def test_no_task_touches_a_keystone(config: Path, tmp_path: Path, prefect_server: None) -> None:
    learnt = learn(config, tmp_path / "home", guarded())
    found, sets = keystones(config), learnt_sets(learnt)
    assert len(found) > 3
    assert len(sets) == len(TASKS)
    for place, neurons in enumerate(sets):
        assert len(neurons) == 32
        assert not neurons & found
        assert all(not neurons & other for other in sets[:place])
    rows = (learnt.run.matrix or {})["rows"]
    assert sum(rows[place + 1][place] for place in range(len(TASKS))) / len(TASKS) > 0.7


def test_only_keystones_are_trained_and_tasks_share_them(
    config: Path, tmp_path: Path, prefect_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = keystones(config)
    options = (f"method.budget={len(found) - 1}", "method.selection.scope=global", FEW_STEPS)
    learnt = learn(config, tmp_path / "home", guarded(only=True), *options)
    assert f"reserves {len(found)} neurons" in capsys.readouterr().err
    for neurons in learnt_sets(learnt):
        assert len(neurons) == len(found) - 1
        assert not neurons - found


def test_a_budget_beyond_the_keystones_is_one_clear_sentence(
    config: Path, tmp_path: Path, prefect_server: None
) -> None:
    count = len(keystones(config))
    with pytest.raises(
        FailedError,
        match=rf"asks for {count + 1} neurons in the model, where {count} neurons are free \(of 128 neurons in all; "
        r"method\.protection keeps the rest\): lower method\.budget",
    ):
        learn(config, tmp_path, guarded(only=True), f"method.budget={count + 1}", "method.selection.scope=global")


def test_a_stream_that_goes_on_asks_the_untouched_model(
    config: Path, tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = KeystoneGuard.reserve

    def reserve(self: KeystoneGuard, model: Any, tokenizer: Any, space: NeuronSpace) -> NeuronSet:
        asked.append(state_digest(model))
        return real(self, model, tokenizer, space)

    monkeypatch.setattr(KeystoneGuard, "reserve", reserve)
    base = state_digest(load_base(str(config.parent / "model"))[0])
    for tasks in (1, 2):
        write_stream(config.parent, tasks=tasks)
        learnt = learn(config, tmp_path / "home", guarded(), FEW_STEPS)
    assert asked == [base, base]
    assert len(sets := learnt_sets(learnt)) == 2
    assert all(not neurons & keystones(config) for neurons in sets)


# What was done is decided by content


def identities(config: Path, *overrides: str) -> tuple[str, str]:
    """Digests of the run and of its first task."""
    parsed = load_config(config, overrides)
    bench = Workbench(parsed, cast(Registry, None), cast(Tracker, None), None)
    bench.load()
    bench.begin(0)
    return run_digest(bench.setting, bench.standing.tokenizer), bench.work.input_digest


@pytest.mark.parametrize("key", ["scorer", "protection"])
def test_prompts_count_by_their_content_and_not_by_their_name(config: Path, tmp_path: Path, key: str) -> None:
    def of(prompts: str) -> tuple[str, str]:
        return identities(config, f"method.{key}={{name: keystone, prompts: {prompts}}}")

    original = config.parent / "prompts" / "tiny.yaml"
    first = of("prompts/tiny.yaml")
    shutil.copy(original, tmp_path / "copy.yaml")
    assert of(str(tmp_path / "copy.yaml")) == first
    original.write_text(yaml.safe_dump(KEYSTONE_PROMPTS | {"fillers": ["the"]}))
    changed = of("prompts/tiny.yaml")
    assert changed[0] != first[0] and changed[1] != first[1]


def test_the_prompts_that_neft_comes_with_count_too(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of neft may bring others."""
    from flows import identity

    first = identities(config, "method.protection=keystone")
    plain = identities(config)
    monkeypatch.setattr(identity, "contents", lambda _: {"prompts": "others"})
    assert identities(config, "method.protection=keystone") != first
    monkeypatch.undo()
    assert identities(config) == plain
