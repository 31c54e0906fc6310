# SPDX-License-Identifier: Apache-2.0
"""An exponential moving average of a network, held outside of it."""

import copy
import inspect
from itertools import chain
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from lightning_robust.checks import check_in_range

__all__ = ["WeightAverage"]


class WeightAverage:
    r"""A frozen copy of a network whose weights follow those of the network slowly.

    .. math:: \bar w \leftarrow d\,\bar w + (1 - d)\,w

    It begins with the weights at construction. Floating-point buffers (BatchNorm statistics) are averaged like weights,
    others are copied, as in timm's average, which the authors of MESA use. Averages of half-precision weights are kept
    in float32, because their steps are too small for them. It is not an ``nn.Module``: whatever holds it neither saves,
    optimises nor synchronises its weights.

    Cost: one copy of the network, and one pass over its weights per update.

    Args:
        module: The network; copied without what ``torch.compile`` made of it. Datasets that it holds are shared.
        decay: ``d``.
        without: A part of the network that the copy leaves out, an objective that holds this average say.

    Raises:
        ValueError: ``decay`` is not in [0, 1]; or a state of another network is loaded.
        TypeError: The network cannot be copied.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> average = WeightAverage(net, decay=0.5)
        >>> before = net.weight.detach().clone()
        >>> with torch.no_grad():
        ...     _ = net.weight.add_(1.0)
        >>> average.update(net)
        >>> torch.allclose(average.module.weight, before + 0.5)
        True
    """

    def __init__(self, module: nn.Module, *, decay: float = 0.9998, without: nn.Module | None = None) -> None:
        check_in_range("decay", decay, 0.0, 1.0)
        self.decay = decay
        self.module = _independent_copy(module, without)
        self._update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        tensors = _tensors(self.module)
        self._shown = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        self._copied = {name: tensor for name, tensor in tensors.items() if name not in self._shown}
        # the same tensors where they are precise enough
        self._averages = {name: _master(tensor) for name, tensor in self._shown.items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the present weights of ``module``.

        Args:
            module: The network of which this is the average.
        """
        present = _tensors(module)
        averages = list(self._averages.values())
        if averages:
            values = [present[name].detach().to(average.dtype) for name, average in self._averages.items()]
            self._update(averages, values, 1)
        self._show()
        for name, tensor in self._copied.items():
            tensor.copy_(present[name])

    @torch.no_grad()
    def broadcast_buffers(self) -> None:
        """Give every process the buffers of the first, whose BatchNorm statistics are those of its own batches.

        The weights of processes that train together are the same anyway.
        """
        names = {name for name, _ in self.module.named_buffers()}
        buffers = [average for name, average in self._averages.items() if name in names]
        for dtype in {buffer.dtype for buffer in buffers}:
            group = [buffer for buffer in buffers if buffer.dtype == dtype]
            flat = torch.cat([buffer.reshape(-1) for buffer in group])
            torch.distributed.broadcast(flat, src=0)
            start = 0
            for buffer in group:
                buffer.copy_(flat[start : start + buffer.numel()].view_as(buffer))
                start += buffer.numel()
        self._show()

    def to(self, device: torch.device | str) -> None:
        """Move the average.

        Args:
            device: Where to.
        """
        state = self.state_dict()
        self.module.to(device)
        tensors = _tensors(self.module)
        self._shown = {name: tensors[name] for name in self._shown}
        self._copied = {name: tensors[name] for name in self._copied}
        self._averages = {name: _master(tensor) for name, tensor in self._shown.items()}
        self.load_state_dict(state)

    def state_dict(self) -> dict[str, Tensor]:
        """Return averages and copied buffers by name; the tensors are those of the average."""
        return {**self._averages, **self._copied}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a state, which is copied.

        Args:
            state: What :meth:`state_dict` returned.
        """
        own = self.state_dict()
        other = sorted(set(own) ^ set(state)) or [name for name in own if own[name].shape != state[name].shape]
        if other:
            raise ValueError(
                f"The saved average is of another network: {', '.join(other[:3])}{' ...' if len(other) > 3 else ''} "
                "differ in name or shape."
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self._show()

    def _show(self) -> None:
        for name, average in self._averages.items():
            if average is not self._shown[name]:
                self._shown[name].copy_(average)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(chain(module.named_parameters(), module.named_buffers()))


def _master(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _independent_copy(module: nn.Module, without: nn.Module | None) -> nn.Module:
    shared: dict[int, Any] = {
        id(value): value for value in vars(module).values() if isinstance(value, Dataset | DataLoader)
    }
    if without is not None:
        shared[id(without)] = nn.Identity()
    try:
        copied = copy.deepcopy(module, shared)
    except (RuntimeError, TypeError) as error:
        raise TypeError(
            f"{type(module).__name__} cannot be copied, which its average needs: {error} Keep such things out of the "
            "module's attributes, or make them in a hook."
        ) from error
    originals = {id(part) for part in module.modules()}
    for part in copied.modules():
        vars(part).pop("_compiled_call_impl", None)
        forward = vars(part).get("forward")
        # a compiled function is shared by copies and would go on calling the original
        if isinstance(forward, FunctionType) and id(getattr(inspect.unwrap(forward), "__self__", None)) in originals:
            del vars(part)["forward"]
    return copied.eval().requires_grad_(False)
