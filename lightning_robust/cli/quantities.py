# SPDX-License-Identifier: Apache-2.0
"""What a comparison can measure of each arm; needs no torch."""

from dataclasses import dataclass

__all__ = ["ATTACKED", "DEFAULT", "QUANTITIES", "Quantity"]


@dataclass(frozen=True)
class Quantity:
    """One column of a comparison.

    Args:
        heading: Its heading in the table.
        factor: What its values are multiplied with where they are shown: 100 for percent.
        note: What it is, for the line below the table.
        better: ``"higher"``, ``"lower"`` or ``""`` when neither is better.
        digits: Decimals.
    """

    heading: str
    factor: float
    note: str
    better: str = ""
    digits: int = 2

    @property
    def label(self) -> str:
        """The heading in one line."""
        return self.heading.replace("\n", " ")

    def text(self, value: float, spread: float | None = None) -> str:
        """A value, and below it its deviation over the seeds if there is one.

        Args:
            value: The value.
            spread: Its standard deviation.
        """
        shown = f"{value * self.factor:.{self.digits}f}"
        return shown if spread is None else f"{shown}\n±{spread * self.factor:.{self.digits}f}"


#: By the name that a recipe uses. All are of the last epoch's weights unless the note says otherwise.
QUANTITIES = {
    "accuracy": Quantity("acc.\n%", 100, "accuracy on the test split", "higher"),
    "val_accuracy": Quantity("val.\nacc. %", 100, "accuracy on the validation split, to choose settings by", "higher"),
    "best_accuracy": Quantity(
        "best\nacc. %", 100, "test accuracy of the epoch that was best on the validation split", "higher"
    ),
    "adv_accuracy": Quantity("adv.\nacc. %", 100, "accuracy under the attack of `evaluation`", "higher"),
    "autoattack": Quantity(
        "AA\n%", 100, "accuracy under AutoAttack (standard) with the budget of that attack", "higher"
    ),
    "ece": Quantity("ECE\n%", 100, "calibration error, 15 bins", "lower"),
    "nll": Quantity("NLL", 1, "cross-entropy on the test split, whatever the training loss", "lower", digits=3),
    "aurc": Quantity(
        "AURC\nx1000", 1000, "area under the risk-coverage curve of the largest softmax probability", "lower"
    ),
    "d_within": Quantity("d_within", 1, "mean cosine distance of the features within a class", digits=3),
    "r2": Quantity("R2", 1, "share of the cosine distance of features that lies between classes", digits=3),
    "probe": Quantity("probe\n%", 100, "accuracy of a linear probe of the features", "higher"),
    "memorised": Quantity("wrong\nfit %", 100, "wrongly labelled training images that get their wrong label", "lower"),
    "recovered": Quantity("wrong\ntrue %", 100, "wrongly labelled training images that get their true label", "higher"),
    "seconds": Quantity("train\nsec.", 1, "seconds of training", "lower", digits=1),
}

#: What needs an attack in the `evaluation` of the recipe.
ATTACKED = ("adv_accuracy", "autoattack")
DEFAULT = ("accuracy", "ece", "nll", "aurc", "d_within", "r2", "probe")
