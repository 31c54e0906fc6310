# SPDX-License-Identifier: Apache-2.0
"""What the sanity checks look at: a model, a few samples, and the attack whose result is to be trusted."""

from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attacks import PGD, Attack, InputSpace
from lightning_robust.attacks.conditions import Model, ordinary, unwrap
from lightning_robust.attacks.losses import PREDICTION_LOSSES, labels_of
from lightning_robust.attacks.norms import NORMS, Norm
from lightning_robust.checks import check_integer
from lightning_robust.evaluation.model_state import seeded_conditions
from lightning_robust.evaluation.watcher import Watcher
from lightning_robust.losses import autocast_off, full_precision

__all__ = ["Probe"]

#: Steps of the attacks that a check brings itself, unless a check needs another number.
STEPS = 20


class Probe:
    """The samples of all sanity checks, with what they share computed once.

    Every forward is one of an evaluation: evaluation mode, float32 (no autocast), outside inference mode, the global
    random generators seeded. Modes, buffers and generators are put back after each.

    Args:
        model: module or callable ``x -> logits``; a callable may name its module in the attribute ``module``.
        x: clean images ``[B, ...]``.
        y: classes ``[B]`` or probabilities ``[B, C]``.
        attack: the attack under test; it has a budget (``norm`` and ``eps``) and is not targeted.
        adversarial: what the attack returned for these images; it is run when they are asked for and ``None`` came.
        indices: index of each sample in its dataset; 0 to B - 1 when ``None``.
        seed: seed of all random numbers of the checks.
        steps: steps of the attacks that the checks bring themselves.
        batch_size: images per forward.

    Raises:
        ValueError: no samples, images outside the bounds, a targeted attack, an attack without a single budget, or
            ``adversarial`` of another shape.

    Example:
        >>> probe = Probe(torch.nn.Linear(4, 3), torch.rand(8, 4), torch.arange(8) % 3, PGD(eps=0.1, steps=5))
        >>> probe.robust.shape
        torch.Size([8])
    """

    def __init__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        attack: Attack,
        *,
        adversarial: Tensor | None = None,
        indices: Tensor | None = None,
        seed: int = 0,
        steps: int = STEPS,
        batch_size: int = 64,
    ) -> None:
        check_integer("steps", steps, 1)
        check_integer("batch_size", batch_size, 1)
        if len(x) == 0:
            raise ValueError("Expected at least one sample to check but got none.")
        if attack.targeted:
            raise ValueError("The sanity checks understand untargeted attacks only; leave out targeted=True.")
        norms = _norms(attack)
        if len(norms) != 1 or not norms <= NORMS.keys():
            raise ValueError(
                f"The sanity checks need an attack with one of the norms {', '.join(NORMS)}, but {attack!r} has "
                f"{', '.join(sorted(norms)) or 'none'}; check its members one by one."
            )
        if adversarial is not None and adversarial.shape != x.shape:
            raise ValueError(f"Expected `adversarial` to have shape {list(x.shape)} but got {list(adversarial.shape)}.")
        self.model, self.attack = model, attack
        self.norm_name = norms.pop()
        self.network, self.module = unwrap(model)
        self.x = _ordinary_here(x)
        self.targets = _ordinary_here(y)
        self.y = labels_of(self.targets)
        self.seed, self.steps, self.batch_size = seed, steps, batch_size
        self.indices = _ordinary_here(torch.arange(len(x)) if indices is None else indices).to(x.device)
        self.space: InputSpace = attack.space
        self.space.check(self.x)
        self._given = None if adversarial is None else _ordinary_here(adversarial)
        self._watcher: Watcher | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def eps(self) -> float:
        """Radius of the budget in pixel units."""
        return self.attack.eps

    @property
    def norm(self) -> Norm:
        """The norm of the budget."""
        return NORMS[self.norm_name]

    @property
    def full_range(self) -> float:
        """Largest difference between two pixels."""
        return self.space.bounds[1] - self.space.bounds[0]

    @cached_property
    def adversarial(self) -> Tensor:
        """The points that the attack under test has found."""
        if self._given is None:
            self._given = self.points(self.attack, self._watch())
        return self._given

    @cached_property
    def clean_right(self) -> Tensor:
        """Whether each clean image is classified correctly, ``[B]``."""
        return self.right(self.x)

    @cached_property
    def robust(self) -> Tensor:
        """Whether each image is right both clean and attacked, ``[B]``."""
        return self.clean_right & self.right(self.adversarial)

    @cached_property
    def has_gradient(self) -> bool:
        """Whether the logits depend on the images by gradients at all."""
        with self.conditions(grad=True):
            first = self.x[:2].clone().requires_grad_()
            return bool(self.network(first).requires_grad)

    def conditions(self, *, grad: bool = False, precise: bool = True) -> AbstractContextManager[None]:
        """Those of an evaluation; what the body changes in the model's modes and buffers is put back.

        Args:
            grad: record a graph.
            precise: switch autocast off.
        """
        return seeded_conditions(self.module, self.x, seed=self.seed, grad=grad, precise=precise)

    def logits(self, x: Tensor, *, precise: bool = True) -> Tensor:
        """Logits in float32.

        Args:
            x: images.
            precise: switch autocast off.
        """
        with self.conditions(precise=precise):
            return torch.cat([full_precision(self.network(part)) for part in torch.split(x, self.batch_size)])

    def right(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Whether each image is classified correctly.

        Args:
            x: images, one for each sample, or for each chosen one.
            chosen: mask or indices of the samples that ``x`` belongs to; all when ``None``.
        """
        labels = self.y if chosen is None else self.y[chosen]
        return self.logits(x).argmax(1) == labels

    def points(self, attack: Attack, model: Model | None = None) -> Tensor:
        """The points that an attack finds for all samples.

        Args:
            attack: the attack.
            model: attack this model instead.
        """
        target = self.model if model is None else model
        # soft targets are the business of the attack under test; margins, say, are of classes
        y = self.targets if attack is self.attack else self.y
        with torch.inference_mode(False), autocast_off(self.x):
            parts = [attack(target, self.x[rows], y[rows], indices=self.indices[rows]) for rows in self._batches()]
        return torch.cat(parts)

    def survivors(self, attack: Attack) -> Tensor:
        """Which samples are right both clean and under an attack, ``[B]``.

        Args:
            attack: the attack.
        """
        return self.clean_right & self.right(self.points(attack))

    def pgd(self, **changes: Any) -> PGD:
        """PGD within the budget of the attack under test, with its loss if it is PGD too, else with the margin.

        Args:
            **changes: other arguments of :class:`~lightning_robust.attacks.PGD`.
        """
        loss = self.attack.loss if isinstance(self.attack, PGD) else "margin"
        loss = "ce" if loss in PREDICTION_LOSSES else loss
        arguments = {"eps": self.eps, "steps": self.steps, "early_stop": True, "loss": loss}
        return PGD(**{**self.budget(), **arguments, **changes})

    def watch(self, max_passes: float) -> Watcher | None:
        """What the attack under test did on its way; it is run once more if its points came from elsewhere.

        Args:
            max_passes: the largest cost of that, as :attr:`~lightning_robust.attacks.Attack.passes`; ``None`` is
                returned beyond it.
        """
        if self._given is None:
            self._given = self.points(self.attack, self._watch())
        elif self._watcher is None and self.attack.passes <= max_passes:
            self.points(self.attack, self._watch())
        return self._watcher

    def budget(self) -> dict[str, Any]:
        """Arguments that give another attack the same norm, pixels and seed."""
        attack = self.attack
        return {
            "norm": self.norm_name,
            "mean": attack.mean,
            "std": attack.std,
            "bounds": attack.bounds,
            "seed": self.seed,
        }

    def pixels(self, x: Tensor) -> Tensor:
        """Images as pixel values in float32.

        Args:
            x: images as the model takes them.
        """
        return self.space.to_pixels(full_precision(x)) + self._mean

    def images(self, pixels: Tensor) -> Tensor:
        """Pixel values as images that the model takes, clipped to the possible ones.

        Args:
            pixels: pixel values.
        """
        return self.space.clip(self.space.from_pixels(pixels - self._mean)).to(self.x.dtype)

    @cached_property
    def _mean(self) -> Tensor:
        values = torch.tensor(self.space.mean or (0.0,), dtype=full_precision(self.x).dtype, device=self.x.device)
        return values.view(1, -1, *[1] * (self.x.ndim - 2))

    def _watch(self) -> Watcher:
        self._watcher = Watcher(
            self.network,
            self.module,
            self.pixels(self.x),
            self.y,
            pixels=self.pixels,
            norm=self.norm_name,
            eps=self.eps,
            bounds=self.space.bounds,
        )
        return self._watcher

    def _batches(self) -> tuple[Tensor, ...]:
        return torch.split(torch.arange(len(self.x), device=self.x.device), self.batch_size)


def _ordinary_here(value: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return ordinary(value)


def _norms(attack: Attack) -> set[str]:
    norm = getattr(attack, "norm", None)
    if norm is not None:
        return {str(norm)}
    members: dict[str, Attack] = getattr(attack, "attacks", {})
    return {norm for member in members.values() for norm in _norms(member)}
