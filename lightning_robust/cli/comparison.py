# SPDX-License-Identifier: Apache-2.0
"""A recipe with a `compare` part: arms that differ in some values of the recipe, each trained with the same seeds."""

from dataclasses import dataclass
from typing import Any

from lightning_robust.cli.builder import COMPARE
from lightning_robust.cli.compare_part import (
    PREFIX,
    SHAPE,
    Arm,
    change,
    checked,
    quantities_of,
    seeds_of,
)
from lightning_robust.cli.errors import UsageError
from lightning_robust.cli.jobs import Job
from lightning_robust.cli.overrides import difference, merged
from lightning_robust.cli.substitute import take_option

__all__ = ["Comparison"]


@dataclass(frozen=True)
class Comparison:
    """What is compared, over which seeds, by which quantities.

    Args:
        name: Name of the recipe.
        config: The recipe without its `compare` part.
        changes: Options of the command line for all arms.
        seeds: Seeds of each arm.
        arms: The arms by name, in the order of the table.
        quantities: What is measured.
    """

    name: str
    config: dict[str, Any]
    changes: list[str]
    seeds: list[int]
    arms: dict[str, Arm]
    quantities: list[str]

    @classmethod
    def of(cls, job: Job) -> "Comparison | None":
        """Understand the `compare` part of a recipe and the options that change it; ``None`` without one.

        Args:
            job: The recipe with the options of the command line.

        Raises:
            UsageError: If the part has the wrong shape, or does not go with something else in the recipe.
        """
        block = job.config.get(COMPARE)
        own, shared = take_option(job.changes, PREFIX)
        if block is None:
            if own:
                raise UsageError(f"{own[0][0]}: {job.name} compares nothing, it has no `{COMPARE}` part.", SHAPE)
            return None
        given = checked(block)
        arms = {name: Arm(value) for name, value in given["arms"].items() if value is not None}
        for option, value in own:
            change(given, arms, option, value)
        chosen = cls(
            job.name,
            {key: value for key, value in job.config.items() if key != COMPARE},
            shared,
            seeds_of(given.get("seeds", [0, 1, 2])),
            arms,
            quantities_of(given.get("quantities")),
        )
        chosen._refuse()
        return chosen

    def job(self, arm: str, seed: int) -> Job:
        """The training of one arm with one seed.

        Args:
            arm: Name of the arm.
            seed: The seed.
        """
        config = merged(self.config, self.arms[arm].overrides)
        return Job(arm, {**config, "seed_everything": seed}, [*self.changes, *self.arms[arm].changes])

    def cells(self) -> list[tuple[str, int]]:
        """Every arm with every seed, the arms of a seed next to each other."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    def settled(self, base: dict[str, Any], parsed: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The recipe with all options of the command line in it.

        Args:
            base: The parsed recipe without its arms.
            parsed: The parsed recipe of each arm.
        """
        arms = {arm: difference(base, whole) for arm, whole in parsed.items()}
        for arm, whole in parsed.items():
            if merged(base, arms[arm]) != whole:
                raise UsageError(
                    f"The arm `{arm}` takes something away that the recipe sets, which a recipe cannot say.",
                    "Leave it out of the recipe, and set it in the other arms.",
                )
        return {**base, COMPARE: {"seeds": self.seeds, "quantities": self.quantities, "arms": arms}}

    def base(self) -> Job:
        """The recipe without its arms."""
        return Job(self.name, {**self.config, "seed_everything": self.seeds[0]}, self.changes)

    def values(self) -> list[Any]:
        """Everything in which a word in braces may stand."""
        return [self.config, self.changes, *([arm.overrides, arm.changes] for arm in self.arms.values())]

    def _refuse(self) -> None:
        if not self.arms:
            raise UsageError(f"`{COMPARE}.arms` is empty, so there is nothing to compare.", SHAPE)
        if self.config.get("baseline") is not None:
            raise UsageError(f"A recipe has a `baseline` or a `{COMPARE}` part, not both: make the baseline an arm.")
        if any(word.partition("=")[0] == "--seed_everything" for word in self.changes):
            raise UsageError(f"The seeds of a comparison are changed with: {PREFIX}.seeds [0,1,2]")
