# SPDX-License-Identifier: Apache-2.0
"""One call that asks a teacher about a whole training set and stores what it says."""

from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_robust.callbacks.teacher_cache_writer import TeacherCacheWriter, TeacherPredictor
from lightning_robust.checks import check_choice, check_integer
from lightning_robust.data import ImageDataModule, ImageView, SeededViews
from lightning_robust.distillation import Network, Teacher, TeacherCache, TeacherSource, build_teacher
from lightning_robust.training import BatchAdapter

__all__ = ["cache_teacher"]

View = Literal["fixed", "seeded"]


def cache_teacher(
    teacher: str | Path | Network | Teacher | TeacherSource,
    data: L.LightningDataModule | Dataset[Any],
    path: str | Path,
    *,
    trainer: L.Trainer | None = None,
    view: View = "fixed",
    variants: int | None = None,
    seed: int = 0,
    top_k: int | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    batch_size: int = 256,
    num_workers: int = 0,
    overwrite: bool = False,
    batch: BatchAdapter | None = None,
) -> TeacherCache:
    """Write the logits of a teacher about every training sample to disk, through ``trainer.predict``.

    With ``view="fixed"`` the teacher sees each image once without random augmentation. With ``view="seeded"`` it sees
    ``variants`` augmented variants of each, and the student has to be trained on the same ones: set
    ``augment_variants`` of our data modules, or train on the :class:`~lightning_robust.data.SeededViews` that was
    given. Crops that are stored one by one, as FKD does, are not supported.

    Cost: one forward pass of the teacher per sample and variant.

    Args:
        teacher: The network, file, timm name or teacher; see :func:`~lightning_robust.distillation.build_teacher`.
        data: A data module, whose training set is taken, or a map-style data set.
        path: Folder of the cache.
        trainer: The Trainer to predict with, of one or several processes on one machine; a fresh one when ``None``. The
            writer is taken out of its callbacks again.
        view: ``"fixed"`` or ``"seeded"``.
        variants: Variants of each sample, for ``"seeded"``; what the data module or ``SeededViews`` has, or 1.
        seed: Seed of the variants of a data set that does not seed itself.
        top_k: Number of classes to keep of each sample, the label's always among them; all when ``None``.
        dtype: Type of the stored numbers.
        batch_size: Samples per batch and process.
        num_workers: Loading processes.
        overwrite: Replace a cache that is there.
        batch: How to read inputs (and labels, for ``top_k``) from a batch; the usual forms are understood when
            ``None``.

    Returns:
        The cache, opened.

    Raises:
        FileExistsError: If there is a cache.
        TypeError: If ``data`` is something else.
        ValueError: If arguments contradict each other or the data, if samples are random with ``view="fixed"``, or for
            what the writer refuses.

    References:
        Beyer et al., arXiv:2106.05237 (why the student should see the teacher's view), Shen and Xing,
        arXiv:2112.01528 (stored labels).

    Example:
        >>> import tempfile
        >>> import lightning as L
        >>> import torch
        >>> from lightning_robust.callbacks import cache_teacher
        >>> from lightning_robust.data import DigitsDataModule
        >>> teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))  # a trained network
        >>> data = DigitsDataModule(image_size=8, augment="shift", augment_variants=2)
        >>> quiet = L.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache_teacher(teacher, data, folder + "/seeded", trainer=quiet, view="seeded").num_samples
        2590
    """
    check_choice("view", view, ("fixed", "seeded"))
    check_integer("batch_size", batch_size, 1)
    if variants is not None and view == "fixed":
        raise ValueError("`variants` are those of view='seeded'; leave them out, or set the view.")
    built = teacher.build() if isinstance(teacher, TeacherSource) else build_teacher(teacher)
    writer = TeacherCacheWriter(path, dtype=dtype, top_k=top_k, overwrite=overwrite, batch=batch)
    loading = {"batch_size": batch_size, "num_workers": num_workers}
    views = _Views(data, view, variants, seed, loading)
    if trainer is None:
        trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.callbacks.insert(0, writer)  # type: ignore[attr-defined]
    try:
        trainer.predict(TeacherPredictor(built, batch=batch), datamodule=views, return_predictions=False)
    finally:
        trainer.callbacks.remove(writer)  # type: ignore[attr-defined]
        built.to("cpu")
    cache = TeacherCache(path)
    cache.described  # noqa: B018  opens it, so that what cannot be read is noticed here
    return cache


class _Views(L.LightningDataModule):
    """The training set of some data as a predict loader, prepared by Lightning where and when it should be."""

    def __init__(self, data: Any, view: View, variants: int | None, seed: int, loading: dict[str, int]) -> None:
        super().__init__()
        if not isinstance(data, L.LightningDataModule) and not hasattr(data, "__getitem__"):
            raise TypeError(
                f"Expected `data` to be a LightningDataModule or a map-style data set but got {type(data).__name__}."
            )
        self._data = data
        self._view = view
        self._variants = variants
        self._seed = seed
        self._loading: dict[str, Any] = dict(loading)
        self._dataset: Any = None

    @override
    def prepare_data(self) -> None:
        if isinstance(self._data, L.LightningDataModule):
            self._data.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        # Not with the loader: an error while Lightning asks for one leaves its patch of DataLoader in place.
        self._dataset = self._fixed() if self._view == "fixed" else self._seeded()

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._dataset, shuffle=False, **self._loading)

    def _training_set(self) -> Any:
        if not isinstance(self._data, L.LightningDataModule):
            return self._data
        self._data.setup("fit")
        if isinstance(self._data, ImageDataModule):
            assert self._data.train_set is not None
            return self._data.train_set
        loaders = tree_leaves(self._data.train_dataloader())
        if len(loaders) != 1 or not hasattr(loaders[0], "dataset"):
            raise ValueError(
                f"{type(self._data).__name__} has {len(loaders)} training loaders, expected one DataLoader; give the "
                "data set itself."
            )
        self._loading["collate_fn"] = loaders[0].collate_fn
        return loaders[0].dataset

    def _fixed(self) -> Any:
        dataset = self._training_set()
        if isinstance(self._data, ImageDataModule):
            return ImageView(dataset.dataset, dataset.indices, self._data.eval_transform())
        if isinstance(dataset, SeededViews):
            raise ValueError("SeededViews are augmented; set view='seeded', or give the data set inside of them.")
        for position in {0, len(dataset) - 1}:
            if not _same(dataset[position], dataset[position]):
                raise ValueError(
                    f"Sample {position} of the {type(dataset).__name__} differs each time it is asked for, so answers "
                    "about it would be right for one view only; give the data set without its random transform, or "
                    "set view='seeded' and train on the same SeededViews."
                )
        return dataset

    def _seeded(self) -> SeededViews:
        dataset = self._training_set()
        if isinstance(self._data, ImageDataModule):
            if self._data.augment_variants is None or self._variants not in (None, self._data.augment_variants):
                raise ValueError(
                    f"{type(self._data).__name__} has augment_variants={self._data.augment_variants} but "
                    f"{'seeded' if self._variants is None else self._variants} variants were asked for; set "
                    "`augment_variants` of the data, here and where the student is trained."
                )
            return self._data.train_views()
        if not isinstance(dataset, SeededViews):
            return SeededViews(dataset, variants=1 if self._variants is None else self._variants, seed=self._seed)
        if self._variants not in (None, dataset.variants):
            raise ValueError(
                f"The SeededViews have {dataset.variants} variants but {self._variants} were asked for; leave "
                "`variants` out."
            )
        return dataset


def _same(first: Any, second: Any) -> bool:
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))
