# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found, as plain numbers that JSON can hold."""

from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["EvaluationResult"]


@dataclass(frozen=True)
class EvaluationResult:
    """The numbers of one model on one test set.

    Args:
        samples: Number of test samples.
        accuracy: Share of right answers on the clean samples.
        nll: Mean negative log-likelihood.
        brier: Mean Brier score, the sum over classes, in [0, 2].
        ece: Expected calibration error of the top label.
        bin_counts: Samples per confidence bin.
        bin_accuracy: Share of right answers per bin; ``None`` for an empty bin.
        bin_confidence: Mean confidence per bin; ``None`` for an empty bin.
        attack: How the samples were attacked; ``None`` without an attack.
        attacked: Number of samples that were attacked.
        robust_accuracy: Share of the attacked samples that are right both clean and attacked.
        temperature: Temperature fitted on the validation samples; ``None`` without them.
        temperature_at_bound: Whether the fit ended at a bound, as it does when every validation sample is right.
        ece_scaled: Expected calibration error with that temperature.
        nll_scaled: Mean negative log-likelihood with that temperature.

    Example:
        >>> result = EvaluationResult(4, 0.75, 0.5, 0.3, 0.1, [0, 4], [None, 0.75], [None, 0.85])
        >>> EvaluationResult.from_dict(result.to_dict()) == result
        True
    """

    samples: int
    accuracy: float
    nll: float
    brier: float
    ece: float
    bin_counts: list[int]
    bin_accuracy: list[float | None]
    bin_confidence: list[float | None]
    attack: str | None = None
    attacked: int = 0
    robust_accuracy: float | None = None
    temperature: float | None = None
    temperature_at_bound: bool = False
    ece_scaled: float | None = None
    nll_scaled: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EvaluationResult":
        """The result that `to_dict` wrote; keys of other versions are left out.

        Args:
            values: What `to_dict` returned.
        """
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})
