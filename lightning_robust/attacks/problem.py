# SPDX-License-Identifier: Apache-2.0
"""What is maximised over the images of one batch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_robust.attacks.conditions import Model
from lightning_robust.attacks.draws import Draws
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
        draws: random numbers for these samples.
        targeted: lower the loss instead, and count a sample as fooled when ``y`` is predicted.
        check: whether to look for NaN and infinity in the logits, which makes the host wait for the device.
        towards: classes ``[B]`` that the loss steers to, while any misclassification of ``y`` is a success.
        steered: the loss ``(logits, y, towards) -> [B]`` that does so; ``None`` if the loss knows no such form.
        scale: multiple ``[B]`` of the attack's budget and step for each sample.
        capacity: number of images that are known to fit into one pass: those of the call.
        labels: smallest and largest class of the call, to be compared with the model's; ``None`` if nobody looked.
        against: logits ``[B, C]`` that take the place of the model's own clean prediction in losses that compare with
            it, or a network that answers with them at each point, its gradient included; ``None`` for its own.
    """

    model: Model
    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    reference: Tensor
    dtype: torch.dtype
    draws: Draws
    targeted: bool = False
    check: bool = True
    towards: Tensor | None = None
    steered: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    scale: Tensor | None = None
    capacity: int = 1
    labels: tuple[int, int] | None = None
    against: Tensor | Model | None = None

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
        if self.labels is not None:
            _check_labels(*self.labels, logits.shape[1])
        if self.check and not _finite(logits):
            raise ValueError(
                "The attacked model returned NaN or infinite logits, which would pass for robustness; look for "
                "diverged weights or overflow in half precision."
            )
        return full_precision(logits)

    def against_prediction(self) -> "Problem":
        """The same problem with a prediction as reference: the model's own for the clean images, or what is given.

        The model's own costs one forward pass.
        """
        if self.against is None:
            return replace(self, reference=self._logits_only(self.x).log_softmax(1))
        if isinstance(self.against, Tensor):
            return replace(self, reference=full_precision(self.against).log_softmax(1))
        return self  # asked at each point

    def losses(self, logits: Tensor, x_adv: Tensor | None = None) -> Tensor:
        """What is maximised, per sample.

        Args:
            logits: ``[B, C]`` of the model.
            x_adv: the points that they belong to, which only a network to compare with has to be asked about.

        Raises:
            ValueError: there is such a network and the points are missing, or it has another number of classes.
        """
        if self.towards is not None and self.steered is not None:
            return self.steered(logits, labels_of(self.y), self.towards)
        reference = self.reference
        if self.against is not None:
            if not isinstance(self.against, Tensor):
                reference = self._answer(self.against, x_adv)
            if reference.shape != logits.shape:
                raise ValueError(
                    f"`against` (the teacher, in distillation) has {reference.shape[1]} classes but the model has "
                    f"{logits.shape[1]}; take a teacher for the model's classes."
                )
        values = self.loss(logits, reference)
        return -values if self.targeted else values

    def fooled(self, logits: Tensor) -> Tensor:
        """Whether each sample is misclassified, or classified as wanted when targeted."""
        hit = logits.argmax(1) == labels_of(self.y)
        return hit if self.targeted else ~hit

    def gradient(self, x_adv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of the loss with respect to the images, logits, losses; one forward and one input-backward.

        Raises:
            ValueError: the logits do not depend on the images by gradients.
        """
        x_adv = x_adv.detach().requires_grad_()
        logits = self.logits(x_adv)
        losses = self.losses(logits, x_adv)
        return self.input_gradient(losses.sum(), x_adv), logits.detach(), losses.detach()

    def input_gradient(self, total: Tensor, x_adv: Tensor, *, retain_graph: bool = False) -> Tensor:
        """Gradient of a number with respect to the images; one input-backward.

        In float16 it is computed of a multiple of the number, which keeps small gradients from vanishing.

        Args:
            total: number computed from logits of ``x_adv``.
            x_adv: images that require a gradient.
            retain_graph: keep the graph for a further gradient.

        Raises:
            ValueError: the number does not depend on the images by gradients.
        """
        if not self._half():
            return _gradient(total, x_adv, retain_graph)
        gradient = _gradient(total * _HALF_SCALE, x_adv, retain_graph)
        # an overflow keeps its sign; of an undefined difference of overflows nothing is known
        return gradient.nan_to_num(nan=0.0, posinf=_HALF_MAX, neginf=-_HALF_MAX) / _HALF_SCALE

    def judge(self, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and success of each sample; one forward pass."""
        logits = self._logits_only(x_adv)
        with torch.no_grad():
            losses = self.losses(logits, x_adv)
        return losses, self.fooled(logits)

    def select(self, index: Tensor) -> "Problem":
        """The same problem for some of the samples: their numbers, or a mask."""
        rows = index.nonzero().squeeze(1) if index.dtype == torch.bool else index
        return replace(
            self,
            x=self.x.index_select(0, rows),
            y=self.y.index_select(0, rows),
            reference=self.reference.index_select(0, rows),
            draws=self.draws.select(rows),
            towards=None if self.towards is None else self.towards.index_select(0, rows),
            scale=None if self.scale is None else self.scale.index_select(0, rows),
            against=self.against.index_select(0, rows) if isinstance(self.against, Tensor) else self.against,
        )

    def _logits_only(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            logits = self.logits(x)
        # before torch 2.7 autocast may have kept copies of the weights that carry no gradient
        torch.clear_autocast_cache()
        return logits

    def _answer(self, network: Model, x_adv: Tensor | None) -> Tensor:
        if x_adv is None:
            raise ValueError(
                "This attack judges logits apart from their images and cannot ask another network about each point; "
                "use PGD, or give fixed logits as `against`."
            )
        return full_precision(network(x_adv.to(self.dtype))).log_softmax(1)

    def _half(self) -> bool:
        kind = self.x.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        return autocast or self.dtype == torch.float16


def _check_labels(low: int, high: int, classes: int) -> None:
    if low < 0 or high >= classes:
        raise ValueError(
            f"Expected labels to be in [0, {classes - 1}] for logits of {classes} classes but got labels from "
            f"{low} to {high}; give the model a larger num_classes, or leave unlabelled samples out of the batch."
        )


def _finite(values: Tensor) -> bool:
    # one sum tells it as a rule; that of finite numbers may overflow
    return math.isfinite(values.detach().sum().item()) or bool(values.isfinite().all())


def _gradient(total: Tensor, x_adv: Tensor, retain_graph: bool) -> Tensor:
    gradient = None
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(total, x_adv, retain_graph=retain_graph, allow_unused=True)
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
