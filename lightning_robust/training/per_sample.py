# SPDX-License-Identifier: Apache-2.0
"""The base of step callbacks that remember something about every sample of the training set."""

from typing import Any

import lightning as L
from torch import Tensor
from typing_extensions import override

from lightning_robust.training.batches import BatchAdapter
from lightning_robust.training.callback import StepCallback
from lightning_robust.training.context import StepContext
from lightning_robust.training.indices import SampleIndices

__all__ = ["PerSampleCallback"]


class PerSampleCallback(StepCallback):
    """A step callback that knows which samples of the training set the running batch consists of.

    A subclass asks :meth:`indices_of` in its ``around_step`` and prepares its memory in :meth:`on_samples_known`.

    Args:
        index_key: key or position of the indices in a batch, for datasets that return them; read off the loader's
            sampler when ``None``. See :class:`~lightning_robust.training.SampleIndices`.
        num_samples: number of training samples; that of the training loader's dataset when ``None``.
        logits_from: dotted name of the sub-module whose output is the logits; found by itself when ``None``.
        batch: how to read inputs and targets from a batch; the usual forms are understood when ``None``.

    Example:
        >>> from lightning_robust.training import Stage
        >>> class Seen(PerSampleCallback):
        ...     stage = Stage.LOSS
        ...     needs_logits = True
        ...     def around_step(self, context, batch, run):
        ...         output = run(batch)
        ...         print(self.indices_of(context, len(context.logits(self))))
        ...         return output
    """

    def __init__(
        self,
        *,
        index_key: int | str | None = None,
        num_samples: int | None = None,
        logits_from: str | None = None,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__(logits_from=logits_from, batch=batch)
        self._indices = SampleIndices(index_key=index_key, num_samples=num_samples)

    @property
    def follows_samples(self) -> bool:
        """Whether the samples of batches have to be known; a subclass may need them for some of its settings only."""
        return True

    def on_samples_known(self, trainer: L.Trainer, pl_module: L.LightningModule, num_samples: int) -> None:
        """Called once per fit before the first step, after a checkpoint was restored.

        Args:
            trainer: the Trainer.
            pl_module: the LightningModule.
            num_samples: number of training samples.
        """

    def indices_of(self, context: StepContext, count: int) -> Tensor:
        """Indices ``[count]`` of the samples of the running batch.

        Args:
            context: the step.
            count: number of samples that the step computed something for. Only a pass that does not count may have
                fewer than the batch: a sharpness-aware ascent on its first samples.
        """
        return self._indices.current(context.batch_as_loaded, count=count, partial=not context.counted)

    @override
    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().check(trainer, pl_module)
        if self.follows_samples:
            self._indices.install(trainer)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.follows_samples:
            self.on_samples_known(trainer, pl_module, self._indices.start())

    @override
    def on_pipeline_end(self) -> None:
        self._indices.remove()

    # A fit that fails before its first hook has no pipeline yet.
    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._indices.remove()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._indices.remove()

    @override
    def __getstate__(self) -> dict[str, Any]:
        indices = self._indices
        fresh = SampleIndices(index_key=indices.index_key, num_samples=indices.num_samples)
        return {**super().__getstate__(), "_indices": fresh}
