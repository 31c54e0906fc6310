# SPDX-License-Identifier: Apache-2.0
"""Random augmentation of which each image has a fixed number of variants, so that answers about them can be stored."""

from collections.abc import Iterator
from copy import copy
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_robust.checks import check_integer
from lightning_robust.data.augment import AugmentedView, seeded_draws
from lightning_robust.data.samplers import EpochSampler
from lightning_robust.distillation.cache_data import labels_of, transform_of
from lightning_robust.training import derive_seed

__all__ = ["SeededViews", "ViewSampler"]


class SeededViews(Dataset[Any]):
    """A data set with a fixed number of augmented variants of each sample.

    Variant ``v`` of sample ``i`` is item ``v * N + i`` of ``N * variants``. It is made with the generators of torch,
    NumPy and Python seeded by ``(seed, i, v)`` and put back afterwards, so it is the same bit for bit in every epoch,
    order, worker and process. The position of an item thereby says what the student sees, which is what a
    :class:`~lightning_robust.distillation.TeacherCache` of these views is asked by. A data set with ``set_epoch``, as
    our data modules make them, is asked for its epochs 0, 1, ... as variants.

    A plain loader walks through all variants of all samples in one epoch. With :class:`ViewSampler`, epoch ``e`` has
    variant ``e % variants`` of each sample, as many steps as without the wrapper.

    Cost: 100 microseconds per sample for the generators; none for data sets of our data modules, which seed themselves.

    Args:
        dataset: a map-style data set whose samples are augmented when they are asked for.
        variants: number of variants of each sample.
        seed: seed of the draws.

    Raises:
        ValueError: an argument is out of range, or the data set has no samples.

    Example:
        >>> import torch
        >>> from torchvision.transforms import v2
        >>> from lightning_robust.data import ArrayImages, ImageView
        >>> images = ArrayImages(torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2]))
        >>> views = SeededViews(ImageView(images, transform=v2.RandomCrop(8, padding=2)), variants=4)
        >>> len(views), bool((views[5][0] == views[5][0]).all()), views[5][1]
        (12, True, 2)
    """

    def __init__(self, dataset: Dataset[Any], *, variants: int = 1, seed: int = 0) -> None:
        check_integer("variants", variants, 1)
        check_integer("seed", seed, 0)
        self.dataset = dataset
        self.variants = variants
        self.seed = seed
        self._samples = len(dataset)  # type: ignore[arg-type]
        if not self._samples:
            raise ValueError("Expected a data set with samples but it is empty.")
        self._epochs: list[Any] = [dataset] * variants
        if hasattr(dataset, "set_epoch"):
            self._epochs = [copy(dataset) for _ in range(variants)]
            for variant, own in enumerate(self._epochs):
                own.set_epoch(variant)

    @property
    def num_samples(self) -> int:
        """Number of samples, each with its variants."""
        return self._samples

    @property
    def labels(self) -> Tensor:
        """Labels of all items, if they can be had without loading samples."""
        labels = labels_of(self.dataset)
        if labels is None:
            raise AttributeError("The labels of this data set are not known without loading its samples.")
        return labels.repeat(self.variants)

    def __len__(self) -> int:
        return self._samples * self.variants

    def __getitem__(self, position: int) -> Any:
        position = int(position)
        if not 0 <= position < len(self):
            raise IndexError(f"Expected a position from 0 to {len(self) - 1} but got {position}.")
        variant, index = divmod(position, self._samples)
        own = self._epochs[variant]
        if isinstance(own, AugmentedView):
            return own[index]
        with seeded_draws(derive_seed(self.seed, index, variant, "view"), seed_all=True):
            return own[index]

    def describe_view(self) -> dict[str, Any]:
        """What a teacher cache remembers of the views, to refuse others."""
        seed = "" if isinstance(self.dataset, AugmentedView) else f"seed={self.seed}: "
        return {"view": "seeded", "variants": self.variants, "transform": seed + transform_of(self.dataset)}


class ViewSampler(EpochSampler):
    """Draws one variant of each sample per epoch of :class:`SeededViews`: ``epoch % variants``.

    Lightning calls ``set_epoch`` on it and leaves it alone, in one process as in many.

    Args:
        views: the data set.
        seed: the order of epoch ``e`` is drawn from ``seed + e``.
        num_replicas: number of processes.
        rank: index of this process.
        shuffle: ``False`` keeps the order of the data set.

    Example:
        >>> views = SeededViews(list(range(3)), variants=2)
        >>> sampler = ViewSampler(views, shuffle=False)
        >>> sampler.set_epoch(1)
        >>> list(sampler)
        [3, 4, 5]
    """

    def __init__(
        self, views: SeededViews, *, seed: int = 0, num_replicas: int = 1, rank: int = 0, shuffle: bool = True
    ) -> None:
        super().__init__(range(views.num_samples), seed=seed, num_replicas=num_replicas, rank=rank, shuffle=shuffle)
        self.variants = views.variants

    @override
    def __iter__(self) -> Iterator[int]:
        first = self.epoch % self.variants * len(self.dataset)  # type: ignore[arg-type]
        return (first + index for index in super().__iter__())
