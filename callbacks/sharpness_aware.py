# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware training of any LightningModule."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_robust.guards import RandomState
from lightning_robust.sharpness import (
    SAM,
    Gradients,
    SharpnessMethod,
    WeightBackup,
    Weights,
    inject_gradients,
    own_memory,
    parameter_hooks_off,
    sharp_direction,
)
from lightning_robust.training import RepeatableBatch, RunStep, Stage, StepCallback, StepContext, loss_of, replace_loss

__all__ = ["SharpnessAware"]


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

    Cost: ``1 + method.extra_passes`` forward + backward passes per step; one copy of the weights and one of the
    gradients in memory.

    Args:
        method: the rule, ``SAM(rho=0.05)`` when ``None``.
        replay: extra passes see the random numbers (dropout masks, draws) of the first; ``False`` draws fresh ones, as
            the common PyTorch ports do.
        sync_ascent: average every gradient over the processes, so that two processes with half batches take the step
            of one process; ``False``, as in the paper's code, keeps the ascent local.
        log_gap: log ``train/sharpness_gap``, the loss at the last evaluated point minus the clean loss.

    Raises:
        ValueError: at setup, for manual optimization, sharded strategies, a second sharpness callback, LBFGS or an
            optimizer that is itself sharpness-aware.
        RuntimeError: in the first step, for re-entrant activation checkpointing, which hides gradients.

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
        replay: bool = True,
        sync_ascent: bool = False,
        log_gap: bool = True,
    ) -> None:
        super().__init__()
        self.method = method if method is not None else SAM()
        self.replay = replay
        self.sync_ascent = sync_ascent
        self.log_gap = log_gap
        self._backup = WeightBackup()
        self._first_step = True

    @override
    def passes(self, inner: float) -> float:
        return inner * (1 + self.method.extra_passes)

    @override
    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().check(trainer, pl_module)
        # by name: the classes exist twice, in `lightning` and in `pytorch_lightning`
        strategies = {cls.__name__ for cls in type(trainer.strategy).__mro__}
        if "DeepSpeedStrategy" in strategies or not {"SingleDeviceStrategy", "DDPStrategy"} & strategies:
            name = type(trainer.strategy).__name__
            raise ValueError(
                f"SharpnessAware perturbs whole weights, which {name} does not keep on one device; "
                'use strategy="ddp" or a single device.'
            )
        if trainer.precision in ("bf16-true", "16-true"):
            rank_zero_warn(
                f"With precision={trainer.precision!r} most weights are too coarse for a perturbation of this size; "
                'prefer "bf16-mixed".'
            )

    @override
    def on_pipeline_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_step = True
        optimizer = trainer.optimizers[0]
        name = type(optimizer).__name__
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("SharpnessAware cannot be combined with LBFGS, which evaluates its closure repeatedly.")
        if hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
            raise ValueError(
                f"{name} is itself sharpness-aware; return its base optimizer from configure_optimizers and leave the "
                "perturbation to this callback."
            )

    @override
    def around_step(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        devices = context.devices if self.replay else set()
        before = RandomState.capture(devices) if self.replay else None
        repeatable = RepeatableBatch(batch)
        output = run(repeatable.fresh())
        loss = loss_of(output)
        if loss is None or not loss.requires_grad:
            return output
        if self._first_step:
            _refuse_hidden_gradients(loss)
            self._first_step = False
        after = RandomState.capture(devices) if self.replay else None
        weights = Weights.of(context.trainer.optimizers[0], context.pl_module)
        gradients, bystanders = self._clean_gradients(context, loss, weights)
        weights = weights.subset([id(tensor) in gradients for tensor in weights.tensors])
        gap = loss.detach()

        def gradient_here() -> Gradients:
            nonlocal gap
            # autocast keeps low-precision copies of weights; they belong to the values before the move
            torch.clear_autocast_cache()
            with context.repeated_pass(before):
                moved = loss_of(run(repeatable.fresh()))
                if moved is None:
                    raise RuntimeError(
                        "training_step returned a loss at first and None when evaluated again on the same batch; a "
                        "sharpness-aware step needs the loss of the same batch at other weights."
                    )
                gap = moved.detach() - loss.detach()
                found = self._gradients(context, moved, weights.tensors)
                return [gradient for gradient in found if gradient is not None]

        try:
            direction = sharp_direction(self.method, weights, list(gradients.values()), gradient_here, self._backup)
        finally:
            torch.clear_autocast_cache()
            if after is not None:
                after.restore()
        if self.log_gap:
            context.log("train/sharpness_gap", gap)
        injected = inject_gradients(
            loss, [*weights.tensors, *(tensor for tensor, _ in bystanders)], [*direction, *(g for _, g in bystanders)]
        )
        return replace_loss(output, injected)

    def _clean_gradients(
        self, context: StepContext, loss: Tensor, weights: Weights
    ) -> tuple[dict[int, Tensor], list[tuple[Tensor, Tensor]]]:
        """Gradients of the optimized weights by identity, and of trainable parameters that no optimizer holds.

        The latter are neither perturbed nor stepped, but DDP waits for their gradients.
        """
        held = {id(tensor) for tensor in weights.tensors}
        others = [p for p in context.pl_module.parameters() if p.requires_grad and id(p) not in held]
        tensors = [*weights.tensors, *others]
        found = self._gradients(context, loss, tensors, unused=True)
        pairs = [(tensor, gradient) for tensor, gradient in zip(tensors, found, strict=True) if gradient is not None]
        ours = {id(tensor): gradient for tensor, gradient in pairs if id(tensor) in held}
        if _scaler(context.trainer) is not None and ours:
            # An overflow leaves no usable ascent: no perturbation, and the overflow of the next pass is the scaler's.
            overflow = ~torch.stack([gradient.isfinite().all() for gradient in ours.values()]).all()
            for gradient in ours.values():
                gradient.masked_fill_(overflow, 0.0)
        return ours, [(tensor, gradient) for tensor, gradient in pairs if id(tensor) not in held]

    def _gradients(
        self, context: StepContext, loss: Tensor, tensors: list[Tensor], unused: bool = False
    ) -> list[Tensor | None]:
        """Gradients outside autocast, of the scaled loss where the run scales losses, and back in its units.

        With ``unused``, parameters that took no part have none; else they have zeros.
        """
        scaler = _scaler(context.trainer)
        scaled = loss if scaler is None else scaler.scale(loss)
        synced = self.sync_ascent and context.trainer.world_size > 1
        with torch.autocast(loss.device.type, enabled=False), parameter_hooks_off(tensors):
            # processes may differ in what took part, and must reduce the same tensors
            found = own_memory(
                torch.autograd.grad(scaled, tensors, allow_unused=True, materialize_grads=synced or not unused)
            )
        present = [gradient for gradient in found if gradient is not None]
        if scaler is not None:
            torch._foreach_mul_(present, 1.0 / scaler.scale(torch.ones_like(loss, dtype=torch.float32)))
        if synced:
            for gradient in present:
                torch.distributed.all_reduce(gradient)
            torch._foreach_div_(present, context.trainer.world_size)
        return found


def _scaler(trainer: L.Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _refuse_hidden_gradients(loss: Tensor) -> None:
    pending: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().startswith("CheckpointFunctionBackward"):
            raise RuntimeError(
                "The step uses re-entrant activation checkpointing, which hides gradients from sharpness-aware "
                "training; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        pending.extend(following for following, _ in node.next_functions)
