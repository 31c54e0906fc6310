# SPDX-License-Identifier: Apache-2.0
"""Single-step adversarial training whose first backward gives the gradients of images and weights at once."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_robust.attacks import FGSM
from lightning_robust.attacks.draws import GeneratorDraws
from lightning_robust.losses import cross_entropy, full_precision
from lightning_robust.sharpness.lap import LAP
from lightning_robust.sharpness.loop import sharp_backward
from lightning_robust.sharpness.selection import ParameterSelection

__all__ = ["SharedGradientAttack", "lap_backward"]


class SharedGradientAttack:
    """The images of both passes of a step: where the attack starts, and what it makes of the gradient there.

    Args:
        attack: a single-step attack, that of R-LAP when ``None``; its ``mode`` does not matter, for the step itself
            runs the model.
        x: clean images ``[B, ...]``.
        generator: source of randomness on the device of ``x``.
        start: where to start, used as it is; drawn when ``None``.

    Raises:
        ValueError: the attack is none that one gradient of the training loss can make, or the images are outside its
            bounds (looked for on the CPU only, where it is free).

    Example:
        >>> x = torch.tensor([[0.5, 0.5]])
        >>> shared = SharedGradientAttack(FGSM(eps=0.1), x, torch.Generator())
        >>> (shared.start * torch.tensor([1.0, -1.0])).sum().backward()
        >>> shared.attacked()
        tensor([[0.6000, 0.4000]])
    """

    def __init__(self, attack: FGSM | None, x: Tensor, generator: torch.Generator, start: Tensor | None = None) -> None:
        attack = single_step(attack)
        if x.device.type == "cpu":
            attack.space.check(x)
        self.attack = attack
        self.x = x.detach()
        if start is None:
            start = attack.draw_start(full_precision(self.x), GeneratorDraws(generator))
        #: Leaf tensor; its ``.grad`` has to be set before :meth:`attacked`.
        self.start = start.detach().to(x.dtype, copy=True).requires_grad_()

    def attacked(self) -> Tensor:
        """The attacked images, shaped and typed like the clean ones.

        Raises:
            ValueError: no gradient reached the start.
        """
        gradient = self.start.grad
        if gradient is None:
            raise ValueError(
                "No gradient reaches the images from the training loss, so they cannot be attacked; take "
                "torch.no_grad() and .detach() out of the way from the images to the loss."
            )
        start = full_precision(self.start.detach())
        return self.attack.step(full_precision(self.x), start, full_precision(gradient)).to(self.x.dtype)


def single_step(attack: FGSM | None) -> FGSM:
    """An attack that needs one gradient of the training loss only; that of R-LAP when ``None``.

    Args:
        attack: the attack.

    Raises:
        ValueError: it needs more.
    """
    if attack is None:
        return FGSM(eps=8 / 255, step_size=10 / 255, random_start=True)
    if attack.steps != 1 or attack.restarts != 1 or attack.loss != "ce" or attack.targeted:
        raise ValueError(
            "The attack uses the gradient of the training loss at its start, so it has one step, one start and no "
            f"loss or target of its own; {attack!r} has."
        )
    return attack


def lap_backward(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    method: LAP,
    optimizer: torch.optim.Optimizer,
    *,
    attack: FGSM | None = None,
    criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    perturb: ParameterSelection | None = None,
    replay: bool = True,
    step: int | None = None,
    total_steps: int = -1,
    accumulate: int = 1,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> Tensor:
    """Single-step adversarial training with layer-aware weight perturbation; takes the place of ``loss.backward()``.

    The weights are as before when this returns; ``optimizer.step()`` takes the step and leaves them perturbed.

    Args:
        model: maps images to logits.
        x: clean images ``[B, ...]``.
        y: classes ``[B]`` or probabilities ``[B, C]``.
        method: for example ``LAP(beta=0.002)``.
        optimizer: the optimizer of the model.
        attack: single-step attack; when ``None`` ``FGSM(eps=8/255, step_size=10/255, random_start=True)`` (R-LAP).
        criterion: ``criterion(logits, y) -> scalar``.
        start: where the attack starts, used as it is; drawn when ``None``.
        generator: source of the start on the device of ``x``; seeded from torch's global one when ``None``.
        perturb: which weights are perturbed; those of the method when ``None``.
        replay: both passes see the same random numbers (dropout masks); ``False`` draws fresh ones.
        step: optimizer steps taken so far, for schedules.
        total_steps: optimizer steps of the run, for schedules that need its length.
        accumulate: number of calls whose directions and moves are averaged before the optimizer steps.
        backward: delivers a loss whose gradient is the direction; ``self.manual_backward`` in manual optimization.

    Returns:
        The loss on the attacked images at the perturbed weights; detached.

    Raises:
        ValueError: the attack has several steps, or what :func:`sharp_backward` refuses.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> loss = lap_backward(model, torch.rand(8, 4), torch.arange(8) % 3, LAP(beta=0.002), optimizer)
        >>> optimizer.step()
    """
    if generator is None:
        generator = torch.Generator(x.device).manual_seed(int(torch.randint(2**62, ())))
    images = SharedGradientAttack(attack, x, generator, start)
    return sharp_backward(
        lambda: criterion(model(images.attacked()), y),
        method,
        optimizer,
        module=model,
        perturb=perturb,
        ascent_closure=lambda: criterion(model(images.start), y),
        ascent_inputs=[images.start],
        replay=replay,
        step=step,
        total_steps=total_steps,
        accumulate=accumulate,
        backward=backward,
    )
