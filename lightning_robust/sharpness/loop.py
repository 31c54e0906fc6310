# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware gradients in a plain PyTorch loop, or in manual optimization."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_robust.checks import check_integer
from lightning_robust.guards import buffers_restored
from lightning_robust.sharpness.backup import WeightBackup
from lightning_robust.sharpness.gradients import hides_gradients
from lightning_robust.sharpness.injection import inject_gradients
from lightning_robust.sharpness.method import Evaluation, SharpnessMethod
from lightning_robust.sharpness.moves import PendingMoves
from lightning_robust.sharpness.probe import unknown_step
from lightning_robust.sharpness.selection import ParameterSelection
from lightning_robust.sharpness.sharded import is_sharded, reshard
from lightning_robust.sharpness.step import SharpStep
from lightning_robust.sharpness.weights import Weights

__all__ = ["sharp_backward"]


def sharp_backward(
    closure: Callable[[], Tensor],
    method: SharpnessMethod,
    parameters: torch.optim.Optimizer | nn.Module | Iterable[Tensor],
    *,
    module: nn.Module | None = None,
    perturb: ParameterSelection | None = None,
    ascent_closure: Callable[[], Tensor] | None = None,
    ascent_inputs: Sequence[Tensor] = (),
    replay: bool = True,
    step: int | None = None,
    total_steps: int = -1,
    accumulate: int = 1,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> Tensor:
    """Take the place of ``closure().backward()``: add the method's direction to ``.grad``.

    The weights are back at their values when this returns, also after an exception, so the optimizer steps as usual.
    Works with any optimizer, with gradient accumulation, under ``DistributedDataParallel`` (each process ascends by
    itself and the directions are averaged) and in Lightning's manual optimization (``backward=self.manual_backward``).

    Args:
        closure: runs the forward pass and returns the loss, or the losses ``[B]`` of the samples, whose mean counts;
            called once per pass of the method.
        method: for example ``SAM(rho=0.05)``.
        parameters: an optimizer (its group options such as ``rho`` count), a module, or parameters.
        module: its buffers (BatchNorm statistics) are moved by one pass only; give it whenever it has any. A module
            given as ``parameters`` is used by itself.
        perturb: which weights are perturbed; the method's own choice when ``None``, which is all of them for most.
        ascent_closure: the loss that leads the ascent where it is another one, of a part of the batch for example. The
            one pass of ``closure`` at the perturbed weights is then the one that moves buffers.
        ascent_inputs: leaf tensors, images say, whose ``.grad`` the backward of ``ascent_closure`` sets as well; known
            to ``closure`` when it runs.
        replay: the extra passes see the random numbers (dropout masks) of the first one; ``False`` draws fresh ones.
        step: optimizer steps taken so far, for methods with an interval and for schedules.
        total_steps: optimizer steps of the run, for schedules that need its length.
        accumulate: number of calls whose directions add up before the optimizer steps; each counts with one over it, so
            ``closure`` returns the whole loss.
        backward: delivers a loss whose gradient is the direction; ``self.manual_backward`` in manual optimization.

    Returns:
        The loss of the pass that counts, at the unperturbed weights for most methods; detached.

    Raises:
        ValueError: no parameter is trainable, the loss depends on none of them, or the method needs what was not given.

    Example:
        >>> from lightning_robust.sharpness import SAM, sharp_backward
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> loss = sharp_backward(lambda: nn.functional.cross_entropy(model(x), y), SAM(), optimizer, module=model)
        >>> optimizer.step()
    """
    check_integer("accumulate", accumulate, 1)
    if ascent_closure is not None and not method.ascent_only:
        raise ValueError(
            f"{type(method).__name__} uses the gradient at the unperturbed weights for more than the ascent, so it "
            "must be that of the training loss; leave out ascent_closure."
        )
    if ascent_inputs and ascent_closure is None:
        raise ValueError("The gradient of ascent_inputs is that of ascent_closure; give it, too.")
    if module is None and isinstance(parameters, nn.Module):
        module = parameters
    if module is not None:
        reshard(module)  # gathered copies stand in the place of the parameters
    weights = Weights.of(parameters, module)
    if not len(weights):
        raise ValueError("No trainable parameter was given, so there is nothing to perturb.")
    optimizer = parameters if isinstance(parameters, torch.optim.Optimizer) else None
    method.check_optimizer(optimizer)
    plain = _PlainStep(
        method,
        method.selected(weights, perturb),
        closures=(closure, ascent_closure or closure),
        optimizer=optimizer,
        steps=None if step is None else (step, total_steps),
        share=1.0 / accumulate,
        backup=_backup_of(parameters),
        replay=replay,
        devices={tensor.device for tensor in weights.tensors},
        module=module,
        inputs=ascent_inputs,
        ascent_apart=ascent_closure is not None,
    )
    taken = plain.run()
    loss = plain.counted_loss
    if taken is None or loss is None:
        raise ValueError("The loss does not require gradients; return it from closure with its graph.")
    injected = inject_gradients(loss, *taken)
    del taken  # a second reference would make backward copy every gradient
    backward(injected / accumulate if accumulate > 1 else injected)
    return loss


class _PlainStep(SharpStep):
    """Passes are calls of a closure."""

    def __init__(
        self,
        method: SharpnessMethod,
        weights: Weights,
        *,
        closures: tuple[Callable[[], Tensor], Callable[[], Tensor]],
        optimizer: torch.optim.Optimizer | None,
        steps: tuple[int, int] | None,
        share: float,
        **options: Any,
    ) -> None:
        super().__init__(method, weights, **options)
        self._closures = closures  # of the training loss, and of the one that leads the ascent
        self._optimizer = optimizer
        self._steps = steps
        self._share = share
        self._hidden: bool | None = None  # whether the loss hides gradients; found out in the first pass

    @property
    @override
    def optimizer(self) -> torch.optim.Optimizer | None:
        return self._optimizer

    @override
    def evaluate(self, *, counted: bool, ascent: bool) -> Evaluation:
        losses = self._closures[ascent]()
        return Evaluation(losses.mean() if losses.ndim else losses, lambda: _per_sample(losses))

    @override
    def uncounted(self, *, restore_buffers: bool) -> AbstractContextManager[None]:
        return buffers_restored(self.module) if restore_buffers and self.module is not None else nullcontext()

    @override
    def gradients(self, loss: Tensor, tensors: list[Tensor]) -> list[Tensor | None]:
        if self._hidden is None:
            self._hidden = not self.sharded and hides_gradients(loss)
        return self.take(loss, tensors, hidden=self._hidden)

    @override
    def clock(self) -> tuple[int, int]:
        if self._steps is None:
            raise unknown_step(type(self.method).__name__)
        return self._steps

    @override
    def average(self, tensors: list[Tensor]) -> None:
        average_over_processes(tensors)

    @override
    def moves(self) -> PendingMoves:
        assert self._optimizer is not None, "the probe asks only if there is an optimizer"
        if self._optimizer not in _MOVES:
            _MOVES[self._optimizer] = PendingMoves(self._optimizer, average_over_processes)
        moves = _MOVES[self._optimizer]
        moves.share = self._share
        return moves


# Memory of the size of the model is kept between calls: getting it from the system in every step costs some percent.
_BACKUPS: WeakKeyDictionary[torch.optim.Optimizer | nn.Module, WeightBackup] = WeakKeyDictionary()


def _backup_of(parameters: object) -> WeightBackup:
    if not isinstance(parameters, torch.optim.Optimizer | nn.Module):
        return WeightBackup()
    return _BACKUPS.setdefault(parameters, WeightBackup())


_MOVES: WeakKeyDictionary[torch.optim.Optimizer, PendingMoves] = WeakKeyDictionary()


def average_over_processes(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over the processes of the default group, if there is one.

    Args:
        tensors: as many of the same shapes in every process.
    """
    tensors = [tensor for tensor in tensors if not is_sharded([tensor])]  # sharded ones are the same everywhere
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        waiting: list[Any] = [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
        for work in waiting:
            work.wait()
        if tensors:
            torch._foreach_div_(tensors, torch.distributed.get_world_size())


def _per_sample(losses: Tensor) -> Tensor:
    if not losses.ndim:
        raise ValueError(
            "The method reads the losses of single samples, but closure returns their mean; return losses [B], for "
            'example cross_entropy(..., reduction="none").'
        )
    return losses
