# SPDX-License-Identifier: Apache-2.0
"""Under which conditions a model is evaluated."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lightning_robust.guards import evaluation_mode, rng_preserved

__all__ = ["evaluation_conditions"]


@contextmanager
def evaluation_conditions(module: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Evaluation mode, no gradients, outside inference mode (attacks need graphs); global generators are put back.

    Args:
        module: The module whose modes are switched; ``None`` for a plain callable.
        device: Where it runs.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(rng_preserved([device]))
        if module is not None:
            stack.enter_context(evaluation_mode(module))
        yield
