# SPDX-License-Identifier: Apache-2.0
"""From the flags of every sample to the numbers of a report."""

import platform
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_robust import __version__
from lightning_robust.evaluation.check import Check
from lightning_robust.evaluation.plan import StageInfo
from lightning_robust.evaluation.report import AttackReport, ClassReport, RobustnessReport, StageReport
from lightning_robust.evaluation.shard import Settings, Shard, merge_shards
from lightning_robust.evaluation.tally import StageTally

__all__ = ["build_report"]


def build_report(shards: Sequence[Shard], checks: Sequence[Check] = ()) -> RobustnessReport:
    """The report of what all processes found.

    Args:
        shards: One per process.
        checks: Sanity checks.

    Raises:
        ValueError: No process got a sample.
    """
    whole = merge_shards(shards)
    settings, columns = whole.settings, whole.columns
    assert settings is not None
    right = columns["prediction"] == columns["label"]
    survived = _Survivors(right, columns, settings.eight_bit)
    stages = list(zip(whole.stages, whole.tallies, strict=True))
    attacks = [
        _attack(list(group), survived, settings.mode) for _, group in groupby(stages, key=lambda each: each[0].attack)
    ]
    union = survived.all()
    classes = _classes(columns["label"], right, union)
    worst = min(classes, key=lambda each: each.robust_accuracy)
    return RobustnessReport(
        model=settings.model,
        samples=len(right),
        num_classes=whole.num_classes,
        clean_accuracy=_share(right),
        clean_standard_error=_error(right),
        robust_accuracy=_share(union),
        standard_error=_error(union),
        robust_accuracy_8bit=survived.rounded(inside=False),
        robust_accuracy_8bit_inside=survived.rounded(inside=True),
        worst_class=worst.label,
        worst_class_accuracy=worst.robust_accuracy,
        mode=settings.mode,
        attacks=attacks,
        classes=classes,
        forwards=whole.clean.forwards + sum(tally.forwards + tally.verifications for tally in whole.tallies),
        backwards=sum(tally.backwards for tally in whole.tallies),
        seconds=whole.seconds,
        earlier_seconds=whole.earlier_seconds,
        seed=settings.seed,
        batch_size=settings.batch_size,
        processes=whole.processes,
        craft_dtype=settings.craft_dtype,
        inputs=_inputs(settings),
        versions=_versions(settings.device),
        checks=list(checks),
    )


class _Survivors:
    """Which samples are right clean and withstood what."""

    def __init__(self, right: Tensor, columns: Mapping[str, Tensor], eight_bit: bool) -> None:
        self.right, self.broken, self.eight_bit = right, columns["broken"], eight_bit
        self.flags = {False: columns["rounded"], True: columns["rounded_inside"]}

    def all(self) -> Tensor:
        return self.right & (self.broken < 0).all(1)

    def up_to(self, stage: StageInfo) -> Tensor:
        """Stages of other chains do not count."""
        broken = self.broken[:, stage.chain]
        return self.right & ((broken < 0) | (broken > stage.position))

    def rounded(self, *, inside: bool, last: StageInfo | None = None) -> float | None:
        """Share that withstood when the points are rounded to 8 bits, of a chain up to a stage or of all chains."""
        if not self.eight_bit:
            return None
        fooled = (self.broken >= 0) & self.flags[inside]
        if last is None:
            return _share(self.right & ~fooled.any(1))
        broken = self.broken[:, last.chain]
        return _share(self.right & ~(fooled[:, last.chain] & (broken <= last.position)))


def _attack(stages: list[tuple[StageInfo, StageTally]], survived: _Survivors, mode: str) -> AttackReport:
    first, last = stages[0][0], stages[-1][0]
    budgets = {info.norm: info.eps for info, _ in stages}
    left = survived.up_to(last)
    return AttackReport(
        name=first.attack,
        attack=first.whole,
        norm="+".join(budgets),
        eps=list(budgets.values()),
        exact=mode == "exact" or first.position == 0,
        robust_accuracy=_share(left),
        standard_error=_error(left),
        robust_accuracy_8bit=survived.rounded(inside=False, last=last),
        robust_accuracy_8bit_inside=survived.rounded(inside=True, last=last),
        stages=[
            StageReport(
                name=info.name,
                attack=info.description,
                robust_accuracy=_share(survived.up_to(info)),
                **tally.to_dict(),
            )
            for info, tally in stages
        ],
        deviations=first.deviations,
    )


def _classes(label: Tensor, right: Tensor, robust: Tensor) -> list[ClassReport]:
    found = []
    for each in sorted(set(label.tolist())):
        of_class = label == each
        found.append(ClassReport(each, int(of_class.sum()), _share(right[of_class]), _share(robust[of_class])))
    return found


def _share(flags: Tensor) -> float:
    return int(flags.sum()) / len(flags)


def _error(flags: Tensor) -> float:
    share = _share(flags)
    return float((share * (1 - share) / len(flags)) ** 0.5)


def _inputs(settings: Settings) -> dict[str, Any]:
    contract = settings.contract
    return {
        "bounds": list(contract.bounds),
        "mean": None if contract.mean is None else list(contract.mean),
        "std": None if contract.std is None else list(contract.std),
        "dtype": settings.dtype,
        "shape": list(settings.shape),
    }


def _versions(device: str) -> dict[str, str]:
    index = torch.device(device)
    name = torch.cuda.get_device_name(index) if index.type == "cuda" else index.type
    return {
        "lightning-robust": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": name,
    }
