# SPDX-License-Identifier: Apache-2.0
"""What every sharpness-aware method is: a function from gradients at some points to a descent direction."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_robust.sharpness.probe import Probe
from lightning_robust.sharpness.selection import ParameterSelection
from lightning_robust.sharpness.weights import Gradients, Weights

__all__ = ["Evaluation", "SharpnessMethod", "sharp_direction"]


@dataclass(frozen=True)
class Evaluation:
    """The loss of one pass.

    Attributes:
        loss: scalar with its graph.
        sample_losses: returns the losses ``[B]`` of the samples; raises where they are not known.
    """

    loss: Tensor
    sample_losses: Callable[[], Tensor]


class SharpnessMethod:
    """A rule that turns gradients at chosen weights into the direction for the base optimizer.

    A method is arithmetic, and memory if it needs any. Passes, randomness, BatchNorm, precision and distribution are
    the caller's business: :class:`~lightning_robust.callbacks.SharpnessAware` inside Lightning, :func:`sharp_backward`
    in a plain loop.
    """

    #: The pass that moves BatchNorm statistics, is logged and gives the value of the loss: the one at the unperturbed
    #: weights, or the one (and only) call of ``probe.gradient_at``.
    counted: Literal["clean", "perturbed"] = "clean"
    #: Whether ``direction`` is given the gradient at the unperturbed weights.
    needs_ascent: ClassVar[bool] = True
    #: Whether that gradient only says where to climb, and ``probe.gradient_at`` is called once; it may then be taken of
    #: a part of the batch.
    ascent_only: ClassVar[bool] = False
    #: Whether :meth:`ascent_loss` reads the losses of single samples.
    needs_sample_losses: ClassVar[bool] = False
    #: Whether processes exchange tensors, so that each of them must hold gradients of the same weights.
    collective: ClassVar[bool] = False
    #: Whether weights are moved once more after the optimizer's step.
    moves_after_step: ClassVar[bool] = False
    #: Whether ``direction`` is right for parameters kept in shards: element-wise arithmetic, and every sum over entries
    #: by ``global_norm``, ``global_dot`` or ``tensor_norms``.
    sharded: ClassVar[bool] = False

    @property
    def extra_passes(self) -> float:
        """Passes beyond the one of a plain step."""
        return 1

    @property
    def ascent_moves_buffers(self) -> bool:
        """Whether the pass that leads the ascent moves BatchNorm statistics too, though another one counts."""
        return False

    def default_parameters(self) -> ParameterSelection:
        """Which weights are perturbed where the user does not choose."""
        return ParameterSelection()

    def check_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Refuse an optimizer that the method cannot work with, before the first step.

        Args:
            optimizer: the base optimizer, where there is one.
        """

    def selected(self, weights: Weights, perturb: ParameterSelection | None = None) -> Weights:
        """The same weights, of which only the chosen ones may be perturbed.

        Args:
            weights: the weights to choose from.
            perturb: the user's choice; that of the method when ``None``.
        """
        return (self.default_parameters() if perturb is None else perturb).apply(weights)

    def ascent_loss(self, evaluation: Evaluation) -> Tensor:
        """The scalar whose gradient leads the ascent; the training loss unless a method says otherwise.

        Args:
            evaluation: a pass at unperturbed weights, or one of ``probe.ascent_gradient_at``.
        """
        return evaluation.loss

    def direction(self, weights: Weights, gradients: Gradients, probe: Probe) -> Gradients:
        """Return the descent direction, one tensor per weight; runs without gradient tracking.

        Args:
            weights: all weights, at the unperturbed values until ``probe.gradient_at`` is called; those that may be
                perturbed are ``weights.perturbed``.
            gradients: gradient of the ascent loss at the unperturbed weights, zero where a weight took no part; the
                method may overwrite it. Empty if the method does not need it.
            probe: evaluates gradients elsewhere.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything; called when a fit begins."""
        self.load_state_dict({})

    def state_dict(self) -> dict[str, Tensor]:
        """What the method remembers, by the name of the memory and of the parameter."""
        return dict(self._memory())

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave.

        Args:
            state_dict: tensors by name.
        """
        memory = self._memory()
        memory.clear()
        memory.update(state_dict)

    def recall(self, slot: str, weights: Weights) -> list[Tensor | None]:
        """What was remembered under ``slot`` for each weight; ``None`` for a weight that is new.

        Args:
            slot: name of the memory.
            weights: the weights.
        """
        memory = self._memory()
        found: list[Tensor | None] = []
        for name, tensor in zip(weights.names, weights.tensors, strict=True):
            key = f"{slot}/{name}"
            kept = memory.get(key)
            if kept is not None and kept.device != tensor.device:
                kept = memory[key] = kept.to(tensor.device)  # a checkpoint is read on the CPU
            found.append(kept)
        return found

    def remember(self, slot: str, weights: Weights, tensors: list[Tensor]) -> None:
        """Keep one tensor per weight, in every checkpoint too.

        Args:
            slot: name of the memory.
            weights: the weights.
            tensors: one per weight; they are handed over.
        """
        memory = self._memory()
        memory.update({f"{slot}/{name}": tensor for name, tensor in zip(weights.names, tensors, strict=True)})

    def _memory(self) -> dict[str, Tensor]:
        memory: dict[str, Tensor] = self.__dict__.setdefault("_remembered", {})
        return memory

    def __repr__(self) -> str:
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in public.items())})"


def sharp_direction(method: SharpnessMethod, weights: Weights, gradients: Gradients, probe: Probe) -> Gradients:
    """Evaluate ``method`` and put the weights back, bit for bit, whatever happens.

    Args:
        method: the rule.
        weights: the weights of the step.
        gradients: the gradient at their present values; may be overwritten.
        probe: evaluates gradients at other values.
    """
    probe.backup.save(weights.perturbed.tensors)
    try:
        with torch.no_grad():
            return method.direction(weights, gradients, probe)
    finally:
        probe.backup.restore()
