# SPDX-License-Identifier: Apache-2.0
"""Weight decay that follows the overfitting-underfitting indicator (OUI) from epoch to epoch."""

import math
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from lightning_robust.checks import check_in_range, check_integer, check_positive

__all__ = ["AutoWeightDecay", "WeightDecayStep"]


@dataclass(frozen=True)
class WeightDecayStep:
    """What to do after an epoch.

    Attributes:
        weight_decay: Weight decay of the next epoch.
        restart: Whether to initialise the network anew.
    """

    weight_decay: float
    restart: bool


class AutoWeightDecay:
    r"""Chooses the weight decay of the next epoch from the OUI and the training loss of the one that ended.

    The OUI is near 1 where samples activate different units and falls when a network is regularised too much. After a
    warm-up, which ends early when the OUI leaves ``[first - 0.1, first + 0.2]``, where ``first`` is that of the first
    epoch:

    - an OUI above ``ideal + 0.1`` with a training loss below that of the last raise multiplies the weight decay by
      :math:`f = 10^{10 / \text{epochs}}`;
    - an OUI below the limit, ``ideal`` at first, divides it by :math:`f`, the second time by :math:`f^2` and so on, and
      lowers the limit by 0.025;
    - each of the last epochs divides it by :math:`f^4`.

    An OUI below ``restart_below`` during the warm-up divides the weight decay by 10 and asks for a new initialisation.

    Cost: none; this is a state machine over numbers. Save :meth:`state_dict` to resume.

    Args:
        epochs: Epochs of the run.
        initial: Weight decay of the first epoch.
        ideal: OUI to aim at.
        restart_below: OUI below which an epoch of the warm-up asks for a new initialisation.
        warmup_epochs: Epochs of the warm-up; a tenth of the run when ``None``.
        final_epochs: Last epochs, in which the weight decay falls; a tenth of the run when ``None``.

    Raises:
        ValueError: If an argument is out of range, or a value of an epoch is not a number.

    References:
        Fernandez-Hernandez et al., OUI Need to Talk About Weight Decay: A New Perspective on Overfitting Detection,
        arXiv 2504.17160.

    Example:
        >>> from lightning_robust.regularization import AutoWeightDecay
        >>> controller = AutoWeightDecay(epochs=20, initial=1e-4)
        >>> for epoch, (oui, loss) in enumerate([(0.7, 2.0), (0.72, 1.8), (0.95, 1.7)]):
        ...     step = controller.step(epoch, oui=oui, training_loss=loss)
        >>> round(step.weight_decay, 6), step.restart
        (0.000316, False)
    """

    def __init__(
        self,
        *,
        epochs: int,
        initial: float = 1e-4,
        ideal: float = 0.55,
        restart_below: float = 0.55,
        warmup_epochs: int | None = None,
        final_epochs: int | None = None,
    ) -> None:
        check_integer("epochs", epochs, 1)
        check_positive("initial", initial)
        check_in_range("ideal", ideal, 0.0, 1.0)
        check_in_range("restart_below", restart_below, 0.0, 1.0)
        for name, value in {"warmup_epochs": warmup_epochs, "final_epochs": final_epochs}.items():
            if value is not None:
                check_integer(name, value, 0)
        self.epochs = epochs
        self.initial = initial
        self.ideal = ideal
        self.restart_below = restart_below
        self.warmup_epochs = int(0.1 * epochs) if warmup_epochs is None else warmup_epochs
        self.final_epochs = int(0.1 * epochs) if final_epochs is None else final_epochs
        self.factor = 10 ** (10 / epochs)
        #: Weight decay of the next epoch.
        self.weight_decay = initial
        self._begin()

    def step(self, epoch: int, *, oui: float, training_loss: float) -> WeightDecayStep:
        """Take in the values of an epoch that ended; return what to do in the next.

        Args:
            epoch: Epoch, counted from 0.
            oui: Its overfitting-underfitting indicator, in [0, 1].
            training_loss: Its mean training loss.
        """
        check_integer("epoch", epoch, 0)
        check_in_range("oui", oui, 0.0, 1.0)
        if math.isnan(training_loss):
            raise ValueError("Expected `training_loss` to be a number but got nan.")
        if self._warming:
            self._warm_up(epoch, oui)
        if epoch < self.warmup_epochs and oui < self.restart_below:
            self.weight_decay /= 10
            self._begin()
            return WeightDecayStep(self.weight_decay, restart=True)
        if not self._warming:
            self._correct(epoch, oui, training_loss)
        return WeightDecayStep(self.weight_decay, restart=False)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes, as plain numbers."""
        return {name.lstrip("_"): getattr(self, name) for name in _STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`.

        Args:
            state_dict: The state.
        """
        for name in _STATE:
            setattr(self, name, state_dict[name.lstrip("_")])

    @override
    def __repr__(self) -> str:
        return f"AutoWeightDecay(epochs={self.epochs}, initial={self.initial}, ideal={self.ideal})"

    def _begin(self) -> None:
        self._warming = True
        self._first_oui: float | None = None
        self._best_loss = math.inf  # training loss of the last raise
        self._limit = self.ideal
        self._divisor = self.factor

    def _warm_up(self, epoch: int, oui: float) -> None:
        if epoch > self.warmup_epochs:
            self._warming = False
            return
        if self._first_oui is None:
            self._first_oui = oui
        self._warming = self._first_oui - 0.1 <= oui <= self._first_oui + 0.2

    def _correct(self, epoch: int, oui: float, training_loss: float) -> None:
        if epoch >= self.epochs - self.final_epochs:
            self.weight_decay /= self.factor**4
        elif oui < self._limit:
            self.weight_decay /= self._divisor
            # if it stays low all the same, a lower OUI is accepted, and what follows is harsher
            self._limit -= 0.025
            self._divisor *= self.factor
        elif oui > self.ideal + 0.1 and training_loss < self._best_loss:
            self.weight_decay *= self.factor
            self._best_loss = training_loss


_STATE = ("weight_decay", "_warming", "_first_oui", "_best_loss", "_limit", "_divisor")
