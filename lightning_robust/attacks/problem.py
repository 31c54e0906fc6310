# SPDX-License-Identifier: Apache-2.0
"""What is maximised over the images of one batch."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_robust.attacks.conditions import Model
from lightning_robust.attacks.losses import labels_of
from lightning_robust.losses import full_precision

__all__ = ["Problem", "check_batch", "check_probabilities"]

# Gradients of confident samples are below the smallest float16 number; scaled by this much they are not.
_HALF_SCALE = 1024.0
_HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Problem:
    """Images, targets and the per-sample loss to maximise.

    Losses are added up, not averaged, so the gradient of a sample does not depend on the size of its batch.

    Args:
        model: maps images to logits ``[B, C]``.
        x: clean images ``[B, ...]`` in the attack's working type.
        y: classes ``[B]`` or probabilities ``[B, C]``; of the class to reach when targeted.
        loss: per-sample loss ``(logits, reference) -> [B]``.
        reference: what the loss compares with: ``y``, or clean log-probabilities.
        dtype: the type the model takes.
        targeted: lower the loss instead, and count a sample as fooled when ``y`` is predicted.
        check: whether to look for NaN and infinity in the logits, which makes the host wait for the device.
    """

    model: Model
    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    reference: Tensor
    dtype: torch.dtype
    targeted: bool = False
    check: bool = True

    def logits(self, x: Tensor) -> Tensor:
        """Logits in at least float32.

        Raises:
            ValueError: the model returned something else than ``[B, C]``, one logit only, or NaN or infinity; or the
                targets are no classes of the model.
        """
        logits = self.model(x.to(self.dtype))
        if logits.ndim != 2 or len(logits) != len(x):
            raise ValueError(f"Expected logits [B, C] from the model but got {list(logits.shape)} for {len(x)} images.")
        if logits.shape[1] < 2:
            raise ValueError(
                f"Expected one logit per class from the model but got {list(logits.shape)}; let a binary classifier "
                "return two, for example torch.cat([torch.zeros_like(z), z], 1)."
            )
        if self.check:
            self._check_labels(logits.shape[1])
        if self.check and not logits.isfinite().all():
            raise ValueError(
                "The attacked model returned NaN or infinite logits, which would pass for robustness; look for "
                "diverged weights or overflow in half precision."
            )
        return full_precision(logits)

    def _check_labels(self, classes: int) -> None:
        if self.y.is_floating_point() or not len(self.y):
            return
        low, high = int(self.y.min()), int(self.y.max())
        if low < 0 or high >= classes:
            raise ValueError(
                f"Expected labels to be in [0, {classes - 1}] for logits of {classes} classes but got labels from "
                f"{low} to {high}; give the model a larger num_classes, or leave unlabelled samples out of the batch."
            )

    def against_own_prediction(self) -> "Problem":
        """The same problem with the model's prediction for the clean images as reference; one forward pass."""
        return replace(self, reference=self._logits_only(self.x).log_softmax(1))

    def losses(self, logits: Tensor) -> Tensor:
        """What is maximised, per sample."""
        values = self.loss(logits, self.reference)
        return -values if self.targeted else values

    def fooled(self, logits: Tensor) -> Tensor:
        """Whether each sample is misclassified, or classified as wanted when targeted."""
        hit = logits.argmax(1) == labels_of(self.y)
        return hit if self.targeted else ~hit

    def gradient(self, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of the loss with respect to the images, and the logits; one forward and one input-backward.

        Raises:
            ValueError: the logits do not depend on the images by gradients.
        """
        x_adv = x_adv.detach().requires_grad_()
        logits = self.logits(x_adv)
        total = self.losses(logits).sum()
        if not self._half():
            gradient = _gradient(total, x_adv)
        else:
            gradient = _gradient(total * _HALF_SCALE, x_adv)
            # an overflow keeps its sign; of an undefined difference of overflows nothing is known
            gradient = gradient.nan_to_num(nan=0.0, posinf=_HALF_MAX, neginf=-_HALF_MAX)
        return gradient, logits.detach()

    def judge(self, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and success of each sample; one forward pass."""
        logits = self._logits_only(x_adv)
        return self.losses(logits), self.fooled(logits)

    def select(self, index: Tensor) -> "Problem":
        """The same problem for some of the samples."""
        return replace(self, x=self.x[index], y=self.y[index], reference=self.reference[index])

    def _logits_only(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            logits = self.logits(x)
        # before torch 2.7 autocast may have kept copies of the weights that carry no gradient
        torch.clear_autocast_cache()
        return logits

    def _half(self) -> bool:
        kind = self.x.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        return autocast or self.dtype == torch.float16


def _gradient(total: Tensor, x_adv: Tensor) -> Tensor:
    gradient = torch.autograd.grad(total, x_adv, allow_unused=True)[0] if total.requires_grad else None
    if gradient is None:
        raise ValueError(
            "No gradient reaches the images from the logits of the attacked model; take torch.no_grad() and .detach() "
            "out of its forward, and freeze weights with requires_grad_(False) instead."
        )
    return gradient


def check_probabilities(y: Tensor) -> None:
    """Refuse rows of probabilities that do not add up to 1; reads values, so a device has to catch up.

    Args:
        y: classes ``[B]``, which are not looked at, or probabilities ``[B, C]``.

    Raises:
        ValueError: a row is off by more than 0.01, as those of multi-label targets are.
    """
    if y.ndim != 2:
        return
    sums = full_precision(y).sum(1)
    worst = sums[(sums - 1).abs().argmax()].item()
    if not abs(worst - 1) <= 1e-2:
        raise ValueError(
            f"Expected probabilities [B, C] whose rows add up to 1 but got a row with the sum {worst:g}; attacks know "
            "one class per image, so give classes [B] (0 and 1 with a binary classifier) or a distribution over them."
        )


def check_batch(x: Tensor, y: Tensor) -> None:
    """Refuse images and targets of the wrong type or shape; reads no values.

    Args:
        x: images ``[B, ...]``.
        y: classes ``[B]`` or probabilities ``[B, C]``.

    Raises:
        TypeError: the images hold no floating-point numbers.
        ValueError: the shapes of ``x`` and ``y`` do not belong together.
    """
    if not x.is_floating_point():
        raise TypeError(
            f"Expected floating-point images but got {x.dtype}; convert them, for example with x.float() / 255."
        )
    hard = y.ndim == 1 and not y.is_floating_point() and not y.is_complex()
    soft = y.ndim == 2 and y.is_floating_point()
    if x.ndim < 2 or not (hard or soft) or len(x) != len(y):
        raise ValueError(
            "Expected images [B, ...] with integer classes [B] or probabilities [B, C] but got images "
            f"{list(x.shape)} with a target {list(y.shape)} of {y.dtype}."
        )
