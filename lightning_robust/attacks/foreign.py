# SPDX-License-Identifier: Apache-2.0
"""Attacks of other libraries, under the rules of this one."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_robust.attacks.base import Attack
from lightning_robust.attacks.climb import choose
from lightning_robust.attacks.conditions import unwrap
from lightning_robust.attacks.draws import Draws
from lightning_robust.attacks.losses import labels_of
from lightning_robust.attacks.norms import per_sample
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.region import region
from lightning_robust.attacks.space import InputSpace
from lightning_robust.checks import check_choice, check_positive

__all__ = ["AttackedModel", "ForeignAttack", "Perturb"]

#: ``(model, images in [0, 1], classes [B]) -> attacked images in [0, 1]``
Perturb = Callable[["AttackedModel", Tensor, Tensor], Tensor]


class AttackedModel(nn.Module):
    """The attacked model as other libraries expect one: a module in evaluation mode that takes images in [0, 1].

    It hides the modules behind it, so that nothing can change their modes or reach their parameters; its only parameter
    is an empty one that tells the device.

    Args:
        problem: the images and the model.
        space: the pixels of the images.
        num_classes: number of classes, for attacks whose settings depend on it.
    """

    def __init__(self, problem: Problem, space: InputSpace, num_classes: int) -> None:
        super().__init__()
        self.device_marker = nn.Parameter(problem.x.new_empty(0), requires_grad=False)
        self.num_classes = num_classes
        self._problem, self._space = problem, space
        self._lowest = space.clip(torch.full_like(problem.x[:1], -torch.inf))
        self._width = space.bounds[1] - space.bounds[0]
        self.eval()

    def to_unit(self, x: Tensor) -> Tensor:
        """Images as the other library gets them."""
        return (self._space.to_pixels(x - self._lowest) / self._width).clamp(0, 1)

    def from_unit(self, difference: Tensor) -> Tensor:
        """A difference of such images in the units of the images."""
        return self._space.from_pixels(difference * self._width)

    @override
    def forward(self, images: Tensor) -> Tensor:
        return self._problem.logits(self._lowest + self.from_unit(images.to(self._lowest)))


class ForeignAttack(Attack):
    """An attack of another library as an :class:`Attack`, for evaluations, monitors and training.

    :func:`from_torchattacks`, :func:`from_foolbox` and :func:`from_autoattack` make one. What such attacks are known to
    do wrong is prevented: the model they get stands for the one of the call (also if they were built with another
    one), is in evaluation mode, and hides its modules, so BatchNorm modes stay as they are; parameters are frozen
    meanwhile, so no ``.grad`` is filled; random generators (torch, NumPy, Python) are seeded from this attack's own and
    put back. The attack gets pixels in [0, 1], whatever ``bounds`` and normalisation are.

    What it returns is looked at: other shapes and NaN are errors, and so are points outside the budget or the pixels by
    more than rounding (0.1% of ``eps``), unless ``on_violation`` says otherwise. A clean image that is misclassified is
    not given up for a point that is not.

    Results depend on the composition of the batch, since other libraries draw for all samples at once.

    Cost: that of the other attack, and 2 forwards.

    Args:
        perturb: ``(model, images in [0, 1], classes) -> attacked images``.
        eps: radius of the budget that it keeps, in pixel units (those of ``bounds``).
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        name: name in reports; that of ``perturb`` when ``None``.
        on_violation: a point outside the budget is an ``"error"``, ``"project"``: moved to the budget, or ``"drop"``:
            replaced by the clean image, as is right for attacks that look for the nearest adversarial point.
        cost: forward-and-backward passes of one call, where known, for the time that is left.
        targeted: ``y`` is the class to reach; ``perturb`` has to take it so.
        restarts: independent runs.
        mean: mean per channel, if the images are normalised; ``eps`` and ``bounds`` stay in pixel units.
        std: standard deviation per channel, if the images are normalised.
        bounds: smallest and largest possible pixel.
        seed: seed of the attack's own generator, used when a call brings none, and of the streams of ``indices``.

    Shape:
        ``x`` is ``[B, ...]`` (channels in dimension 1 if ``mean`` is given), ``y`` is ``[B]`` or ``[B, C]``, of which
        the attack gets the most probable classes.

    Raises:
        ValueError: an argument out of range, or (when called) ``towards``, ``start``, or a result as described.

    Example:
        >>> attack = ForeignAttack(lambda model, x, y: (x + 0.1).clamp(0, 1), eps=0.1)
        >>> x = torch.full((2, 4), 0.5)
        >>> attack(torch.nn.Linear(4, 3), x, torch.tensor([0, 2])).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        perturb: Perturb,
        *,
        eps: float,
        norm: Literal["linf", "l2", "l1"] = "linf",
        name: str | None = None,
        on_violation: Literal["error", "project", "drop"] = "error",
        cost: float = 1.0,
        targeted: bool = False,
        restarts: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
    ) -> None:
        super().__init__(eps=eps, restarts=restarts, targeted=targeted, mean=mean, std=std, bounds=bounds, seed=seed)
        check_choice("norm", norm, ("linf", "l2", "l1"))
        check_choice("on_violation", on_violation, ("error", "project", "drop"))
        check_positive("cost", cost)
        self.perturb, self.norm, self.on_violation, self.cost = perturb, norm, on_violation, cost
        self.name = getattr(perturb, "__name__", type(perturb).__name__) if name is None else name

    def __repr__(self) -> str:
        return f"ForeignAttack({self.name}, eps={self.eps!r}, norm={self.norm!r})"

    @override
    def stages(self, num_classes: int) -> dict[str, Attack]:
        return {self.name: self}

    @override
    def adopt(self, problem: Problem) -> Problem:
        if problem.towards is not None:
            raise ValueError(f"`towards` steers to a class, which {self!r} cannot do; use an attack of this library.")
        return super().adopt(problem)

    @override
    def solve(self, problem: Problem, start: Tensor | None = None) -> Tensor:
        if start is not None:
            raise ValueError(f"{self!r} chooses where it starts; leave out `start`.")
        _, module = unwrap(problem.model)
        with _frozen(module):
            _seed_others(problem.draws.fingerprint())
            return super().solve(problem)

    @override
    def draw_start(self, x: Tensor, draws: Draws, scale: Tensor | None = None) -> Tensor:
        draws.uniform(x.new_empty(len(x)))  # moves the generator on, so that the next call is seeded differently
        return x.clone()

    @override
    def run(self, problem: Problem, x_adv: Tensor) -> Tensor:
        if self.eps == 0:
            return problem.x.clone()
        with torch.no_grad():
            logits = problem.logits(problem.x)
        torch.clear_autocast_cache()  # what it holds now has no graph
        model = AttackedModel(problem, self.space, logits.shape[1])
        images = model.to_unit(problem.x)
        found = self.perturb(model, images.clone(), labels_of(problem.y))
        point = self._within(problem, model, images, found)
        _, fooled = problem.judge(point)
        return choose(problem.fooled(logits) & ~fooled, problem.x, point)

    @property
    @override
    def run_passes(self) -> float:
        return self.cost + 1

    def _within(self, problem: Problem, model: AttackedModel, images: Tensor, found: Tensor) -> Tensor:
        if not isinstance(found, Tensor) or found.shape != images.shape:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"Expected attacked images {list(images.shape)} from {self!r} but got {got}.")
        found = found.detach().to(images)
        width = self.bounds[1] - self.bounds[0]
        delta = found - images
        length = torch.linalg.vector_norm(delta.flatten(1), ord=_ORDERS[self.norm], dim=1) * width
        if not length.isfinite().all():
            raise ValueError(f"{self!r} returned NaN or infinity.")
        inside = ((found >= -1e-5) & (found <= 1 + 1e-5)).flatten(1).all(1)
        beyond = ~inside | (length > self.eps * (1 + 1e-3) + 1e-6 * width)
        if self.on_violation == "error" and beyond.any():
            raise ValueError(
                f"{self!r} returned points up to {length.max().item():g} from the images, with pixels in "
                f"[{found.min().item():g}, {found.max().item():g}] of [0, 1]; give its true `eps` and `norm`, or set "
                "on_violation='project', or 'drop' for an attack that looks for the nearest adversarial point."
            )
        if self.on_violation == "drop":
            delta = torch.where(per_sample(beyond, delta), 0.0, delta)
        area = region(self.norm, problem.x, self.eps, self.space, problem.dtype)
        return area.project(problem.x + model.from_unit(delta))


_ORDERS = {"linf": torch.inf, "l2": 2, "l1": 1}


@contextmanager
def _frozen(module: nn.Module | None) -> Iterator[None]:
    trained = [] if module is None else [each for each in module.parameters() if each.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _seed_others(seed: int) -> None:
    # torch's generators are seeded for every attack; all of them are put back afterwards
    np.random.seed(seed)
    random.seed(seed)
