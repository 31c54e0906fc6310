# SPDX-License-Identifier: Apache-2.0
"""Losses compute in float32 whatever the precision of the run: bfloat16 logits tie at the top and lose small terms."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["autocast_off", "full_precision"]


def full_precision(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32, or unchanged when it is float64.

    Args:
        tensor: Logits, as a rule.

    Example:
        >>> full_precision(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def autocast_off(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which operations on the device of ``tensor`` keep the precision of their inputs.

    Args:
        tensor: Any tensor on the device in question.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), autocast_off(torch.zeros(1)):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.float32
    """
    device = tensor.device.type
    # Devices without autocast ("meta") refuse even to be asked.
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
