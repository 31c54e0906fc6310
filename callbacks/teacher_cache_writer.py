# SPDX-License-Identifier: Apache-2.0
"""Storing what a teacher predicts about every sample, from one process or several."""

import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import IterableDataset
from typing_extensions import override

from lightning_robust.checks import check_choice, check_integer
from lightning_robust.distillation import Teacher, fingerprint
from lightning_robust.distillation.cache_data import describe_dataset
from lightning_robust.distillation.cache_writing import CacheFiles
from lightning_robust.training import BatchAdapter

__all__ = ["TeacherCacheWriter", "TeacherPredictor"]


class TeacherCacheWriter(BasePredictionWriter):
    """Writes the logits that ``trainer.predict`` makes into a teacher cache, row by row.

    Each process writes its own samples into files that all of them map, so they have to run on one machine; which are
    its own is read off Lightning's batch sampler. Samples that a sampler repeats are written twice, which is harmless.
    The first process finishes the manifest when all are done; a run that is interrupted, or that leaves samples out,
    leaves nothing that would be taken for a cache. Usually :func:`cache_teacher` does all of this.

    Cost: copying the logits to the CPU.

    Args:
        path: Folder of the cache.
        dtype: Type of the stored numbers; see :class:`~lightning_robust.distillation.TeacherCache`.
        top_k: Number of classes to keep of each sample, the label's always among them; all when ``None``.
        overwrite: Replace a cache that is there.
        batch: How to read the labels from a batch, for ``top_k``; the usual forms are understood when ``None``.

    Raises:
        FileExistsError: When predicting starts, if there is a cache.
        ValueError: If an argument is out of range; when predicting starts, for several loaders or machines; during and
            after it, for predictions that are not the logits of all samples.

    Example:
        >>> import tempfile
        >>> import lightning as L
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_robust.callbacks import TeacherCacheWriter, TeacherPredictor
        >>> from lightning_robust.distillation import Teacher, TeacherCache
        >>> data = TensorDataset(torch.randn(6, 4), torch.arange(6) % 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = TeacherCacheWriter(folder + "/teacher")
        ...     trainer = L.Trainer(
        ...         callbacks=[writer], logger=False, enable_progress_bar=False, enable_checkpointing=False
        ...     )
        ...     teacher = Teacher(torch.nn.Linear(4, 3))
        ...     _ = trainer.predict(TeacherPredictor(teacher), DataLoader(data, 4), return_predictions=False)
        ...     TeacherCache(folder + "/teacher").num_samples
        6
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: Literal["float16", "float32"] = "float16",
        top_k: int | None = None,
        overwrite: bool = False,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__(write_interval="batch")
        check_choice("dtype", dtype, ("float16", "float32"))
        if top_k is not None:
            check_integer("top_k", top_k, 1)
        self.path = Path(path)
        self.dtype = dtype
        self.top_k = top_k
        self.overwrite = overwrite
        self.batch = BatchAdapter() if batch is None else batch
        self._files: CacheFiles | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "predict" and trainer.num_nodes > 1:
            raise ValueError(
                f"A teacher cache is written by the processes of one machine, not of {trainer.num_nodes}; predict "
                "with num_nodes=1."
            )

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        dataset = _dataset(trainer)
        self._files = CacheFiles(
            self.path, rows=len(dataset), dtype=self.dtype, top_k=self.top_k, overwrite=self.overwrite
        )
        _agreed(trainer, self._files.begin)

    @override
    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert self._files is not None, "on_predict_start came before"
        logits = prediction.get("logits") if isinstance(prediction, Mapping) else prediction
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"Expected predict_step of {type(pl_module).__name__} to return logits [B, C] but got "
                f"{type(logits).__name__}; predict with TeacherPredictor(teacher)."
            )
        if not batch_indices:
            raise ValueError(
                "Lightning does not know which samples this batch consists of; give a plain DataLoader of a map-style "
                "data set to trainer.predict."
            )
        labels = None if self.top_k is None else self.batch.target_of(batch)
        self._files.write(_positions(batch_indices), logits, labels)

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._files is not None, "on_predict_start came before"
        files, self._files = self._files, None
        files.flush()
        trainer.strategy.barrier("teacher cache")  # the first process finishes what all have written
        _agreed(trainer, lambda: files.finish(_teacher_of(pl_module), describe_dataset(_dataset(trainer))))

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._files = None


class TeacherPredictor(L.LightningModule):
    """Lets ``trainer.predict`` ask a teacher about the inputs of batches.

    Args:
        teacher: The teacher, which follows its inputs to their device.
        batch: How to read inputs from a batch; the usual forms are understood when ``None``.

    Example:
        >>> import torch
        >>> from lightning_robust.callbacks import TeacherPredictor
        >>> from lightning_robust.distillation import Teacher
        >>> predictor = TeacherPredictor(Teacher(torch.nn.Linear(4, 3)))
        >>> predictor.predict_step((torch.zeros(2, 4), torch.zeros(2)), 0).shape
        torch.Size([2, 3])
    """

    def __init__(self, teacher: Teacher, *, batch: BatchAdapter | None = None) -> None:
        super().__init__()
        self.teacher = teacher
        self.batch = BatchAdapter() if batch is None else batch

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.teacher(batch if isinstance(batch, Tensor) else self.batch.input_of(batch))


def _dataset(trainer: L.Trainer) -> Any:
    loaders = tree_leaves(trainer.predict_dataloaders)
    if len(loaders) != 1:
        raise ValueError(
            f"A teacher cache is written from one predict loader but there are {len(loaders)}; predict each data set "
            "into a cache of its own."
        )
    dataset = getattr(loaders[0], "dataset", None)
    if not hasattr(dataset, "__len__") or isinstance(dataset, IterableDataset):
        raise ValueError(
            "A teacher cache needs a DataLoader of a map-style data set, whose samples are numbered 0, 1, 2, ..., but "
            f"got a {type(loaders[0]).__name__} of {type(dataset).__name__}."
        )
    return dataset


def _positions(batch_indices: Sequence[int]) -> Tensor:
    return torch.tensor([operator.index(index) for index in batch_indices], dtype=torch.long)


def _teacher_of(pl_module: L.LightningModule) -> dict[str, Any]:
    teacher = getattr(pl_module, "teacher", None)
    if isinstance(teacher, Teacher):
        options = {"temperature": teacher.temperature, "classes": teacher.classes}
        return {**teacher.manifest(), **options}
    return {"source": type(pl_module).__name__, "fingerprint": fingerprint(pl_module), "dtype": "run"}


def _agreed(trainer: L.Trainer, action: Callable[[], None]) -> None:
    """Let the first process do something, and all of them fail with it."""
    failed: Exception | None = None
    if trainer.is_global_zero:
        try:
            action()
        except Exception as error:
            failed = error
    told: Exception | None = trainer.strategy.broadcast(failed)
    if told is not None:
        raise told
