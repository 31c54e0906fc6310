# SPDX-License-Identifier: Apache-2.0
"""The folder from which a killed evaluation continues: parts that processes append, whole or not at all."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["StateFolder", "load_points", "weights_hash"]

_PART = "part-*.pt"


class StateFolder:
    """Parts of an evaluation, written by any number of processes and read by any other number.

    A part holds what changed since the one before it: rows of the ledger, adversarial points, tallies. Parts are
    written under another name and then renamed, so a killed process leaves none that is half written.

    Args:
        path: The folder; made when the first part is written.
        rank: Number of this process.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as path:
        ...     StateFolder(path, rank=0).write({"seed": "0"}, {"seconds": 1.5})
        ...     parts = StateFolder(path, rank=0).read({"seed": "0"})
        >>> parts
        [{'rank': 0, 'seconds': 1.5}]
    """

    def __init__(self, path: str | Path, rank: int) -> None:
        self.path = Path(path)
        self.rank = rank
        # those of earlier runs: other processes of this one may write before this one reads
        self._earlier = sorted(self.path.glob(_PART))
        taken = [int(each.stem.split("-")[2]) for each in self._earlier if int(each.stem.split("-")[1]) == rank]
        self._next = max(taken, default=-1) + 1

    def read(self, fingerprint: Mapping[str, str]) -> list[dict[str, Any]]:
        """The parts of earlier runs.

        Args:
            fingerprint: What this evaluation is; has to be theirs.

        Raises:
            ValueError: They belong to another evaluation.
        """
        parts = []
        for path in self._earlier:
            found = torch.load(path, map_location="cpu", weights_only=True)
            self._refuse_other(found.pop("fingerprint"), fingerprint)
            parts.append(found)
        return parts

    def write(self, fingerprint: Mapping[str, str], part: Mapping[str, Any]) -> None:
        """Append a part.

        Args:
            fingerprint: What this evaluation is.
            part: Plain values and tensors.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        target = self.path / f"part-{self.rank:04d}-{self._next:06d}.pt"
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            torch.save({"fingerprint": dict(fingerprint), "rank": self.rank, **part}, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        self._next += 1

    def _refuse_other(self, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
        different = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
        if different:
            shown = "; ".join(f"{name} was {theirs.get(name)!r} and is {ours.get(name)!r}" for name in different)
            raise ValueError(
                f"{self.path} holds the state of another evaluation ({shown}); give this one a `state_dir` of its own, "
                "or delete that folder."
            )


def load_points(path: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The adversarial images that an evaluation with a `state_dir` found.

    Args:
        path: The `state_dir`.

    Returns:
        Indices ``[N]`` in the dataset and images ``[N, ...]``, by the name of the attack.

    Example:
        >>> import tempfile
        >>> from lightning_robust.attacks import PGD
        >>> from lightning_robust.evaluation import evaluate_robustness
        >>> model, batch = torch.nn.Linear(4, 3), (torch.rand(8, 4), torch.randint(3, (8,)))
        >>> with tempfile.TemporaryDirectory() as path:
        ...     report = evaluate_robustness(model, [batch], PGD(eps=0.5, steps=2), state_dir=path)
        ...     indices, images = load_points(path)["PGD"]
        >>> len(indices) == report.attacks[0].stages[0].broken
        True
    """
    found: dict[str, dict[int, Tensor]] = {}
    for each in sorted(Path(path).glob(_PART)):
        for name, (indices, images) in torch.load(each, map_location="cpu", weights_only=True)["points"].items():
            found.setdefault(name, {}).update(zip(indices.tolist(), images, strict=True))
    return {
        name: (torch.tensor(sorted(images)), torch.stack([images[index] for index in sorted(images)]))
        for name, images in found.items()
        if images
    }


def weights_hash(module: nn.Module | None) -> str:
    """A short text that changes with any parameter or buffer of a module.

    Args:
        module: The module; ``None`` for a callable whose weights cannot be seen.
    """
    if module is None:
        return "unknown"
    digest = hashlib.blake2b(digest_size=16)
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> Any:
    return value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
