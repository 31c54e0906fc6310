# SPDX-License-Identifier: Apache-2.0
"""The logits of a LightningModule at weights that are not its own."""

from collections.abc import Callable

import lightning as L
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_robust.sharpness import graph_nodes
from lightning_robust.training import LogitsFunction

__all__ = ["SeparateWeights"]


class SeparateWeights:
    """Evaluates a module with copies of its parameters and buffers, so that nothing of the module can change.

    The copies are float32 (float64 if the module has float64 parameters) whatever the precision of the run.

    Args:
        pl_module: The module.
        logits_from: Dotted name of the sub-module whose output is the logits; found by itself when not given.
        reduce: ``reduce(tensor, operation)`` over processes; buffers, which processes of DDP may disagree on, are then
            those of process zero.
    """

    def __init__(
        self,
        pl_module: L.LightningModule,
        logits_from: str | None,
        reduce: Callable[[Tensor, str], Tensor] | None = None,
    ) -> None:
        self._function = _LogitsModule(pl_module, logits_from)
        self._looked = False
        self._own = {id(parameter) for parameter in pl_module.parameters()}
        wide = any(parameter.dtype == torch.float64 for parameter in pl_module.parameters())
        self.dtype = torch.float64 if wide else torch.float32
        self.device = pl_module.device
        self._tensors: dict[str, Tensor] = {}
        for name, buffer in self._function.named_buffers():
            copied = self.converted(buffer.detach().clone())
            if reduce is not None and copied.is_floating_point():
                copied = reduce(copied if pl_module.global_rank == 0 else torch.zeros_like(copied), "sum")
            self._tensors[name] = copied
        #: The copies of the trainable parameters.
        self.parameters: list[Tensor] = []
        for name, parameter in self._function.named_parameters():
            copied = self.converted(parameter.detach())
            if parameter.requires_grad:
                copied = copied.clone().requires_grad_()
                self.parameters.append(copied)
            self._tensors[name] = copied

    def converted(self, tensor: Tensor) -> Tensor:
        """The tensor in the precision of the copies, unless it holds integers.

        Args:
            tensor: Any tensor.
        """
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of the inputs ``x``."""
        logits: Tensor = functional_call(self._function, self._tensors, (x,))
        return logits

    def refuse_own(self, loss: Tensor) -> None:
        """Refuse, once, a forward that reaches the parameters of the module past the attributes that hold them.

        Args:
            loss: Computed from logits of this object.

        Raises:
            ValueError: The graph of the loss leads to parameters of the module itself.
        """
        if self._looked or not loss.requires_grad:
            return
        self._looked = True
        for node in graph_nodes([loss]):
            if id(getattr(node, "variable", None)) in self._own:
                raise ValueError(
                    f"{type(self._function.module).__name__}.forward keeps references to its parameters (in a list, "
                    "for example), so they cannot be exchanged for copies; let it use the attributes that hold them."
                )


class _LogitsModule(nn.Module):
    """The logits as the forward of a module, which is what parameters can be exchanged in."""

    def __init__(self, module: L.LightningModule, logits_from: str | None) -> None:
        super().__init__()
        self.module = module
        self._logits = LogitsFunction(module, logits_from)

    def forward(self, x: Tensor) -> Tensor:
        return self._logits(x)
