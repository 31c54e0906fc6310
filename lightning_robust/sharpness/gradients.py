# SPDX-License-Identifier: Apache-2.0
"""Gradients as lists of tensors: their norms, and how they are taken off a graph."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_robust.sharpness.sharded import is_sharded, local_parts, over_shards

__all__ = [
    "global_norm",
    "graph_nodes",
    "hides_gradients",
    "own_memory",
    "parameter_hooks_off",
    "take_gradients",
    "take_hidden_gradients",
    "tensor_norms",
]


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    r"""Euclidean norm over all entries of all tensors, in float32 at least.

    Args:
        tensors: gradients or weights on one device.
    """
    total: Tensor = torch.linalg.vector_norm(torch.stack(tensor_norms(tensors)))
    return total


def tensor_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Euclidean norm of each tensor, in float32 at least.

    Args:
        tensors: gradients or weights.
    """
    half = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)
    norms = list(torch._foreach_norm(local_parts(tensors), 2, dtype=torch.float32 if half else None))
    if is_sharded(tensors):
        norms = list(torch.linalg.vector_norm(over_shards(torch.stack(norms), tensors[0]), dim=0).unbind())
    return norms


@contextmanager
def parameter_hooks_off(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Suspend the hooks that users registered on parameters (``p.register_hook``).

    They belong to the gradient that the optimizer gets, which they see once, in the backward that delivers it; a hook
    that scales would otherwise act on every gradient on the way, too.

    Args:
        tensors: parameters.
    """
    suspended = [(tensor, tensor._backward_hooks) for tensor in tensors if tensor._backward_hooks]
    for tensor, _ in suspended:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, hooks in suspended:
            tensor._backward_hooks = hooks


def own_memory(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients that may be changed in place, one independent of the other.

    Autograd hands out one tensor for parameters that are added to each other, and expanded tensors where a gradient is
    constant; those are copied.

    Args:
        gradients: what ``torch.autograd.grad`` returned.
    """
    taken: set[int] = set()
    separate: list[Tensor | None] = []
    for gradient in gradients:
        if gradient is not None and gradient.layout == torch.strided:
            expanded = any(
                stride == 0 and size > 1 for stride, size in zip(gradient.stride(), gradient.shape, strict=True)
            )
            memory = gradient.untyped_storage().data_ptr()
            if gradient.numel() and (expanded or memory in taken):
                gradient = gradient.clone(memory_format=torch.contiguous_format)
            taken.add(memory)
        separate.append(gradient)
    return separate


def take_gradients(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of ``loss`` without touching ``.grad``; ``None`` for tensors that took no part.

    Args:
        loss: scalar with its graph, which is freed.
        tensors: leaf tensors.
    """
    with parameter_hooks_off(tensors):
        return own_memory(torch.autograd.grad(loss, tensors, allow_unused=True))


def take_hidden_gradients(loss: Tensor, tensors: Sequence[Tensor], others: Iterable[Tensor]) -> list[Tensor | None]:
    """The same by an ordinary backward, which also reaches parameters inside re-entrant activation checkpoints.

    ``.grad`` is set aside and put back.

    Args:
        loss: scalar with its graph, which is freed.
        tensors: leaf tensors.
        others: whatever else backward may reach.
    """
    reached = {id(tensor): tensor for tensor in (*tensors, *others)}.values()
    kept = [(tensor, tensor.grad) for tensor in reached]
    for tensor, _ in kept:
        tensor.grad = None
    try:
        with parameter_hooks_off(tensors):
            loss.backward()  # type: ignore[no-untyped-call]
        return own_memory([tensor.grad for tensor in tensors])
    finally:
        for tensor, gradient in kept:
            tensor.grad = gradient


def hides_gradients(loss: Tensor) -> bool:
    """Whether the graph of ``loss`` has a re-entrant activation checkpoint.

    Args:
        loss: the end of the graph.
    """
    return any(node.name().startswith("CheckpointFunctionBackward") for node in graph_nodes([loss]))


def graph_nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the graphs that end in ``tensors``, once.

    Args:
        tensors: the ends; one without a graph has no nodes.
    """
    pending: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(following for following, _ in node.next_functions)
