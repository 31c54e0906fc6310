# SPDX-License-Identifier: Apache-2.0
"""Reading the files of a teacher cache: memory-mapped arrays and the manifest that makes them valid."""

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_robust import __version__
from lightning_robust.distillation.cache_rows import Arrays, row_layout

__all__ = ["MANIFEST", "PART", "VERSION", "CacheManifest", "checksum", "map_arrays", "read_manifest"]

#: Version of the format; readers refuse others.
VERSION = 1
#: Name of the file without which the others are no cache.
MANIFEST = "manifest.json"
#: What names carry behind them while the files are written.
PART = ".part"
_REMEDY = "write it anew with cache_teacher(...) or `lightning-robust cache`."


@dataclass(frozen=True)
class CacheManifest:
    """What a cache says about itself.

    Args:
        rows: number of rows.
        num_classes: number of classes.
        dtype: type of the stored numbers.
        top_k: kept classes per row; all when ``None``.
        teacher: source, fingerprint and options of the teacher.
        data: what the rows are about; see :func:`~lightning_robust.distillation.cache_data.describe_dataset`.
        checksums: CRC-32 of each file.
        library: version of this package.
    """

    rows: int
    num_classes: int
    dtype: str
    top_k: int | None
    teacher: dict[str, Any]
    data: dict[str, Any]
    checksums: dict[str, int] = field(default_factory=dict)
    library: str = __version__

    def layout(self) -> dict[str, tuple[Any, ...]]:
        """Shape and type of each array."""
        return row_layout(self.rows, self.num_classes, self.dtype, self.top_k)


def read_manifest(path: Path) -> CacheManifest:
    """Read the manifest of a cache.

    Args:
        path: folder of the cache.

    Raises:
        FileNotFoundError: there is no cache, or it was never finished.
        ValueError: the manifest is damaged, or of another version.
    """
    file = path / MANIFEST
    if not file.is_file():
        begun = path.is_dir() and any(path.glob(f"*{PART}"))
        what = f"The teacher cache {path} was not finished" if begun else f"There is no teacher cache at {path}"
        raise FileNotFoundError(f"{what}; {_REMEDY}")
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        version = told.pop("version")
        manifest = CacheManifest(**told) if version == VERSION else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"The manifest {file} is damaged; {_REMEDY}") from error
    if manifest is None:
        raise ValueError(f"The teacher cache {path} has the format {version!r}, expected {VERSION}; {_REMEDY}")
    if not _is_sound(manifest):
        raise ValueError(f"The manifest {file} is damaged; {_REMEDY}")
    return manifest


def map_arrays(path: Path, manifest: CacheManifest, *, verify: bool = True) -> Arrays:
    """Map the arrays of a cache into memory, for reading.

    Args:
        path: folder of the cache.
        manifest: its manifest.
        verify: compare the checksums, which reads the files once.

    Raises:
        ValueError: an array is missing, damaged or of another shape than the manifest says.
    """
    arrays = {}
    for name, (shape, dtype) in manifest.layout().items():
        file = path / f"{name}.npy"
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"The file {file} of a teacher cache is missing or damaged; {_REMEDY}") from error
        if array.shape != tuple(shape) or array.dtype != np.dtype(dtype):
            raise ValueError(
                f"Expected {file} to hold {dtype} of shape {tuple(shape)} but it holds {array.dtype} of shape "
                f"{array.shape}; {_REMEDY}"
            )
        if verify and checksum(file) != manifest.checksums.get(name):
            raise ValueError(f"The file {file} of a teacher cache is damaged: its checksum differs; {_REMEDY}")
        arrays[name] = array.view(np.ndarray)
    return arrays


def checksum(file: Path) -> int:
    """The CRC-32 of a file.

    Args:
        file: The file.
    """
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _is_sound(manifest: CacheManifest) -> bool:
    counts = (manifest.rows, manifest.num_classes, *([] if manifest.top_k is None else [manifest.top_k]))
    parts = (manifest.teacher, manifest.data, manifest.checksums)
    return (
        all(isinstance(count, int) and count > 0 for count in counts)
        and all(isinstance(part, dict) for part in parts)
        and manifest.dtype in ("float16", "float32")
        and "fingerprint" in manifest.teacher
    )
