# SPDX-License-Identifier: Apache-2.0
"""Numbers from which overfitting of adversarial training can be told, on one batch of held-out images."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.attacks import FGSM, PGD, GeneratorDraws
from lightning_robust.attacks.losses import cross_entropy, labels_of
from lightning_robust.losses import full_precision

__all__ = ["Signals", "signal_sums"]

_COUNT, _ROBUST, _SINGLE, _HALF, _ABNORMAL, _COSINE = range(6)


@dataclass(frozen=True)
class Signals:
    """What one validation showed, over all images looked at.

    Args:
        robust_acc: accuracy under the iterated attack.
        single_step_acc: accuracy under the single-step attack.
        half_step_acc: accuracy halfway to the images of the single-step attack; below ``single_step_acc`` the loss is
            not monotone along the step any more.
        abnormal: share of images whose loss is lower after the single step than at its start.
        gradient_cosine: mean cosine of the input gradients at an image and at a random point of its budget.
    """

    robust_acc: float
    single_step_acc: float
    half_step_acc: float
    abnormal: float
    gradient_cosine: float

    @classmethod
    def from_sums(cls, sums: Tensor) -> "Signals":
        """The means of what :func:`signal_sums` added up."""
        values = (sums / sums[_COUNT]).tolist()
        return cls(*(values[column] for column in (_ROBUST, _SINGLE, _HALF, _ABNORMAL, _COSINE)))


def signal_sums(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, attack: PGD, single_step: FGSM, seed: int
) -> Tensor:
    """Sums ``[6]`` of the signals over a batch; those of several batches are added.

    Args:
        model: maps images to logits.
        x: images.
        y: classes or probabilities.
        attack: the iterated attack.
        single_step: the single-step attack.
        seed: of the random starts.
    """

    def generator() -> torch.Generator:
        return torch.Generator(x.device).manual_seed(seed)

    start = single_step.draw_start(full_precision(x), GeneratorDraws(generator())).to(x.dtype)
    stepped = single_step(model, x, y, start=start, generator=generator())
    points = {
        "robust": attack(model, x, y, generator=generator()),
        "single": stepped,
        "half": x + (stepped - x) / 2,
        "start": start,
    }
    with torch.no_grad():
        logits = {name: full_precision(model(images)) for name, images in points.items()}
    right = {name: values.argmax(1) == labels_of(y) for name, values in logits.items()}
    with single_step.posed(model, x, y, generator=generator()) as problem:
        at_image, *_ = problem.gradient(problem.x)
        nearby, *_ = problem.gradient(start.to(problem.x))
    # normalised by the largest entry first: squares of the gradients of confident images underflow
    at_image, nearby = (F.normalize(each.flatten(1), p=torch.inf) for each in (at_image, nearby))
    columns = [torch.ones(len(x), device=x.device)] * 6
    columns[_ROBUST], columns[_SINGLE], columns[_HALF] = (right[name] for name in ("robust", "single", "half"))
    columns[_ABNORMAL] = cross_entropy(logits["single"], y) < cross_entropy(logits["start"], y)
    columns[_COSINE] = F.cosine_similarity(at_image, nearby)
    return torch.stack([column.float().sum() for column in columns])
