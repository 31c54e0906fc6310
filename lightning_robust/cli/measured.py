# SPDX-License-Identifier: Apache-2.0
"""Measure the quantities of a comparison on what one of its trainings has left."""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from lightning_robust.attacks import Attack, AutoAttack
from lightning_robust.cli.builder import RecipeCLI
from lightning_robust.cli.errors import CommandError
from lightning_robust.cli.measure import loader_of
from lightning_robust.cli.quantities import QUANTITIES
from lightning_robust.cli.train import best_weights, last_weights, load_checkpoint
from lightning_robust.data import ImageDataModule
from lightning_robust.evaluation import evaluate, linear_probe, quarter_turns
from lightning_robust.guards import evaluation_mode
from lightning_robust.metrics import (
    CalibrationError,
    NegativeLogLikelihood,
    Separation,
    aurc,
    class_separation,
    feature_sums,
)
from lightning_robust.training import BatchAdapter, FeatureCapture, LogitsFunction

__all__ = ["measure_quantities", "probe_task"]


class Outputs(NamedTuple):
    """What the network makes of a split; without features where no quantity needs them."""

    logits: Tensor
    features: Tensor
    labels: Tensor


def probe_task(cli: RecipeCLI) -> str:
    """What the linear probe of a comparison learns, in words; available once the run is built."""
    transfer = cli.config_init.evaluation.transfer
    if transfer is None:
        return "which quarter turn an image was given"
    return f"the classes of {getattr(transfer, 'dataset', type(transfer).__name__)}"


def measure_quantities(
    cli: RecipeCLI, folder: Path, names: list[str], seconds: float | None
) -> dict[str, float | None]:
    """Measure a training of a comparison.

    Args:
        cli: The training, built.
        folder: Its folder.
        names: Which quantities.
        seconds: How long it trained.

    Returns:
        The value of each; ``None`` where it has none, as the wrong labels of true ones.

    Raises:
        CommandError: If something cannot be measured.
    """
    measured = _Measured(cli, folder, with_features=not _NEEDS_FEATURES.isdisjoint(names))
    found: dict[str, float | None] = {"seconds": seconds}
    try:
        # the weights of the best epoch come last
        for name in sorted(set(names) - set(found), key=lambda name: name == "best_accuracy"):
            found[name] = _HOW[name](measured)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CommandError(f"{folder} is trained but `{name}` cannot be measured: {error}") from error
    return {name: found[name] for name in QUANTITIES if name in names}


class _Measured:
    def __init__(self, cli: RecipeCLI, folder: Path, *, with_features: bool) -> None:
        self.cli = cli
        self.with_features = with_features
        self.folder = folder
        self.device = cli.trainer.strategy.root_device
        self.load(last_weights(folder))
        cli.model.to(self.device)

    def load(self, weights: Path) -> None:
        if weights.is_file():
            self.cli.model.load_state_dict(load_checkpoint(weights)["state_dict"])

    @cached_property
    def test(self) -> Outputs:
        return self.outputs(self.batches("test"))

    @cached_property
    def train(self) -> Outputs:
        return self.outputs(self.batches("train"))

    @cached_property
    def wrong(self) -> tuple[Tensor, Tensor] | None:
        """Which training labels are wrong, and the true ones; ``None`` without any."""
        data = self.cli.datamodule
        if not isinstance(data, ImageDataModule) or data.label_noise == 0:
            return None
        true = data.true_train_labels()
        return true != self.train.labels, true

    def batches(self, split: str, data: L.LightningDataModule | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        loader = loader_of(self.cli, split, data)
        if loader is None:
            raise ValueError(f"there is no {split} data")
        unpack = BatchAdapter().unpack
        return (unpack(batch) for batch in loader)

    @cached_property
    def separation(self) -> Separation:
        logits, features, labels = self.test
        return class_separation(feature_sums(features, labels, logits.shape[1], covariance=False))

    def outputs(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Outputs:
        model = self.cli.model
        capture = FeatureCapture(model, self.cli.config.evaluation.features_from)
        capture.active = self.with_features
        parts: list[Outputs] = []
        with evaluation_mode(model), torch.no_grad(), capture:
            for images, labels in batches:
                logits = LogitsFunction(model)(images.to(self.device))
                features = capture.take(logits) if self.with_features else logits[:, :0]
                capture.clear()
                parts.append(Outputs(logits.float().cpu(), features.float().cpu(), labels.cpu()))
        if not parts:
            raise ValueError("there are no samples")
        return Outputs(*(torch.cat(each) for each in zip(*parts, strict=True)))

    @cached_property
    def attack(self) -> Attack:
        attack = self.cli.config_init.evaluation.attack
        if attack is None:
            raise ValueError("the recipe's `evaluation` has no attack")
        return attack  # type: ignore[no-any-return]

    def under(self, attack: Attack) -> float | None:
        """Share of the test samples, or of the first `evaluation.max_attacked`, that are right clean and attacked."""
        result = evaluate(
            LogitsFunction(self.cli.model),
            self.batches("test"),
            attack=attack,
            max_attacked=self.cli.config_init.evaluation.max_attacked,
            device=self.device,
        )
        return result.robust_accuracy

    def probe(self) -> float:
        transfer = self.cli.config_init.evaluation.transfer
        if transfer is None:
            train, test = (self.outputs(_turned(self.batches(split))) for split in ("train", "test"))
        else:
            train, test = (self.outputs(self.batches(split, transfer)) for split in ("train", "test"))
        return linear_probe(train.features, train.labels, test.features, test.labels).accuracy


def _turned(batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    seen = 0
    for images, _ in batches:
        yield quarter_turns(images, torch.arange(seen, seen + len(images)))
        seen += len(images)


def _right(outputs: Outputs) -> Tensor:
    return outputs.logits.argmax(1) == outputs.labels


def _accuracy(measured: _Measured) -> float:
    return float(_right(measured.test).double().mean())


def _val_accuracy(measured: _Measured) -> float:
    return float(_right(measured.outputs(measured.batches("val"))).double().mean())


def _best_accuracy(measured: _Measured) -> float | None:
    weights = best_weights(measured.folder)
    if not weights.is_file():
        return None
    measured.load(weights)
    found = float(_right(measured.outputs(measured.batches("test"))).double().mean())
    measured.load(last_weights(measured.folder))
    return found


def _adv_accuracy(measured: _Measured) -> float | None:
    return measured.under(measured.attack)


def _autoattack(measured: _Measured) -> float | None:
    own = measured.attack
    norm: Any = getattr(own, "norm", "linf")
    return measured.under(AutoAttack(eps=own.eps, norm=norm, mean=own.mean, std=own.std, bounds=own.bounds))


def _streamed(metric: CalibrationError | NegativeLogLikelihood, measured: _Measured) -> float:
    metric.update(measured.test.logits, measured.test.labels)
    return float(metric.compute())


def _aurc(measured: _Measured) -> float:
    # in float64 fewer confident samples share a probability of one
    scores = measured.test.logits.double().softmax(1).amax(1)
    return float(aurc(scores, _right(measured.test)))


def _wrong_share(measured: _Measured, true: bool) -> float | None:
    if measured.wrong is None:
        return None
    wrong, true_labels = measured.wrong
    wanted = true_labels if true else measured.train.labels
    return float((measured.train.logits.argmax(1) == wanted)[wrong].double().mean())


_HOW: dict[str, Callable[[_Measured], float | None]] = {
    "accuracy": _accuracy,
    "val_accuracy": _val_accuracy,
    "best_accuracy": _best_accuracy,
    "adv_accuracy": _adv_accuracy,
    "autoattack": _autoattack,
    "ece": lambda measured: _streamed(CalibrationError(n_bins=15, sync_on_compute=False), measured),
    "nll": lambda measured: _streamed(NegativeLogLikelihood(sync_on_compute=False), measured),
    "aurc": _aurc,
    "d_within": lambda measured: float(measured.separation.d_within),
    "r2": lambda measured: float(measured.separation.r2),
    "probe": _Measured.probe,
    "memorised": lambda measured: _wrong_share(measured, true=False),
    "recovered": lambda measured: _wrong_share(measured, true=True),
}
_NEEDS_FEATURES = {"d_within", "r2", "probe"}
