# SPDX-License-Identifier: Apache-2.0
"""What a criterion cannot be trained with."""

from collections.abc import Mapping
from typing import Any

import lightning as L

from lightning_robust import losses
from lightning_robust.callbacks.objective_training import ObjectiveTraining

__all__ = ["refuse_misfits"]


def refuse_misfits(trainer: L.Trainer, criterion: losses.Criterion, told: Mapping[str, tuple[Any, str]]) -> None:
    """Refuse a criterion that asks for what this run does not have; at setup.

    Args:
        trainer: The Trainer.
        criterion: The criterion.
        told: Options of the callback by name, each with its value and the need that it serves.

    Raises:
        ValueError: Something is missing, or another callback takes it away.
    """
    name = type(criterion).__name__
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, ObjectiveTraining) for callback in callbacks):
        raise ValueError(
            f"An objective computes a loss of its own, so there is no cross-entropy that {name} could replace; keep "
            "either the objective or the callback Criterion."
        )
    unknown = [each for each in criterion.needs if each not in losses.CONTEXT]
    if unknown:
        raise ValueError(
            f"{name} needs {', '.join(map(repr, unknown))} of each sample, but the callback Criterion can tell it "
            f"{', '.join(losses.CONTEXT)} only; pass the rest in a training_step of your own."
        )
    if getattr(criterion, "reduction", "mean") == "none":
        raise ValueError(f"{name} has reduction='none', but training needs one number; use 'mean' or 'sum'.")
    if "group" in criterion.needs and all(value is None for value, need in told.values() if need == "group"):
        raise ValueError(
            f"{name} needs the group of each sample; let the dataset return it and name that entry of the batch with "
            "Criterion(..., group_key=...)."
        )
    for option, (value, need) in told.items():
        if value is not None and need not in criterion.needs:  # nobody reads it: meant for another criterion
            raise ValueError(
                f"{name} needs no {need} of a sample, so {option}={value!r} would be ignored; leave it out, or use the "
                "criterion that it was meant for."
            )
    mixing = next((type(each).__name__ for each in callbacks if getattr(each, "mixes_samples", False)), None)
    if mixing and ("index" in criterion.needs or not criterion.soft_targets):
        raise ValueError(
            f"{name} needs the label of each sample as it is, but {mixing} mixes the samples of a batch; drop one of "
            "the two."
        )
