# SPDX-License-Identifier: Apache-2.0
"""Under which conditions an attack runs, and how everything is left as it was found."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_robust.attacks.draws import Draws
from lightning_robust.guards import buffers_restored, evaluation_mode, frozen_modes, rng_preserved

__all__ = ["MODES", "AttackMode", "Model", "attack_conditions", "ordinary", "unwrap"]

#: Anything that maps images to logits: a module, or a callable, which may name its module in the attribute ``module``.
Model = Callable[[Tensor], Tensor]

AttackMode = Literal["eval", "train", "train-frozen-stats"]
MODES: tuple[AttackMode, ...] = ("eval", "train", "train-frozen-stats")


def unwrap(model: Model) -> tuple[Model, nn.Module | None]:
    """The callable to attack and the module whose modes and buffers belong to it.

    An attack's passes must not arm the gradient reducer of ``DistributedDataParallel``, so its inner module is taken.

    Args:
        model: a module, or a callable ``x -> logits``, possibly with a module in its attribute ``module``.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if isinstance(model, nn.Module):
        return model, model
    module = getattr(model, "module", None)
    return model, module if isinstance(module, nn.Module) else None


@contextmanager
def attack_conditions(module: nn.Module | None, mode: AttackMode, device: torch.device, draws: Draws) -> Iterator[None]:
    """Gradients on, the module in the wanted mode, the global generators seeded from the attack's own.

    On exit the training flag of every sub-module and the global generators are what they were, after an exception
    too. Layers that draw random numbers (dropout) thus never see the draws of the training forward that follows.

    Args:
        module: the module whose modes are switched; ``None`` for a plain callable.
        mode: ``"eval"``; ``"train"``: every sub-module as it is found, running statistics move;
            ``"train-frozen-stats"``: as it is found, but all buffers are put back.
        device: where the images are.
        draws: the attack's random numbers; none are taken.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
            # autocast may hold copies of the weights without a graph
            torch.clear_autocast_cache()
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(rng_preserved([device]))
        _seed_global(device, draws.fingerprint())
        if module is not None:
            stack.enter_context(evaluation_mode(module) if mode == "eval" else frozen_modes(module))
            if mode == "train-frozen-stats":
                stack.enter_context(buffers_restored(module))
        yield


def ordinary(value: Tensor) -> Tensor:
    """A tensor that can take part in a graph, which one that was made in inference mode cannot.

    Args:
        value: any tensor; to be called outside inference mode.
    """
    return value.clone() if value.is_inference() else value.detach()


def _seed_global(device: torch.device, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device.type).manual_seed(seed)
