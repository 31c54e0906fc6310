# SPDX-License-Identifier: Apache-2.0
"""Everything that one process has found out, in memory and in the folder from which a killed evaluation continues."""

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_robust.evaluation.ledger import Ledger
from lightning_robust.evaluation.plan import Stage
from lightning_robust.evaluation.queues import Samples, StageQueue
from lightning_robust.evaluation.shard import Settings, Shard
from lightning_robust.evaluation.stage_runner import Outcome
from lightning_robust.evaluation.state import StateFolder
from lightning_robust.evaluation.tally import RunningTally, StageTally

__all__ = ["Book"]


class Book:
    """The ledger of samples, the counts of stages, and adversarial points until they are saved.

    Args:
        chains: Stages of each chain.
        settings: How the evaluation is made.
        num_classes: Number of classes.
        state: Where to save, if anywhere.
        fingerprint: What the evaluation is; saved parts of another one are refused.
        save_every_s: Seconds from one save to the next.

    Raises:
        ValueError: The folder holds the state of another evaluation.
    """

    def __init__(
        self,
        chains: Sequence[Sequence[Stage]],
        settings: Settings,
        num_classes: int,
        *,
        state: StateFolder | None,
        fingerprint: Mapping[str, str],
        save_every_s: float,
    ) -> None:
        self.settings, self.num_classes = settings, num_classes
        numbers = iter(range(sum(map(len, chains))))
        self.chains = [[StageQueue(stage, next(numbers)) for stage in chain] for chain in chains]
        self.clean = RunningTally()
        self.ledger = Ledger(len(chains))
        self._state, self._fingerprint, self._save_every_s = state, fingerprint, save_every_s
        self._points: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._started = self._saved = time.monotonic()
        self._earlier: list[dict[str, Any]] = [] if state is None else state.read(fingerprint)
        for part in self._earlier:
            self.ledger.merge(part["columns"])

    @property
    def queues(self) -> list[StageQueue]:
        """The queues of all stages, in order."""
        return [queue for chain in self.chains for queue in chain]

    def record(self, queue: StageQueue, samples: Samples, outcome: Outcome, tally: StageTally) -> None:
        """Write down what a stage did to a batch, and save if it is time.

        Args:
            queue: The stage's queue.
            samples: The batch.
            outcome: What became of it.
            tally: What it cost.
        """
        queue.tally.add(tally)
        info, fooled, rows = queue.stage.info, outcome.fooled, self.ledger.rows_of(samples.index)
        done = torch.where(fooled, info.position, info.position + 1)
        self.ledger.set(rows, info.chain, done=done, broken=torch.where(fooled, info.position, -1))
        self.ledger.set(rows[fooled], info.chain, rounded=outcome.rounded, rounded_inside=outcome.rounded_inside)
        if self._state is not None and len(outcome.points):
            self._points.setdefault(info.attack, []).append((samples.index[fooled], outcome.points.cpu()))
        if time.monotonic() - self._saved >= self._save_every_s:
            self.save()

    def save(self) -> None:
        """Append to the state what is new since the last time, if there is a place for it."""
        if self._state is None:
            return
        now, columns = time.monotonic(), self.ledger.take_changes()
        if not len(columns["index"]):
            return
        points = {
            name: (torch.cat([index for index, _ in found]), torch.cat([images for _, images in found]))
            for name, found in self._points.items()
        }
        part = {
            "columns": columns,
            "points": points,
            "clean": self.clean.take().to_dict(),
            "tallies": [queue.tally.take().to_dict() for queue in self.queues],
            "seconds": now - self._saved,
        }
        self._state.write(self._fingerprint, part)
        self._points, self._saved = {}, now

    def shard(self, fed: Collection[int]) -> Shard:
        """What this process tells the others.

        Args:
            fed: Indices of the samples that it got.
        """
        # every process has read the parts of all earlier ones; they count once
        earlier = self._earlier if self._state is not None and self._state.rank == 0 else []
        tallies = []
        for queue in self.queues:
            before = (StageTally(**part["tallies"][queue.number]) for part in earlier)
            tallies.append(StageTally.total([queue.tally.total, *before]))
        return Shard(
            settings=self.settings,
            num_classes=self.num_classes,
            stages=[queue.stage.info for queue in self.queues],
            columns=self.ledger.columns(self.ledger.rows_of(sorted(fed))),
            clean=StageTally.total([self.clean.total, *(StageTally(**part["clean"]) for part in earlier)]),
            tallies=tallies,
            seconds=time.monotonic() - self._started,
            earlier_seconds=sum(part["seconds"] for part in earlier if part["rank"] == 0),
        )
