# SPDX-License-Identifier: Apache-2.0
"""Showing the logits of every validation batch to a loss that learns from them."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.callbacks._evaluation_tap import EvaluationTap
from lightning_robust.callbacks._processes import total
from lightning_robust.training import BatchAdapter, StepCallback

__all__ = ["LearnsFromValidation", "ValidationWatch"]


class _Observer(Protocol):
    def observe(self, logits: Tensor, target: Tensor) -> None: ...
    def validation_ends(self, total: Callable[[Tensor], Tensor]) -> None: ...


class ValidationWatch:
    """Feeds a criterion or penalty with the validation batches of a fit; nothing happens in the sanity check.

    Args:
        observer: what learns from validation.
        logits_from: dotted name of the sub-module whose output is the logits; found by itself when ``None``.
        batch: how to read targets from a batch.
    """

    def __init__(self, observer: _Observer, logits_from: str | None, batch: BatchAdapter) -> None:
        self._observer = observer
        self._logits_from = logits_from
        self._batch = batch
        self._tap: EvaluationTap | None = None

    def refuse_without_validation(self, trainer: L.Trainer) -> None:
        """Refuse a run without validation batches; in ``on_train_start``.

        Args:
            trainer: the Trainer.
        """
        if not sum(trainer.num_val_batches):
            raise ValueError(
                f"{type(self._observer).__name__} adapts itself on validation data, but this run has none; give the "
                "Trainer a validation loader (and let limit_val_batches be above 0)."
            )

    def start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A validation epoch begins.

        Args:
            trainer: the Trainer.
            pl_module: the module that is validated.
        """
        self.stop()
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._tap = EvaluationTap(pl_module, "validation_step", self._logits_from)
            self._tap.attach()

    def look(self, batch: Any) -> None:
        """A validation batch is done.

        Args:
            batch: the batch.
        """
        if self._tap is None:
            return
        # what is remembered must outlive Lightning's inference mode
        with torch.inference_mode(False), torch.no_grad():
            logits = self._tap.take().clone()
            self._observer.observe(logits, self._batch.target_of(batch).to(logits.device).clone())

    def finish(self, trainer: L.Trainer) -> None:
        """All validation batches are done; in all processes.

        Args:
            trainer: the Trainer.
        """
        if self._tap is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._observer.validation_ends(partial(total, trainer))
            self.stop()

    def stop(self) -> None:
        """Let go of the module; doing so twice is harmless."""
        if self._tap is not None:
            self._tap.detach()
            self._tap = None


class LearnsFromValidation(StepCallback):
    """A step callback whose criterion or penalty may learn from validation batches; :meth:`learn` says that it does."""

    _watch: ValidationWatch | None = None

    def learn(self, observer: _Observer | None) -> None:
        """Show the validation batches of this fit to ``observer``, or to nobody; in ``check``.

        Args:
            observer: what learns.
        """
        self._watch = None if observer is None else ValidationWatch(observer, self.logits_from, self.batch)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._watch is not None:
            self._watch.refuse_without_validation(trainer)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._watch is not None:
            self._watch.start(trainer, pl_module)

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
        if self._watch is not None:
            self._watch.look(batch)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._watch is not None:
            self._watch.finish(trainer)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._let_go()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._let_go()

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_watch": None}

    def _let_go(self) -> None:
        if self._watch is not None:
            self._watch.stop()
