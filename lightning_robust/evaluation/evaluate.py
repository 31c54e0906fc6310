# SPDX-License-Identifier: Apache-2.0
"""One pass over a test set: every sample counted once, on one device, whatever trained the model."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attacks import Attack
from lightning_robust.calibration import TemperatureScaling
from lightning_robust.checks import check_integer
from lightning_robust.evaluation.result import EvaluationResult
from lightning_robust.guards import evaluation_mode
from lightning_robust.metrics import ReliabilityTable, TopLabelReliability

__all__ = ["evaluate"]

Unpack = Callable[[Any], tuple[Tensor, Tensor]]


def evaluate(
    model: Callable[[Tensor], Tensor],
    test: Iterable[Any],
    *,
    validation: Iterable[Any] | None = None,
    attack: Attack | None = None,
    device: torch.device | str = "cpu",
    max_attacked: int | None = None,
    n_bins: int = 15,
    seed: int = 0,
    unpack: Unpack | None = None,
    progress: Callable[[int], None] | None = None,
) -> EvaluationResult:
    """Measure accuracy, accuracy under attack, and calibration before and after temperature scaling.

    Runs in evaluation mode and in float32 as the model is; flags, buffers and gradients of the model stay as they
    were. A sample is robust when it is right both clean and attacked, so a random start that happens to repair a
    wrong answer is no merit. The temperature is fitted on `validation` and never sees a test sample.

    Cost: one forward per sample, and the passes of the attack per attacked sample.

    Args:
        model: Maps images to logits; a module, or a callable with the module as its attribute ``module``.
        test: Batches of the test set.
        validation: Batches of held-out samples for the temperature; no scaling without them.
        attack: Attack to withstand; none by default.
        device: Where to run.
        max_attacked: Attack only this many samples, the first ones; all by default.
        n_bins: Number of confidence bins of the calibration error.
        seed: Seed of the attack's random numbers.
        unpack: Reads images and labels from a batch; its first two entries by default.
        progress: Called after each batch with the number of its samples.

    Raises:
        ValueError: If there is no test sample.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> result = evaluate(model, [(torch.rand(8, 2), torch.randint(3, (8,)))])
        >>> result.samples, result.robust_accuracy
        (8, None)
    """
    if max_attacked is not None:
        check_integer("max_attacked", max_attacked, 0)
    module = model if isinstance(model, nn.Module) else model.module  # type: ignore[attr-defined]
    device = torch.device(device)
    run = _Run(model, device, unpack or _first_two, progress or _silent)
    with evaluation_mode(module):
        scaling = None if validation is None else run.fit_temperature(validation)
        counts = run.count(test, attack, max_attacked, scaling, n_bins, seed)
    plain = counts.plain.compute()
    scaled = None if scaling is None else counts.scaled.compute()
    return EvaluationResult(
        samples=int(plain.total),
        accuracy=float(plain.overall_accuracy),
        nll=float(plain.nll),
        brier=float(plain.brier),
        ece=float(plain.error("l1")),
        bin_counts=plain.counts.tolist(),
        bin_accuracy=_per_bin(plain, plain.accuracy),
        bin_confidence=_per_bin(plain, plain.confidence),
        attack=None if attack is None or counts.attacked == 0 else repr(attack),
        attacked=counts.attacked,
        robust_accuracy=counts.robust / counts.attacked if counts.attacked else None,
        temperature=None if scaling is None else scaling.temperature,
        temperature_at_bound=scaling is not None and scaling.at_bound,
        ece_scaled=None if scaled is None else float(scaled.error("l1")),
        nll_scaled=None if scaled is None else float(scaled.nll),
    )


class _Counts:
    def __init__(self, n_bins: int, device: torch.device) -> None:
        # This process has all samples: it must not wait for others that do not evaluate.
        self.plain = TopLabelReliability(n_bins=n_bins, sync_on_compute=False).to(device)
        self.scaled = TopLabelReliability(n_bins=n_bins, sync_on_compute=False).to(device)
        self.attacked = 0
        self.robust = 0


class _Run:
    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        device: torch.device,
        unpack: Unpack,
        progress: Callable[[int], None],
    ) -> None:
        self.model = model
        self.device = device
        self.unpack = unpack
        self.progress = progress

    def fit_temperature(self, batches: Iterable[Any]) -> TemperatureScaling:
        pairs = [self._logits(batch)[1:] for batch in batches]
        if not pairs:
            raise ValueError("Expected `validation` to have samples but got none.")
        logits, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        with warnings.catch_warnings():
            # The result says so itself.
            warnings.filterwarnings("ignore", message="The temperature was set to its")
            return TemperatureScaling().fit(logits, labels)

    def count(
        self,
        batches: Iterable[Any],
        attack: Attack | None,
        max_attacked: int | None,
        scaling: TemperatureScaling | None,
        n_bins: int,
        seed: int,
    ) -> _Counts:
        counts = _Counts(n_bins, self.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        robust = torch.zeros((), dtype=torch.long, device=self.device)
        for batch in batches:
            x, logits, y = self._logits(batch)
            counts.plain.update(logits, y)
            if scaling is not None:
                counts.scaled.update(scaling(logits), y)
            left = len(y) if max_attacked is None else min(len(y), max_attacked - counts.attacked)
            if attack is not None and left > 0:
                adversarial = attack(self.model, x[:left], y[:left], generator=generator)
                with torch.no_grad():
                    withstood = self.model(adversarial).argmax(1) == y[:left]
                robust += (withstood & (logits[:left].argmax(1) == y[:left])).sum()
                counts.attacked += left
            self.progress(len(y))
        if int(counts.plain.table().total) == 0:
            raise ValueError("Expected `test` to have samples but got none.")
        counts.robust = int(robust)
        return counts

    def _logits(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y = self.unpack(batch)
        x, y = x.to(self.device), y.to(self.device)
        with torch.no_grad():
            return x, self.model(x).float(), y


def _per_bin(table: ReliabilityTable, values: Tensor) -> list[float | None]:
    filled = (table.counts > 0).tolist()
    return [value if full else None for value, full in zip(values.tolist(), filled, strict=True)]


def _first_two(batch: Any) -> tuple[Tensor, Tensor]:
    return batch[0], batch[1]


def _silent(samples: int) -> None:
    pass
