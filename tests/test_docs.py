"""What the pages tell the reader to type runs, one block after the other, as a new user would run it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])

#: What a page's blocks take for granted, in front of them. Other pages need data or a registry of their own.
PREAMBLES = {
    "docs/guides/train-with-peft.md": "",
    "docs/extending.md": """
from dataclasses import dataclass
from functools import partial
from typing import ClassVar
import torch
from neft.guard import Guard
from neft.protection import Candidates, ProtectionPolicy
from neft.scoring import Scores
from neft.scoring.taps import run_tapped
""",
    # A tiny model stands in for the one on the hub.
    "README.md": """
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=128, num_hidden_layers=5, num_attention_heads=4)
transformers.AutoModelForCausalLM.from_pretrained = lambda name: LlamaForCausalLM(config)
""",
}
#: What shows that the blocks did something, behind them.
CHECKS = {
    "docs/guides/train-with-peft.md": "assert type(merged) is LlamaForCausalLM and mixed.shape == (4, 10, 64)",
    "docs/extending.md": """
from neft import NeuronSpace
from tests.tiny import batch, tiny_model
model = tiny_model()
space = NeuronSpace.from_model(model)
scores = Loudest().score(model, None, space, [batch(model)], seed=0)
assert all((values > 0).all() for values in scores.values.values())
from neft import NeuronSet
from neft.protection import Learnt
site = space.sites[0]
neurons, earlier = (NeuronSet(space, {site.name: each}) for each in (range(8), range(4)))
assert Slow().candidates(scores, [], space.none()).free == space.all()
assert Slow().guard(model, neurons, []) is None
limits = Slow().guard(model, neurons, [Learnt("before", earlier)]).limits()
for module, limit in limits.items():
    change = limit(torch.ones(8, 3))
    assert change[:, 0].tolist() == torch.tensor([0.1] * 4 + [1.0] * 4).tolist()
""",
    "README.md": "assert peft_model.num_parameters(only_trainable=True) == 103 * 3 * 32",
}


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PREAMBLES)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path) -> None:
    found = blocks(ROOT / page)
    assert found
    program = tmp_path / "page.py"
    program.write_text("\n".join([PREAMBLES[page], *found, CHECKS[page]]))
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []
