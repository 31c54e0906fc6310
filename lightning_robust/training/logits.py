# SPDX-License-Identifier: Apache-2.0
"""Finding the logits of a running step in somebody else's module, without a second forward pass."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_robust.guards import TransientHook

__all__ = ["LogitsCapture", "LogitsFunction", "LogitsNotCaptured", "named_submodule"]


class LogitsNotCaptured(RuntimeError):  # noqa: N818 - says what happened
    """The step produced no logits that a callback could see; the message says how to point to them."""


def named_submodule(module: nn.Module, name: str) -> nn.Module:
    """``module.get_submodule(name)`` with a helpful error.

    Args:
        module: where to look.
        name: dotted name of a sub-module.

    Raises:
        ValueError: there is no such sub-module; near names are given.
    """
    names = [candidate for candidate, _ in module.named_modules() if candidate]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3) or names[:5]
        raise ValueError(
            f"logits_from={name!r} names no sub-module of {type(module).__name__}; it has {', '.join(near)}"
            f"{' ...' if len(names) > len(near) else ''}."
        )
    return module.get_submodule(name)


def as_logits(value: Any) -> Tensor | None:
    """The logits in what a module returned: a tensor of two or more dimensions, ``.logits`` or entry ``"logits"``."""
    if isinstance(value, Mapping):
        value = value.get("logits")
    elif hasattr(value, "logits"):
        value = value.logits
    if isinstance(value, Tensor) and value.ndim >= 2 and value.is_floating_point():
        return value
    return None


def _is_network(module: nn.Module) -> bool:
    """Whether a child of a LightningModule may compute logits: it holds parameters and is no metric or loss."""
    if isinstance(module, Metric | MetricCollection | nn.modules.loss._Loss):
        return False
    if getattr(module, "stands_apart", False) is True:  # parts of a loss that is trained with the module
        return False
    return any(True for _ in module.parameters())


class LogitsCapture:
    """Remembers the logits that a module computed in its most recent forward.

    Sources, in this order: entry ``"logits"`` of what the step returned; the sub-module ``logits_from``; the module's
    own ``forward``; its only child network that returned ``[B, C]``. Nothing is guessed: several candidates are an
    error that names them. The hooks stay attached between :meth:`attach` and :meth:`detach` and the last forward
    wins, so a step that calls the network several times (an attack, say) leaves its final logits.

    Args:
        module: the LightningModule that is watched.
        logits_from: dotted name of the sub-module whose output is the logits; found by itself when ``None``.
        needs_grad: overlook logits without a graph (of a teacher, a pseudo-label, or detached ones in what the step
            returned): a term added to the loss would do nothing on them.

    Raises:
        ValueError: ``logits_from`` names no sub-module.
        LogitsNotCaptured: from :meth:`take`, when nothing usable was seen.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 3))
        >>> with LogitsCapture(net) as capture:
        ...     _ = net(torch.zeros(2, 4))
        ...     capture.take().shape
        torch.Size([2, 3])
    """

    def __init__(self, module: nn.Module, logits_from: str | None = None, *, needs_grad: bool = False) -> None:
        self.module = module
        self.logits_from = logits_from
        self.needs_grad = needs_grad
        self._seen: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        if logits_from is not None:
            named_submodule(module, logits_from)

    def attach(self) -> None:
        """Start watching; attaching twice is the same as once."""
        if self._handles:
            return
        if self.logits_from is not None:
            watched = {self.logits_from: named_submodule(self.module, self.logits_from)}
        else:
            watched = {name: child for name, child in self.module.named_children() if _is_network(child)}
            watched[""] = self.module
        for name, child in watched.items():
            self._handles.append(child.register_forward_hook(_Remember(self, name)))

    def detach(self) -> None:
        """Stop watching and forget what was seen."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self._seen.clear()

    def __enter__(self) -> "LogitsCapture":
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def take(self, output: Any = None, *, returned_first: bool = False) -> Tensor:
        """Return the logits of the most recent forward.

        Args:
            output: what the step returned, if known; its entry ``"logits"`` comes first unless ``logits_from`` is set.
            returned_first: let that entry win in any case.
        """
        if isinstance(output, Mapping) and (returned_first or self.logits_from is None):
            logits = self._usable(output)
            if logits is not None:
                return logits
        last = next(reversed(self._seen), None)
        # what the module's own forward returned counts, unless something (a head) was computed from it afterwards
        if last is not None and (last == "" or len(self._seen) == 1):
            return self._seen[last]
        raise LogitsNotCaptured(self._explain())

    def _explain(self) -> str:
        name = type(self.module).__name__
        graph = " with gradients (not detached, not under no_grad)" if self.needs_grad else ""
        if self.logits_from is not None:
            return (
                f"logits_from={self.logits_from!r} was not called by the step of {name}, or did not return logits "
                f"[B, C]{graph}; name the sub-module whose output is the logits."
            )
        if self._seen:
            shapes = ", ".join(f"{child} {list(value.shape)}" for child, value in self._seen.items())
            return (
                f"Several sub-modules of {name} returned tensors ({shapes}); say which are the logits, for example "
                f"logits_from={list(self._seen)[-1]!r}."
            )
        return (
            f"No logits were seen in the step of {name}: it called neither the module itself (self(x)) nor a child "
            f'network that returns [B, C]{graph}. Name the sub-module with logits_from="...", or return '
            '{"loss": ..., "logits": ...} from the step.'
        )

    def _usable(self, value: Any) -> Tensor | None:
        logits = as_logits(value)
        return None if logits is None or (self.needs_grad and not logits.requires_grad) else logits

    def _remember(self, name: str, output: Any) -> None:
        logits = self._usable(output)
        if logits is not None:
            # last forward wins, in position too: the final entry is the one computed last
            self._seen.pop(name, None)
            self._seen[name] = logits


class _Remember(TransientHook):
    """The forward hook. A copy of the hooked module (an EMA, say) gets one that does nothing."""

    def __init__(self, capture: LogitsCapture, name: str) -> None:
        self._capture = capture
        self._name = name

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._capture._remember(self._name, output)


class LogitsFunction:
    """The map ``x -> logits`` of a LightningModule, for attacks, objectives and monitors.

    Uses the module's ``forward`` when it has one, else ``logits_from`` or its only child network.

    Args:
        module: the LightningModule.
        logits_from: dotted name of the sub-module whose output is the logits.

    Raises:
        LogitsNotCaptured: the module has no usable forward, or it did not return logits.

    Example:
        >>> import torch
        >>> function = LogitsFunction(nn.Sequential(nn.Linear(4, 3)))
        >>> function(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, module: nn.Module, logits_from: str | None = None) -> None:
        self.module = module
        self.logits_from = logits_from
        self._function, self._capture = self._resolve()

    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``[B, C]`` of the inputs ``x``."""
        if self._capture is not None:
            with self._capture as capture:
                self._function(x)
                return capture.take()
        logits = as_logits(self._function(x))
        if logits is None:
            raise LogitsNotCaptured(
                f"{type(self.module).__name__}.forward did not return logits [B, C]; name the sub-module whose output "
                'they are with logits_from="...".'
            )
        return logits

    def _resolve(self) -> tuple[Callable[[Tensor], Any], LogitsCapture | None]:
        has_forward = _overrides_forward(self.module)
        if self.logits_from is not None:
            child = named_submodule(self.module, self.logits_from)
            return (self.module, LogitsCapture(self.module, self.logits_from)) if has_forward else (child, None)
        if has_forward:
            return self.module, None
        children = {name: child for name, child in self.module.named_children() if _is_network(child)}
        if len(children) == 1:
            return next(iter(children.values())), None
        raise LogitsNotCaptured(
            f"{type(self.module).__name__} has no forward and {len(children)} child networks ({', '.join(children)}); "
            'define forward(x) -> logits, or name the network with logits_from="...".'
        )


def _overrides_forward(module: nn.Module) -> bool:
    # LightningModule.forward exists but only raises, so where the method was written decides
    # (torch.compile leaves a wrapper on the instance)
    forward = inspect.unwrap(vars(module).get("forward", type(module).forward))
    forward = getattr(forward, "__func__", forward)
    return forward is not nn.Module.forward and forward.__module__.partition(".")[0] not in _LIGHTNING


_LIGHTNING = ("lightning", "pytorch_lightning")
