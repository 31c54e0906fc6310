# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware training for free: predictions are held near those of some epochs ago."""

from typing import Any, Literal

import lightning as L
from torch import Tensor
from typing_extensions import override

from lightning_robust.callbacks._epoch_window import EpochWindow
from lightning_robust.checks import check_choice, check_integer, check_non_negative, check_positive
from lightning_robust.sharpness import LogitHistory, trajectory_loss
from lightning_robust.training import (
    PerSampleCallback,
    RunStep,
    Stage,
    StepContext,
    loss_of,
    replace_loss,
)

__all__ = ["SAF"]


class SAF(PerSampleCallback):
    r"""Adds the distance of the predictions from those of the same samples some epochs ago to the loss of any module.

    .. math:: L + \lambda\,T^2\,\frac1B \sum_i
        \mathrm{KL}\big(\mathrm{softmax}(z_i^{(e-E)}/T)\,\|\,\mathrm{softmax}(z_i/T)\big)

    Runs inside the training step, on the logits that the step itself computed, in the epochs
    ``start_epoch < e < end_epoch``. Training that falls into a sharp minimum changes its predictions quickly; the term
    holds against it. The logits of every sample are remembered in each epoch, as the network gave them for the
    augmented images of that epoch, and never get a gradient. Which samples a batch holds is read off the loader's
    sampler, so dataset and step stay as they are. The term without ``weight`` is logged as ``train/saf``.

    All processes of a DDP run share what they remember, once per epoch. Checkpoints hold the memory, so a run continues
    exactly. Of a sharpness-aware step's passes, the one that counts is remembered and all have the term.

    Cost: no pass; ``samples * (lag + 1) * (classes * 4 + 8)`` bytes, also in checkpoints: 82 MB for CIFAR-100, 20 GB
    for ImageNet. ``dtype="bfloat16"`` halves it.

    Args:
        weight: Coefficient of the term; 0.3 as in the authors' description, 0.16 in their script.
        temperature: ``T``, by which both distributions are softened.
        start_epoch: The last epoch without the term, counted from 0.
        end_epoch: The first epoch without it again; ``None`` for no end.
        lag: How many epochs back the reference lies, the paper's ``E``.
        unseen: What a sample without reference does: ``"skip"`` adds nothing, ``"uniform"`` draws it to the uniform
            distribution, as the authors' code does.
        dtype: What logits are stored in: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        storage: ``"device"`` stores them beside the model, ``"cpu"`` in main memory, for one synchronisation per step.
        index_key: Key or position of the indices in a batch, for datasets that return them; read off the loader's
            sampler when ``None``.
        num_samples: Number of training samples; that of the training loader's dataset when ``None``.
        logits_from: Dotted name of the sub-module whose output is the logits; found by itself when ``None``.

    Raises:
        TypeError: When loaders are set up, if the samples of a batch cannot be known:
            :class:`~lightning_robust.training.SampleIndices` lists the reasons.
        ValueError: At setup, for manual optimization; before the first step, for a checkpoint of another number of
            samples or another ``lag``, and for several training loaders; in a step, for logits that are not ``[B, C]``.

    References:
        Du et al., Sharpness-Aware Training for Free, NeurIPS 2022, arXiv 2205.14083. In the authors' code every process
        has a memory of its own, in which shuffled samples are mostly unknown, and unknown samples are compared with the
        uniform distribution.

    Example:
        >>> import lightning as L
        >>> from lightning_robust.callbacks import SAF
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[SAF()], logger=False, enable_checkpointing=False)
    """

    stage = Stage.LOSS
    needs_logits = True

    def __init__(
        self,
        *,
        weight: float = 0.3,
        temperature: float = 5.0,
        start_epoch: int = 5,
        end_epoch: int | None = None,
        lag: int = 3,
        unseen: Literal["skip", "uniform"] = "skip",
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        storage: Literal["device", "cpu"] = "device",
        index_key: int | str | None = None,
        num_samples: int | None = None,
        logits_from: str | None = None,
    ) -> None:
        super().__init__(index_key=index_key, num_samples=num_samples, logits_from=logits_from)
        check_non_negative("weight", weight)
        check_positive("temperature", temperature)
        check_integer("lag", lag, 1)
        check_choice("unseen", unseen, ("skip", "uniform"))
        check_choice("dtype", dtype, ("float32", "float16", "bfloat16"))
        check_choice("storage", storage, ("device", "cpu"))
        self.weight = weight
        self.temperature = temperature
        self.window = EpochWindow(start_epoch, end_epoch)
        self.lag = lag
        self.unseen = unseen
        self.dtype = dtype
        self.storage = storage
        self.history: LogitHistory | None = None  # the first step tells the number of classes
        self._samples = 0
        self._restored: dict[str, Any] = {}
        self._merged_at = -1

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._restored if self.history is None else self.history.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict)

    @override
    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().check(trainer, pl_module)
        self.history = None
        self._restored = {}
        self._merged_at = -1
        self.window.warn_if_missed(trainer, "SAF", first=self.lag if self.unseen == "skip" else 0)

    @override
    def on_samples_known(self, trainer: L.Trainer, pl_module: L.LightningModule, num_samples: int) -> None:
        self._samples = num_samples
        if self._restored:
            state, self._restored = self._restored, {}
            self.history = self._new_history(state["logits"].shape[2], trainer)
            self.history.load_state_dict(state)

    @override
    def around_step(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        output = run(batch)
        loss = loss_of(output)
        if loss is None:
            return output
        logits = context.logits(self)
        if logits.ndim != 2:
            raise ValueError(f"SAF needs one row of logits [B, C] per sample but they have {list(logits.shape)}.")
        if self.history is None:
            self.history = self._new_history(logits.shape[1], context.trainer)
        indices = self.indices_of(context, len(logits))
        epoch = context.trainer.current_epoch
        if context.counted:
            self.history.record(indices, logits, epoch=epoch)
        if epoch not in self.window:
            return output
        term = self._term(self.history, logits, indices, epoch)
        context.log("train/saf", term, batch_size=len(logits))
        return replace_loss(output, loss + self.weight * term)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._merge(trainer)

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # the first process writes the file, for all of them
        self._merge(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if stage == "fit" and self.history is not None:
            self.history.to("cpu")  # the Trainer takes the module off the device as well

    def _new_history(self, classes: int, trainer: L.Trainer) -> LogitHistory:
        device = "cpu" if self.storage == "cpu" else trainer.strategy.root_device
        return LogitHistory(self._samples, classes, lag=self.lag, dtype=self.dtype, device=device)

    def _term(self, history: LogitHistory, logits: Tensor, indices: Tensor, epoch: int) -> Tensor:
        reference, known = history.look_up(indices, epoch=epoch)
        reference = reference.to(logits.device, non_blocking=True)
        known = known.to(logits.device, non_blocking=True)
        return trajectory_loss(logits, reference, self.temperature, known=known if self.unseen == "skip" else None)

    def _merge(self, trainer: L.Trainer) -> None:
        now = trainer.fit_loop.total_batch_idx
        if self.history is not None and trainer.world_size > 1 and now != self._merged_at:
            self.history.merge(epoch=trainer.current_epoch, device=trainer.strategy.root_device)
            self._merged_at = now
