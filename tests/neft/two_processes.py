"""What each of two processes does for the tests of training in several; run by torchrun with a folder to write to."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from neft import InputError, NeftConfig, NeuronSpace
from neft.neurons import Kind
from tests.neft.helpers import Inputs, State, draw, layers, logits, state
from tests.tiny import batch, tiny_model

STEPS = 4
KINDS: tuple[Kind, ...] = ("ffn", "attention")


def adapted(path: str) -> PeftModel:
    model = tiny_model()
    neurons = draw(NeuronSpace.from_model(model, KINDS))
    return get_peft_model(model, NeftConfig.from_neurons(neurons, path=path))


def inputs_of(step: int) -> Inputs:
    """Four whole rows, so that each process has as many labels."""
    return {name: values[:4] for name, values in batch(tiny_model(), rows=5, seed=step).items()}


def rows_of(peft_model: PeftModel) -> State:
    """The trained rows, gathered where they are sharded."""
    model = peft_model.get_base_model()
    return dict(peft_model.base_model.overlay(draw(NeuronSpace.from_model(model, KINDS))).values)


def train(model: nn.Module, part: slice) -> None:
    """Some AdamW steps, on a part of each batch."""
    # Roundings of tiny gradients are not to be made large.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, eps=1e-3)
    for step in range(STEPS):
        model(**{name: values[part] for name, values in inputs_of(step).items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train_alone(path: str) -> State:
    peft_model = adapted(path)
    train(peft_model, slice(None))
    return rows_of(peft_model)


def mine() -> slice:
    return slice(dist.get_rank(), None, dist.get_world_size())


def ddp(path: str) -> dict[str, Any]:
    peft_model = adapted(path)
    model = DistributedDataParallel(peft_model)
    sent: list[int] = []

    def reduce(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        values = bucket.buffer()
        # A step may have several buckets, of which the first has the index 0.
        if bucket.index() == 0:
            sent.append(0)
        sent[-1] += values.numel() * values.element_size()
        work = dist.all_reduce(values.div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    model.register_comm_hook(None, reduce)
    train(model, mine())
    return {"rows": rows_of(peft_model), "bytes": sent, "base": state(peft_model.unload())}


def shard(peft_model: PeftModel) -> PeftModel:
    """Each layer by itself, then the rest, as FSDP2 is used."""
    for layer in peft_model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(peft_model)


def shards(peft_model: PeftModel) -> State:
    return {
        name: parameter.to_local().detach().clone()
        for name, parameter in peft_model.named_parameters()
        if ".neft_" not in name
    }


def fsdp() -> dict[str, Any]:
    peft_model = shard(adapted("side"))
    found: dict[str, Any] = {"before": shards(peft_model)}
    found["sharded"] = sum(hasattr(layer.neft_rows["default"], "to_local") for layer in layers(peft_model))
    train(peft_model, mine())
    found |= {"after": shards(peft_model), "rows": rows_of(peft_model)}
    peft_model.eval()
    plain = tiny_model()
    inputs = inputs_of(0)
    names = ["__base__", "default", "default", "__base__"]
    base = logits(plain, inputs)
    peft_model.base_model.overlay(draw(NeuronSpace.from_model(plain, KINDS))).lay_on(plain)
    found["expected"] = logits(plain, inputs)
    found["expected_mixed"] = torch.where(torch.tensor([1, 0, 0, 1]).bool()[:, None, None], base, found["expected"])
    found["logits"] = logits(peft_model, inputs)
    with torch.no_grad():
        found["mixed"] = peft_model(**inputs, adapter_names=names).logits
    return found


def refusal(use: Callable[[], Any]) -> str:
    try:
        use()
    except InputError as error:
        return str(error)
    return "not refused"


def refused() -> dict[str, str]:
    """What becomes of the `inplace` path when weights are sharded."""
    sharded = shard(adapted("inplace"))
    inputs = inputs_of(0)
    found = {
        "forward": refusal(lambda: sharded(**inputs)),
        "forward without gradients": refusal(lambda: logits(sharded.eval(), inputs)),
        "generate": refusal(lambda: sharded.generate(input_ids=inputs["input_ids"], max_new_tokens=1)),
    }
    model = tiny_model()
    neurons = draw(NeuronSpace.from_model(model, KINDS))
    for layer in model.model.layers:
        fully_shard(layer)
    found["sharded first"] = refusal(lambda: get_peft_model(model, NeftConfig.from_neurons(neurons)))
    root = fully_shard(adapted("inplace"))

    def use_root() -> None:
        root(**inputs).loss.backward()
        root.state_dict()

    found["root alone"] = refusal(use_root)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {
        "world": dist.get_world_size(),
        "ddp": {path: ddp(path) for path in ("inplace", "side")},
        "fsdp": fsdp(),
        "refused": refused(),
    }
    torch.save(found, folder / f"{os.environ['RANK']}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
