# SPDX-License-Identifier: Apache-2.0
"""Keeping the gradient of one loss from pointing against that of another."""

from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor

from lightning_robust.callbacks._processes import total
from lightning_robust.distillation.dhkd import conflict

__all__ = ["conflict_of"]


def conflict_of(trainer: L.Trainer, pl_module: L.LightningModule, term: Tensor, reference: Tensor) -> Tensor:
    """How much of ``reference`` has to be added to ``term`` so that their gradients do not conflict.

    With that factor, a constant, the gradient of the sum is that of the reference plus the aligned one of the term:
    what is added to it is a multiple of the reference's gradient.

    Args:
        trainer: The Trainer.
        pl_module: The LightningModule, all of whose trainable parameters count.
        term: The loss whose gradient is aligned.
        reference: The loss whose gradient stays.
    """
    parameters = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
    # In float16 gradients of the plain losses would vanish; the factor does not depend on a scale that both have.
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    losses = [loss if scaler is None else scaler.scale(loss) for loss in (term, reference)]
    of_term, of_reference = (_flat_gradient(loss, parameters) for loss in losses)
    if trainer.world_size > 1:  # what counts is the gradient that the processes agree on
        of_term, of_reference = total(trainer, of_term), total(trainer, of_reference)
    return conflict(torch.dot(of_term, of_reference), torch.dot(of_reference, of_reference))


def _flat_gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return torch.cat(
        [(torch.zeros_like(like) if gradient is None else gradient).float().flatten() for like, gradient in pairs]
    )
