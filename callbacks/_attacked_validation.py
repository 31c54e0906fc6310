# SPDX-License-Identifier: Apache-2.0
"""What callbacks share that attack some of the images a module is validated or tested on, and only look."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_robust.callbacks._evaluation_tap import EvaluationTap, refuse_other_function
from lightning_robust.checks import check_choice, check_integer
from lightning_robust.guards import evaluation_mode
from lightning_robust.training import BatchAdapter, LogitsFunction, QuietGate, derive_seed

__all__ = ["PREFIXES", "AttackedValidation"]

#: What the names of logged values begin with, by loop.
PREFIXES = {"validate": "val", "test": "test"}
_STEPS = {"validate": "validation_step", "test": "test_step"}


class AttackedValidation(Callback, ABC):
    """Shows a subclass the first images of each validation or test with the function that gives their logits.

    The work runs in ``on_validation_batch_end`` on the batch that was just validated, in the Trainer's precision, in
    evaluation mode and with the module's logs and metrics silenced; weights, gradients, modes and generators stay as
    they are. The first batch of a run compares the logits with those of the validation step.

    Args:
        every_n_epochs: look in every n-th epoch of a fit only.
        max_samples: look at this many images, the first of the loader, shared out over the ranks; ``None`` for all.
        stages: when to look: ``"validate"``, ``"test"`` or both.
        dataloader_idx: which loader is looked at if there are several.
        seed: seed of what is random.
        logits_from: dotted name of the sub-module whose output is the logits; found by itself when ``None``.
        batch: how to read images and targets from a batch; the usual forms are understood when ``None``.

    Raises:
        ValueError: an argument out of range; when running, a step that validates another function.
    """

    #: Shape and type of what :meth:`measure` returns.
    sums: ClassVar[tuple[int, ...]]
    sum_dtype: ClassVar[torch.dtype]

    def __init__(
        self,
        *,
        every_n_epochs: int,
        max_samples: int | None,
        stages: Sequence[Literal["validate", "test"]],
        dataloader_idx: int,
        seed: int,
        logits_from: str | None,
        batch: BatchAdapter | None,
    ) -> None:
        super().__init__()
        check_integer("every_n_epochs", every_n_epochs, 1)
        check_integer("dataloader_idx", dataloader_idx, 0)
        check_integer("seed", seed, 0)
        if max_samples is not None:
            check_integer("max_samples", max_samples, 1)
        for stage in stages:
            check_choice("stages", stage, tuple(PREFIXES))
        self.every_n_epochs = every_n_epochs
        self.max_samples = max_samples
        self.stages = tuple(stages)
        self.dataloader_idx = dataloader_idx
        self.seed = seed
        self.logits_from = logits_from
        self.batch = batch if batch is not None else BatchAdapter()
        self._model: LogitsFunction | None = None  # None: this loop is not looked at
        self._tap: EvaluationTap | None = None  # watches the step up to the first batch of a run that is looked at
        self._compared = False
        self._gate: QuietGate | None = None  # keeps our forwards out of logs and metrics
        self._own_gate: QuietGate | None = None  # the same, in the callback that installs and removes it
        self._left = 0.0
        self._totals: Tensor | None = None

    @abstractmethod
    def measure(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, seed: int) -> Tensor:
        """Sums over some images; those of all batches and ranks are added.

        Args:
            model: maps images to logits.
            x: images.
            y: targets.
            seed: of this batch, the same in every epoch.
        """

    @abstractmethod
    def conclude(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str, totals: Tensor) -> None:
        """Log the sums of all ranks.

        Args:
            trainer: the Trainer.
            pl_module: the module.
            stage: ``"validate"`` or ``"test"``.
            totals: the sums, on the CPU.
        """

    def should_attack(self, trainer: L.Trainer, stage: str) -> bool:
        """Whether the loop that begins now is one to look at.

        Args:
            trainer: the Trainer.
            stage: ``"validate"`` or ``"test"``.
        """
        due = trainer.state.fn != TrainerFn.FITTING or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return stage in self.stages and due and not trainer.sanity_checking

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._compared = False

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module, "validate")

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._model is not None and self._left > 0 and dataloader_idx == self.dataloader_idx:
            self._look(trainer, pl_module, batch, batch_idx)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish(trainer, pl_module, "validate")

    @override
    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module, "test")

    on_test_batch_end = on_validation_batch_end

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish(trainer, pl_module, "test")

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end()

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end()
        # all of them share the gate of the first: two would be removed in the order of their installation
        first = next(each for each in trainer.callbacks if isinstance(each, AttackedValidation))  # type: ignore[attr-defined]
        if first is self:
            self._own_gate = QuietGate(pl_module)
            self._own_gate.install()
        self._gate = first._own_gate
        if not self.should_attack(trainer, stage):
            return
        self._model = LogitsFunction(pl_module, self.logits_from)
        if not self._compared:
            self._tap = EvaluationTap(pl_module, _STEPS[stage], self.logits_from)
            self._tap.attach()
        self._left = float("inf")
        if self.max_samples is not None:
            share, rest = divmod(self.max_samples, trainer.world_size)
            self._left = share + (trainer.global_rank < rest)

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._gate is not None
        assert self._model is not None
        x, y = self.batch.unpack(batch)
        if self._tap is not None:
            with trainer.precision_plugin.forward_context(), self._gate.silence(), torch.no_grad():
                refuse_other_function(self._tap, self._model, x)
            self._tap.detach()
            self._tap, self._compared = None, True
        count = int(min(self._left, len(x)))
        self._left -= count
        seed = derive_seed(self.seed, trainer.global_rank, batch_idx)
        with trainer.precision_plugin.forward_context(), evaluation_mode(pl_module), self._gate.silence():
            measured = self.measure(self._model, x[:count], y[:count], seed)
        self._totals = measured if self._totals is None else self._totals + measured

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        looked, totals = self._model is not None, self._totals
        self._end()
        if not looked:
            return
        if trainer.world_size > 1:
            # a rank without a sample does not know how many sums the others have
            totals = torch.zeros(self.sums, dtype=self.sum_dtype, device=pl_module.device) if totals is None else totals
            totals = trainer.strategy.reduce(totals, reduce_op="sum")
        if totals is not None:
            self.conclude(trainer, pl_module, stage, totals.cpu())

    def _end(self) -> None:
        self._model = self._totals = None
        if self._tap is not None:
            self._tap.detach()
            self._tap = None
        if self._own_gate is not None:
            self._own_gate.remove()
        self._gate = self._own_gate = None
