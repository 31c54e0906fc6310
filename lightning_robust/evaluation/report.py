# SPDX-License-Identifier: Apache-2.0
"""What an evaluation of robustness found, as plain values that JSON can hold."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lightning_robust.evaluation.check import Check

__all__ = ["AttackReport", "ClassReport", "RobustnessReport", "StageReport"]


@dataclass(frozen=True)
class StageReport:
    """One stage of an attack, on the samples that the stages before it left robust.

    Args:
        name: Name of the stage.
        attack: Its attack with all arguments that are not defaults.
        entered: Samples that it attacked.
        broken: Samples for which it found a valid adversarial point.
        robust_accuracy: Share of all samples that are right clean and withstood everything up to this stage.
        forwards: Forward passes of the attack, in samples.
        backwards: Backward passes of the attack, in samples.
        verifications: Forward passes for the look at returned points, in samples.
        seconds: Time, added up over processes.
        max_size: Largest distance of a returned point from its image.
        over_budget: Returned points that were too far from their image.
        out_of_bounds: Returned points with impossible pixels.
        not_finite: Returned points with NaN or infinite pixels.
        rejected: Misclassified points that did not count for one of these reasons.
        lost: Points that fooled the model in the low precision they were crafted in, and not in float32.
    """

    name: str
    attack: str
    entered: int
    broken: int
    robust_accuracy: float
    forwards: int
    backwards: int
    verifications: int
    seconds: float
    max_size: float
    over_budget: int
    out_of_bounds: int
    not_finite: int
    rejected: int
    lost: int


@dataclass(frozen=True)
class AttackReport:
    """One attack.

    Args:
        name: Name of the attack.
        attack: The attack with all arguments that are not defaults.
        norm: Norm of the budget; several, with ``+``, for an attack whose stages differ.
        eps: Radius of the budget in pixel units, one per norm.
        exact: Whether it attacked every correct sample; else only those that the attacks before it left, so that its
            accuracy is that of all so far.
        robust_accuracy: Share of all samples that are right clean and withstood it.
        standard_error: Of that share, as an estimate for the population the samples were drawn from.
        robust_accuracy_8bit: The same when each adversarial image is first rounded to 8 bits per channel; ``None`` if
            that was not looked at.
        robust_accuracy_8bit_inside: The same, counting only rounded images that are still within the budget.
        stages: Its stages in order.
        deviations: What it says itself it does otherwise than its name promises.
    """

    name: str
    attack: str
    norm: str
    eps: list[float]
    exact: bool
    robust_accuracy: float
    standard_error: float
    robust_accuracy_8bit: float | None
    robust_accuracy_8bit_inside: float | None
    stages: list[StageReport]
    deviations: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AttackReport":
        """The report that `asdict` wrote.

        Args:
            values: Its plain values.
        """
        return cls(**{**_known(cls, values), "stages": [StageReport(**stage) for stage in values["stages"]]})


@dataclass(frozen=True)
class ClassReport:
    """The samples of one class.

    Args:
        label: The class.
        samples: Number of samples.
        clean_accuracy: Share that is right clean.
        robust_accuracy: Share that is right clean and withstood all attacks.
    """

    label: int
    samples: int
    clean_accuracy: float
    robust_accuracy: float


@dataclass(frozen=True)
class RobustnessReport:
    """The numbers of one model on one set of samples, under one or several attacks.

    Args:
        model: Name of the model.
        samples: Number of samples, each counted once.
        num_classes: Number of classes of the model.
        clean_accuracy: Share of right answers without attack.
        clean_standard_error: Of that share.
        robust_accuracy: Share that is right clean and withstood all attacks, their union.
        standard_error: Of that share.
        robust_accuracy_8bit: The same when adversarial images are first rounded to 8 bits per channel.
        robust_accuracy_8bit_inside: The same, counting only rounded images that are still within the budget.
        worst_class: The class of lowest robust accuracy.
        worst_class_accuracy: Its robust accuracy.
        mode: ``"exact"``: each attack on all correct samples; ``"union"``: on those that the ones before it left.
        attacks: One report per attack.
        classes: One report per class that occurs.
        forwards: Forward passes in samples, all together.
        backwards: Backward passes in samples.
        seconds: Time of this run.
        earlier_seconds: Time of earlier runs that this one continued.
        seed: Seed in place of those of the attacks; theirs if ``None``.
        batch_size: Samples per attacked batch.
        processes: Number of processes.
        craft_dtype: Low precision in which the attacks ran, if any; points are verified in float32 in any case.
        inputs: What the images were: ``bounds``, ``mean``, ``std``, ``dtype``, ``shape``.
        versions: Of what ran: packages, Python, the device.
        checks: Sanity checks; empty if none were made.

    Example:
        >>> from lightning_robust.attacks import PGD
        >>> from lightning_robust.evaluation import evaluate_robustness
        >>> import torch
        >>> batch = torch.rand(8, 4), torch.randint(3, (8,))
        >>> report = evaluate_robustness(torch.nn.Linear(4, 3), [batch], PGD(eps=0.1, steps=2))
        >>> RobustnessReport.from_dict(report.to_dict()) == report
        True
    """

    model: str
    samples: int
    num_classes: int
    clean_accuracy: float
    clean_standard_error: float
    robust_accuracy: float
    standard_error: float
    robust_accuracy_8bit: float | None
    robust_accuracy_8bit_inside: float | None
    worst_class: int
    worst_class_accuracy: float
    mode: str
    attacks: list[AttackReport]
    classes: list[ClassReport]
    forwards: int
    backwards: int
    seconds: float
    earlier_seconds: float
    seed: int | None
    batch_size: int
    processes: int
    craft_dtype: str | None
    inputs: dict[str, Any]
    versions: dict[str, str]
    checks: list[Check] = field(default_factory=list)

    @property
    def warnings(self) -> list[Check]:
        """The checks that warn."""
        return [check for check in self.checks if check.status == "warn"]

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RobustnessReport":
        """The report that `to_dict` wrote; keys of other versions are left out.

        Args:
            values: What `to_dict` returned.
        """
        return cls(
            **{
                **_known(cls, values),
                "attacks": [AttackReport.from_dict(each) for each in values["attacks"]],
                "classes": [ClassReport(**each) for each in values["classes"]],
                "checks": [Check.from_dict(each) for each in values.get("checks", [])],
            }
        )

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON, whole or not at all.

        Args:
            path: The file; missing folders are made.

        Returns:
            The file.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "RobustnessReport":
        """The report that `save` wrote.

        Args:
            path: The file.
        """
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _known(cls: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    names = {each.name for each in fields(cls)}
    return {key: value for key, value in values.items() if key in names}
