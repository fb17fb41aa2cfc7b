"""The `inplace` path: one dense product with the chosen rows in the base weight, and the gradient of those rows alone.

No dense weight gradient exists, and of the input only what the chosen rows' gradient needs is saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from neft.neurons import Side
from neft.overlay import columns

if TYPE_CHECKING:
    from neft.tuner.layer import NeftLinear


def row_gradient(side: Side, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient (k, d) of the chosen rows or columns, given as neurons' vectors.

    Args:
        inputs: of a row, the whole input (..., in); of a column, the chosen columns of the input (..., k).
        gradient: of a row, the chosen columns of the output's gradient (..., k); of a column, all of it (..., out).
    """
    neurons, others = (gradient, inputs) if side == "row" else (inputs, gradient)
    return neurons.reshape(-1, neurons.shape[-1]).T @ others.reshape(-1, others.shape[-1])


class InplaceLinear(torch.autograd.Function):
    """y = x W^T + b with the adapters' rows in W; gradients for x and for those rows only."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: NeftLinear, adapters: tuple[str, ...], *rows: torch.Tensor
    ) -> torch.Tensor:
        layer.lay(adapters)
        result = layer.dense(x)
        trained = [name for name, wanted in zip(adapters, ctx.needs_input_grad[3:], strict=True) if wanted]
        # A row's gradient needs the whole input, a column's only the inputs that the chosen columns read.
        whole = any(layer.sides[name] == "row" for name in trained)
        kept = [columns(x.detach(), layer.neft_positions[name]) for name in trained if layer.sides[name] == "column"]
        ctx.save_for_backward(*rows, *([x] if whole else []), *kept)
        ctx.layer, ctx.adapters, ctx.trained, ctx.whole = layer, adapters, trained, whole
        ctx.x_dtype = x.dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer, count = ctx.layer, len(ctx.adapters)
        saved = list(ctx.saved_tensors)
        rows, saved = saved[:count], saved[count:]
        whole: torch.Tensor | None = saved.pop(0) if ctx.whole else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            # Another forward may have laid other rows since: the gradient is that of this forward's weight.
            now = layer.laid
            if now != ctx.adapters:
                layer.lay(ctx.adapters)
            grad_x = layer.dense_input_gradient(grad).to(ctx.x_dtype)
            if now != ctx.adapters:
                layer.lay(now)
        gradients: list[torch.Tensor | None] = []
        for name, values in zip(ctx.adapters, rows, strict=True):
            if name not in ctx.trained:
                gradients.append(None)
            elif layer.sides[name] == "row":
                assert whole is not None
                chosen = columns(grad, layer.neft_positions[name])
                gradients.append(row_gradient("row", whole.to(grad.dtype), chosen).to(values.dtype))
            else:
                gradients.append(row_gradient("column", saved.pop(0).to(grad.dtype), grad).to(values.dtype))
        return grad_x, None, None, *gradients


class TracedLinear(torch.autograd.Function):
    """The same for one adapter and made of tensors alone, so that `torch.compile` can follow it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rows: torch.Tensor,
        index: torch.Tensor,
        side: Side,
    ) -> torch.Tensor:
        ctx.save_for_backward(x if side == "row" else columns(x, index), weight, index)
        ctx.side, ctx.dtype = side, rows.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight, index = ctx.saved_tensors
        chosen = columns(grad, index) if ctx.side == "row" else grad
        gradient = row_gradient(ctx.side, inputs.to(grad.dtype), chosen).to(ctx.dtype)
        return grad @ weight.to(grad.dtype), None, None, gradient, None, None
