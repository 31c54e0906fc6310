# SPDX-License-Identifier: Apache-2.0
"""A frozen network that another one learns from, held outside the module tree."""

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_robust.losses import full_precision, label_smoothing_of

__all__ = ["Teacher", "fingerprint"]


def fingerprint(module: nn.Module) -> str:
    """Return 16 hex digits that identify the weights and buffers of a module, by name, type, shape and bytes.

    Args:
        module: The module; non-persistent buffers count too, because they may hold a normalisation.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import fingerprint
        >>> len(fingerprint(torch.nn.Linear(2, 2)))
        16
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(chain(module.named_parameters(), module.named_buffers())):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # A scalar has no bytes to view, hence the reshape.
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()[:16]


class Teacher:
    """A frozen network that answers with float32 logits.

    It is not an ``nn.Module``, so whatever holds it neither saves, optimises, averages nor synchronises its weights.
    The network is put in evaluation mode, and is put there again if something switched it since; its parameters never
    ask for gradients. Calls run under ``no_grad`` and inherit autocast from where they stand.

    Args:
        network: Maps inputs to logits ``[B, C]``: a tensor, or an output with a ``logits`` attribute or entry.
        name: What messages call it.
        num_classes: Number of classes that its logits must have; unchecked when ``None``.
        source: Where it came from, for messages and checkpoints.
        label_smoothing: How much the labels that it was trained on were smoothed; read off a criterion that the network
            holds when ``None``.
        copy: Work on a copy, so that the given network stays trainable and in its mode. Without it the network is
            taken over, frozen, which saves the memory of one copy.

    Raises:
        TypeError: If the network answers with something that is not logits.
        ValueError: If the logits have another number of classes than promised.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import Teacher
        >>> teacher = Teacher(torch.nn.Linear(4, 3), num_classes=3)
        >>> logits = teacher(torch.zeros(2, 4))
        >>> logits.shape, logits.requires_grad
        (torch.Size([2, 3]), False)
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str = "teacher",
        num_classes: int | None = None,
        source: str | None = None,
        label_smoothing: float | None = None,
        copy: bool = True,
    ) -> None:
        self.network = (deepcopy(network) if copy else network).eval().requires_grad_(False)
        self.network.zero_grad(set_to_none=True)
        self.name = name
        self.num_classes = num_classes
        self.source = type(network).__name__ if source is None else source
        self.label_smoothing = label_smoothing_of(self.network) if label_smoothing is None else label_smoothing
        # Taken before any conversion of the precision, so that it is the same in every run.
        self.fingerprint = fingerprint(self.network)

    def __call__(self, x: Tensor, *, input_grad: bool = False) -> Tensor:
        """Return the logits ``[B, C]`` of ``x``.

        Args:
            x: Inputs, in the space that the network was trained on.
            input_grad: Let gradients flow to ``x``; the weights stay frozen.
        """
        if any(module.training for module in self.network.modules()):
            self.network.eval()
        # Not inference_mode: its tensors cannot be saved for the student's backward pass.
        with nullcontext() if input_grad else torch.no_grad():
            logits = full_precision(self._logits(self.network(x)))
        if self.num_classes is not None and logits.shape[1] != self.num_classes:
            raise ValueError(
                f"The {self.name} {self.source} was expected to have {self.num_classes} classes but its logits have "
                f"{logits.shape[1]}; set `num_classes` to what it was trained for."
            )
        return logits

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the network to a device, and its floating-point weights to a type."""
        self.network.to(device=device, dtype=dtype)
        return self

    def manifest(self) -> dict[str, str]:
        """Return what a checkpoint says about the teacher: source and fingerprint, never weights."""
        return {"source": self.source, "fingerprint": self.fingerprint}

    def __repr__(self) -> str:
        return f"Teacher(name={self.name!r}, source={self.source!r}, fingerprint={self.fingerprint!r})"

    def _logits(self, output: Any) -> Tensor:
        if isinstance(output, Mapping):
            output = output.get("logits")
        elif not isinstance(output, Tensor):
            output = getattr(output, "logits", None)
        if not isinstance(output, Tensor) or output.ndim < 2:
            raise TypeError(
                f"Expected the {self.name} {self.source} to return logits [B, C] (a tensor, or `logits` of its output) "
                "but it did not; wrap it in a module that does."
            )
        return output
