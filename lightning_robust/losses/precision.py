# SPDX-License-Identifier: Apache-2.0
"""Losses compute in float32 whatever the precision of the run: bfloat16 logits tie at the top and lose small terms."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["autocast_off", "full_precision"]


def full_precision(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32, or unchanged when it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def autocast_off(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which operations on the device of ``tensor`` keep the precision of their inputs."""
    device = tensor.device.type
    # Devices without autocast ("meta") refuse even to switch it off.
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
