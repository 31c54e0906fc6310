# SPDX-License-Identifier: Apache-2.0
"""The refusal of sparse gradients, for methods whose arithmetic needs dense ones."""

import torch

from lightning_robust.sharpness.weights import Gradients, Weights

__all__ = ["check_dense"]


def check_dense(method: str, weights: Weights, gradients: Gradients) -> None:
    """Raise ``ValueError`` if a gradient is sparse.

    Args:
        method: what the refusal calls the method.
        weights: the weights, for their names.
        gradients: one per weight.
    """
    for name, gradient in zip(weights.names, gradients, strict=True):
        if gradient.layout != torch.strided:
            raise ValueError(
                f"{method} needs dense gradients, but that of {name!r} is sparse; use Embedding(sparse=False)."
            )
