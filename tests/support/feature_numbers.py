"""What `FeatureMonitor` must log for given features."""

import torch

from lightning_robust.metrics import (
    EffectiveRank,
    NeuralCollapse,
    centred_means,
    class_separation,
    feature_sums,
    self_duality,
)
from support.modules import CLASSES


def expected(features, logits, y, weight):
    sums = feature_sums(features, y, CLASSES)
    collapse = NeuralCollapse(num_classes=CLASSES, num_features=features.shape[1])
    collapse.update(features, y)
    rank = EffectiveRank(num_features=features.shape[1])
    rank.update(features)
    spread, ranks = class_separation(sums), rank.compute()
    nearest = torch.cdist(features.double(), sums.means).argmin(1)
    return {
        "d_within": spread.d_within,
        "r2": spread.r2,
        **collapse.compute()._asdict(),
        "nc3": self_duality(centred_means(sums), weight.double()),
        "nc4": (nearest != logits.argmax(1)).double().mean(),
        "effective_rank": ranks.effective,
        "stable_rank": ranks.stable,
    }
