# SPDX-License-Identifier: Apache-2.0
"""Gradients of parameters that ``torch.distributed.fsdp.fully_shard`` keeps in shards, one on each process."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["is_sharded", "local_parts", "over_shards", "reshard", "sharded_passes", "take_sharded_gradients"]


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of the tensors is kept in shards.

    Args:
        tensors: parameters or gradients.
    """
    if not _several_processes():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The shards of this process, sharing memory with the tensors; a plain tensor is its own.

    Args:
        tensors: parameters or gradients.
    """
    if not is_sharded(tensors):
        return list(tensors)
    with torch.no_grad():
        return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


def over_shards(local: Tensor, like: Tensor) -> Tensor:
    """What every shard holder computed, stacked in a new first dimension, the same on all processes.

    Args:
        local: what this process computed from its shard.
        like: a sharded tensor.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    assert isinstance(like, DTensor)
    placements = [Shard(0) if placement.is_shard() else Replicate() for placement in like.placements]
    stacked: Tensor = DTensor.from_local(local[None], like.device_mesh, placements, run_check=False).full_tensor()
    return stacked


def reshard(module: nn.Module) -> None:
    """Drop gathered copies of weights, which would not follow when the shards are moved.

    Args:
        module: holds the sharded modules.
    """
    for child in _sharded_modules(module):
        child.reshard()


@contextmanager
def sharded_passes(tensors: Sequence[Tensor], module: nn.Module | None) -> Iterator[None]:
    """While the body runs, backward may write to ``.grad``; afterwards ``.grad`` is what it was.

    Args:
        tensors: the sharded parameters of the step.
        module: holds them.

    Raises:
        ValueError: the parameters or the state of the sharded modules do not allow a sharpness-aware step.
    """
    if module is None or not _sharded_modules(module):
        raise ValueError("Parameters are sharded; pass the module that fully_shard was applied to (module=...).")
    _check(tensors, module)
    reshard(module)
    reached: dict[int, Tensor] = {id(tensor): tensor for tensor in (*tensors, *module.parameters())}
    kept = [(tensor, tensor.grad, tensor._post_accumulate_grad_hooks) for tensor in reached.values()]
    try:
        for tensor, _, hooks in kept:
            tensor.grad = None
            if hooks:
                tensor._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        yield
    except BaseException:
        _abandon(module)
        raise
    finally:
        for tensor, gradient, hooks in kept:
            tensor.grad = gradient
            if hooks:
                tensor._post_accumulate_grad_hooks = hooks


def take_sharded_gradients(loss: Tensor, tensors: Sequence[Tensor], module: nn.Module) -> list[Tensor | None]:
    """The gradients of the mean loss over all processes, in shards; ``None`` for tensors that took no part.

    Only an ordinary backward gathers weights and scatters gradients; ``torch.autograd.grad`` finds no gradients. For
    use inside :func:`sharded_passes`.

    Args:
        loss: scalar with its graph, which is freed.
        tensors: sharded parameters.
        module: holds them.
    """
    loss.backward()  # type: ignore[no-untyped-call]
    found = [tensor.grad for tensor in tensors]
    reshard(module)
    for tensor in (*tensors, *module.parameters()):
        tensor.grad = None
    return found


def _several_processes() -> bool:
    # without process group nothing is sharded, and the imports below are not free
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _sharded_modules(module: nn.Module) -> list[Any]:
    if not _several_processes():
        return []
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    children = list(module.modules())
    if any(isinstance(child, FullyShardedDataParallel) for child in children):
        raise ValueError(
            "FullyShardedDataParallel hides parameters in flat ones; shard the module by "
            "torch.distributed.fsdp.fully_shard instead, or use DistributedDataParallel."
        )
    return [child for child in children if isinstance(child, FSDPModule)]


def _abandon(module: nn.Module) -> None:
    # an exception in the midst of a pass leaves gathered copies of perturbed weights, which reshard() would not drop
    inner = {id(below) for child in _sharded_modules(module) for below in child.modules() if below is not child}
    for child in _sharded_modules(module):
        if id(child) not in inner and hasattr(child, "reset_iter_state"):
            child.reset_iter_state()
    for parameter in (parameter for group in _groups(module) for parameter in group.fsdp_params):
        parameter.unsharded_accumulated_grad = None
        if hasattr(parameter, "_unsharded_param"):
            parameter._unsharded_param.grad = None


def _check(tensors: Sequence[Tensor], module: nn.Module) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if any(not isinstance(tensor, DTensor) for tensor in tensors):
        raise ValueError(
            "Some parameters are sharded and some are not; apply fully_shard to the whole module, and build the "
            "optimizer before any forward pass, which leaves gathered copies in the root module."
        )
    layouts = {(tensor.device_mesh, tuple(map(type, tensor.placements))) for tensor in tensors}  # type: ignore[attr-defined]
    if len(layouts) > 1 or any(kinds.count(Shard) != 1 or not set(kinds) <= {Shard, Replicate} for _, kinds in layouts):
        raise ValueError(
            "Expected all parameters to be sharded by fully_shard over one device mesh; tensor parallelism and several "
            "meshes are not supported."
        )
    if not all(child._get_fsdp_state()._state_ctx.is_last_backward for child in _sharded_modules(module)):
        raise ValueError("Expected set_is_last_backward(True), as each pass must wait for its gradients.")
    for group in _groups(module):
        if not (group.reduce_grads and group.all_reduce_grads):
            raise ValueError(
                "Every pass of a sharpness-aware step needs reduced gradients; leave out "
                "set_requires_gradient_sync(False) and set_requires_all_reduce(False). Directions of accumulated "
                "batches add up in `.grad`."
            )
        if group._partial_reduce_output is not None or any(map(_pending, group.fsdp_params)):
            raise ValueError(
                "An earlier backward left gradients that are not reduced yet and would be mixed with the ascent; let "
                "its last backward run with set_requires_gradient_sync(True)."
            )


def _groups(module: nn.Module) -> list[Any]:
    # what follows has no public getters
    states = [child._get_fsdp_state() for child in _sharded_modules(module)]
    groups = [getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group] for state in states]
    return [group for several in groups for group in several if group is not None]


def _pending(parameter: Any) -> bool:
    whole = getattr(parameter, "_unsharded_param", None)
    return parameter.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None)
