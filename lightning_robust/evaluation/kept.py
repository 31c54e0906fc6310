# SPDX-License-Identifier: Apache-2.0
"""The first samples of an evaluation with the points that attacks returned for them, for the sanity checks."""

import torch
from torch import Tensor

from lightning_robust.evaluation.ledger import Ledger
from lightning_robust.evaluation.queues import Samples

__all__ = ["KeptSamples"]


class KeptSamples:
    """Remembers the first samples and, for each attack, the last point returned for each of them.

    Args:
        count: Number of samples.

    Example:
        >>> kept = KeptSamples(count=2)
        >>> kept.offer(Samples(torch.rand(5, 3), torch.arange(5), torch.arange(5)))
        >>> kept.samples.index
        tensor([0, 1])
    """

    def __init__(self, count: int) -> None:
        self.samples: Samples | None = None
        self._count = count
        self._positions: dict[int, int] = {}
        self._points: dict[str, dict[int, Tensor]] = {}

    def offer(self, samples: Samples) -> None:
        """Keep samples while there is room.

        Args:
            samples: Samples that were not offered before.
        """
        room = self._count - len(self._positions)
        if room <= 0 or not len(samples):
            return
        first = samples.split(room)[0]
        self.samples = first if self.samples is None else Samples.joined([self.samples, first])
        self._positions = {index: position for position, index in enumerate(self.samples.index.tolist())}

    def note(self, attack: str, samples: Samples, x_adv: Tensor) -> None:
        """Remember what an attack returned.

        Args:
            attack: Its name.
            samples: The attacked samples.
            x_adv: Their points.
        """
        for position, index in enumerate(samples.index.tolist()):
            if index in self._positions:
                self._points.setdefault(attack, {})[index] = x_adv[position]

    def points(self, attack: str, ledger: Ledger) -> Tensor | None:
        """The points of an attack for all kept samples, the clean image for one that was wrong anyway.

        Args:
            attack: Its name.
            ledger: What is known of the samples.

        Returns:
            The points; ``None`` if the attack has not seen all samples, in this run.
        """
        if self.samples is None:
            return None
        found = self._points.get(attack, {})
        columns = ledger.columns(ledger.rows_of(self.samples.index))
        right = (columns["prediction"] == columns["label"]).tolist()
        points = []
        for index, image, was_right in zip(self.samples.index.tolist(), self.samples.x, right, strict=True):
            if was_right and index not in found:
                return None
            points.append(found.get(index, image))
        return torch.stack(points)
