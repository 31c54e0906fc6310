# SPDX-License-Identifier: Apache-2.0
"""Gradient injection: a scalar with the value of one loss whose backward delivers ready-made gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["inject_gradients"]


def inject_gradients(loss: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    r"""Return a scalar with the value of ``loss`` whose gradient with respect to ``parameters[i]`` is ``gradients[i]``.

    Backward multiplies by the incoming gradient, so loss scaling and the division by the number of accumulated
    batches act as on an ordinary loss. The gradients are scaled in place and handed over, hence usable once.

    Args:
        loss: scalar whose value is kept; its own graph is dropped.
        parameters: leaf tensors.
        gradients: one tensor per parameter, of its shape.

    Raises:
        RuntimeError: from a second ``backward`` through the result, or one with ``create_graph=True``.

    Example:
        >>> w = torch.zeros(2, requires_grad=True)
        >>> injected = inject_gradients(torch.tensor(3.0), [w], [torch.tensor([1.0, 2.0])])
        >>> (injected / 2).backward()
        >>> injected.item(), w.grad.tolist()
        (3.0, [0.5, 1.0])
    """
    injected: Tensor = _Inject.apply(loss.detach(), [list(gradients)], *parameters)
    return injected


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, parcel: list[list[Tensor]], *parameters: Tensor) -> Tensor:
        ctx.parcel = parcel
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The loss of a sharpness-aware step was backpropagated with create_graph=True, but its gradients are "
                "ready-made and have no second derivatives; use a first-order optimizer, or train without "
                "sharpness-aware directions."
            )
        if not ctx.parcel:
            raise RuntimeError(
                "The loss of a sharpness-aware step can be backpropagated once; call backward a single time."
            )
        # Popping drops the last reference but autograd's own, so AccumulateGrad can take the tensors without a copy.
        gradients = ctx.parcel.pop()
        if upstream.device.type != "cpu" or upstream != 1:  # asking an accelerator would make the host wait for it
            torch._foreach_mul_(gradients, upstream)
        return (None, None, *gradients)
