# SPDX-License-Identifier: Apache-2.0
"""Evaluating a loss at chosen weights without leaving a trace."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lightning_robust.guards import RandomState, buffers_restored, rng_preserved
from lightning_robust.sharpness.backup import WeightBackup
from lightning_robust.sharpness.gradients import parameter_hooks_off
from lightning_robust.sharpness.weights import Weights

__all__ = ["WeightFunction", "uncompiled"]


class WeightFunction:
    """A loss as a function of weights: value and gradient, there or nearby, with everything put back.

    Cost: a forward, or a forward and a backward pass per evaluation; away from the weights one copy of them.

    Args:
        closure: runs the forward pass and returns the loss; or several, whose losses add up.
        parameters: an optimizer, a module, or parameters; trainable ones count.
        module: its buffers are put back. A module given as ``parameters`` is used by itself.
        reduce: sum over processes of a tensor.
    """

    def __init__(
        self,
        closure: Callable[[], Tensor] | Sequence[Callable[[], Tensor]],
        parameters: torch.optim.Optimizer | nn.Module | Iterable[Tensor],
        *,
        module: nn.Module | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._module = parameters if module is None and isinstance(parameters, nn.Module) else module
        self._closures = [closure] if callable(closure) else list(closure)
        if not self._closures and reduce is None:
            raise ValueError("No closure was given, so there is no loss to look at.")
        self._tensors = Weights.of(parameters, module).tensors
        _refuse_weights(self._tensors)
        self._sizes = [tensor.numel() for tensor in self._tensors]
        self._reduce = reduce
        self._backup = WeightBackup()
        self._random = RandomState.capture({self.device})

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(self._sizes)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._tensors[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self._tensors[0].dtype

    def value(self, offset: Tensor | None = None) -> Tensor:
        """The loss at the weights, or at the weights plus ``offset``.

        Args:
            offset: flat vector.
        """
        with self._undisturbed(), self._moved(offset), torch.no_grad():
            return self._total([self._loss(closure) for closure in self._closures], moved=offset is not None)

    def value_and_gradient(self, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss and its gradient at the weights, or at the weights plus ``offset``.

        Args:
            offset: flat vector.
        """
        with self._undisturbed(), self._moved(offset):
            losses = []
            gradient = torch.zeros(self.size, dtype=self.dtype, device=self.device)
            for closure in self._closures:
                loss = self._loss(closure)
                gradient += self._flat(self._gradients(loss))
                losses.append(loss.detach())
            return self._total(losses, moved=offset is not None), self._sum(gradient)

    def random(self, generator: torch.Generator, *, signs: bool = False) -> Tensor:
        """A random flat vector, the same on every device.

        Args:
            generator: a generator of the CPU.
            signs: entries are -1 or 1 instead of normally distributed.
        """
        if signs:
            drawn = torch.randint(2, (self.size,), generator=generator).to(self.dtype) * 2 - 1
        else:
            drawn = torch.randn(self.size, generator=generator, dtype=self.dtype)
        return drawn.to(self.device)

    def agreed(self, *values: Tensor) -> list[float]:
        """Numbers on which decisions rest, equal in all processes: they could differ by rounding.

        Args:
            values: scalars.
        """
        stacked = torch.stack([*values, torch.ones_like(values[0])])
        *shared, count = self._sum(stacked).tolist()
        return [value / count for value in shared]

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        device = self.device
        with ExitStack() as stack:
            for context in (torch.inference_mode(False), torch.enable_grad(), rng_preserved({device})):
                stack.enter_context(context)
            if torch.amp.is_autocast_available(device.type):
                stack.enter_context(torch.autocast(device.type, enabled=False))
            if self._module is not None:
                stack.enter_context(buffers_restored(self._module))
            stack.enter_context(uncompiled())
            stack.enter_context(parameter_hooks_off(self._tensors))
            yield

    @contextmanager
    def _moved(self, offset: Tensor | None) -> Iterator[None]:
        if offset is None:
            yield
            return
        self._backup.save(self._tensors)
        try:
            self._backup.move(self._parts(offset))
            yield
        finally:
            self._backup.restore()

    def _loss(self, closure: Callable[[], Tensor]) -> Tensor:
        self._random.restore()
        # autocast keeps low-precision copies of weights; they may belong to other values
        torch.clear_autocast_cache()
        loss = closure()
        if loss.numel() != 1:
            raise ValueError(
                f"Expected the loss to be a scalar but got shape {list(loss.shape)}; reduce it to its mean."
            )
        return loss.reshape(())

    def _gradients(self, loss: Tensor, *, again: bool = False) -> Sequence[Tensor | None]:
        """Gradients of ``loss``, with a graph of their own if they are to be differentiated ``again``."""
        if loss.requires_grad:
            found = torch.autograd.grad(loss, self._tensors, create_graph=again, allow_unused=True)
            if any(gradient is not None for gradient in found):
                return found
        raise ValueError(
            "The loss depends on none of the given parameters; pass those of the model it comes from, and return it "
            "with its graph (not detached, not under no_grad)."
        )

    def _total(self, losses: list[Tensor], *, moved: bool = False) -> Tensor:
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        total = self._sum(torch.stack([zero, *(loss.to(zero) for loss in losses)]).sum())
        if not torch.isfinite(total):
            where, remedy = (
                ("the moved weights", "use a smaller radius or step")
                if moved
                else ("the weights", "look for diverged weights or NaN in the inputs")
            )
            raise ValueError(f"The loss at {where} is {total.item()}, so it has no curvature; {remedy}.")
        return total

    def _sum(self, tensor: Tensor) -> Tensor:
        return tensor if self._reduce is None else self._reduce(tensor)

    def _parts(self, vector: Tensor) -> list[Tensor]:
        pieces = torch.split(vector, self._sizes)
        return [piece.view(tensor.shape) for piece, tensor in zip(pieces, self._tensors, strict=True)]

    def _flat(self, tensors: Sequence[Tensor | None]) -> Tensor:
        return torch.cat(
            [
                torch.zeros(size, dtype=self.dtype, device=self.device) if tensor is None else tensor.reshape(-1)
                for tensor, size in zip(tensors, self._sizes, strict=True)
            ]
        )


def _refuse_weights(tensors: list[Tensor]) -> None:
    if not tensors:
        raise ValueError("No trainable parameter was given, so there is no loss surface.")
    dtypes = {tensor.dtype for tensor in tensors}
    if not dtypes <= {torch.float32, torch.float64} or len(dtypes) > 1:
        raise ValueError(
            f"Expected all weights in float32, or all in float64, but got {sorted(map(str, dtypes))}; curvature drowns "
            "in coarser rounding, so pass a copy: copy.deepcopy(model).float()."
        )
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"Expected all weights on one device but got {sorted(map(str, devices))}.")


def uncompiled() -> AbstractContextManager[None]:
    """Compiled modules run eagerly inside, and nothing is compiled."""
    if "torch._dynamo" not in sys.modules:  # then nothing can be compiled, and its import takes seconds
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
