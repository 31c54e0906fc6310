# SPDX-License-Identifier: Apache-2.0
"""The base of every callback that changes a training step."""

from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_robust.training.batches import BatchAdapter
from lightning_robust.training.context import RunStep, StepContext
from lightning_robust.training.pipeline import StepPipeline
from lightning_robust.training.stages import Stage

__all__ = ["StepCallback"]


class StepCallback(Callback):
    """Wraps the training step of any LightningModule from the outside.

    A subclass names its :attr:`stage` and overrides :meth:`around_step`. All step callbacks of a Trainer form one
    :class:`~lightning_robust.training.StepPipeline`, ordered by stage whatever the order in the Trainer's list; within
    a stage the listed order counts. It is installed in ``on_fit_start`` and removed in ``on_fit_end``, on exceptions
    and in ``teardown``.

    Args:
        logits_from: dotted name of the sub-module whose output is the logits; found by itself when ``None``.
        batch: how to read inputs and targets from a batch; the usual forms are understood when ``None``.

    Example:
        >>> class HalfLoss(StepCallback):
        ...     stage = Stage.LOSS
        ...     def around_step(self, context, batch, run):
        ...         return run(batch) / 2
    """

    stage: ClassVar[Stage]
    #: Whether the logits of the step are captured for this callback.
    needs_logits: bool = False
    #: Only one callback with this mark may stand in its stage.
    exclusive: ClassVar[bool] = False
    #: Whether the callback leaves batch and loss as they are.
    only_looks: ClassVar[bool] = False
    #: Whether the callback works when the module steps its optimizers by hand.
    manual_optimization: ClassVar[bool] = False

    def __init__(self, *, logits_from: str | None = None, batch: BatchAdapter | None = None) -> None:
        super().__init__()
        self.logits_from = logits_from
        self.batch = batch if batch is not None else BatchAdapter()
        self._pipeline: StepPipeline | None = None

    def around_step(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        """Run the wrapped step; ``run(batch)`` runs everything further inside.

        Args:
            context: the step; see :class:`~lightning_robust.training.StepContext`.
            batch: the batch as the stages further out made it.
            run: runs the rest on a batch and returns what the module's ``training_step`` returned.

        Returns:
            What the step returns: a loss, a mapping with ``"loss"``, or ``None`` (skipped).
        """
        raise NotImplementedError

    def passes(self, inner: float) -> float:
        """Forward+backward passes of a training step, given those of everything that this callback wraps.

        Args:
            inner: passes of what is wrapped; a plain step has 1.
        """
        return inner

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what cannot work, before anything runs; called in ``setup`` of a fit.

        Args:
            trainer: the Trainer.
            pl_module: the LightningModule.

        Raises:
            ValueError: the module steps its optimizers by hand and this callback needs to see the loss.
        """
        self.check_optimization(pl_module)

    def check_optimization(self, pl_module: L.LightningModule) -> None:
        """Refuse manual optimization where the callback has to change the loss; a module may choose it in ``setup``.

        Args:
            pl_module: the LightningModule.

        Raises:
            ValueError: the module steps its optimizers by hand.
        """
        if not self.manual_optimization and not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(self).__name__} needs automatic optimization, but {type(pl_module).__name__} steps its "
                "optimizers by hand, so no returned loss can be changed; use automatic optimization, or call the "
                "method's plain-PyTorch function in your own training_step."
            )

    def on_pipeline_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called once per fit when the module is on its device and the optimizers exist.

        Args:
            trainer: the Trainer.
            pl_module: the LightningModule.
        """

    def on_pipeline_end(self) -> None:
        """Called when the step pipeline is removed, also after an exception."""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._remove_pipeline()  # of a fit whose end another callback's error hid from us
        if stage == "fit":
            if StepPipeline.leader(trainer) is self:
                self._pipeline = StepPipeline(trainer, pl_module)
            self.check(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._pipeline is not None:
            self._pipeline.install()

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._remove_pipeline()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._remove_pipeline()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._remove_pipeline()

    def __getstate__(self) -> dict[str, Any]:
        # a copy, or a callback sent to another process, builds a pipeline of its own
        return {**vars(self), "_pipeline": None}

    def _remove_pipeline(self) -> None:
        if self._pipeline is not None:
            self._pipeline.remove()
            self._pipeline = None
