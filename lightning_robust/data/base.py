# SPDX-License-Identifier: Apache-2.0
"""What all image data modules share: splits, loaders, augmentation and exact resume."""

import os
from collections.abc import Callable
from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_robust.checks import check_choice, check_in_range, check_integer
from lightning_robust.data.augment import (
    AUGMENTATIONS,
    Augmentation,
    AugmentedView,
    ImageView,
    LabelledImages,
    augmentation,
)
from lightning_robust.data.label_noise import NOISE_KINDS, NoiseKind, RelabelledImages, noisy_labels
from lightning_robust.data.loader import ResumableDataLoader
from lightning_robust.data.samplers import EpochSampler, EvalSampler
from lightning_robust.data.seeded_views import SeededViews, ViewSampler
from lightning_robust.data.split import stratified_split

__all__ = ["ImageDataModule"]


class ImageDataModule(L.LightningDataModule):
    """Base of the data modules: float32 images ``[C, H, W]`` in [0, 1] with an integer label.

    Normalisation belongs to the model, so that attacks work on pixels; :attr:`mean` and :attr:`std` are suggestions
    for it. A subclass sets the attributes below in its constructor and implements :meth:`load_train` and
    :meth:`load_test`; without validation images of its own, ``val_fraction`` of each training class is held out.

    Training order and augmentation are functions of (seed, epoch, index), so runs repeat, and a run that continues in
    mid-epoch sees exactly what the uninterrupted run would have seen. Evaluation sees every image exactly once, in
    several processes too.

    Attributes:
        num_classes: number of classes.
        in_chans: number of channels.
        image_size: side of the square images.
        classes: name of each class.
        mean: mean of each channel, for the model.
        std: standard deviation of each channel, for the model.

    Args:
        batch_size: samples per batch and process.
        num_workers: loading processes; images in memory need none.
        augment: "none", "shift", "crop-flip", "randaugment", "trivialaugment" or "cutout", applied to training images.
        train_transform: an augmentation of your own instead, image tensor in and out.
        augment_variants: number of augmented variants of each image, so that epoch ``e`` repeats epoch
            ``e % augment_variants`` and a teacher's answers about them can be stored (:class:`SeededViews`); new
            ones in every epoch when ``None``.
        val_fraction: part of each training class that is held out for validation; 0 means no validation.
        split_seed: seed of that split, apart from ``seed`` so that repeated runs validate on the same images.
        train_fraction: part of each class that is trained on, of what the validation leaves; also chosen by
            ``split_seed``.
        label_noise: share of the training labels that are replaced by wrong ones (:func:`noisy_labels`); validation
            and test labels stay true, and :meth:`true_train_labels` tells which are wrong.
        noise_kind: "symmetric" or "pairflip".
        noise_seed: seed of the wrong labels, apart from ``seed`` so that repeated runs train on the same labels.
        seed: seed of order and augmentation; ``None`` takes the one of ``seed_everything``, or 0.
        drop_last: leave out a last, smaller training batch.

    Raises:
        ValueError: an argument is out of range, or both ``augment`` and ``train_transform`` are given.
    """

    num_classes: int
    in_chans: int
    image_size: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        *,
        batch_size: int = 128,
        num_workers: int = 0,
        augment: Augmentation = "none",
        train_transform: Callable[[Any], Any] | None = None,
        augment_variants: int | None = None,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        train_fraction: float = 1.0,
        label_noise: float = 0.0,
        noise_kind: NoiseKind = "symmetric",
        noise_seed: int = 0,
        seed: int | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        check_integer("batch_size", batch_size, 1)
        check_integer("num_workers", num_workers, 0)
        check_choice("augment", augment, AUGMENTATIONS)
        if augment_variants is not None:
            check_integer("augment_variants", augment_variants, 1)
        check_in_range("val_fraction", val_fraction, 0.0, 0.9)
        check_integer("split_seed", split_seed, 0)
        check_in_range("train_fraction", train_fraction, 0.0, 1.0)
        check_in_range("label_noise", label_noise, 0.0, 1.0)
        check_choice("noise_kind", noise_kind, NOISE_KINDS)
        check_integer("noise_seed", noise_seed, 0)
        if train_transform is not None and augment != "none":
            raise ValueError("Expected either `augment` or `train_transform` but got both.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.augment: Augmentation = augment
        self.train_transform = train_transform
        self.augment_variants = augment_variants
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.train_fraction = train_fraction
        self.label_noise = label_noise
        self.noise_kind: NoiseKind = noise_kind
        self.noise_seed = noise_seed
        self.seed = seed
        self.drop_last = drop_last
        self.train_set: ImageView | None = None
        self.val_set: ImageView | None = None
        self.test_set: ImageView | None = None
        self._train_loader: ResumableDataLoader | None = None
        self._loaded_state: dict[str, Any] = {}

    def load_train(self) -> LabelledImages:
        """Return the training images."""
        raise NotImplementedError

    def load_val(self) -> LabelledImages | None:
        """Return the validation images, or ``None`` to hold some training images out."""
        return None

    def load_test(self) -> LabelledImages:
        """Return the test images."""
        raise NotImplementedError

    def make_augmentation(self) -> Callable[[Any], Any] | None:
        """Return the random transform that :attr:`augment` names."""
        return augmentation(self.augment, self.image_size, fill=self.mean)

    def eval_transform(self) -> Callable[[Any], Any] | None:
        """Return the fixed transform of evaluation images."""
        return None

    @override
    def setup(self, stage: str | None = None) -> None:
        """Load what a stage needs, once.

        Args:
            stage: "fit", "validate", "test" or "predict"; everything when ``None``.
        """
        if stage in ("fit", "validate", None) and self.train_set is None:
            self._setup_fit()
        if stage in ("test", "predict", None) and self.test_set is None:
            self.test_set = ImageView(self.load_test(), transform=self.eval_transform())

    @override
    def train_dataloader(self) -> ResumableDataLoader:
        replicas, rank = self._processes()
        dataset: Dataset[Any]
        if self.augment_variants is None:
            dataset = images = self._loaded(self.train_set, "fit")
            sampler = EpochSampler(images, seed=self._seed(), num_replicas=replicas, rank=rank)
        else:
            dataset = views = self.train_views()
            sampler = ViewSampler(views, seed=self._seed(), num_replicas=replicas, rank=rank)
        loader = ResumableDataLoader(
            dataset,
            self.batch_size,
            sampler=sampler,
            progress=self._progress if self.trainer is not None else None,
            drop_last=self.drop_last,
            num_workers=self.num_workers,
            pin_memory=self._pin_memory(),
        )
        if self._loaded_state:
            loader.load_state_dict(self._loaded_state)
            self._loaded_state = {}
        self._train_loader = loader
        return loader

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if self.train_set is not None and self.val_set is None:
            return []  # Lightning's way of saying that there is no validation
        return self._eval_loader(self._loaded(self.val_set, "validate"))

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self._eval_loader(self._loaded(self.test_set, "test"))

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        return self.test_dataloader()

    def clean_train_loader(self) -> DataLoader[Any]:
        """The training images once and in order, without augmentation, with the labels that are trained on."""
        trained = self._loaded(self.train_set, "fit")
        return self._eval_loader(ImageView(trained.dataset, trained.indices, self.eval_transform()))

    def train_views(self) -> SeededViews:
        """All :attr:`augment_variants` variants of the training images, as they are trained on."""
        if self.augment_variants is None:
            raise ValueError(
                f"{type(self).__name__} augments anew in every epoch; set `augment_variants` to repeat some."
            )
        return SeededViews(self._loaded(self.train_set, "fit"), variants=self.augment_variants)

    def true_train_labels(self) -> Tensor:
        """The true label of each training image, in the order of the training set, whatever :attr:`label_noise` is."""
        trained = self._loaded(self.train_set, "fit")
        images = trained.dataset
        labels = images.true_labels if isinstance(images, RelabelledImages) else images.labels
        return labels[trained.indices]

    # Lightning keeps the state of loaders too, but forgets to restore it when configure_optimizers has asked for
    # trainer.estimated_stepping_batches; what a data module keeps is always restored.
    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._train_loader is None else {"train_loader": self._train_loader.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded_state = dict(state_dict.get("train_loader", {}))

    def _setup_fit(self) -> None:
        train, val = self.load_train(), self.load_val()
        stay: list[int] | None = None
        if val is not None:
            self.val_set = ImageView(val, transform=self.eval_transform())
        elif self.val_fraction > 0:
            stay, held = stratified_split(train.labels, self.val_fraction, self.split_seed)
            if held:
                self.val_set = ImageView(train, held, self.eval_transform())
        stay = self._fewer(train.labels, stay)
        if self.label_noise > 0:
            wrong = noisy_labels(
                train.labels,
                self.label_noise,
                num_classes=self.num_classes,
                kind=self.noise_kind,
                seed=self.noise_seed,
            )
            train = RelabelledImages(train, wrong)
        own = self.train_transform
        transform = own if own is not None else self.make_augmentation()
        if transform is None:
            self.train_set = ImageView(train, stay, self.eval_transform())
        else:
            self.train_set = AugmentedView(train, stay, transform, seed=self._seed(), seed_all=own is not None)

    def _fewer(self, labels: Tensor, stay: list[int] | None) -> list[int] | None:
        if self.train_fraction == 1.0:
            return stay
        stay = list(range(len(labels))) if stay is None else stay
        kept = stratified_split(labels[stay], self.train_fraction, self.split_seed)[1]
        if not kept:
            raise ValueError(f"`train_fraction` {self.train_fraction:g} leaves no training image; choose a larger one.")
        return [stay[index] for index in kept]

    def _eval_loader(self, dataset: ImageView) -> DataLoader[Any]:
        replicas, rank = self._processes()
        return DataLoader(
            dataset,
            self.batch_size,
            sampler=EvalSampler(dataset, num_replicas=replicas, rank=rank),
            num_workers=self.num_workers,
            pin_memory=self._pin_memory(),
        )

    def _loaded(self, dataset: ImageView | None, stage: str) -> ImageView:
        if dataset is None:
            raise RuntimeError(f"{type(self).__name__} is not set up; call setup({stage!r}) first.")
        return dataset

    def _processes(self) -> tuple[int, int]:
        trainer = self.trainer
        return (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)

    def _pin_memory(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _seed(self) -> int:
        return self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))

    def _progress(self) -> tuple[int, int]:
        assert self.trainer is not None
        # index of the batch that Lightning trained on last in this epoch, -1 before the first
        return self.trainer.current_epoch, self.trainer.fit_loop.batch_idx + 1
