# SPDX-License-Identifier: Apache-2.0
"""What one process found out, and the whole of what all did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightning_robust import __version__
from lightning_robust.evaluation.contract import InputContract
from lightning_robust.evaluation.ledger import merged
from lightning_robust.evaluation.plan import Mode, StageInfo
from lightning_robust.evaluation.tally import StageTally

__all__ = ["Settings", "Shard", "merge_shards"]


@dataclass(frozen=True)
class Settings:
    """How an evaluation was made.

    Args:
        model: Name of the model.
        mode: ``"exact"`` or ``"union"``.
        seed: Seed that replaced those of the attacks, if any.
        batch_size: Samples per attacked batch.
        craft_dtype: Low precision in which the attacks ran, if any.
        eight_bit: Whether points were looked at after rounding to 8 bits.
        contract: What the images are.
        dtype: Type of the images.
        shape: Shape of an image.
        device: Where the model ran.
    """

    model: str
    mode: Mode
    seed: int | None
    batch_size: int
    craft_dtype: str | None
    eight_bit: bool
    contract: InputContract
    dtype: str
    shape: tuple[int, ...]
    device: str

    def fingerprint(self, stages: str, num_classes: int, weights: str) -> dict[str, str]:
        """What has to be the same for flags to mean the same; not batch size, processes or device.

        Args:
            stages: All stages, described.
            num_classes: Number of classes.
            weights: What changes with any weight of the model.
        """
        return {
            "attacks": stages,
            "classes": str(num_classes),
            "craft_dtype": str(self.craft_dtype),
            "eight_bit": str(self.eight_bit),
            "images": f"{self.contract} {self.dtype} {self.shape}",
            "mode": self.mode,
            "seed": str(self.seed),
            "version": __version__,
            "weights": weights,
        }


@dataclass(frozen=True)
class Shard:
    """The part of one process; plain values and tensors on the CPU, to be sent to the others.

    Args:
        settings: How it was made; ``None`` in a process that got no sample.
        num_classes: Number of classes.
        stages: All stages in order.
        columns: Rows of the ledger for the samples of this process.
        clean: Counts of the clean predictions.
        tallies: Counts of each stage.
        seconds: Time from the first sample to the end, without that of earlier runs.
        earlier_seconds: Time of earlier runs that this one continued.
        processes: Number of processes whose parts these are.
    """

    settings: Settings | None = None
    num_classes: int = 0
    stages: list[StageInfo] = field(default_factory=list)
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    clean: StageTally = field(default_factory=StageTally)
    tallies: list[StageTally] = field(default_factory=list)
    seconds: float = 0.0
    earlier_seconds: float = 0.0
    processes: int = 1


def merge_shards(shards: Sequence[Shard]) -> Shard:
    """All parts in one: samples by index, each once, in order; counts added up.

    Samples that two processes got, as the padding of a distributed sampler makes them, are counted once; one that
    either of them broke is broken.

    Args:
        shards: One per process.

    Raises:
        ValueError: No process got a sample.

    Example:
        >>> merge_shards([Shard()])
        Traceback (most recent call last):
            ...
        ValueError: Expected at least one sample to evaluate but got none.
    """
    filled = [shard for shard in shards if shard.settings is not None]
    if not filled:
        raise ValueError("Expected at least one sample to evaluate but got none.")
    first = filled[0]
    chains = 1 + max(stage.chain for stage in first.stages)
    columns = merged(chains, (shard.columns for shard in filled)).columns()
    order = columns["index"].argsort()
    return Shard(
        settings=first.settings,
        num_classes=first.num_classes,
        stages=first.stages,
        columns={name: column[order] for name, column in columns.items()},
        clean=StageTally.total(shard.clean for shard in filled),
        tallies=[StageTally.total(each) for each in zip(*(shard.tallies for shard in filled), strict=True)],
        seconds=max(shard.seconds for shard in filled),
        earlier_seconds=max(shard.earlier_seconds for shard in filled),
        processes=len(shards),
    )
