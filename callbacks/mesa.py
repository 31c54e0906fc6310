# SPDX-License-Identifier: Apache-2.0
"""Memory-efficient sharpness-aware training: predictions are held near those of a moving average of the network."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, no_grad
from typing_extensions import override

from lightning_robust.callbacks._answers import OncePerInput
from lightning_robust.callbacks._epoch_window import EpochWindow
from lightning_robust.callbacks._network_input import NetworkInput
from lightning_robust.callbacks._strategies import keeps_whole_weights
from lightning_robust.checks import check_in_range, check_non_negative, check_positive
from lightning_robust.sharpness import WeightAverage, trajectory_loss
from lightning_robust.training import (
    BatchAdapter,
    LogitsFunction,
    RunStep,
    Stage,
    StepCallback,
    StepContext,
    loss_of,
    replace_loss,
)
from lightning_robust.training.context import logits_of_copy

__all__ = ["MESA"]


class MESA(StepCallback):
    r"""Adds the distance of the predictions from those of a moving average of the network to the loss of any module.

    .. math:: L + \lambda\,T^2\,\frac1B \sum_i
        \mathrm{KL}\big(\mathrm{softmax}(\bar z_i/T)\,\|\,\mathrm{softmax}(z_i/T)\big),
        \qquad \bar w \leftarrow d\,\bar w + (1-d)\,w

    Runs inside the training step, in the epochs ``start_epoch < e < end_epoch``: the average sees the batch first, in
    evaluation mode, without gradients and under the step's autocast, then the module's own step runs. It begins with
    the initial weights and follows after every optimizer step, from the first epoch on. It needs about ``1/(1 - d)``
    steps to leave the initial weights behind, 5000 with the default: choose a smaller decay for a short run. The term
    without ``weight`` is logged as ``train/mesa``.

    The average lives outside the module tree: it is in no optimizer, no DDP reduction and not in the module's state.
    Checkpoints hold it in this callback's state, so a run continues exactly. It is the same in all processes: weights
    by themselves, BatchNorm statistics because those of the first process are handed out.

    Cost: one forward pass of the average per batch, a third of a pass; a sharpness-aware method does not repeat it. One
    copy of the module in memory and in checkpoints.

    Args:
        weight: Coefficient of the term; 0.8 as in the authors' description, 0.3 in their script.
        temperature: ``T``, by which both distributions are softened.
        decay: ``d``, per optimizer step.
        start_epoch: The last epoch without the term, counted from 0.
        end_epoch: The first epoch without it again; ``None`` for no end.
        logits_from: Dotted name of the sub-module whose output is the logits; found by itself when ``None``.
        batch: How to read inputs and targets from a batch; the usual forms are understood when ``None``.

    Raises:
        ValueError: At setup, for manual optimization and for strategies that do not keep whole weights on one device;
            when the fit starts, for a checkpoint of another network.
        TypeError: When the fit starts, if the module cannot be copied.

    References:
        Du et al., Sharpness-Aware Training for Free, NeurIPS 2022, arXiv 2205.14083. In the authors' code every process
        averages its own BatchNorm statistics.

    Example:
        >>> import lightning as L
        >>> from lightning_robust.callbacks import MESA
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[MESA(decay=0.999)], logger=False, enable_checkpointing=False)
    """

    stage = Stage.LOSS
    needs_logits = True

    def __init__(
        self,
        *,
        weight: float = 0.8,
        temperature: float = 5.0,
        decay: float = 0.9998,
        start_epoch: int = 5,
        end_epoch: int | None = None,
        logits_from: str | None = None,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__(logits_from=logits_from, batch=batch)
        check_non_negative("weight", weight)
        check_positive("temperature", temperature)
        check_in_range("decay", decay, 0.0, 1.0)
        self.weight = weight
        self.temperature = temperature
        self.decay = decay
        self.window = EpochWindow(start_epoch, end_epoch)
        self.average: WeightAverage | None = None
        self._restored: dict[str, Any] = {}
        self._steps = 0  # optimizer steps that the average has followed
        self._looked = False  # whether the first batch with the term was watched
        self._function: LogitsFunction | None = None
        self._answers = OncePerInput()

    @override
    def passes(self, inner: float) -> float:
        return inner + 1 / 3

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._restored if self.average is None else self.average.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict)

    @override
    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().check(trainer, pl_module)
        if not keeps_whole_weights(trainer):
            raise ValueError(
                f"MESA averages whole weights, which {type(trainer.strategy).__name__} does not keep on one device; "
                'use strategy="ddp" or a single device.'
            )
        self.average = None
        self._restored = {}
        self.window.warn_if_missed(trainer, "MESA")

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # not earlier: the weights of the checkpoint, or those of the first process, are in place now
        self.average = WeightAverage(pl_module, decay=self.decay)
        self._function = logits_of_copy(self.average.module, trainer, self.logits_from)
        self._steps = trainer.global_step
        self._looked = False
        if self._restored:
            state, self._restored = self._restored, {}
            self.average.load_state_dict(state)

    @override
    def around_step(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        if context.trainer.current_epoch not in self.window:
            return run(batch)
        # Before the step: the average's activations are gone when the student's graph is built.
        reference = self._answers.ask(self._of_average, self.batch.input_of(batch))
        output = run(batch) if self._looked else self._watched(context, batch, run)
        loss = loss_of(output)
        if loss is None:
            return output
        logits = context.logits(self)
        term = trajectory_loss(logits, reference, self.temperature)
        context.log("train/mesa", term, batch_size=len(logits))
        return replace_loss(output, loss + self.weight * term)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._answers.forget()
        if trainer.global_step == self._steps:  # gradients are being accumulated
            return
        self._steps = trainer.global_step
        assert self.average is not None
        self.average.update(pl_module)
        if trainer.world_size > 1:
            self.average.broadcast_buffers()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._answers.forget()
        if stage == "fit" and self.average is not None:
            copied: Any = self.average.module
            copied.trainer = None
            self.average.to("cpu")  # the Trainer takes the module off the device as well

    def _of_average(self, x: Tensor) -> Tensor:
        assert self._function is not None, "made in on_train_start"
        with no_grad():
            return self._function(x)

    def _watched(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        self._looked = True
        with NetworkInput(context.pl_module, self.batch.input_of(batch)) as watch:
            output = run(batch)
        if watch.changed:
            rank_zero_warn(
                f"The training_step of {type(context.pl_module).__name__} changes its inputs before the network sees "
                "them, while MESA's average got them as they are. Normalise inside of the module's forward, and put "
                "mixup and augmentation in the data set or in on_after_batch_transfer, so that both see the same."
            )
        return output
