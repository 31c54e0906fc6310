# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware training of any LightningModule."""

import re
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_robust.callbacks._strategies import is_strategy, keeps_whole_weights
from lightning_robust.callbacks._trainer_step import TrainerStep
from lightning_robust.checks import check_in_range, check_integer
from lightning_robust.sharpness import (
    SAM,
    ParameterSelection,
    PendingMoves,
    SharpnessMethod,
    WeightBackup,
    average_over_processes,
    inject_gradients,
)
from lightning_robust.training import BatchAdapter, RunStep, Stage, StepCallback, StepContext, replace_loss

__all__ = ["SharpnessAware"]

_MEMORY = "lightning_robust.SharpnessAware"  # entry of a checkpoint


class SharpnessAware(StepCallback):
    """Lets the optimizer follow a sharpness-aware direction, without touching the LightningModule.

    Runs around the training step: the step is evaluated at the unperturbed weights (this pass logs and counts), then
    at the points the method asks for, with the same random numbers; weights and buffers are put back bit for bit
    before the step returns. The returned loss has the value of the first pass, and its backward delivers the finished
    direction. Accumulation, clipping, loss scaling, DDP, hooks and checkpoints are therefore ordinary Lightning.

    What a step does besides computing its loss happens once per pass: Python counters, lists it appends to, calls of
    ``logger.experiment``, NumPy generators of its own, a moving average that it updates itself. Do such things in
    ``on_train_batch_end``. The learning-rate and batch-size finders of Lightning run plain steps.

    The ascent belongs to one micro-batch on one device (m-sharpness): the result is the mean over devices and
    accumulated batches of each one's sharpness-aware gradient, so it changes with their number.

    Most methods count the pass at the unperturbed weights. Those that are published otherwise (AWP, RWP), and any
    method with an ``ascent_fraction`` below 1, count the pass at the perturbed weights: it logs, moves BatchNorm
    statistics and gives the value of the loss.

    What a method remembers is saved in checkpoints and resumed. Processes exchange it, so that all remember the same.

    Cost: ``1 + method.extra_passes`` forward + backward passes per step; one copy of the weights and one of the
    gradients in memory.

    Args:
        method: the rule, ``SAM(rho=0.05)`` when ``None``.
        perturb: which weights are perturbed; the method's own choice when ``None``, which is all of them for most.
        every_n_steps: only every n-th optimizer step is sharpness-aware, the others are plain.
        start_epoch: epochs before this one are plain.
        ascent_fraction: part of each batch, its first samples, that leads the ascent; below 1 the ascent is cheaper and
            the counted pass is the one at the perturbed weights, the only one that sees the whole batch.
        replay: extra passes see the random numbers (dropout masks, draws) of the first; ``False`` draws fresh ones, as
            the common PyTorch ports do.
        sync_ascent: average every gradient over the processes, so that two processes with half batches take the step
            of one process; ``False``, as in the paper's code, keeps the ascent local.
        log_gap: log ``train/sharpness_gap``, the loss at the last evaluated point minus the clean loss, where both are
            known.
        logits_from: dotted name of the sub-module whose output is the logits, for methods that read the losses of
            single samples; found by itself when ``None``.
        batch: how to read samples and targets from a batch; the usual forms are understood when ``None``.

    Raises:
        ValueError: at setup, for manual optimization, sharded strategies, a second sharpness callback, an optimizer
            that evaluates its closure repeatedly (LBFGS), needs second derivatives (AdaHessian) or is itself
            sharpness-aware, and for an ``ascent_fraction`` that the method or an objective cannot have.
        RuntimeError: in the first step, for re-entrant activation checkpointing under DDP with ``static_graph`` or
            ``find_unused_parameters``; in its backward, for ``create_graph=True``.

    References:
        See the method, for example :class:`~lightning_robust.sharpness.SAM`.

    Example:
        >>> import lightning as L
        >>> from lightning_robust.callbacks import SharpnessAware
        >>> from lightning_robust.sharpness import SAM
        >>> trainer = L.Trainer(callbacks=[SharpnessAware(SAM(rho=0.05))], logger=False, enable_checkpointing=False)
    """

    stage = Stage.WEIGHTS
    exclusive = True

    def __init__(
        self,
        method: SharpnessMethod | None = None,
        *,
        perturb: ParameterSelection | None = None,
        every_n_steps: int = 1,
        start_epoch: int = 0,
        ascent_fraction: float = 1.0,
        replay: bool = True,
        sync_ascent: bool = False,
        log_gap: bool = True,
        logits_from: str | None = None,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__(logits_from=logits_from, batch=batch)
        check_integer("every_n_steps", every_n_steps, 1)
        check_integer("start_epoch", start_epoch, 0)
        check_in_range("ascent_fraction", ascent_fraction, 0.0, 1.0)
        self.method = method if method is not None else SAM()
        if ascent_fraction < 1 and not self.method.needs_ascent:
            raise ValueError(
                f"{type(self.method).__name__} spends no pass on an ascent, so there is none to take of a part of the "
                f"batch; leave ascent_fraction at 1 instead of {ascent_fraction}."
            )
        if ascent_fraction < 1 and not self.method.ascent_only:
            raise ValueError(
                f"{type(self.method).__name__} uses the clean gradient for more than the ascent, so it must be that of "
                f"the whole batch; leave ascent_fraction at 1 instead of {ascent_fraction}."
            )
        if ascent_fraction == 0:
            raise ValueError("Expected `ascent_fraction` to be > 0 but got 0; no sample would lead the ascent.")
        self.perturb = perturb
        self.every_n_steps = every_n_steps
        self.start_epoch = start_epoch
        self.ascent_fraction = ascent_fraction
        self.replay = replay
        self.sync_ascent = sync_ascent
        self.log_gap = log_gap
        self.needs_logits = self.method.needs_sample_losses
        self._backup = WeightBackup()
        self._moves: PendingMoves | None = None
        self._in_shards = False
        self._hidden: bool | None = None  # whether the step hides gradients; found out in the first one

    @override
    def passes(self, inner: float) -> float:
        extra = self.method.extra_passes
        return inner * (1 + extra * self.ascent_fraction / self.every_n_steps)

    @override
    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().check(trainer, pl_module)
        self.method.reset()  # a resumed fit gets its memory back right after setup
        self._in_shards = is_strategy(trainer, "ModelParallelStrategy")
        if self._in_shards:
            self._check_shards()
        elif not keeps_whole_weights(trainer):
            name = type(trainer.strategy).__name__
            raise ValueError(
                f"SharpnessAware perturbs whole weights, which {name} does not keep on one device; "
                'use strategy="ddp", a single device, or ModelParallelStrategy with fully_shard.'
            )
        rivals = [cb for cb in trainer.callbacks if getattr(cb, "stage", None) is Stage.OBJECTIVE]  # type: ignore[attr-defined]
        if rivals and self.ascent_fraction < 1:
            raise ValueError(
                f"{type(rivals[0]).__name__} prepares whole batches, so no part of one can lead the ascent; leave "
                "ascent_fraction at 1, or use every_n_steps to save passes."
            )
        if trainer.precision in ("bf16-true", "16-true"):
            rank_zero_warn(
                f"With precision={trainer.precision!r} most weights are too coarse for a perturbation of this size; "
                'prefer "bf16-mixed".'
            )

    def _check_shards(self) -> None:
        if not self.method.sharded:
            raise ValueError(
                f"{type(self.method).__name__} cannot work on parameters in shards; use SAM, ASAM, GSAM or GAM, or "
                'strategy="ddp".'
            )
        if not self.sync_ascent:
            raise ValueError(
                "With ModelParallelStrategy there are only gradients of all processes together, so the ascent is "
                'theirs; say so by sync_ascent=True, or use strategy="ddp" for one ascent per process.'
            )

    @override
    def on_pipeline_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._hidden = None
        optimizer = trainer.optimizers[0]
        refuse_optimizer(optimizer)
        self.method.check_optimizer(optimizer)
        if self.method.moves_after_step:
            self._moves = PendingMoves(optimizer, average_over_processes)

    @override
    def on_pipeline_end(self) -> None:
        if self._moves is not None:
            self._moves.close()
            self._moves = None

    @override
    def around_step(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        trainer = context.trainer
        if trainer.current_epoch < self.start_epoch or trainer.global_step % self.every_n_steps:
            return run(batch)
        step = self.make_step(context, batch, run)
        taken = step.run()
        if taken is None or step.counted_loss is None:
            return step.output
        if self.log_gap and step.clean_loss is not None and step.moved_loss is not None:
            context.log("train/sharpness_gap", step.moved_loss - step.clean_loss)
        return replace_loss(step.output, inject_gradients(step.counted_loss, *taken))

    def make_step(self, context: StepContext, batch: Any, run: RunStep) -> TrainerStep:
        """What runs the passes of one step.

        Args:
            context: the step.
            batch: the batch as the stages further out made it.
            run: runs everything further inside.
        """
        return TrainerStep(self, context, batch, run)

    # Not the callback's state_dict: with it Lightning refuses a second SharpnessAware before we can say why.
    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        memory = self.method.state_dict()
        if memory:
            checkpoint[_MEMORY] = {"method": type(self.method).__name__, "memory": memory}

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(_MEMORY)
        if saved is None or trainer.state.fn != "fit":
            return
        name = type(self.method).__name__
        if saved["method"] != name:
            raise ValueError(
                f"The checkpoint was trained with {saved['method']}, whose memory {name} cannot continue; resume with "
                "the same method, or start a new fit from the weights."
            )
        self.method.load_state_dict(saved["memory"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_moves": None}


def refuse_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise ``ValueError`` for an optimizer that cannot work with ready-made gradients.

    Args:
        optimizer: the base optimizer.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("SharpnessAware cannot be combined with LBFGS, which evaluates its closure repeatedly.")
    if re.search("hessian|sophia", name, re.IGNORECASE):
        raise ValueError(
            f"{name} needs second derivatives, which the ready-made gradients of SharpnessAware do not have; use a "
            f"first-order optimizer, or train with {name} without SharpnessAware."
        )
    ascends = any(
        hasattr(optimizer, method) for method in ("first_step", "second_step", "perturb_weights", "unperturb")
    )
    if ascends or re.search("SAM|GAM", name):
        raise ValueError(
            f"{name} is itself sharpness-aware; return its base optimizer from configure_optimizers and leave the "
            "perturbation to this callback."
        )
