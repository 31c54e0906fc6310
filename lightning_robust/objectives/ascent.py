# SPDX-License-Identifier: Apache-2.0
"""What the model said on the way of an attack, for objectives that look at more than where it ended."""

import torch
from torch import Tensor

from lightning_robust.attacks import Attack
from lightning_robust.attacks.conditions import Model, unwrap
from lightning_robust.losses import full_precision

__all__ = ["Ascent", "check_one_run"]


class Ascent:
    """A model that keeps the logits of the passes whose gradient an attack takes: those of its iterates, in order.

    Forwards without a gradient (the clean prediction of ``loss="kl"``, the choice between restarts) are not kept.
    No pass is added, and no device is waited for.

    Args:
        model: maps images to logits.

    Example:
        >>> from lightning_robust.attacks import PGD
        >>> ascent = Ascent(torch.nn.Linear(4, 3))
        >>> x_adv = PGD(steps=5)(ascent, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> ascent.logits().shape
        torch.Size([5, 2, 3])
    """

    def __init__(self, model: Model) -> None:
        self._network, self.module = unwrap(model)
        self._kept: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of ``x``."""
        logits = self._network(x)
        if torch.is_grad_enabled():
            self._kept.append(full_precision(logits.detach()))
        return logits

    def logits(self) -> Tensor:
        """The kept logits ``[passes, B, C]``.

        Raises:
            ValueError: the attack took no gradient, or not of the whole batch in each pass.
        """
        sizes = {len(logits) for logits in self._kept}
        if len(sizes) != 1:
            raise ValueError(
                "Expected an attack that takes the gradient of the whole batch in each step but the passes were of "
                f"{sorted(sizes) or 'no'} images; take PGD without `early_stop`."
            )
        return torch.stack(self._kept)


def check_one_run(name: str, attack: Attack) -> None:
    """Refuse attacks whose way cannot be followed.

    Args:
        name: the objective, for the message.
        attack: its attack.

    Raises:
        ValueError: several restarts, or samples that leave the batch on the way.
    """
    if getattr(attack, "restarts", 1) > 1 or getattr(attack, "early_stop", False):
        raise ValueError(
            f"{name} follows one run of its attack over the whole batch but got {attack!r}; set restarts=1 and "
            "early_stop=False."
        )
