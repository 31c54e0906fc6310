# SPDX-License-Identifier: Apache-2.0
"""What an evaluation computes: clean predictions, attacks on one batch, and the look at what they returned."""

import time
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_robust.evaluation.contract import InputContract
from lightning_robust.evaluation.counted import CountedModel
from lightning_robust.evaluation.plan import Stage
from lightning_robust.evaluation.queues import Samples
from lightning_robust.evaluation.tally import StageTally
from lightning_robust.evaluation.verdict import Verdict, judge

__all__ = ["CraftDtype", "Outcome", "StageRunner"]

CraftDtype = Literal["bfloat16", "float16"]


@dataclass(frozen=True)
class Outcome:
    """What a stage did to a batch; on the CPU but for the images.

    Args:
        fooled: Samples ``[B]`` for which a valid adversarial point was found.
        x_adv: What the attack returned for each.
        points: The adversarial ones among them.
        rounded: Whether each, rounded to 8 bits, fools the model.
        rounded_inside: Whether it does so within the budget.
    """

    fooled: Tensor
    x_adv: Tensor
    points: Tensor
    rounded: Tensor
    rounded_inside: Tensor


class StageRunner:
    """Runs a model and attacks on batches, and counts.

    Args:
        model: The model.
        contract: What the images are.
        craft_dtype: Run attacks under autocast in this type; points are looked at without it.
        eight_bit: Look at adversarial points after rounding to 8 bits as well.
    """

    def __init__(
        self, model: CountedModel, contract: InputContract, *, craft_dtype: CraftDtype | None, eight_bit: bool
    ) -> None:
        self.model, self.contract = model, contract
        self.craft_dtype, self.eight_bit = craft_dtype, eight_bit

    def predict(self, samples: Samples, batch_size: int) -> tuple[Tensor, StageTally]:
        """Predicted class of each clean image, on the CPU, and what it cost.

        Args:
            samples: Images.
            batch_size: Images per forward.
        """
        began = time.monotonic()
        predictions = []
        for part in samples.split(batch_size):
            _seed(part, stage=-1)
            predictions.append(self.model.plain(part.x).argmax(1).cpu())
        spent = time.monotonic() - began
        return torch.cat(predictions), StageTally(entered=len(samples), forwards=len(samples), seconds=spent)

    def attack(self, stage: Stage, number: int, samples: Samples) -> tuple[Outcome, StageTally]:
        """Attack a batch and verify what comes back.

        Args:
            stage: The stage.
            number: Its number, by which draws of a random model differ from those in other stages.
            samples: Images that are right so far.

        Raises:
            ValueError: A logit was NaN or infinite, or the points are no images like the clean ones.
        """
        began = time.monotonic()
        x, y = samples.x, samples.y
        self.model.reset()
        with self._crafting(x.device):
            x_adv = stage.attack(self.model, x, y, indices=samples.index.to(x.device)).detach()
        self._refuse_non_finite(stage.info.name)
        tally = StageTally(entered=len(samples), forwards=self.model.forwards, backwards=self.model.backwards)
        self.model.reset()
        _seed(samples, number)
        verdict = judge(self.model, x, x_adv, y, stage.budget)
        if self.craft_dtype is not None:
            tally.lost = self._lost(x_adv, y, verdict)
        outcome = self._outcome(stage, samples, x_adv, verdict.fooled)
        tally.add(
            broken=int(verdict.fooled.sum()),
            verifications=self.model.forwards,
            over_budget=int(verdict.over_budget.sum()),
            out_of_bounds=int(verdict.out_of_bounds.sum()),
            not_finite=int(verdict.not_finite.sum()),
            rejected=int((verdict.misclassified & ~verdict.fooled).sum()),
            max_size=float(verdict.size.max()),
            seconds=time.monotonic() - began,
        )
        return outcome, tally

    def _lost(self, x_adv: Tensor, y: Tensor, verdict: Verdict) -> int:
        with self._crafting(x_adv.device), torch.no_grad():
            believed = self.model(x_adv).argmax(1) != y
        return int((believed & ~verdict.misclassified).sum())

    def _outcome(self, stage: Stage, samples: Samples, x_adv: Tensor, fooled: Tensor) -> Outcome:
        points = x_adv[fooled]
        wrong = inside = torch.zeros(len(points), dtype=torch.bool)
        if self.eight_bit and len(points):
            rounded = self.contract.eight_bit(points)
            wrong = self.model.plain(rounded).argmax(1) != samples.y[fooled]
            inside = wrong & stage.budget.holds(samples.x[fooled], rounded)
        return Outcome(fooled.cpu(), x_adv, points, wrong.cpu(), inside.cpu())

    def _refuse_non_finite(self, stage: str) -> None:
        if not self.model.finite:
            hint = "" if self.craft_dtype is None else f"; or run the attack in float32 (craft_dtype={None})"
            raise ValueError(
                f"The evaluated model returned NaN or infinite logits for a point of {stage}, which would pass for "
                f"robustness; look for diverged weights or overflow in half precision{hint}."
            )

    def _crafting(self, device: torch.device) -> Any:
        if self.craft_dtype is None:
            return torch.autocast(device.type, enabled=False)
        return torch.autocast(device.type, dtype=getattr(torch, self.craft_dtype))


def _seed(samples: Samples, stage: int) -> None:
    """Let a model that draws random numbers draw the same in every run, and others in every batch."""
    seed = zlib.crc32(samples.index.numpy().tobytes(), stage & 0xFFFF)
    torch.default_generator.manual_seed(seed)
    if samples.x.device.type != "cpu":
        torch.get_device_module(samples.x.device.type).manual_seed(seed)
