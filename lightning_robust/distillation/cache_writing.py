# SPDX-License-Identifier: Apache-2.0
"""Writing the files of a teacher cache, from several processes at once and never half."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_robust.checks import check_choice, check_integer
from lightning_robust.distillation.cache_files import MANIFEST, PART, VERSION, CacheManifest, checksum
from lightning_robust.distillation.cache_rows import Arrays, encode_rows, row_layout

__all__ = ["CacheFiles"]

_WRITTEN = "written"
_NAMES = ("logits", "offset", "classes", "rest", _WRITTEN)


class CacheFiles:
    """Writes a cache, from several processes of one machine at once.

    Everything is written beside the final names first, and the manifest, without which nothing is read, comes last. A
    cache that is there already stays valid until then.

    Args:
        path: folder of the cache.
        rows: number of rows.
        dtype: type of the stored numbers.
        top_k: kept classes per row; all when ``None``.
        overwrite: replace a cache that is there.

    Raises:
        FileExistsError: from :meth:`begin`, if there is a cache.
        ValueError: an argument is out of range; from :meth:`write`, for what cannot be stored; from :meth:`finish`, if
            rows were left out.
    """

    def __init__(
        self, path: Path, *, rows: int, dtype: str = "float16", top_k: int | None = None, overwrite: bool = False
    ) -> None:
        check_integer("rows", rows, 1)
        check_choice("dtype", dtype, ("float16", "float32"))
        if top_k is not None:
            check_integer("top_k", top_k, 1)
        self.path = path
        self.rows = rows
        self.dtype = dtype
        self.top_k = top_k
        self.overwrite = overwrite
        self.num_classes: int | None = None  # known with the first rows
        self._arrays: Arrays = {}

    def begin(self) -> None:
        """Make the folder and clear what an interrupted writing left; to be called once, before anybody writes."""
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path} is a file; choose another folder for the teacher cache.")
        if (self.path / MANIFEST).exists() and not self.overwrite:
            raise FileExistsError(
                f"There is a teacher cache at {self.path} already; set `overwrite`, or choose another folder."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        for name in _NAMES:
            self._part(name).unlink(missing_ok=True)

    def write(self, index: Tensor, logits: Tensor, labels: Tensor | None = None) -> None:
        """Write some rows; writing a row twice is harmless.

        Args:
            index: numbers of the rows, ``[B]``.
            logits: ``[B, C]``.
            labels: classes of the samples, for ``top_k``.
        """
        if logits.ndim != 2 or len(logits) != len(index):
            raise ValueError(
                f"Expected logits [B, C] with one row for each of the {len(index)} samples of the batch but got the "
                f"shape {tuple(logits.shape)}."
            )
        self._open(logits.shape[1])
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.rows:
            raise ValueError(
                f"Expected sample indices from 0 to {self.rows - 1} but got {int(index.min())} to {int(index.max())}."
            )
        where = index.cpu().numpy()
        for name, rows in encode_rows(logits, dtype=self.dtype, top_k=self.top_k, labels=labels).items():
            self._arrays[name][where] = rows
        self._arrays[_WRITTEN][where] = 1

    def flush(self) -> None:
        """Write everything to disk; to be called by every process before one finishes."""
        for array in self._arrays.values():
            array.flush()  # type: ignore[attr-defined]

    def finish(self, teacher: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Make the cache valid; to be called once, when all have written.

        Args:
            teacher: source and fingerprint.
            data: what the rows are about.
        """
        missing = self.rows - (int(self._arrays[_WRITTEN].sum()) if self._arrays else 0)
        if missing:
            raise ValueError(
                f"{missing} of {self.rows} samples were not predicted, so the teacher cache {self.path} was not "
                "finished; predict the whole data set (no limit_predict_batches, no drop_last)."
            )
        assert self.num_classes is not None
        manifest = CacheManifest(self.rows, self.num_classes, self.dtype, self.top_k, dict(teacher), dict(data))
        self._arrays = {}
        manifest.checksums.update({name: checksum(self._part(name)) for name in manifest.layout()})
        final = self.path / MANIFEST
        final.unlink(missing_ok=True)  # what is there becomes invalid before its arrays are replaced
        for name in _NAMES:
            (self.path / f"{name}.npy").unlink(missing_ok=True)
        for name in manifest.layout():
            os.replace(self._part(name), self.path / f"{name}.npy")
        self._part(_WRITTEN).unlink()
        part = final.with_name(MANIFEST + PART)
        with part.open("w", encoding="utf-8") as file:
            json.dump({"version": VERSION, **asdict(manifest)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, final)

    def _part(self, name: str) -> Path:
        return self.path / f"{name}.npy{PART}"

    def _open(self, num_classes: int) -> None:
        if self.num_classes not in (None, num_classes):
            raise ValueError(f"The teacher has {self.num_classes} classes in one batch and {num_classes} in another.")
        if self._arrays:
            return
        self.num_classes = num_classes
        if self.top_k is not None and self.top_k >= num_classes:
            raise ValueError(
                f"Expected `top_k` to be less than the {num_classes} classes of the teacher but got {self.top_k}; "
                "leave it out to keep all classes."
            )
        layout = row_layout(self.rows, num_classes, self.dtype, self.top_k)
        for name, (shape, dtype) in {**layout, _WRITTEN: ((self.rows,), "uint8")}.items():
            self._arrays[name] = _shared_array(self._part(name), shape, dtype)


def _shared_array(file: Path, shape: tuple[int, ...], dtype: str) -> Any:
    """Open a new array for writing that other processes may open, or have opened, as well."""
    own = file.with_name(f"{file.name}.{os.getpid()}")
    np.lib.format.open_memmap(own, mode="w+", dtype=np.dtype(dtype), shape=shape).flush()
    try:
        os.link(own, file)  # unlike a renaming, this fails where another process was first
    except FileExistsError:
        pass
    finally:
        own.unlink()
    array = np.lib.format.open_memmap(file, mode="r+")
    if array.shape != tuple(shape):
        raise ValueError(f"The processes that write {file} disagree about its shape: {array.shape} and {shape}.")
    return array
