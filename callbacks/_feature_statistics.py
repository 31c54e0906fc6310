# SPDX-License-Identifier: Apache-2.0
"""What `FeatureMonitor` sums up over an epoch, and the numbers that it makes of it."""

import math
import random

import lightning as L
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_robust.metrics import (
    FeatureAccumulator,
    FeatureSums,
    centred_means,
    class_separation,
    effective_rank,
    nearest_mean_disagreement,
    self_duality,
    stable_rank,
)
from lightning_robust.metrics.effective_rank import gram_of, singular_values_of
from lightning_robust.metrics.neural_collapse import collapse_of

__all__ = ["FeatureStatistics", "KeptFeatures", "classifier_weight"]

_ROWS = 1024


class KeptFeatures:
    """A uniform sample of at most ``limit`` of the rows that pass, with the class that was predicted for each.

    Args:
        limit: number of rows.
        seed: seed of the choice.
    """

    def __init__(self, limit: int, seed: int = 0) -> None:
        self.limit = limit
        self._random = random.Random(seed)
        self._passed = 0
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._packed = False  # into one part, a copy that may be changed

    def add(self, features: Tensor, predicted: Tensor) -> None:
        """Offer some rows; nothing waits for the device.

        Args:
            features: features ``[B, D]``.
            predicted: predicted classes ``[B]``; a negative one for a sample that does not count.
        """
        room = max(self.limit - self._passed, 0)
        if room:
            self._parts.append((features[:room].float(), predicted[:room]))
        replaced: dict[int, int] = {}  # slot: row; of several rows for one slot the last one stays
        for row in range(room, len(features)):
            slot = self._random.randrange(self._passed + row + 1)
            if slot < self.limit:
                replaced[slot] = row
        self._passed += len(features)
        if replaced:
            self._replace(list(replaced), features[list(replaced.values())], predicted[list(replaced.values())])

    def _replace(self, slots: list[int], features: Tensor, predicted: Tensor) -> None:
        if not self._packed:
            self._parts = [(torch.cat([h for h, _ in self._parts]), torch.cat([answer for _, answer in self._parts]))]
            self._packed = True
        kept, classes = self._parts[0]
        at = torch.tensor(slots, device=kept.device)
        kept.index_copy_(0, at, features.float())
        classes.index_copy_(0, at, predicted)

    def disagreement(self, sums: FeatureSums) -> tuple[Tensor, Tensor]:
        """For how many kept rows the nearest class mean is not the predicted class, and how many rows count.

        Args:
            sums: sums that give the class means.
        """
        means, present = sums.means, sums.present
        position = torch.where(present, present.cumsum(0) - 1, len(means))  # a class without a mean agrees with none
        wrong = counted = torch.zeros((), dtype=torch.int64, device=means.device)
        for features, predicted in self._parts:
            for h, answer in zip(torch.split(features, _ROWS), torch.split(predicted, _ROWS), strict=True):
                kept = answer >= 0
                wrong = wrong + nearest_mean_disagreement(
                    h[kept].to(means.device), position[answer[kept].to(means.device)], means
                )
                counted = counted + kept.sum().to(means.device)
        return wrong, counted


class FeatureStatistics:
    """Sums over the features of one epoch, the same for any number of processes.

    Args:
        covariance: whether to sum outer products.
        keep: number of features that are kept for the nearest class mean.
        seed: seed of the choice of these.
    """

    def __init__(self, *, covariance: bool, keep: int, seed: int) -> None:
        self.covariance = covariance
        self._sums: FeatureAccumulator | None = None
        self._kept = KeptFeatures(keep, seed)

    @torch.no_grad()
    def update(self, features: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: features ``[B, D]``.
            logits: logits ``[B, C]``.
            labels: class indices ``[B]``.
        """
        labels = labels.to(features.device)
        if self._sums is None:
            self._sums = self._empty(logits.shape[1], features.shape[1], features.device)
        self._sums.update(features, labels)
        if self._kept.limit:
            self._kept.add(features, torch.where(labels >= 0, logits.argmax(1), -1))

    def compute(self, trainer: L.Trainer, classifier: nn.Module | None, where: str) -> dict[str, float]:
        """The numbers of the epoch; all processes have to call it.

        Args:
            trainer: the Trainer.
            classifier: the layer that made logits of the features, if known.
            where: what is measured, for warnings.
        """
        weight = classifier_weight(classifier)
        sums, weight_known = self._reduced(trainer, weight)
        if sums is None:
            return {}
        if not sums.finite():
            rank_zero_warn(f"Features of {where} are NaN or infinite, so the values of FeatureMonitor are NaN.")
        spread = class_separation(sums)
        values = {"d_within": spread.d_within, "r2": spread.r2, **collapse_of(sums)._asdict()}
        if weight is not None and weight_known:
            kept = sums.present
            values["nc3"] = self_duality(centred_means(sums), weight.to(sums.sums)[kept])
        if self._kept.limit:
            wrong, counted = (trainer.strategy.reduce(part, reduce_op="sum") for part in self._kept.disagreement(sums))
            values["nc4"] = wrong / counted
        if sums.outer is None:
            del values["nc1"]
        else:
            singular = singular_values_of(gram_of(sums.outer, sums.sums.sum(0), sums.counts.sum()))
            values |= {"effective_rank": effective_rank(singular), "stable_rank": stable_rank(singular)}
        # all of them in one transfer
        numbers = torch.stack([value.double() for value in values.values()]).tolist()
        return dict(zip(values, numbers, strict=True))

    def _empty(self, classes: int, features: int, device: torch.device) -> FeatureAccumulator:
        sums = FeatureAccumulator(num_classes=classes, num_features=features, covariance=self.covariance)
        return sums.to(device if device.type != "mps" else "cpu")  # which has no float64

    def _reduced(self, trainer: L.Trainer, weight: Tensor | None) -> tuple[FeatureSums | None, bool]:
        """The sums of all processes, and whether all of them know the weights of the classifier."""
        shape = [0, 0] if self._sums is None else [self._sums.num_classes, self._sums.num_features]
        unknown = weight is None or list(weight.shape) != shape
        agreed = torch.tensor([*shape, unknown], device=trainer.strategy.root_device)
        if trainer.world_size > 1:
            # a process that had no batch knows nothing
            agreed = trainer.strategy.reduce(agreed, reduce_op="max")
        classes, features, unknown = agreed.tolist()
        if not classes:
            return None, False
        if self._sums is None:
            self._sums = self._empty(classes, features, trainer.strategy.root_device)
        with self._sums.sync_context():
            return self._sums.total, not unknown


def classifier_weight(classifier: nn.Module | None) -> Tensor | None:
    """Weights ``[C, D]`` of a linear layer, also one that is written as a 1 x 1 convolution.

    Args:
        classifier: the layer.
    """
    if isinstance(classifier, nn.Linear) or (
        isinstance(classifier, nn.Conv2d) and math.prod(classifier.kernel_size) == 1
    ):
        return classifier.weight.detach().flatten(1)
    return None
