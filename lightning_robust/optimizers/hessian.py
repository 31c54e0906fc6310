# SPDX-License-Identifier: Apache-2.0
"""The diagonal of the Hessian from gradients that have a graph."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_robust.sharpness import parameter_hooks_off

__all__ = ["hessian_diagonal", "rademacher"]


def rademacher(parameters: Sequence[Tensor], seed: int, draw: int) -> list[Tensor]:
    """Vectors of random signs, one per parameter, the same whenever seed, number and kind of device are.

    Args:
        parameters: give shapes, types and devices.
        seed: of the whole series.
        draw: number of the draw in it.
    """
    digest = hashlib.blake2b(f"{seed}/{draw}".encode(), digest_size=8).digest()
    generators: dict[torch.device, torch.Generator] = {}
    signs = []
    for parameter in parameters:
        if parameter.device not in generators:
            generators[parameter.device] = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest) >> 1)
        coins = torch.empty_like(parameter, requires_grad=False)
        signs.append(coins.bernoulli_(0.5, generator=generators[parameter.device]).mul_(2).sub_(1))
    return signs


def hessian_diagonal(
    gradients: Sequence[Tensor], parameters: Sequence[Tensor], probes: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    r"""Hutchinson's estimate of the diagonal of the Hessian, the mean of :math:`z \odot Hz` over random signs ``z``.

    The graph of the gradients is freed.

    Args:
        gradients: one per parameter; one without graph belongs to a parameter in which the loss is linear.
        parameters: leaf tensors.
        probes: for each sample one vector of signs per parameter.

    Raises:
        RuntimeError: no gradient has a graph.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> gradients = torch.autograd.grad((w**3).sum(), [w], create_graph=True)
        >>> hessian_diagonal(gradients, [w], [[torch.tensor([1.0, -1.0])]])
        [tensor([ 6., 12.])]
    """
    curved = [index for index, gradient in enumerate(gradients) if gradient.requires_grad]
    if not curved:
        raise RuntimeError(
            "No gradient has a graph, so the Hessian is out of reach: call loss.backward(create_graph=True), in "
            "Lightning self.manual_backward(loss, create_graph=True) with manual optimization. Losses whose gradients "
            "come ready-made, as those of SharpnessAware, have no Hessian; use a first-order optimizer with them."
        )
    diagonal: list[Tensor] = []
    with parameter_hooks_off(parameters):
        for number, signs in enumerate(probes):
            directions = [sign.to(parameter.dtype) for sign, parameter in zip(signs, parameters, strict=True)]
            products = torch.autograd.grad(
                [gradients[index] for index in curved],
                list(parameters),
                [directions[index] for index in curved],
                retain_graph=number + 1 < len(probes),
                allow_unused=True,
                materialize_grads=True,
            )
            estimates = torch._foreach_mul(products, directions)
            diagonal = list(torch._foreach_add(diagonal, estimates)) if diagonal else list(estimates)
    return list(torch._foreach_div(diagonal, len(probes))) if len(probes) > 1 else diagonal
