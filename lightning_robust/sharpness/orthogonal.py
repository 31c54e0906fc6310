# SPDX-License-Identifier: Apache-2.0
"""Gradients without their part along the weights (perpGrad, OrthoGrad)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_robust.sharpness.selection import ParameterSelection
from lightning_robust.sharpness.weights import Weights

__all__ = ["attach_orthogonal_gradients", "orthogonal_gradients", "orthogonalize"]

_TINY = 1e-30
_NOISE = 32  # in units of the rounding error


@torch.no_grad()
def orthogonal_gradients(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    r"""Remove from each gradient its part along the weights, and give it its length back.

    .. math:: g_\perp = g - \frac{\langle w, g\rangle}{\langle w, w\rangle + 10^{-30}}\, w, \qquad
              g \leftarrow g_\perp \,\frac{\lVert g\rVert_2}{\lVert g_\perp\rVert_2 + 10^{-30}}

    tensor by tensor, in float32 at least. Weights of zero change nothing. A tensor with one entry, in which nothing is
    orthogonal, keeps its gradient; a remainder that is rounding error keeps its tiny length.

    Args:
        weights: as many as gradients.
        gradients: dense; they stay as they are.

    Shape:
        That of ``gradients``, in their types.

    References:
        Prieto et al., arXiv 2501.04697.

    Example:
        >>> orthogonal_gradients([torch.tensor([1.0, 0.0])], [torch.tensor([3.0, 4.0])])
        [tensor([0., 5.])]
    """
    result = list(gradients)
    chosen = [index for index, gradient in enumerate(gradients) if gradient.numel() > 1]
    if not chosen:
        return result
    along = [_wide(weights[index]) for index in chosen]
    steep = [_wide(gradients[index]) for index in chosen]
    inner = torch.stack([torch.dot(w.reshape(-1), g.reshape(-1)) for w, g in zip(along, steep, strict=True)])
    parts = inner / (_norms(along).square() + _TINY)
    rest = list(torch._foreach_sub(steep, torch._foreach_mul(along, parts.unbind())))
    before, after = _norms(steep), _norms(rest)
    noise = _NOISE * max(torch.finfo(each.dtype).eps for each in steep)
    scales = torch.where(after <= noise * before, 1.0, before / (after + _TINY))
    torch._foreach_mul_(rest, scales.unbind())
    for index, projected in zip(chosen, rest, strict=True):
        result[index] = projected.to(gradients[index].dtype)
    return result


@torch.no_grad()
def orthogonalize(
    optimizer: torch.optim.Optimizer,
    *,
    parameters: ParameterSelection | None = None,
    module: nn.Module | None = None,
) -> None:
    """Replace the gradients of an optimizer, just before it steps, by :func:`orthogonal_gradients`.

    After unscaling and reduction; before clipping, which by norm gives the same afterwards, because no length changes.

    Args:
        optimizer: whose ``.grad`` are projected.
        parameters: which of its parameters; all when ``None``.
        module: gives the parameters their names, where ``parameters`` chooses by name.

    Raises:
        ValueError: nothing is chosen, or a chosen gradient is sparse.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> orthogonalize(optimizer)
        >>> weight.grad
        tensor([0., 5.])
    """
    if parameters is None:
        chosen = [weight for group in optimizer.param_groups for weight in group["params"]]
    else:
        chosen = parameters.apply(Weights.of(optimizer, module)).perturbed.tensors
    pairs = [(weight, weight.grad) for weight in chosen if weight.grad is not None]
    for weight, gradient in pairs:
        if gradient.layout != torch.strided:
            raise ValueError(
                f"The gradient of a parameter of shape {tuple(weight.shape)} is sparse and cannot be projected; leave "
                "it out with ParameterSelection(exclude=...), or use Embedding(sparse=False)."
            )
    projected = orthogonal_gradients([weight for weight, _ in pairs], [gradient for _, gradient in pairs])
    for (_, gradient), value in zip(pairs, projected, strict=True):
        gradient.copy_(value)


def attach_orthogonal_gradients(
    optimizer: torch.optim.Optimizer,
    *,
    parameters: ParameterSelection | None = None,
    module: nn.Module | None = None,
) -> RemovableHandle:
    """Project the gradients of an optimizer at the beginning of each of its steps; for plain PyTorch loops.

    Works with a ``GradScaler``, and with clipping by norm before ``step``. In Lightning use
    :class:`~lightning_robust.callbacks.OrthogonalGradient`.

    Args:
        optimizer: any that takes gradients from an earlier ``backward``.
        parameters: which of its parameters; all when ``None``.
        module: gives the parameters their names, where ``parameters`` chooses by name.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        RuntimeError: in a step with a closure, whose gradients do not exist yet when the step begins.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> handle = attach_orthogonal_gradients(optimizer)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 1.0000, -0.5000])
    """

    def project(stepping: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # the first of `args` is the optimizer itself
        if any(callable(value) for value in (*args[1:], kwargs.get("closure"))):
            raise RuntimeError(
                "optimizer.step(closure) computes gradients after attach_orthogonal_gradients has looked for them, so "
                "nothing would be projected; call backward before step(), or use the callback OrthogonalGradient in "
                "Lightning."
            )
        orthogonalize(stepping, parameters=parameters, module=module)

    handle: RemovableHandle = optimizer.register_step_pre_hook(project)
    return handle


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _norms(tensors: list[Tensor]) -> Tensor:
    return torch.stack(list(torch._foreach_norm(tensors)))
