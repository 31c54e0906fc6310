# SPDX-License-Identifier: Apache-2.0
"""A label-free penalty on the logits of any LightningModule's training step."""

from typing import Any

import lightning as L
from torch import Tensor
from typing_extensions import override

from lightning_robust.callbacks._names import refuse_same_name
from lightning_robust.callbacks._smoothing import warn_of_smoothing
from lightning_robust.callbacks._validation_watch import LearnsFromValidation
from lightning_robust.checks import check_kind
from lightning_robust.losses import LogitRegularizer
from lightning_robust.training import BatchAdapter, RunStep, Stage, StepContext, loss_of, replace_loss

__all__ = ["LogitRegularization"]

_KEY = "logit_regularizers"  # in checkpoints


class LogitRegularization(LearnsFromValidation):
    r"""Adds a penalty on the logits to the loss of the training step of any LightningModule.

    .. math:: L + \alpha\,\mathrm{mean}(r(z))

    Runs inside the training step, on the logits that the step itself computed, so it costs no forward pass. The
    coefficient may follow a schedule, whose value is set at the start of every epoch and continues after a resume.
    The penalty without its coefficient is logged as ``train/NAME`` (the mean over the epoch).

    Samples whose hard label is ``ignore_index`` do not count, as in the cross-entropy; the mean runs over the samples
    of one process. Validation and test losses are never changed.

    Cost: one pass over the logits per step.

    Args:
        regularizer: The penalty with its coefficient, for example ``MaxSup(alpha=0.1)``.
        ignore_index: Hard label of the samples that do not count; only looked at when the batch holds hard labels.
        name: Tells two penalties apart in the logs, ``train/NAME``; the regularizer's own name when ``None``.
        logits_from: Dotted name of the sub-module whose output is the logits; found by itself when ``None``.
        batch: How to read labels from a batch; the usual forms are understood when ``None``.

    Raises:
        ValueError: At setup, for manual optimization, for a schedule over a run of unknown length, or for two
            penalties of one Trainer with the same name.

    References:
        See the regularizer, for example :class:`~lightning_robust.losses.MaxSup`.

    Example:
        >>> import lightning as L
        >>> from lightning_robust.callbacks import LogitRegularization
        >>> from lightning_robust.losses import MaxSup
        >>> callback = LogitRegularization(MaxSup(alpha=0.1))
        >>> trainer = L.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    stage = Stage.LOSS
    needs_logits = True

    def __init__(
        self,
        regularizer: LogitRegularizer,
        *,
        ignore_index: int = -100,
        name: str | None = None,
        logits_from: str | None = None,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__(logits_from=logits_from, batch=batch)
        check_kind(
            "regularizer",
            regularizer,
            LogitRegularizer,
            "use one of lightning_robust.losses, MaxSup(alpha=0.1) for example, and the callback Criterion for a loss "
            "that needs labels",
        )
        self.regularizer = regularizer
        self.ignore_index = ignore_index
        self.name = regularizer.name if name is None else name
        self._reads_labels = batch is not None  # the user says where labels are, so failing to find them is an error

    @override
    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().check(trainer, pl_module)
        refuse_same_name(trainer, self)
        self._set_progress(trainer)
        warn_of_smoothing(trainer, pl_module, self)
        self.learn(self.regularizer if self.regularizer.needs_validation else None)

    @override
    def on_pipeline_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.regularizer.to(pl_module.device)

    # A run that continues in the middle of an epoch gets no call at the start of that epoch.
    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._set_progress(trainer)

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._set_progress(trainer)

    @override
    def around_step(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        labels = self._labels(batch)  # read first: a step may take its batch apart
        output = run(batch)
        loss = loss_of(output)
        if loss is None:
            return output
        logits = context.logits(self)
        penalty = self.regularizer.mean_penalty(logits, self._mask(labels, logits))
        context.log(f"train/{self.name}", penalty, batch_size=len(logits))
        return replace_loss(output, loss + self.regularizer.coefficient * penalty)

    # Not `state_dict`: Lightning would refuse two penalties of one name before this callback can say what to do, and
    # would ask later runs for a callback whose state is empty.
    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if state := self.regularizer.state_dict():
            checkpoint.setdefault(_KEY, {})[self.name] = dict(state)

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if state := checkpoint.get(_KEY, {}).get(self.name):
            self.regularizer.load_state_dict(state)

    def _set_progress(self, trainer: L.Trainer) -> None:
        max_epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
        self.regularizer.set_progress(trainer.current_epoch, max_epochs)

    def _labels(self, batch: Any) -> Tensor | None:
        try:
            return self.batch.target_of(batch)
        except (TypeError, KeyError):
            if self._reads_labels:
                raise
            return None

    def _mask(self, labels: Tensor | None, logits: Tensor) -> Tensor | None:
        """Which samples count; ``None`` when the batch has no hard labels that fit the logits."""
        if labels is None or labels.is_floating_point() or labels.shape != logits.shape[:1] + logits.shape[2:]:
            return None
        return labels != self.ignore_index
