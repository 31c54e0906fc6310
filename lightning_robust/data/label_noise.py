# SPDX-License-Identifier: Apache-2.0
"""Wrong labels on purpose, as a function of (seed, index), with the true ones kept for comparison."""

from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_robust.checks import check_choice, check_in_range, check_integer
from lightning_robust.data.augment import LabelledImages
from lightning_robust.training import derive_seed

__all__ = ["NOISE_KINDS", "NoiseKind", "RelabelledImages", "noisy_labels"]

NoiseKind = Literal["symmetric", "pairflip"]
NOISE_KINDS: tuple[NoiseKind, ...] = ("symmetric", "pairflip")


def noisy_labels(
    labels: Tensor, rate: float, *, num_classes: int, kind: NoiseKind = "symmetric", seed: int = 0
) -> Tensor:
    """Replace each label with probability `rate` by a wrong one.

    What becomes of a label depends on the seed and its position alone. The labels that are wrong at a lower rate are
    wrong in the same way at a higher one.

    Args:
        labels: class of each sample, ``[N]``.
        rate: probability that a label is wrong, in [0, 1]; a replaced label is never the true one, so this is the
            share of wrong labels (papers that draw from all classes, the true one included, have ``1 / num_classes``
            fewer).
        num_classes: number of classes.
        kind: ``"symmetric"`` draws one of the other classes with equal probabilities; ``"pairflip"`` takes the class
            that follows (arXiv:1804.06872).
        seed: seed of the draws.

    Example:
        >>> noisy = noisy_labels(torch.zeros(1000, dtype=torch.long), 0.4, num_classes=10)
        >>> 350 < int((noisy != 0).sum()) < 450
        True
    """
    check_in_range("rate", rate, 0.0, 1.0)
    check_integer("num_classes", num_classes, 2)
    check_choice("kind", kind, NOISE_KINDS)
    found = labels.tolist()
    for index, label in enumerate(found):
        if derive_seed(seed, index, "label-noise") < rate * 2**63:
            others = num_classes - 1 if kind == "symmetric" else 1
            found[index] = (label + 1 + derive_seed(seed, index, "wrong-label") % others) % num_classes
    return torch.tensor(found, dtype=labels.dtype)


class RelabelledImages(Dataset[tuple[Tensor, int]]):
    """Images of a dataset with other labels.

    Args:
        dataset: the images with their true labels.
        labels: what is taken for the labels instead, ``[N]``.

    Raises:
        ValueError: the lengths differ.

    Example:
        >>> from lightning_robust.data import ArrayImages
        >>> images = ArrayImages(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))
        >>> wrong = RelabelledImages(images, torch.tensor([0, 2]))
        >>> wrong[1][1], wrong.true_labels.tolist()
        (2, [0, 1])
    """

    def __init__(self, dataset: LabelledImages, labels: Tensor) -> None:
        if len(dataset) != len(labels):
            raise ValueError(f"Expected as many labels as images but got {len(labels)} for {len(dataset)}.")
        self.dataset = dataset
        self.labels = labels
        self._labels = labels.tolist()

    @property
    def true_labels(self) -> Tensor:
        """The labels of the dataset, ``[N]``."""
        return self.dataset.labels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.dataset[index][0], self._labels[index]
