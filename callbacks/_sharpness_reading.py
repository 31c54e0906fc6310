# SPDX-License-Identifier: Apache-2.0
"""The loss of a few samples as a function of weights, and the numbers that one look at it gives."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import lightning as L
import torch
from torch import Tensor

from lightning_robust.attacks.losses import labels_of
from lightning_robust.callbacks._separate_weights import SeparateWeights
from lightning_robust.checks import check_choice, check_integer, check_positive
from lightning_robust.losses import Criterion
from lightning_robust.sharpness import (
    Eigenvalues,
    LossSurface,
    epsilon_sharpness,
    hutchinson_trace,
    lanczos,
    power_iteration,
)
from lightning_robust.sharpness.surface import HessianMethod
from lightning_robust.sharpness.weight_function import uncompiled
from lightning_robust.training import QuietGate

__all__ = ["Reading", "Reduction", "SampleLoss", "reduction", "silenced"]

#: ``reduce(tensor, operation)`` over processes.
Reduction = Callable[[Tensor, str], Tensor]


@dataclass(frozen=True)
class Reading:
    """What is computed, and with what effort; see the arguments of ``SharpnessMonitor``."""

    solver: str
    method: HessianMethod
    tolerance: float
    max_products: int
    trace_products: int
    radius: float
    ascent_steps: int
    per_class: bool | list[int]
    seed: int

    def __post_init__(self) -> None:
        check_choice("solver", self.solver, ("lanczos", "power"))
        check_choice("method", self.method, ("double-backward", "finite-difference"))
        check_positive("tolerance", self.tolerance)
        check_integer("max_products", self.max_products, 1)
        check_integer("trace_products", self.trace_products, 0)
        check_positive("radius", self.radius)
        check_integer("ascent_steps", self.ascent_steps, 0)
        for label in () if isinstance(self.per_class, bool) else self.per_class:
            check_integer("per_class", label, 0)

    def of(self, loss: "SampleLoss") -> dict[str, float]:
        """Every number by its name.

        Args:
            loss: The loss of the samples.

        Raises:
            ValueError: A class that is to be looked at has no sample.
        """
        surface = loss.surface(self.method)
        values = self._whole(surface)
        products = surface.products_used
        for label in loss.classes(self.per_class):
            of_class = self._eigenvalue(loss.surface(self.method, label))
            values[f"top_eigenvalue_class_{label}"] = float(of_class.values[0])
            values["converged"] = min(values["converged"], float(of_class.converged))
            products += of_class.products
        return {**values, "products": float(products)}

    def _whole(self, surface: LossSurface) -> dict[str, float]:
        loss, gradient = surface.value_and_gradient()
        top = self._eigenvalue(surface)
        values = {
            "loss": float(loss),
            "gradient_norm": float(gradient.norm()),
            "top_eigenvalue": float(top.values[0]),
            "converged": float(top.converged),
        }
        if self.ascent_steps:
            rise = epsilon_sharpness(surface, radius=self.radius, steps=self.ascent_steps)
            values |= {"epsilon_sharpness": rise.absolute, "keskar_sharpness": rise.relative}
        if self.trace_products:
            trace = hutchinson_trace(surface, tolerance=0.0, max_products=self.trace_products, seed=self.seed)
            values |= {"trace": trace.value, "trace_error": trace.standard_error}
        return values

    def _eigenvalue(self, surface: LossSurface) -> Eigenvalues:
        search = lanczos if self.solver == "lanczos" else power_iteration
        return search(surface, tolerance=self.tolerance, max_products=self.max_products, seed=self.seed)


class SampleLoss:
    """The mean loss of the samples of all processes; each process evaluates its own.

    Args:
        taken: Inputs and targets of this process; ``None`` if it has none.
        weights: Maps inputs to logits.
        criterion: The loss.
        batch_size: Samples per forward pass.
        reduce: ``reduce(tensor, operation)`` over processes, ``None`` in a single one.
    """

    def __init__(
        self,
        taken: tuple[Tensor, Tensor] | None,
        weights: SeparateWeights,
        criterion: Criterion,
        batch_size: int,
        reduce: Reduction | None,
    ) -> None:
        self._weights = weights
        self._criterion = criterion
        self._batch_size = batch_size
        self._reduce = reduce
        self._device = weights.device
        self._x = self._y = torch.zeros(0, device=self._device)
        self._labels = torch.zeros(0, dtype=torch.long, device=self._device)
        if taken is not None:
            self._x, self._y = (weights.converted(tensor) for tensor in taken)
            self._labels = labels_of(self._y).long()

    def classes(self, wanted: bool | list[int]) -> list[int]:
        """The classes to look at one by one.

        Args:
            wanted: All that have samples, none, or the listed ones.

        Raises:
            ValueError: A listed class has no sample in any process.
        """
        if not wanted:
            return []
        highest = self._labels.max() if len(self._labels) else torch.tensor(-1, device=self._device)
        length = int(self._over_processes(highest, "max")) + 1
        counts = self._over_processes(torch.bincount(self._labels, minlength=length), "sum").tolist()
        present = [label for label, count in enumerate(counts) if count]
        if wanted is True:
            return present
        absent = [label for label in wanted if label not in present]
        if absent:
            raise ValueError(
                f"`per_class` lists {absent}, of which none of the {sum(counts)} samples is; raise `max_samples`, or "
                f"list classes that are there: {present}."
            )
        return wanted

    def surface(self, method: HessianMethod, label: int | None = None) -> LossSurface:
        """The loss of all samples, or of those of one class, which must have some.

        Args:
            method: How products with the Hessian are computed.
            label: The class.
        """
        indices = torch.arange(len(self._labels), device=self._device)
        if label is not None:
            indices = indices[self._labels == label]
        total = int(self._over_processes(torch.tensor(len(indices), device=self._device), "sum"))
        closures = [
            self._closure(part, len(part) / total) for part in torch.split(indices, self._batch_size) if len(part)
        ]
        reduce = self._reduce
        return LossSurface(
            closures,
            self._weights.parameters,
            method=method,
            reduce=None if reduce is None else lambda tensor: reduce(tensor, "sum"),
        )

    def _closure(self, indices: Tensor, share: float) -> Callable[[], Tensor]:
        x, y = self._x[indices], self._y[indices]

        def closure() -> Tensor:
            loss: Tensor = self._criterion(self._weights(x), y) * share
            self._weights.refuse_own(loss)
            return loss

        return closure

    def _over_processes(self, tensor: Tensor, operation: str) -> Tensor:
        return tensor if self._reduce is None else self._reduce(tensor, operation)


def reduction(trainer: L.Trainer) -> Reduction | None:
    """How tensors are reduced over the processes of a Trainer; ``None`` in a single one.

    Args:
        trainer: The Trainer.
    """
    return partial(_reduce, trainer) if trainer.world_size > 1 else None


def _reduce(trainer: L.Trainer, tensor: Tensor, operation: str) -> Tensor:
    reduced: Tensor = trainer.strategy.reduce(tensor, reduce_op=operation)
    return reduced


@contextmanager
def silenced(pl_module: L.LightningModule) -> Iterator[None]:
    """What forward logs and counts inside is not logged and counted, and nothing is compiled.

    Args:
        pl_module: The module.
    """
    gate = QuietGate(pl_module)
    gate.install()
    try:
        with gate.silence(), uncompiled():
            yield
    finally:
        gate.remove()
