# SPDX-License-Identifier: Apache-2.0
"""Telling callbacks of one kind in one Trainer apart."""

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

__all__ = ["refuse_same_name"]


def refuse_same_name(
    trainer: L.Trainer, callback: Callback, collides: Callable[[Any], bool] = lambda other: True
) -> None:
    """Refuse a second callback of the kind and ``name`` of this one, whose values would overwrite each other.

    Args:
        trainer: The Trainer.
        callback: The callback; has the attribute ``name``.
        collides: Whether another one of that name writes the same values.

    Raises:
        ValueError: There is one.
    """
    kind, name = type(callback), vars(callback)["name"]
    others = [other for other in trainer.callbacks if isinstance(other, kind) and other is not callback]  # type: ignore[attr-defined]
    if any(vars(other)["name"] == name and collides(other) for other in others):
        raise ValueError(
            f"Two {kind.__name__} callbacks of this Trainer have the name {name!r} and would overwrite each other's "
            "values; give one of them another `name`."
        )
