# SPDX-License-Identifier: Apache-2.0
"""The trajectory loss of SAF and MESA, and the memory of past logits that SAF compares with."""

from typing import Any, Self

import torch
from torch import Tensor

from lightning_robust.attacks.losses import kl_divergence
from lightning_robust.checks import check_choice, check_integer, check_positive
from lightning_robust.losses import full_precision

__all__ = ["LogitHistory", "trajectory_loss"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROWS = 2**14  # samples that are merged at a time


def trajectory_loss(
    logits: Tensor, reference_logits: Tensor, temperature: float = 5.0, *, known: Tensor | None = None
) -> Tensor:
    r"""Distance of predictions from those of an earlier or averaged network, which get no gradient.

    .. math:: T^2\,\frac1B \sum_i \mathrm{KL}\big(\mathrm{softmax}(z^{ref}_i/T)\,\|\,\mathrm{softmax}(z_i/T)\big)

    Args:
        logits: Logits ``z``.
        reference_logits: Logits of the reference, of the same shape.
        temperature: ``T``; both distributions are softened by it.
        known: Which samples have a reference, ``[B]``; the others add zero to the sum and count in ``B``. All when
            ``None``.

    Shape:
        ``[B, C]`` or ``[B, C, ...]`` to a scalar, in float32 at least.

    Raises:
        ValueError: The shapes differ, or ``temperature`` is not above zero.

    References:
        Du et al., arXiv 2205.14083. The factor ``T^2`` is that of the authors' code; the logarithm is taken of the
        logits, not of the probabilities, which lose it in half precision.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> trajectory_loss(logits, logits)
        tensor(0.)
    """
    check_positive("temperature", temperature)
    if logits.shape != reference_logits.shape:
        raise ValueError(
            f"Expected logits and reference of one shape but got {tuple(logits.shape)} and "
            f"{tuple(reference_logits.shape)}."
        )
    reference = (full_precision(reference_logits.detach()) / temperature).log_softmax(1)
    divergence = kl_divergence(full_precision(logits) / temperature, reference)
    if known is not None:
        divergence = torch.where(known.view(-1, *[1] * (divergence.ndim - 1)), divergence, 0.0)
    return temperature**2 * divergence.mean()


class LogitHistory:
    r"""Remembers the logits of every training sample for some epochs.

    A ring of ``lag + 1`` slots: an epoch ``e`` writes slot ``e mod (lag + 1)`` and looks up slot
    ``(e - lag) mod (lag + 1)``. A sample that an epoch left out keeps what its slot held before, from ``lag + 1``
    epochs earlier, as in the authors' code. Logits that are not finite are not remembered.

    With several processes, each writes what it sees and :meth:`merge` makes their memories equal; nothing written in an
    epoch is looked up before the next one.

    Cost: ``samples * (lag + 1) * (classes * bytes per number + 8)`` bytes, 82 MB for CIFAR-100 and 20 GB for ImageNet
    in float32.

    Args:
        samples: Number of samples.
        classes: Number of classes.
        lag: How many epochs back a look-up goes.
        dtype: What logits are stored in: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        device: Where they are stored; another device than that of the logits costs a synchronisation per batch.

    Raises:
        ValueError: An argument is out of its range; or a state of another size is loaded.

    References:
        Du et al., arXiv 2205.14083, who keep one memory per process, where a shuffled sample is mostly unknown.

    Example:
        >>> history = LogitHistory(10, 3, lag=1)
        >>> history.record(torch.tensor([4, 2]), torch.ones(2, 3), epoch=0)
        >>> history.look_up(torch.tensor([2, 7]), epoch=1)
        (tensor([[1., 1., 1.],
                [0., 0., 0.]]), tensor([ True, False]))
    """

    def __init__(
        self,
        samples: int,
        classes: int,
        *,
        lag: int = 3,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
    ) -> None:
        check_integer("samples", samples, 1)
        check_integer("classes", classes, 1)
        check_integer("lag", lag, 1)
        check_choice("dtype", dtype, DTYPES)
        self._logits = torch.zeros(lag + 1, samples, classes, dtype=DTYPES[dtype], device=device)
        # When and by which process a row was written, so that merging knows whose is the last; -1 for never.
        self._stamps = torch.full((lag + 1, samples), -1, dtype=torch.long, device=device)
        self._epoch = -1
        self._batches = 0  # of that epoch

    @property
    def lag(self) -> int:
        """How many epochs back a look-up goes."""
        return len(self._logits) - 1

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self._logits.shape[1]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self._logits.shape[2]

    @torch.no_grad()
    def record(self, indices: Tensor, logits: Tensor, *, epoch: int) -> None:
        """Remember the logits of a batch; of a sample that occurs twice, the last row.

        Args:
            indices: Which samples, ``[B]``.
            logits: Their logits, ``[B, C]``.
            epoch: The running epoch.

        Raises:
            ValueError: The logits have another shape.
        """
        if logits.shape != (len(indices), self.classes):
            raise ValueError(
                f"Expected logits of shape {(len(indices), self.classes)} but got {tuple(logits.shape)}; remembering "
                "them needs one row [C] per sample."
            )
        self._batches = self._batches + 1 if epoch == self._epoch else 0
        self._epoch = epoch
        indices = _moved(indices, self._logits.device)
        last = _last_occurrence(indices)
        rows = logits.to(device=self._logits.device, dtype=self._logits.dtype)[last]
        usable = rows.isfinite().all(dim=1)
        stamp = epoch << 40 | self._batches << 16 | _rank()
        slot = epoch % len(self._logits)
        self._logits[slot].index_copy_(0, indices, torch.where(usable.unsqueeze(1), rows, 0.0))
        self._stamps[slot].index_copy_(0, indices, torch.where(usable, stamp, -1))

    @torch.no_grad()
    def look_up(self, indices: Tensor, *, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the logits that samples had ``lag`` epochs ago, and which of them are known; unknown ones are zero.

        Args:
            indices: Which samples, ``[B]``.
            epoch: The running epoch.
        """
        indices = _moved(indices, self._logits.device)
        slot = (epoch - self.lag) % len(self._logits)
        return self._logits[slot][indices].float(), self._stamps[slot][indices] >= 0

    @torch.no_grad()
    def merge(self, *, epoch: int, device: torch.device | str | None = None) -> None:
        """Give every process what any of them wrote in ``epoch``; a sample that several wrote keeps the last.

        All processes have to call it, at the end of an epoch and before :meth:`state_dict` is saved; nothing happens
        without a process group.

        Args:
            epoch: The running epoch.
            device: Where the process group can communicate; that of the memory when ``None``.
        """
        if _processes() == 1:
            return
        slot = epoch % len(self._logits)
        for start in range(0, self.samples, ROWS):
            stamps, logits = (table[slot, start : start + ROWS] for table in (self._stamps, self._logits))
            newest = stamps.to(device=device, copy=True)
            torch.distributed.all_reduce(newest, torch.distributed.ReduceOp.MAX)
            newest = newest.to(stamps.device)
            # exactly one process gives each row, so that adding bytes copies it; one is left when their number changed
            ours = (stamps == newest) & (newest >= 0) & ((newest & 0xFFFF) % _processes() == _rank())
            rows = torch.where(ours.unsqueeze(1), logits, 0.0).to(device=device).contiguous()
            torch.distributed.all_reduce(rows.view(torch.uint8))
            stamps.copy_(newest)
            logits.copy_(rows)

    def to(self, device: torch.device | str) -> Self:
        """Move the memory.

        Args:
            device: Where to.
        """
        self._logits = self._logits.to(device)
        self._stamps = self._stamps.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return everything; the tensors are those of the memory."""
        return {"logits": self._logits, "stamps": self._stamps, "epoch": self._epoch, "batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, which is copied; another storage type is converted.

        Args:
            state: What :meth:`state_dict` returned.
        """
        found, own = state["logits"].shape, self._logits.shape
        for name, saved, present in zip(("lag", "samples", "classes"), found, own, strict=True):
            if saved != present:
                less = 1 if name == "lag" else 0
                raise ValueError(
                    f"The saved history of logits has {name}={saved - less} but this one has {name}={present - less}."
                )
        self._logits.copy_(state["logits"])
        self._stamps.copy_(state["stamps"])
        self._epoch = state["epoch"]
        self._batches = state["batches"]


def _last_occurrence(indices: Tensor) -> Tensor:
    """For each position, the last one that holds the same index: writing in any order then gives the same result."""
    values, order = indices.sort(stable=True)
    return order[torch.searchsorted(values, indices, right=True) - 1]


def _moved(indices: Tensor, device: torch.device) -> Tensor:
    if indices.device.type == "cpu" and device.type == "cuda":
        return indices.pin_memory().to(device, non_blocking=True)  # from pageable memory the stream would be waited for
    return indices.to(device)


def _processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _rank() -> int:
    return torch.distributed.get_rank() if _processes() > 1 else 0
