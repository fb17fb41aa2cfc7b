"""What an overlay costs in use: `python -m benchmarks.serving` times inference with one on, and switching between two.

Inference: a forward over prompts, and greedy decoding, with an overlay in the base weight, beside the base model, in
turn. Switching: another overlay, held in memory on the CPU, is made the active one in a Llama-3.2-1B shape, bf16, and
every weight is compared with the base's, bit for bit, after the last one is taken off. Needs torch, transformers and
peft alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from benchmarks.measure import interleaved, machine, ratios, summary, write
from benchmarks.peers import SHAPES, chosen, fresh_model, twin
from neft.neurons import NeuronSet
from neft.tuner import NeftConfig, NeftLinear

_PROMPT, _NEW = 128, 32


def _served(model: LlamaForCausalLM, *sets: NeuronSet) -> PeftModel:
    """The model with an adapter for each set, `a`, `b`, ..., none of them in training."""
    names = [chr(ord("a") + place) for place in range(len(sets))]
    served = get_peft_model(model, NeftConfig.from_neurons(sets[0]), names[0], autocast_adapter_dtype=False)
    for name, neurons in list(zip(names, sets, strict=True))[1:]:
        served.add_adapter(name, NeftConfig.from_neurons(neurons), autocast_adapter_dtype=False)
    served.set_adapter(names[0], inference_mode=True)
    return served.eval()


def inference(shape: str, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Seconds of a forward over 8 prompts, and of decoding, with an overlay on and without, in turn."""
    base = fresh_model(SHAPES[shape], device, dtype)
    served = _served(twin(base), chosen(base))
    ids = torch.randint(base.config.vocab_size, (8, _PROMPT), generator=torch.Generator().manual_seed(0)).to(device)

    def forward(model: Any) -> Callable[[int], None]:
        def step(_: int) -> None:
            with torch.inference_mode():
                model(input_ids=ids, use_cache=False, logits_to_keep=1)

        return step

    def decode(model: Any) -> Callable[[int], None]:
        def step(_: int) -> None:
            options = {"max_new_tokens": _NEW, "min_new_tokens": _NEW, "do_sample": False, "pad_token_id": 0}
            model.generate(input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1]), **options)

        return step

    measured = {}
    for name, kind in (("forward", forward), ("decode", decode)):
        seconds = interleaved(
            {"base": kind(base), "overlay": kind(served), "base-again": kind(base)}, 2, rounds, device
        )
        measured[name] = {
            "base": summary(seconds["base"]),
            "overlay": summary(seconds["overlay"]),
            "overlay_to_base": ratios(seconds["overlay"], seconds["base"]),
            # The same model twice: what noise alone makes of the ratio.
            "base_to_itself": ratios(seconds["base-again"], seconds["base"]),
        }
    return {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "prompt": _PROMPT, "new": _NEW} | measured


def switching(shape: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds from one active overlay to another, laid on; and whether the base came back bit for bit."""
    base = fresh_model(SHAPES[shape], device, torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    sets = [chosen(base, seed=seed) for seed in (0, 1)]
    served = _served(base, *sets)
    layers = [module for module in served.modules() if isinstance(module, NeftLinear)]
    for layer in layers:
        with torch.no_grad():
            for name, rows in layer.neft_rows.items():
                rows.add_(ord(name))

    def switch(number: int) -> None:
        name = "ab"[number % 2]
        served.set_adapter(name, inference_mode=True)
        for layer in layers:
            layer.lay((name,))

    seconds = interleaved({"switch": switch}, 2, rounds, device)["switch"]
    restored = served.unload()
    after = dict(restored.named_parameters())
    return {
        "shape": shape,
        "dtype": "bfloat16",
        "parameters": sets[0].parameters,
        "overlay_bytes": sum(layer.neft_rows["a"].nbytes for layer in layers),
        "seconds": summary(seconds),
        "base_restored": all(torch.equal(values, after[name]) for name, values in before.items()),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the command line says, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    result = {
        "machine": machine(device),
        "inference": inference("smollm2-135m", device, dtype, arguments.rounds),
        "switching": switching("llama-3.2-1b", device, arguments.rounds),
    }
    write(f"serving-{device.type}", result)
    if not result["switching"]["base_restored"]:
        sys.exit("benchmarks.serving: the base did not come back bit for bit")


if __name__ == "__main__":
    main()
