# SPDX-License-Identifier: Apache-2.0
"""Annealing self-distillation rectification: labels softened by a moving average of the network itself."""

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_robust.attacks import PGD
from lightning_robust.attacks.conditions import Model, unwrap
from lightning_robust.checks import check_in_range, check_positive
from lightning_robust.losses import autocast_off, full_precision
from lightning_robust.objectives.adversarial_cross_entropy import AdversarialCrossEntropy
from lightning_robust.objectives.base import Objective, Total
from lightning_robust.objectives.targets import SoftTargets
from lightning_robust.objectives.terms import label_probabilities
from lightning_robust.schedules import Cosine, Schedule, as_schedule
from lightning_robust.sharpness import WeightAverage

__all__ = ["ADR", "adr_targets"]


def adr_targets(teacher_logits: Tensor, target: Tensor, temperature: float, interpolation: float) -> Tensor:
    r"""Labels rectified by what a teacher says, the more the surer it is of the label.

    .. math:: y' = \lambda_i\,q + (1 - \lambda_i)\,y, \qquad q = \mathrm{softmax}(t / \tau), \qquad
              \lambda_i = \mathrm{clip}\big(\lambda - (\max_c q_c - q_y), 0, 1\big)

    While :math:`\lambda \le 1` the class of a hard label keeps the largest probability.

    Args:
        teacher_logits: ``[B, C]`` of the clean images.
        target: classes ``[B]``, or probabilities ``[B, C]``, whose :math:`q_y` is their mean of :math:`q`.
        temperature: :math:`\tau`.
        interpolation: :math:`\lambda`.

    Shape:
        ``[B, C]``; float32, or float64 for float64 logits; detached.

    References:
        Wu et al., arXiv:2305.12118.

    Example:
        >>> import torch
        >>> from lightning_robust.objectives import adr_targets
        >>> adr_targets(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), temperature=2.0, interpolation=0.8)
        tensor([[0.4000, 0.6000]])
    """
    with autocast_off(teacher_logits), torch.no_grad():
        q = (full_precision(teacher_logits) / temperature).softmax(1)
        y = label_probabilities(target, q)
        share = (interpolation - (q.amax(1) - (q * y).sum(1))).clamp(0, 1).unsqueeze(1)
        return share * q + (1 - share) * y


class ADR(SoftTargets):
    r"""Adversarial training towards labels that a moving average of the network rectifies.

    .. math:: y' = \lambda_i\,q + (1 - \lambda_i)\,y, \qquad q = \mathrm{softmax}\big(\bar f(x) / \tau_s\big), \qquad
              \bar w \leftarrow d\,\bar w + (1 - d)\,w

    with :math:`\lambda_i` of :func:`adr_targets`. The average :math:`\bar f` begins as a copy of the network, sees the
    clean images in evaluation mode and follows after every optimizer step; temperature and interpolation follow their
    schedules from step to step, over the whole run. Loss and attack are those of an objective on these labels: PGD-AT
    by default, ``objective=TRADES(forwards="joint")`` for ADR with TRADES, with
    ``SharpnessAware(SAMStyleAWP())`` around it for ADR with AWP.

    The average is no part of the module: no optimizer, no DDP reduction and no weight average sees it. Checkpoints hold
    it in the state of the objective, so a run continues exactly. All processes have the same one: BatchNorm statistics
    are those of the first. After training :meth:`averaged` is the network that the paper reports as "ADR + WA".

    Cost: that of the objective, and a forward of the average per batch, a third of a pass; a copy of the network in
    memory and in checkpoints.

    Args:
        objective: the loss on the rectified labels; when ``None`` PGD-AT as published: 10 steps of 2/255 within 8/255,
            in training mode.
        temperature: :math:`\tau_s`, a number or a schedule by optimizer step. The default is the paper's for ResNet-18
            on CIFAR-10; CIFAR-100: 1.5 to 1.0; Tiny-ImageNet: 2.0 to 1.5; with AWP 2.5 to 1.5 and 2.0 to 1.0.
        interpolation: :math:`\lambda_s`, likewise; with AWP on CIFAR-10 0.7 to 0.85, Tiny-ImageNet 0.5 to 0.9.
        decay: :math:`d`, per optimizer step.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: a temperature that is not positive, an interpolation or a decay outside of [0, 1]; in training, if
            a schedule needs the number of steps and the run has no end.
        TypeError: in training, if the network cannot be copied, or the model is a bare function.

    References:
        Wu et al., Annealing Self-Distillation Rectification Improves Adversarial Training, arXiv:2305.12118. In their
        code integer buffers (a BatchNorm's counter) are averaged and rounded down; here they are copied. Their TRADES
        attack starts from ``0.001 * U(0, 1)``, ours from ``0.001 * N(0, 1)`` as TRADES itself.

    Example:
        >>> import torch
        >>> from lightning_robust.attacks import PGD
        >>> from lightning_robust.objectives import ADR, AdversarialCrossEntropy, Running
        >>> model, x, y = torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 2])
        >>> objective = ADR(objective=AdversarialCrossEntropy(attack=PGD(eps=0.1, steps=2)))
        >>> objective.running = Running(step=0, max_steps=100)
        >>> loss = objective(model, objective.prepare(model, x, y)).loss
        >>> objective.step_ends(model, total=lambda tensor: tensor)  # after loss.backward() and the optimizer's step
        >>> type(objective.averaged()).__name__
        'Linear'
    """

    def __init__(
        self,
        *,
        objective: Objective | None = None,
        temperature: float | Schedule | None = None,
        interpolation: float | Schedule | None = None,
        decay: float = 0.995,
    ) -> None:
        attack = PGD(eps=8 / 255, step_size=2 / 255, steps=10, mode="train")
        super().__init__(objective=AdversarialCrossEntropy(attack=attack) if objective is None else objective)
        check_in_range("decay", decay, 0.0, 1.0)
        self.temperature = as_schedule(
            "temperature", Cosine(start=2.5, end=2.0, denominator="T") if temperature is None else temperature
        )
        self.interpolation = as_schedule(
            "interpolation", Cosine(start=0.7, end=0.95, denominator="T") if interpolation is None else interpolation
        )
        self.decay = decay
        #: The moving average; ``None`` before the first batch.
        self.average: WeightAverage | None = None
        self._restored: dict[str, Tensor] = {}
        self._values(0, 1)

    def averaged(self) -> nn.Module:
        """A copy of the moving average of the network, in evaluation mode, to be tested or saved.

        Raises:
            RuntimeError: before the first batch.
        """
        if self.average is None:
            raise RuntimeError("ADR has no moving average before the first batch; train, then ask for it.")
        copied: Any = copy.deepcopy(self.average.module)
        # a LightningModule was silenced to be called inside of another one's step, and knows that one's metrics
        for name in ("log", "log_dict"):
            vars(copied).pop(name, None)
        if "_metric_attributes" in vars(copied):
            copied._metric_attributes = None
        assert isinstance(copied, nn.Module)
        return copied

    @torch.no_grad()
    def copy_average_to(self, module: nn.Module) -> None:
        """Give a network the weights and buffers of the average, also of one that came from a checkpoint.

        Args:
            module: the network that was trained, or another one like it.

        Raises:
            RuntimeError: there is no average.
            ValueError: it is of another network.
        """
        state = self.get_extra_state()
        if not state:
            raise RuntimeError("ADR has no moving average; train, or load the state of an objective that was trained.")
        average = WeightAverage(module, decay=self.decay, without=self)
        average.load_state_dict(state)
        averaged = average.state_dict()
        for name, tensor in chain(module.named_parameters(), module.named_buffers()):
            if name in averaged:
                tensor.copy_(averaged[name])

    @override
    def ready(self, num_classes: int | None = None, in_chans: int | None = None) -> None:
        super().ready(num_classes, in_chans)
        self.average = None  # that of an earlier fit; a restored one comes back with the first batch

    @override
    def targets(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        temperature, interpolation = self._values(self.running.step, self.running.max_steps)
        averaged = self._averaged_model(model, x.device)
        with torch.no_grad():
            logits = averaged(x)
        return adr_targets(logits, y, temperature, interpolation)

    @override
    def step_ends(self, model: Model, total: Total) -> None:
        super().step_ends(model, total)
        if self.average is None:
            return
        self.average.update(_network(model))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.average.broadcast_buffers()

    @override
    def passes(self, inner: float) -> float:
        return super().passes(inner) + 1 / 3

    def _values(self, step: int, max_steps: int) -> tuple[float, float]:
        temperature = self.temperature.at(step, max_steps)
        interpolation = self.interpolation.at(step, max_steps)
        check_positive("temperature", temperature)
        check_in_range("interpolation", interpolation, 0.0, 1.0)
        return temperature, interpolation

    def _averaged_model(self, model: Model, device: torch.device) -> Model:
        """The moving average as a map of images to logits, made with the first batch."""
        if self.average is None or self._restored:
            self.average = WeightAverage(_network(model), decay=self.decay, without=self)
            if self._restored:
                state, self._restored = self._restored, {}
                self.average.load_state_dict(state)
        if next((tensor.device for tensor in self.average.state_dict().values()), device) != device:
            self.average.to(device)
        if isinstance(unwrap(model)[0], nn.Module):
            return self.average.module
        averaged: Model = model.on(self.average.module)  # type: ignore[attr-defined]
        return averaged

    @override
    def get_extra_state(self) -> dict[str, Tensor]:
        """The moving average, weights and buffers by name."""
        if self.average is None or self._restored:
            return self._restored
        return {name: tensor.detach() for name, tensor in self.average.state_dict().items()}

    @override
    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a moving average, as soon as a batch shows the network."""
        self._restored = {name: tensor.detach().clone() for name, tensor in state.items()}

    @override
    def extra_repr(self) -> str:
        return f"temperature={self.temperature!r}, interpolation={self.interpolation!r}, decay={self.decay}"


def _network(model: Model) -> nn.Module:
    """The network behind a model, without what ``torch.compile`` made of it."""
    function, module = unwrap(model)
    if module is None or (not isinstance(function, nn.Module) and not hasattr(model, "on")):
        raise TypeError(
            "ADR averages the weights of the network, but the model is a bare function; give the nn.Module itself."
        )
    original: Any = getattr(module, "_orig_mod", module)
    assert isinstance(original, nn.Module)
    return original
