"""Protection while a task trains: every policy with every scorer, and what each one's guard does to the training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from neft.audit import Audit, state_digest
from neft.encoding import IGNORED, batches
from neft.guard import Guard
from neft.keystone import KeystoneSearch
from neft.memory import Memory
from neft.neurons import NeuronSet, NeuronSpace
from neft.overlay import Overlay
from neft.protection import POLICIES, Learnt, ProtectionPolicy
from neft.protection.distill import Distill
from neft.protection.replay import Replay
from neft.protection.soft import Soft
from neft.scoring import SCORERS, Scores
from neft.scoring.keystone import Keystone
from neft.scoring.similarity import Similarity
from neft.selection import Budget, select
from neft.tasks import Example, Task
from neft.training import train
from neft.tuner import NeftConfig
from neft.tuner.model import trained_rows
from tests.neft.helpers import jitter
from tests.neft.test_training import TASK, TOKENIZER, spec
from tests.tiny import ANIMALS, KEYSTONE_PROMPTS, tiny_model

BEFORE = Task(
    "before",
    tuple(Example(f"Text: the {animal} Kind:", (" tame", " wild")[place % 2]) for place, animal in enumerate(ANIMALS)),
    (),
    "accuracy",
    (" tame", " wild"),
)


@pytest.fixture(scope="module")
def space() -> NeuronSpace:
    return NeuronSpace.from_model(tiny_model())


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ProtectionPolicy]:
    path = tmp_path_factory.mktemp("keystones") / "prompts.yaml"
    path.write_text(yaml.safe_dump(KEYSTONE_PROMPTS, sort_keys=False))
    search = {"prompts": path, "rho": 0.2, "new_tokens": 3}
    return {name: kind(**(search if issubclass(kind, KeystoneSearch) else {})) for name, kind in POLICIES.items()}


@pytest.fixture(scope="module")
def scores_of(space: NeuronSpace) -> Callable[[str], Scores]:
    made: dict[str, Scores] = {}
    options = {"similarity": Similarity(steps=2, learning_rate=1e-3), "keystone": Keystone(rho=0.1, new_tokens=3)}

    def scores(name: str) -> Scores:
        if name not in made:
            scorer = options.get(name) or SCORERS[name]()
            read = list(batches(TOKENIZER, TASK.train[:4], 4, 32))
            made[name] = scorer.score(tiny_model(), TOKENIZER, space, read, 0)
        return made[name]

    return scores


def earlier_task(policy: ProtectionPolicy, model: PreTrainedModel, scores: Scores) -> Learnt:
    """A task that the lowest neurons of every site were trained for."""
    neurons = NeuronSet(scores.space, {site.name: range(16) for site in scores.space.sites})
    return Learnt("before", neurons, scores, policy.remember(model, TOKENIZER, neurons, BEFORE, 32, 0))


#: Every scorer meets a policy that takes neurons away, and every policy the default scorer.
PAIRS = [
    *((scorer, "exclude") for scorer in SCORERS),
    *(("taylor", policy) for policy in POLICIES if policy != "exclude"),
]


@pytest.mark.parametrize(("scorer", "policy"), PAIRS)
def test_a_task_trains_its_own_neurons_alone_by_every_scorer_and_policy(
    scorer: str,
    policy: str,
    space: NeuronSpace,
    policies: Mapping[str, ProtectionPolicy],
    scores_of: Callable[[str], Scores],
) -> None:
    model, protection, scores = tiny_model(), policies[policy], scores_of(scorer)
    before = state_digest(model)
    earlier = [earlier_task(protection, model, scores)]
    found = protection.candidates(scores, earlier, protection.reserve(model, TOKENIZER, space))
    neurons = select(found.scores, Budget(neurons=0.2), None, found.free, found.when_full, found.lent).neurons
    guard = protection.guard(model, neurons, earlier)
    assert state_digest(model) == before
    audit = Audit(model, neurons)
    peft_model = get_peft_model(model, NeftConfig.from_neurons(neurons, task_type="CAUSAL_LM"))
    train(peft_model, TOKENIZER, TASK, spec(max_steps=1), 0, guard=guard)
    overlay: Overlay = peft_model.base_model.overlay(neurons)
    base = peft_model.unload()
    assert state_digest(base) == before
    overlay.lay_on(base)
    assert audit.compare(base).identical
    assert state_digest(base) != before
    if policy in ("exclude", "keystone"):
        assert not len(neurons & earlier[0].neurons)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_first_task_is_learnt_as_without_protection(policy: str, policies: Mapping[str, ProtectionPolicy]) -> None:
    model = tiny_model()
    assert policies[policy].guard(model, draw_some(model), []) is None


def draw_some(model: PreTrainedModel) -> NeuronSet:
    space = NeuronSpace.from_model(model, ("ffn", "attention"))
    return NeuronSet(space, {site.name: range(0, site.size, 2) for site in space.sites})


def trained(guard: Guard | None, **changes: Any) -> tuple[dict[str, torch.Tensor], NeuronSet]:
    """How far training has moved every trained row, (k,), and the neurons."""
    model = tiny_model()
    neurons = draw_some(model)
    peft_model = get_peft_model(model, NeftConfig.from_neurons(neurons, task_type="CAUSAL_LM"))
    before = {name: rows.detach().clone() for name, rows in trained_rows(peft_model).items()}
    train(peft_model, TOKENIZER, TASK, spec(**changes), 0, guard=guard)
    return {name: rows.detach() - before[name] for name, rows in trained_rows(peft_model).items()}, neurons


# Soft


def learnt_with(values: Callable[[int], torch.Tensor], neurons: NeuronSet, task: str = "before") -> Learnt:
    scores = Scores(neurons.space, {site.name: values(site.size) for site in neurons.space.sites})
    return Learnt(task, neurons, scores)


def test_soft_keeps_what_matters_and_lets_the_rest_move() -> None:
    """All of a site's score in its even neurons up to the sixth: those stay, to the bit; the others move as ever."""

    def values(size: int) -> torch.Tensor:
        return torch.zeros(size).index_fill(0, torch.tensor([0, 2, 4, 6]), 1.0)

    model = tiny_model()
    neurons = draw_some(model)
    guard = Soft().guard(model, neurons, [learnt_with(values, neurons)])
    settings = {"max_grad_norm": 0.0, "max_steps": 1}
    free, _ = trained(None, **settings)
    moved, _ = trained(guard, **settings)
    # Sites of 64 neurons have a mean of 1/16 there, so those four stand at 16, whose tanh is 1; attention's at 4.
    kept = neurons.per_row({site.name: values(site.size) for site in neurons.space.sites})
    for module, change in moved.items():
        important = kept[module] == 1
        assert important.any() and not important.all()
        if ".mlp." in module:
            assert torch.equal(change[important], torch.zeros_like(change[important])), module
        assert change[important].abs().max() < 0.05 * free[module][important].abs().max()
        assert torch.equal(change[~important], free[module][~important])


def test_soft_importance_is_the_tanh_of_the_largest_score_of_earlier_tasks() -> None:
    model = tiny_model()
    neurons = draw_some(model)
    first = learnt_with(lambda size: torch.arange(size, dtype=torch.float32), neurons)
    second = learnt_with(lambda size: torch.arange(size, dtype=torch.float32).flip(0), neurons, "second")
    guard = Soft().guard(model, neurons, [first, second])
    assert guard is not None
    for module, limit in guard.limits().items():
        rows = neurons.rows()[module].positions
        if ".mlp." in module:
            normal = torch.from_numpy(rows).float() / 31.5
            importance = torch.tanh(torch.maximum(normal, 2 - normal))
            change = torch.ones(len(rows), 3)
            torch.testing.assert_close(limit(change), (1 - importance)[:, None] * change)


# Replay


def test_replay_remembers_balanced_examples_and_rehearses_its_share(space: NeuronSpace) -> None:
    rows = tuple(Example(f"Text: {place} Kind:", " wild" if place < 6 else " tame") for place in range(60))
    policy = Replay(examples=8, share=0.25)
    memory = policy.remember(tiny_model(), TOKENIZER, space.none(), replace(BEFORE, train=rows), 32, 0)
    assert memory is not None
    kept = {(prompt, completion) for prompt, completion in memory.description["examples"]}
    assert kept <= {(row.prompt, row.completion) for row in rows}
    assert Counter(completion for _, completion in kept) == {" wild": 4, " tame": 4}
    again, other = (
        policy.remember(tiny_model(), TOKENIZER, space.none(), replace(BEFORE, train=rows), 32, seed) for seed in (0, 1)
    )
    assert again == memory
    assert other != memory
    guard = policy.guard(tiny_model(), space.none(), [Learnt("before", space.none(), None, memory)])
    assert guard is not None
    rehearsed = guard.rehearsed(60)
    assert len(rehearsed) == 20  # a quarter of eighty
    assert {(each.prompt, each.completion) for each in rehearsed} == kept


def test_replay_comes_back_from_its_file(tmp_path: Any, space: NeuronSpace) -> None:
    chat = Example(({"role": "user", "content": "the old cat"},), " tame")
    policy = Replay(examples=2)
    memory = policy.remember(tiny_model(), TOKENIZER, space.none(), replace(BEFORE, train=(chat,)), 32, 0)
    assert memory is not None
    memory.save(tmp_path / "memory")
    guard = policy.guard(
        tiny_model(), space.none(), [Learnt("x", space.none(), None, Memory.load(tmp_path / "memory"))]
    )
    assert guard is not None
    assert guard.rehearsed(3) == (chat,) * 3  # as many old rows as new ones


def test_replay_without_a_memory_of_its_own_rehearses_nothing(space: NeuronSpace) -> None:
    foreign = Memory("subspace", {"a": torch.zeros(3)})
    earlier = [Learnt("a", space.none()), Learnt("b", space.none(), None, foreign)]
    assert Replay().guard(tiny_model(), space.none(), earlier) is None


# Distillation


def distilling(**options: Any) -> Guard:
    policy = Distill(**options)
    model = tiny_model()
    guard = policy.guard(model, draw_some(model), [Learnt("before", draw_some(model))])
    assert guard is not None
    return guard


def moved_model() -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """A model whose adapter's rows have moved, in training mode, and a batch of prompts and completions."""
    model = tiny_model()
    peft_model = get_peft_model(model, NeftConfig.from_neurons(draw_some(model), task_type="CAUSAL_LM")).train()
    return peft_model, next(iter(batches(TOKENIZER, TASK.train, 6, 32)))


def test_the_divergence_is_that_of_the_prompts_next_tokens() -> None:
    peft_model, inputs = moved_model()
    guard = distilling(weight=3.0, temperature=1.5, positions=99)
    start = guard.penalty(peft_model, inputs)
    assert start is not None
    assert float(start) == pytest.approx(0, abs=1e-6)
    jitter(peft_model)
    penalty = guard.penalty(peft_model, inputs)
    with torch.no_grad():
        now = peft_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        before = tiny_model()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    divergences = []
    for row, labels in enumerate(inputs["labels"]):
        prompt = int((labels != IGNORED).nonzero()[0])
        # The last token of the prompt predicts the completion, which is to change.
        p, q = (F.softmax(logits[row, : prompt - 1] / 1.5, -1) for logits in (before, now))
        divergences += (p * (p / q).log()).sum(-1).tolist()
    assert penalty is not None
    assert float(penalty) == pytest.approx(3 * 1.5**2 * sum(divergences) / len(divergences), rel=1e-4)
    assert float(penalty) > 0.01


def test_a_penalty_reaches_the_trained_rows_and_leaves_the_model_as_it_is() -> None:
    peft_model, inputs = moved_model()
    jitter(peft_model)
    guard = distilling()
    with torch.no_grad():
        before = peft_model(**inputs).logits
    penalty = guard.penalty(peft_model, inputs)
    assert penalty is not None
    penalty.backward()
    assert all(rows.grad is not None and rows.grad.abs().sum() > 0 for rows in trained_rows(peft_model).values())
    assert peft_model.training
    with torch.no_grad():
        assert torch.equal(peft_model(**inputs).logits, before)


def test_a_few_positions_are_drawn_anew_for_each_batch() -> None:
    peft_model, inputs = moved_model()
    jitter(peft_model)
    guard = distilling(positions=1)
    assert len({float(guard.penalty(peft_model, inputs) or 0) for _ in range(6)}) > 1
    state = torch.random.get_rng_state()
    guard.penalty(peft_model, inputs)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_without_a_prompt_there_is_nothing_to_hold_on_to() -> None:
    peft_model, inputs = moved_model()
    bare = {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)}
    assert distilling().penalty(peft_model, bare) is None


def test_distillation_holds_the_model_to_what_it_was() -> None:
    inputs = moved_model()[1]
    drift = []
    for guard in (None, distilling(weight=20.0)):
        model = tiny_model()
        peft_model = get_peft_model(model, NeftConfig.from_neurons(draw_some(model), task_type="CAUSAL_LM"))
        train(peft_model, TOKENIZER, TASK, spec(max_steps=15), 0, guard=guard)
        drift.append(float(distilling(positions=99).penalty(peft_model, inputs) or 0))
    assert drift[1] < drift[0] / 2


def test_distillation_goes_with_hidden_states_that_are_kept() -> None:
    """The layers below the trained ones are the same with and without the task's rows."""
    found = []
    for cached in (False, True):
        model = tiny_model()
        space = NeuronSpace.from_model(model)
        neurons = NeuronSet(space, {space.sites[1].name: range(30)})
        peft_model = get_peft_model(model, NeftConfig.from_neurons(neurons, task_type="CAUSAL_LM"))
        settings = spec(max_steps=9, cache_frozen_layers=cached)
        train(peft_model, TOKENIZER, TASK, settings, 0, guard=distilling(weight=5.0))
        found.append({name: rows.detach() for name, rows in trained_rows(peft_model).items()})
    for name, rows in found[0].items():
        torch.testing.assert_close(found[1][name], rows, rtol=1e-4, atol=1e-5)
