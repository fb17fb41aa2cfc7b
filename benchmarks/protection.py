"""What `functional` protection costs a training step: `python -m benchmarks.protection` times steps with and without.

python -m benchmarks.protection                                 # SmolLM2-135M's shape, fp32, on the CPU
python -m benchmarks.protection --shape llama-3.2-1b            # bf16, on a GPU

Both train the same neurons of one random model, step by step in turn, on the same batches; as many directions are
closed as the policy ever closes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.measure import interleaved, machine, ratios, summary, write
from benchmarks.optimiser import AdamW
from benchmarks.peers import METHODS, SHAPES, Learner, chosen, twin
from benchmarks.training import BATCHES, Training, set_up
from neft.guard import Limit, Limiter
from neft.protection.functional import Closed, Functional
from neft.tuner.model import trained_rows


class Guarded(Training):
    """Training whose rows are kept within limits."""

    def __init__(self, learner: Learner, data: torch.Tensor, autocast: bool, limits: dict[str, Limit]):
        super().__init__(learner, data, autocast)
        self.limiter = Limiter(trained_rows(learner.model), limits)

    def step(self, number: int) -> None:
        with self.limiter.gradients():
            super().step(number)

    def _update(self, optimiser: AdamW) -> None:
        self.limiter.before_step()
        super()._update(optimiser)
        self.limiter.after_step()


def limits_of(learner: Learner, most: float) -> dict[str, Limit]:
    """Random directions, `most` of each input's, for every module of the chosen neurons."""
    generator = torch.Generator().manual_seed(0)
    limits: dict[str, Limit] = {}
    for name, rows in chosen(learner.model.get_base_model()).rows().items():
        parameter = trained_rows(learner.model)[name]
        width = parameter.shape[1] if rows.side == "row" else parameter.shape[0]
        basis = torch.linalg.qr(torch.randn(width, int(most * width), generator=generator)).Q.T.contiguous()
        limits[name] = Closed(rows.side, basis.to(parameter.device)).limit
    return limits


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times of both, interleaved."""
    base, data, device = set_up(arguments)
    autocast = device.type == "cuda"
    plain, guarded = METHODS["neft"](twin(base)), METHODS["neft"](twin(base))
    most = Functional().closed
    trainings = {
        "unprotected": Training(plain, data, autocast),
        "functional": Guarded(guarded, data, autocast, limits_of(guarded, most)),
    }
    taken = interleaved({name: each.step for name, each in trainings.items()}, BATCHES, arguments.rounds, device)
    return {
        "machine": machine(device),
        "shape": arguments.shape,
        "batch": arguments.batch,
        "tokens": arguments.tokens,
        "closed": most,
        "seconds": {name: summary(values) for name, values in taken.items()},
        "ratio": ratios(taken["functional"], taken["unprotected"]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the command line says, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8, help="examples in a batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an example")
    parser.add_argument("--rounds", type=int, default=12, help="measured rounds, after one epoch of warm-up")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has, to try things out")
    arguments = parser.parse_args(argv)
    name = f"protection-{arguments.shape}-{torch.device(arguments.device).type}"
    write(f"trial-{name}" if arguments.layers else name, measure(arguments))


if __name__ == "__main__":
    main()
