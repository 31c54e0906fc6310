# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware gradients in a plain PyTorch loop, or in manual optimization."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from lightning_robust.guards import RandomState, buffers_restored
from lightning_robust.sharpness.injection import inject_gradients
from lightning_robust.sharpness.method import SharpnessMethod, sharp_direction
from lightning_robust.sharpness.weights import Gradients, WeightBackup, Weights, own_memory, parameter_hooks_off

__all__ = ["sharp_backward"]


def sharp_backward(
    closure: Callable[[], Tensor],
    method: SharpnessMethod,
    parameters: torch.optim.Optimizer | nn.Module | Iterable[Tensor],
    *,
    module: nn.Module | None = None,
    replay: bool = True,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> Tensor:
    """Take the place of ``closure().backward()``: add the method's direction to ``.grad``.

    The weights are back at their values when this returns, also after an exception, so the optimizer steps as usual.
    Works with any optimizer, with gradient accumulation, under ``DistributedDataParallel`` (each process ascends by
    itself and the directions are averaged) and in Lightning's manual optimization (``backward=self.manual_backward``).

    Args:
        closure: runs the forward pass and returns the loss; called once per pass of the method.
        method: for example ``SAM(rho=0.05)``.
        parameters: an optimizer (its group options such as ``rho`` count), a module, or parameters.
        module: its buffers (BatchNorm statistics) are moved by the first pass only; give it whenever it has any. A
            module given as ``parameters`` is used by itself.
        replay: the extra passes see the random numbers (dropout masks) of the first one; ``False`` draws fresh ones.
        backward: delivers a loss whose gradient is the direction; ``self.manual_backward`` in manual optimization.

    Returns:
        The loss at the unperturbed weights, detached.

    Raises:
        ValueError: no parameter is trainable, or the loss depends on none of them.

    Example:
        >>> from lightning_robust.sharpness import SAM, sharp_backward
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> loss = sharp_backward(lambda: nn.functional.cross_entropy(model(x), y), SAM(), optimizer, module=model)
        >>> optimizer.step()
    """
    if module is None and isinstance(parameters, nn.Module):
        module = parameters
    weights = Weights.of(parameters, module)
    if not len(weights):
        raise ValueError("No trainable parameter was given, so there is nothing to perturb.")
    devices = {tensor.device for tensor in weights.tensors}
    state = RandomState.capture(devices) if replay else None
    loss = closure()
    after = RandomState.capture(devices) if replay else None
    found = _gradients(loss, weights.tensors, unused=True)
    used = [gradient is not None for gradient in found]
    if not any(used):
        raise ValueError("The loss depends on none of the given parameters; pass the ones of the model it comes from.")
    weights = weights.subset(used)
    gradients: Gradients = [gradient for gradient in found if gradient is not None]

    def gradient_here() -> Gradients:
        with ExitStack() as stack:
            if module is not None:
                stack.enter_context(buffers_restored(module))
            if state is not None:
                state.restore()
            # autocast keeps low-precision copies of weights; they belong to the values before the move
            torch.clear_autocast_cache()
            found = _gradients(closure(), weights.tensors)
            return [gradient for gradient in found if gradient is not None]

    try:
        direction = sharp_direction(method, weights, gradients, gradient_here, WeightBackup())
    finally:
        torch.clear_autocast_cache()
        if after is not None:
            after.restore()
    backward(inject_gradients(loss, weights.tensors, direction))
    return loss.detach()


def _gradients(loss: Tensor, tensors: list[Tensor], unused: bool = False) -> list[Tensor | None]:
    with parameter_hooks_off(tensors):
        return own_memory(torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=not unused))
