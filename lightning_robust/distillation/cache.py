# SPDX-License-Identifier: Apache-2.0
"""Answers of a teacher about every sample of a data set, stored on disk."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_robust.distillation.cache_data import describe_dataset
from lightning_robust.distillation.cache_files import CacheManifest, map_arrays, read_manifest
from lightning_robust.distillation.cache_rows import Arrays, decode_rows

__all__ = ["TeacherCache"]


class TeacherCache:
    r"""Stored logits of a frozen teacher, asked by the position of a sample in the training set.

    It takes the place of a teacher whose inputs are the same in every epoch: clean images without random augmentation,
    or with augmentation that repeats (:class:`~lightning_robust.data.SeededViews`). Written by
    :func:`~lightning_robust.callbacks.cache_teacher` or ``lightning-robust cache``. A folder with arrays that are
    mapped into memory and a manifest: teacher, data set and view that the answers are about. Nothing is opened before
    it is needed, nothing in the files is executed, and processes and workers open the files for themselves.

    In float16 the stored numbers are logits minus the maximum of their row, which is stored in float32 and added
    again: the error is :math:`2^{-11}` of a logit's distance from the largest one. With the top classes only, the
    probability of all other classes together is kept and spread evenly over them, which is exact for the kept classes
    at temperature 1 and too much for the others at higher temperatures.

    Cost: copying the batch's rows, about 0.1 ms for 128 samples of 100 classes; 204 bytes of disk per sample of 100
    classes. The files are read once when they are opened, to compare checksums: 13 ms for 50,000 samples.

    Args:
        path: Folder of the cache.
        fingerprint: Fingerprint that the teacher must have; any when ``None``.
        verify: Compare checksums when the files are opened. Without it, which is worth it for many gigabytes, only
            shapes and types are looked at.

    Raises:
        FileNotFoundError: When first needed, if there is no cache or it was not finished.
        ValueError: When first needed, for files that are damaged or of another version, and for another teacher; from
            :meth:`check_dataset`, for another data set or view; from :meth:`logits`, for positions that are not stored.

    References:
        Shen and Xing, arXiv:2112.01528 (stored labels of many crops; here whole images or repeated augmentations).

    Example:
        >>> import tempfile
        >>> import lightning as L
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_robust.callbacks import cache_teacher
        >>> data = TensorDataset(torch.randn(6, 4), torch.arange(6) % 3)
        >>> teacher = torch.nn.Linear(4, 3)  # a trained network
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     quiet = L.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False)
        ...     cache = cache_teacher(teacher, data, f"{folder}/teacher", trainer=quiet)
        ...     cache.logits(torch.tensor([5, 0])).shape
        torch.Size([2, 3])
    """

    def __init__(self, path: str | Path, *, fingerprint: str | None = None, verify: bool = True) -> None:
        self.path = Path(path)
        self.fingerprint = fingerprint
        self.verify = verify
        self._manifest: CacheManifest | None = None
        self._arrays: Arrays = {}

    @property
    def num_samples(self) -> int:
        """Number of samples; with several variants of each, all of them count."""
        return self.described.rows

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.described.num_classes

    @property
    def described(self) -> CacheManifest:
        """Everything that the manifest says."""
        if self._manifest is None:
            self._open()
        assert self._manifest is not None
        return self._manifest

    def manifest(self) -> dict[str, str]:
        """Return what a checkpoint says about the teacher: source, fingerprint and type, like that of a Teacher."""
        teacher = self.described.teacher
        return {key: str(teacher[key]) for key in ("source", "fingerprint", "dtype", "options") if key in teacher}

    def logits(self, index: Tensor) -> Tensor:
        """Return the logits of some samples as a new float32 tensor ``[B, num_classes]`` on the CPU.

        Args:
            index: Positions in the training set, ``[B]``.
        """
        if index.ndim != 1 or index.is_floating_point():
            raise ValueError(
                f"Expected `index` to be integers [B] but got {index.dtype} of shape {tuple(index.shape)}."
            )
        rows = index.cpu().numpy()
        stored = self.num_samples
        if len(rows) and not (rows.min() >= 0 and rows.max() < stored):
            raise ValueError(
                f"The teacher cache {self.path} knows the samples 0 to {stored - 1} but was asked for {rows.min()} to "
                f"{rows.max()}; train on the data set that it was written for."
            )
        return decode_rows(
            {name: np.take(array, rows, axis=0) for name, array in self._mapped().items()}, self.num_classes
        )

    def check_dataset(self, dataset: Any) -> None:
        """Refuse another data set than the one that the answers are about, or another view of it.

        Length and labels are compared, all of them where they can be had without loading samples. Answers about images
        without augmentation may teach a student that sees augmented ones, which is warned about.

        Args:
            dataset: The training set.
        """
        stored, found = self.described.data, describe_dataset(dataset)
        if found["samples"] != self.num_samples:
            raise ValueError(
                f"The teacher cache {self.path} was written for {self.num_samples} samples but the training set has "
                f"{found['samples']}; write it for this data set, with the same split and number of variants."
            )
        key = "labels" if stored.get("labels") and found["labels"] else "ends"
        if stored.get(key) != found[key]:
            raise ValueError(
                f"The teacher cache {self.path} was written for another data set: the labels of the training set "
                "differ. Write it for this one, with the same split, order and label noise."
            )
        self._check_view(stored, found)

    def __repr__(self) -> str:
        return f"TeacherCache({str(self.path)!r})"

    def __getstate__(self) -> dict[str, Any]:
        # a copy in a worker opens the files for itself, which are known to be sound then
        known = self._manifest is not None
        return {**vars(self), "_arrays": {}, "verify": self.verify and not known}

    def _check_view(self, stored: dict[str, Any], found: dict[str, Any]) -> None:
        same = all(stored.get(key) == found[key] for key in ("view", "variants", "transform"))
        if same:
            return
        if stored.get("view") == "seeded":
            raise ValueError(
                f"The teacher cache {self.path} holds answers about {stored['variants']} seeded augmentation(s) of "
                f"each image ({stored['transform']}), but the training set makes others ({found['view']}, "
                f"{found['variants']}, {found['transform'] or 'no transform'}); train on the SeededViews that it was "
                "written for, or write it with view='fixed'."
            )
        warnings.warn(
            f"The teacher cache {self.path} holds answers about images as {stored.get('transform') or 'they are'}, "
            f"while the student sees them transformed by {found['transform'] or 'nothing'}: both see different views. "
            "Write it with view='seeded' and train on the same SeededViews to let them see the same.",
            stacklevel=3,
        )

    def _open(self) -> None:
        manifest = read_manifest(self.path)
        has = manifest.teacher["fingerprint"]
        if self.fingerprint is not None and has != self.fingerprint:
            raise ValueError(
                f"The teacher cache {self.path} holds answers of {manifest.teacher.get('source')} (fingerprint {has}) "
                f"but {self.fingerprint} was asked for; write a cache of that teacher."
            )
        self._arrays = map_arrays(self.path, manifest, verify=self.verify)
        self._manifest = manifest

    def _mapped(self) -> Arrays:
        if not self._arrays:
            self._arrays = map_arrays(self.path, self.described, verify=self.verify)
        return self._arrays
