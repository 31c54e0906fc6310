# SPDX-License-Identifier: Apache-2.0
"""Notices when adversarial training stops to help, or breaks, and can end it at the best epoch."""

import pickle
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import FGSM, PGD
from lightning_robust.callbacks._attacked_validation import PREFIXES, AttackedValidation
from lightning_robust.callbacks._overfitting_signals import Signals, signal_sums
from lightning_robust.callbacks._strategies import keeps_whole_weights
from lightning_robust.callbacks.robustness_monitor import RobustnessMonitor
from lightning_robust.checks import check_choice, check_in_range, check_integer, check_non_negative
from lightning_robust.training import BatchAdapter

__all__ = ["OverfittingGuard"]

Action = Literal["warn", "stop", "restore"]


class OverfittingGuard(AttackedValidation):
    r"""Watches held-out images for the two ways in which adversarial training overfits.

    *Catastrophic overfitting* of single-step training: within a few batches the network learns to withstand the single
    step and nothing else. It is reported when, on the watched images, accuracy under the iterated attack has fallen to
    ``drop`` of its best while accuracy under a single step has not fallen.

    *Robust overfitting*: in late epochs robust accuracy on new images falls for good while that on training images
    still rises. It is reported when the best robust accuracy was ``max_gap`` higher, ``patience`` validations in a row.

    Logged are ``val/guard_robust_acc``, ``val/guard_single_step_acc``, ``val/guard_robust_gap`` (best minus present)
    and three further signs of a loss that is no longer linear within the budget: ``val/guard_gradient_cosine`` (of the
    gradients at an image and nearby; above 0.6 in health, below 0.3 after a collapse), ``val/guard_abnormal`` (share of
    images whose loss the single step lowers), ``val/guard_half_step_acc`` (halfway along the step; below
    ``guard_single_step_acc`` after a collapse). With ``train_monitor`` also ``val/guard_train_gap``, its value minus
    robust accuracy.

    Everything is decided on validation images in ``fit``; test images are never looked at. With
    ``action="restore"`` the weights that a ``ModelCheckpoint`` chose by a robust validation accuracy are loaded when
    the fit ends, so what is tested afterwards is the most robust epoch.

    Cost: per validation and image ``attack.passes`` + 5 passes, by default 15 over 128 images.

    Args:
        attack: the iterated attack; when ``None`` ``PGD(eps=8/255, step_size=2/255, steps=10)``.
        single_step: the attack of the training; when ``None`` FGSM-RS with the budget, norm and pixel space of
            ``attack``: a random start and a step of ``1.25 * eps``.
        action: ``"warn"`` once; ``"stop"`` the training too; ``"restore"``: stop, and load the best weights.
        drop: catastrophic overfitting is a fall to this part of the best robust accuracy.
        max_gap: robust overfitting is a loss of this much robust accuracy, in [0, 1] ...
        patience: ... in so many validations in a row.
        train_monitor: name of a logged training accuracy under attack, such as ``"train/acc"``, to compare with.
        every_n_epochs: look in every n-th epoch only.
        max_samples: look at this many images, the first of the loader, which should not shuffle; ``None`` for all.
        dataloader_idx: which validation loader is looked at if there are several.
        seed: seed of the random starts, the same in every epoch.
        logits_from: dotted name of the sub-module whose output is the logits; found by itself when ``None``.
        batch: how to read images and targets from a batch; the usual forms are understood when ``None``.

    Raises:
        ValueError: an argument out of range; with ``"restore"``, no ``ModelCheckpoint`` that keeps the epoch of the
            largest ``val/guard_robust_acc`` (or the accuracy of a
            :class:`~lightning_robust.callbacks.RobustnessMonitor`), or a strategy that shards weights.

    References:
        Rice et al., Overfitting in Adversarially Robust Deep Learning, arXiv 2002.11569; Wong et al., Fast is Better
        than Free, arXiv 2001.03994; Andriushchenko and Flammarion, Understanding and Improving Fast Adversarial
        Training, arXiv 2007.02617 (the cosine); Lin et al., arXiv 2404.08154 (abnormal examples).

    Example:
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> from lightning_robust.callbacks import OverfittingGuard
        >>> keep = ModelCheckpoint(monitor="val/guard_robust_acc", mode="max")
        >>> trainer = L.Trainer(callbacks=[OverfittingGuard(action="restore"), keep], logger=False)
    """

    sums: ClassVar[tuple[int, ...]] = (6,)
    sum_dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(
        self,
        attack: PGD | None = None,
        *,
        single_step: FGSM | None = None,
        action: Action = "warn",
        drop: float = 0.5,
        max_gap: float = 0.05,
        patience: int = 3,
        train_monitor: str | None = None,
        every_n_epochs: int = 1,
        max_samples: int | None = 128,
        dataloader_idx: int = 0,
        seed: int = 0,
        logits_from: str | None = None,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__(
            every_n_epochs=every_n_epochs,
            max_samples=max_samples,
            stages=["validate"],
            dataloader_idx=dataloader_idx,
            seed=seed,
            logits_from=logits_from,
            batch=batch,
        )
        check_choice("action", action, ("warn", "stop", "restore"))
        check_in_range("drop", drop, 0.0, 1.0)
        check_non_negative("max_gap", max_gap)
        check_integer("patience", patience, 1)
        self.attack = PGD(eps=8 / 255, step_size=2 / 255, steps=10) if attack is None else attack
        self.single_step = _single_step_of(self.attack) if single_step is None else single_step
        self.action = action
        self.drop, self.max_gap, self.patience = drop, max_gap, patience
        self.train_monitor = train_monitor
        self._history: list[dict[str, float]] = []  # signals of each validation of the fit
        self._found: list[str] = []  # kinds of overfitting already reported

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._history, self._found = [], []
        if stage != "fit" or self.action != "restore":
            return
        if not keeps_whole_weights(trainer):
            raise ValueError("OverfittingGuard restores whole weights, which this strategy shards; use action='stop'.")
        self._kept(trainer)

    @override
    def should_attack(self, trainer: L.Trainer, stage: str) -> bool:
        return trainer.state.fn == TrainerFn.FITTING and super().should_attack(trainer, stage)

    @override
    def measure(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, seed: int) -> Tensor:
        return signal_sums(model, x, y, self.attack, self.single_step, seed)

    @override
    def conclude(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str, totals: Tensor) -> None:
        signals = asdict(Signals.from_sums(totals))
        self._history.append(dict(signals))
        robust = signals["robust_acc"]
        signals["robust_gap"] = max(each["robust_acc"] for each in self._history) - robust
        if self.train_monitor is not None and self.train_monitor in trainer.callback_metrics:
            signals["train_gap"] = float(trainer.callback_metrics[self.train_monitor]) - robust
        for name, value in signals.items():
            pl_module.log(f"{PREFIXES[stage]}/guard_{name}", value, sync_dist=True)
        found = [kind for kind in self.diagnose() if kind not in self._found]
        for kind in found:
            self._found.append(kind)
            self._react(trainer, kind)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = self._kept(trainer).best_model_path if self.action == "restore" else ""
        if path:
            # on all ranks: they train the same weights
            pl_module.load_state_dict(_weights(path))
            rank_zero_info(f"OverfittingGuard restored the most robust epoch, {path}.")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": [dict(each) for each in self._history], "found": list(self._found)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history, self._found = list(state_dict["history"]), list(state_dict["found"])

    def diagnose(self) -> list[str]:
        """What the validations so far show: ``"catastrophic"`` or ``"robust"`` overfitting, both, or nothing."""
        if not self._history:
            return []
        now = self._history[-1]
        best = max(self._history, key=lambda each: each["robust_acc"])
        found = []
        fallen = now["robust_acc"] <= self.drop * best["robust_acc"] and now["robust_acc"] < best["robust_acc"]
        if fallen and now["single_step_acc"] >= best["single_step_acc"]:
            found.append("catastrophic")
        recent = self._history[-self.patience :]
        if len(self._history) > self.patience and all(
            best["robust_acc"] - each["robust_acc"] >= self.max_gap for each in recent
        ):
            found.append("robust")
        return found

    def _react(self, trainer: L.Trainer, kind: str) -> None:
        now, best = self._history[-1], max(each["robust_acc"] for each in self._history)
        seen = f"accuracy under {type(self.attack).__name__} {now['robust_acc']:.1%}, at best {best:.1%}"
        if kind == "catastrophic":
            text = (
                f"Catastrophic overfitting in epoch {trainer.current_epoch}: {seen}, under a single step "
                f"{now['single_step_acc']:.1%}. Train with several steps, a regulariser (ELLE, AAER) or a smaller step."
            )
        else:
            text = (
                f"Robust overfitting since {self.patience} validations: {seen} on held-out images. Stop earlier, or "
                "average or perturb weights."
            )
        rank_zero_warn(text)
        if self.action != "warn":
            # the same on every rank: they have the same sums
            trainer.should_stop = True

    def _kept(self, trainer: L.Trainer) -> ModelCheckpoint:
        robust = {"val/guard_robust_acc"}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RobustnessMonitor):
                robust.add(f"val/{callback.name}_acc")
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor in robust and callback.mode == "max":
                return callback
        raise ValueError(
            "OverfittingGuard(action='restore') needs the checkpoint of the most robust epoch; add "
            "ModelCheckpoint(monitor='val/guard_robust_acc', mode='max') to the Trainer's callbacks."
        )


def _weights(path: str) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"The most robust epoch, {path}, holds objects beside weights, which are not loaded unasked, so the last "
            "weights stay; keep weights only, with ModelCheckpoint(save_weights_only=True) and save_hyperparameters of "
            "plain values."
        ) from error
    return weights


def _single_step_of(attack: PGD) -> FGSM:
    return FGSM(
        eps=attack.eps,
        norm=attack.norm,
        step_size=1.25 * attack.eps,
        random_start=True,
        mean=attack.mean,
        std=attack.std,
        bounds=attack.bounds,
    )
