# SPDX-License-Identifier: Apache-2.0
"""A frozen network that another one learns from, held outside the module tree."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from itertools import chain
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from lightning_robust.checks import check_choice, check_positive
from lightning_robust.distillation.mapping import ClassMapping, InputTransform
from lightning_robust.losses import full_precision, label_smoothing_of

__all__ = ["Classes", "Precision", "Teacher", "fingerprint"]

#: For each class of the student the teacher's class, or several that make it up together.
Classes = list[int | list[int]]
#: Types that a teacher may compute in, whatever the run's precision is.
Precision = Literal["float32", "bfloat16", "float16"]


def fingerprint(module: nn.Module) -> str:
    """Return 16 hex digits that identify the weights and buffers of a module, by name, type, shape and bytes.

    Args:
        module: The module; non-persistent buffers count too, because they may hold a normalisation.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import fingerprint
        >>> len(fingerprint(torch.nn.Linear(2, 2)))
        16
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(chain(module.named_parameters(), module.named_buffers())):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # A scalar has no bytes to view, hence the reshape.
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()[:16]


class Teacher:
    r"""A frozen network that answers with float32 logits.

    It is not an ``nn.Module``, so whatever holds it neither saves, optimises, averages nor synchronises its weights,
    and copies of what holds it share it. The network is put in evaluation mode, and is put there again if something
    switched it since; its parameters never ask for gradients. It follows its inputs to their device and their floating
    type. Calls run under ``no_grad`` and inherit autocast from where they stand.

    .. math:: t(x) = \log \sum_{k \in K_c} \exp\big(f((x - \mu) / \sigma)_k / T\big)

    with the network :math:`f` and for each class :math:`c` of the student the classes :math:`K_c` of the teacher, by
    default the same one.

    Cost: a forward pass. The first answer is looked at for numbers that are not finite, on the CPU each one is.

    Args:
        network: Maps inputs to logits ``[B, C]``: a tensor, or an output with a ``logits`` attribute or entry.
        name: What messages call it.
        num_classes: Number of classes that the network's logits must have; unchecked when ``None``.
        source: Where it came from, for messages and checkpoints.
        label_smoothing: How much the labels that it was trained on were smoothed; read off a criterion that the network
            holds when ``None``.
        mean: What is subtracted from each channel of the inputs, for a network that does not normalise by itself.
        std: What each channel is divided by then.
        image_size: Height and width that images are resized to (bilinear), for a network trained at another size.
        dtype: Type that the network computes in, ``"bfloat16"`` to save time and memory say; that of the inputs, and
            the run's autocast, when ``None``.
        temperature: Divides the logits before any loss sees them, to calibrate an overconfident teacher say.
        classes: For each class of the student the teacher's class, or a list of them that are one for the student;
            the same classes when ``None``.
        copy: Work on a copy, so that the given network stays trainable and in its mode. Without it the network is
            taken over, frozen, which saves the memory of one copy.

    Raises:
        TypeError: If the network answers with something that is not logits.
        ValueError: If an argument is out of range; in a call, if the logits have another number of classes than
            promised, or hold NaN or infinite values, or if the weights were rounded by a run of lower precision.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import Teacher
        >>> teacher = Teacher(torch.nn.Linear(4, 3), num_classes=3)
        >>> logits = teacher(torch.zeros(2, 4))
        >>> logits.shape, logits.requires_grad
        (torch.Size([2, 3]), False)
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str = "teacher",
        num_classes: int | None = None,
        source: str | None = None,
        label_smoothing: float | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        image_size: int | None = None,
        dtype: Precision | None = None,
        temperature: float = 1.0,
        classes: Classes | None = None,
        copy: bool = True,
    ) -> None:
        check_positive("temperature", temperature)
        if dtype is not None:
            check_choice("dtype", dtype, ("float32", "bfloat16", "float16"))
        self.network = (deepcopy(network) if copy else network).eval().requires_grad_(False)
        self.network.zero_grad(set_to_none=True)
        self.name = name
        self.num_classes = num_classes
        self.source = type(network).__name__ if source is None else source
        self.label_smoothing = label_smoothing_of(self.network) if label_smoothing is None else label_smoothing
        self.dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
        self.temperature = temperature
        self.classes = classes
        #: What stands between the inputs or answers and those of the network, as text; empty if nothing does.
        self.options = _described(mean=mean, std=std, image_size=image_size, temperature=temperature, classes=classes)
        self._transform = InputTransform(mean, std, image_size)
        self._mapping = ClassMapping(classes)
        self._looked = False  # whether an answer was checked to be finite
        weight = self._weight()
        self._given = torch.float32 if weight is None else weight.dtype
        if weight is not None:
            self._transform.to(weight.device, weight.dtype)
        self._rounded = False  # whether the weights are not as given any more
        # Taken before any conversion of the precision, so that it is the same in every run.
        self.fingerprint = fingerprint(self.network)

    def __call__(self, x: Tensor, *, input_grad: bool = False) -> Tensor:
        """Return the logits ``[B, C]`` of ``x``.

        Args:
            x: Inputs, in the space that the network was trained on, or that ``mean`` and ``std`` lead there.
            input_grad: Let gradients flow to ``x``; the weights stay frozen.
        """
        if any(module.training for module in self.network.modules()):
            self.network.eval()
        self._follow(x)
        # Not inference_mode: its tensors cannot be saved for the student's backward pass.
        with nullcontext() if input_grad else torch.no_grad():
            with self._own_precision(x.device):
                seen = x if self.dtype is None or not x.is_floating_point() else x.to(self.dtype)
                logits = full_precision(self._logits(self.network(self._transform(seen))))
            self._refuse(logits)
            if self.temperature != 1:
                logits = logits / self.temperature
            return self._mapping(logits)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the network to a device, and its floating-point weights to a type unless it has one of its own."""
        if self.dtype is not None:
            dtype = self.dtype
        self._follow_precision(dtype)
        self.network.to(device=device, dtype=dtype)
        self._transform.to(device=device, dtype=dtype)
        return self

    def manifest(self) -> dict[str, str]:
        """Return what a checkpoint says about the teacher: source, fingerprint, type and options, never weights."""
        dtype = "run" if self.dtype is None else _short(self.dtype)
        told = {"source": self.source, "fingerprint": self.fingerprint, "dtype": dtype}
        return {**told, "options": self.options} if self.options else told

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # frozen: whatever is copied together with its teacher learns from the same one

    def __repr__(self) -> str:
        return f"Teacher(name={self.name!r}, source={self.source!r}, fingerprint={self.fingerprint!r})"

    def _follow(self, x: Tensor) -> None:
        """Put the network where its inputs are, and in their precision."""
        weight = self._weight()
        if weight is None:
            self._transform.to(x.device)
            return
        dtype = self.dtype or (x.dtype if x.is_floating_point() else weight.dtype)
        if (weight.device, weight.dtype) != (x.device, dtype):
            self.to(x.device, dtype)

    def _follow_precision(self, dtype: torch.dtype | None) -> None:
        """Remember that weights are rounded, and refuse to go on with them in a run that would take them for exact."""
        weight = self._weight()
        if dtype is None or weight is None:
            return
        if self._rounded and dtype.itemsize > weight.dtype.itemsize:
            raise ValueError(
                f"The {self.name} {self.source} was rounded to {_short(weight.dtype)} in a run of that precision, so "
                f"its answers in {_short(dtype)} would not be its own; build it anew, or set `dtype`."
            )
        self._rounded = self._rounded or dtype.itemsize < self._given.itemsize

    def _weight(self) -> Tensor | None:
        tensors = chain(self.network.parameters(), self.network.buffers())
        return next((tensor for tensor in tensors if tensor.is_floating_point()), None)

    def _own_precision(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype is None else torch.autocast(device.type, enabled=False)

    def _refuse(self, logits: Tensor) -> None:
        if self.num_classes is not None and logits.shape[1] != self.num_classes:
            raise ValueError(
                f"The {self.name} {self.source} was expected to have {self.num_classes} classes but its logits have "
                f"{logits.shape[1]}; set `num_classes` to what it was trained for."
            )
        if self._looked and logits.device.type != "cpu":  # the answer would have to be waited for
            return
        self._looked = True
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(
                f"The {self.name} {self.source} answered with logits that are NaN or infinite; look whether its "
                "weights are finite, and whether it gets inputs of the scale that it was trained on (`mean`, `std`)."
            )

    def _logits(self, output: Any) -> Tensor:
        if isinstance(output, Mapping):
            output = output.get("logits")
        elif not isinstance(output, Tensor):
            output = getattr(output, "logits", None)
        if not isinstance(output, Tensor) or output.ndim < 2:
            raise TypeError(
                f"Expected the {self.name} {self.source} to return logits [B, C] (a tensor, or `logits` of its output) "
                "but it did not; wrap it in a module that does."
            )
        return output


def _described(**options: Any) -> str:
    unset = {"temperature": 1.0}
    given = {name: value for name, value in options.items() if value not in (None, unset.get(name))}
    return ", ".join(f"{name}={_text(value)}" for name, value in given.items())


def _text(value: Any) -> str:
    # the same for what is the same: tuples and lists, 1 and 1.0
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, Sequence) else f"{value:.10g}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
