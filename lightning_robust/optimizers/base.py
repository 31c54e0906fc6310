# SPDX-License-Identifier: Apache-2.0
"""What the optimizers of this room share: closures, refused gradients, and a state that resumes exactly."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

__all__ = ["ExactOptimizer"]


class ExactOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose loaded state is the saved one, bit for bit.

    ``torch.optim.Optimizer`` casts what it loads to the type of the parameter, which rounds float32 statistics of
    half-precision weights, and keeps the caller's tensors, which the next step would then change. Here loaded tensors
    keep their type, move to the parameter's device and are copies.

    Subclasses implement :meth:`update`.

    Args:
        params: parameters or groups.
        defaults: options of groups that do not name them.
    """

    def update(self) -> None:
        """Move the parameters; gradients are not tracked.

        Raises:
            NotImplementedError: in this base class.
        """
        raise NotImplementedError

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the loss and its gradients; called once, first.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    def with_gradient(self, group: dict[str, Any]) -> list[Tensor]:
        """The parameters of a group that have a gradient.

        Args:
            group: one of ``param_groups``.

        Raises:
            RuntimeError: a gradient is sparse or complex.
        """
        found = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in found:
            if parameter.grad.layout != torch.strided or parameter.is_complex():
                kind = "complex" if parameter.is_complex() else "sparse"
                raise RuntimeError(
                    f"{type(self).__name__} does not support {kind} gradients, but a parameter of shape "
                    f"{tuple(parameter.shape)} has one; give it to another optimizer"
                    + (", or use Embedding(sparse=False)." if kind == "sparse" else ".")
                )
        return found

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.detach().to(parameter.device, copy=True)
