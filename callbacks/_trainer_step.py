# SPDX-License-Identifier: Apache-2.0
"""One sharpness-aware step inside a Lightning Trainer."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_robust.losses import full_precision
from lightning_robust.sharpness import (
    Evaluation,
    Gradients,
    PendingMoves,
    SharpStep,
    Weights,
    average_over_processes,
    hides_gradients,
    reshard,
)
from lightning_robust.training import RepeatableBatch, RunStep, StepContext, loss_of

if TYPE_CHECKING:
    from lightning_robust.callbacks.sharpness_aware import SharpnessAware

__all__ = ["TrainerStep"]


class TrainerStep(SharpStep):
    """Passes are runs of everything further inside the training step."""

    def __init__(self, callback: "SharpnessAware", context: StepContext, batch: Any, run: RunStep) -> None:
        method = callback.method
        if callback._in_shards:
            reshard(context.pl_module)  # gathered copies stand in the place of the parameters
        weights = Weights.of(context.trainer.optimizers[0], context.pl_module)
        held = {id(tensor) for tensor in weights.tensors}
        super().__init__(
            method,
            method.selected(weights, callback.perturb),
            backup=callback._backup,
            replay=callback.replay,
            devices=context.devices if callback.replay else (),
            module=context.pl_module,
            # neither perturbed nor stepped, but DDP waits for their gradients
            bystanders=[p for p in context.pl_module.parameters() if p.requires_grad and id(p) not in held],
            ascent_apart=callback.ascent_fraction < 1,
        )
        self.output: Any = None
        self._callback = callback
        self._context = context
        self._batch = RepeatableBatch(batch)
        self._run_inside = run
        self._scaler = getattr(context.trainer.precision_plugin, "scaler", None)
        self._overflow: Tensor | None = None
        several = context.trainer.world_size > 1
        self._synced = several and callback.sync_ascent

    @property
    @override
    def optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self._context.trainer.optimizers[0]
        return optimizer

    @override
    def evaluate(self, *, counted: bool, ascent: bool) -> Evaluation | None:
        batch = self.batch_for(ascent=ascent)
        output = self._run_inside(batch)
        if counted:
            self.output = output
        loss = loss_of(output)
        if loss is None:
            return None
        return Evaluation(loss, lambda: self._sample_losses(output, batch))

    def batch_for(self, *, ascent: bool) -> Any:
        """The batch of one pass.

        Args:
            ascent: whether the pass leads the ascent.
        """
        batch = self._batch.fresh()
        if not (ascent and self.ascent_apart):
            return batch
        adapter = self._callback.batch
        return adapter.first(batch, -int(-self._callback.ascent_fraction * len(adapter.input_of(batch)) // 1))

    @override
    def uncounted(self, *, restore_buffers: bool) -> AbstractContextManager[None]:
        return self._context.uncounted_pass(restore_buffers=restore_buffers)

    @override
    def gradients(self, loss: Tensor, tensors: list[Tensor]) -> list[Tensor | None]:
        """Gradients outside autocast, of the scaled loss where the run scales losses, and back in its units."""
        if self._callback._hidden is None:
            self._callback._hidden = not self.sharded and self._hides(loss)
        scaled = loss if self._scaler is None else self._scaler.scale(loss)
        with torch.autocast(loss.device.type, enabled=False):
            found = self.take(scaled, tensors, hidden=self._callback._hidden)
        if self._synced:  # processes may differ in what took part, and must reduce the same tensors
            inputs = {id(tensor) for tensor in self.inputs}
            found = [
                torch.zeros_like(tensor) if gradient is None and id(tensor) not in inputs else gradient
                for tensor, gradient in zip(tensors, found, strict=True)
            ]
        present = [gradient for gradient in found if gradient is not None]
        if self._scaler is not None and present:
            torch._foreach_mul_(present, 1.0 / self._scaler.scale(torch.ones_like(loss, dtype=torch.float32)))
        if self._synced:
            average_over_processes(present)
        return found

    @override
    def ready_for_ascent(self, gradients: Gradients) -> Gradients:
        if self._scaler is not None:
            # An overflow leaves no usable ascent: no perturbation, and the step is handed to the scaler to be skipped.
            overflow = ~torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
            for gradient in gradients:
                gradient.masked_fill_(overflow, 0.0)
            self._overflow = overflow if self._overflow is None else self._overflow | overflow
        return gradients

    @override
    def run(self) -> tuple[list[Tensor], Gradients] | None:
        taken = super().run()
        if taken is not None and self._overflow is not None:
            taken[1][0].masked_fill_(self._overflow, torch.nan)
        return taken

    @override
    def clock(self) -> tuple[int, int]:
        trainer = self._context.trainer
        total = trainer.estimated_stepping_batches
        return trainer.global_step, -1 if total == float("inf") else int(total)

    @override
    def average(self, tensors: list[Tensor]) -> None:
        average_over_processes(tensors)

    @override
    def moves(self) -> PendingMoves:
        moves = self._callback._moves
        assert moves is not None, "made at the start for every method that says moves_after_step"
        moves.begin(self._context.trainer.global_step, 1.0 / self._context.trainer.accumulate_grad_batches)
        return moves

    def _sample_losses(self, output: Any, batch: Any) -> Tensor:
        if isinstance(output, Mapping) and "sample_losses" in output:
            losses: Tensor | None = output["sample_losses"]
            if losses is None:
                raise ValueError(
                    f"{type(self.method).__name__} reads the losses of single samples, which this objective does not "
                    "know; leave its criterion at the default, or use a method that reads the whole loss, AWP say."
                )
            return losses
        logits = self._context.logits(self._callback)
        return F.cross_entropy(full_precision(logits), self._callback.batch.target_of(batch), reduction="none")

    def _hides(self, loss: Tensor) -> bool:
        hidden = hides_gradients(loss)
        wrapper = self._context.trainer.model
        if hidden and isinstance(wrapper, torch.nn.parallel.DistributedDataParallel):
            for option in ("static_graph", "find_unused_parameters"):
                if getattr(wrapper, option, False):
                    raise RuntimeError(
                        f"Re-entrant activation checkpointing cannot be combined with DDP's {option}=True in "
                        "sharpness-aware training; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
                    )
        return hidden
