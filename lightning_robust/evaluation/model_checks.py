# SPDX-License-Identifier: Apache-2.0
"""Sanity checks of the model alone: is it a fixed, deterministic function from images to logits?"""

import torch
from torch import Tensor, nn

from lightning_robust.evaluation.check import Check
from lightning_robust.evaluation.judge import fine, warned
from lightning_robust.evaluation.model_state import backwards_seen, module_state, same_generators, state_changes
from lightning_robust.evaluation.probe import Probe
from lightning_robust.guards import RandomState
from lightning_robust.losses import full_precision

__all__ = [
    "autograd_in_forward",
    "batch_independence",
    "determinism",
    "finite",
    "fixed_state",
    "input_range",
    "outputs",
]


def finite(probe: Probe) -> Check:
    """Are the logits finite, for the clean images and for corners of the budget?

    A warning means that the model overflows or has diverged: NaN passes for a right answer wherever the label is 0.
    Remedy: find the layer (``torch.autograd.set_detect_anomaly``), or evaluate in float32.

    Args:
        probe: What is checked.
    """
    generator = torch.Generator(probe.x.device).manual_seed(probe.seed)
    signs = torch.empty_like(probe.x).normal_(generator=generator).sign()
    corners = probe.space.clip(probe.x + probe.space.from_pixels(probe.norm.project(probe.eps * signs, probe.eps)))
    bad = sum(int((~probe.logits(images).isfinite()).any(1).sum()) for images in (probe.x, corners))
    if bad:
        text = f"{bad} of {2 * len(probe)} images have NaN or infinite logits, which would pass for robustness; look "
        return warned("finite", text + "for diverged weights or overflow.", {"not_finite": bad})
    return fine("finite", "All logits are finite.", {"not_finite": 0})


def outputs(probe: Probe, *, tolerance: float = 1e-3) -> Check:
    """Are the outputs logits, or probabilities already?

    A warning means that a softmax is a part of the model. Attacks on the cross-entropy then see a softmax of a softmax,
    whose gradients are small where the model is confident, and report too much robustness. Remedy: return the values
    before the softmax.

    Args:
        probe: What is checked.
        tolerance: how far the rows' sums may be from 1 to count as probabilities.
    """
    logits = probe.logits(probe.x)
    rows = (logits >= -tolerance).all(1) & ((logits.sum(1) - 1).abs() <= tolerance)
    numbers = {"share_of_rows": float(rows.float().mean())}
    if bool(rows.all()):
        text = "The outputs are probabilities, not logits, which hides gradients; return the values before the softmax."
        return warned("outputs", text, numbers)
    return fine("outputs", "The outputs are logits.", numbers)


def determinism(probe: Probe, *, batches: int = 4, tolerance: float = 1e-3) -> Check:
    """Do two forwards of the same images agree, and leave the random generators alone?

    A warning means that the model draws random numbers. Attacks then follow the gradient of one draw and the accuracy
    counts on another. Remedy: attack the average over draws (``AutoAttack(version="rand")``) or fix the randomness.

    Args:
        probe: What is checked.
        batches: how many batches are tried.
        tolerance: largest difference of two logits, relative to the largest logit.
    """
    worst, changed, drew = 0.0, 0, 0
    with probe.conditions():
        for part in probe.x.chunk(batches):
            before = RandomState.capture([part.device])
            first = full_precision(probe.network(part))
            drew += not same_generators(before, RandomState.capture([part.device]))
            second = full_precision(probe.network(part))
            scale = first.abs().amax().clamp(min=torch.finfo(first.dtype).tiny)
            worst = max(worst, float((first - second).abs().amax() / scale))
            changed += int((first.argmax(1) != second.argmax(1)).sum())
    numbers = {"largest_difference": worst, "changed_predictions": changed, "batches_that_drew": drew}
    if worst > tolerance or drew:
        what = (
            f"Two forwards of the same images differ (logits by {worst:.2g} of the largest, {changed} of {len(probe)} "
            "predictions)"
            if worst > tolerance
            else "The forward draws random numbers"
        )
        text = f'{what}; attack the average over draws, AutoAttack(version="rand"), or fix the randomness.'
        return warned("determinism", text, numbers)
    return fine("determinism", "Two forwards of the same images agree.", numbers)


def batch_independence(probe: Probe, *, samples: int = 8, tolerance: float = 1e-2) -> Check:
    """Does the answer for an image depend on the images beside it?

    A warning means that something uses statistics of the batch, BatchNorm in training mode as a rule. Robust accuracy
    then depends on how the samples are batched, and an attack that moves one image moves the answers for others.
    Remedy: ``model.eval()``, also for what the forward switches itself; ``track_running_stats=True``.

    Args:
        probe: What is checked.
        samples: how many images are tried alone.
        tolerance: largest difference of two logits, relative to the largest logit.
    """
    chosen = probe.x[: probe.batch_size]
    with probe.conditions():
        before = RandomState.capture([chosen.device])
        together = full_precision(probe.network(chosen))
        drew = not same_generators(before, RandomState.capture([chosen.device]))
    if drew:
        return fine("batch-independence", "Not judged: the model draws random numbers (see determinism).", {})
    alone = torch.cat([_alone(probe, image) for image in torch.split(chosen[:samples], 1)])
    scale = together.abs().amax().clamp(min=torch.finfo(together.dtype).tiny)
    worst = float((together[: len(alone)] - alone).abs().amax() / scale)
    numbers = {"largest_difference": worst, "samples": len(alone)}
    if not worst <= tolerance:
        text = f"The logits of an image differ by {worst:.2g} of the largest when it is alone in its batch; BatchNorm "
        return warned("batch-independence", text + "works in training mode, call model.eval() and keep it so.", numbers)
    return fine("batch-independence", "An image gets the same answer alone and in a batch.", numbers)


def fixed_state(probe: Probe) -> Check:
    """Is the model in evaluation mode, and is it the same model after a forward?

    A warning means that layers are in training mode, or that a forward moves buffers (BatchNorm statistics), weights,
    gradients or ``requires_grad``: every sample then meets another model, and an evaluation changes what it measures.
    Remedy: ``model.eval()``, and no updates in the forward.

    Args:
        probe: What is checked.
    """
    module = probe.module
    if module is None:
        return fine("fixed-state", "A plain callable: its state cannot be seen.", {})
    training = sum(child.training for child in module.modules() if not _is_container(child))
    with probe.conditions():
        before = module_state(module)
        probe.network(probe.x[: probe.batch_size])
        moved = state_changes(before, module_state(module))
    numbers = {"layers_in_training_mode": training, "moved": len(moved)}
    if moved:
        text = f"A forward in evaluation mode changes {', '.join(moved[:3])}; take the updates out of the forward."
        return warned("fixed-state", text, numbers)
    if training:
        text = f"{training} layers were in training mode and were checked in evaluation mode; call model.eval() first."
        return warned("fixed-state", text, numbers)
    return fine("fixed-state", "The model is in evaluation mode and a forward leaves it as it was.", numbers)


def autograd_in_forward(probe: Probe) -> Check:
    """Does the forward itself compute gradients (purification, test-time optimisation)?

    A warning means a dynamic defence: the attack's gradient does not see through the inner optimisation, and the
    robustness is that of an attack that was not adapted. Remedy: differentiate through the inner steps, or approximate
    them by the identity in the backward (BPDA), and average over its randomness.

    Args:
        probe: What is checked.
    """
    network = getattr(probe.network, "_orig_mod", probe.network)  # inside torch.compile the hooks see nothing
    inner = 0
    for grad in (False, True):
        with probe.conditions(grad=grad), backwards_seen() as seen:
            try:
                network(probe.x[:4].clone().requires_grad_(grad))
            except RuntimeError as error:
                # torch.func refuses to run under these hooks, and only a forward that differentiates uses it
                if "saved tensor hooks" not in str(error):
                    raise
                seen.count += 1
        inner += seen.count
    if inner:
        text = "The forward computes gradients itself; the attack must differentiate through them or replace them by "
        return warned("autograd-in-forward", text + "the identity (BPDA).", {"inner_backwards": 1})
    return fine("autograd-in-forward", "The forward computes no gradients.", {"inner_backwards": 0})


def input_range(probe: Probe, *, smallest_range: float = 0.1, margin: float = 0.05) -> Check:
    """Are the images what the model was trained on?

    Images outside the bounds are an error already. A warning means that the pixels fill a small part of the bounds (as
    after dividing by 255 twice), or that the clean accuracy is near chance, as with a normalisation that is missing or
    applied twice. Remedy: give images in the bounds and put the normalisation into the model, or give the attack the
    ``mean`` and ``std`` of the normalised images.

    Args:
        probe: What is checked.
        smallest_range: smallest part of the bounds that the pixels have to fill.
        margin: how much better than always guessing the commonest class the model has to be.
    """
    low, high = (float(value) for value in probe.pixels(probe.x).aminmax())
    filled = (high - low) / probe.full_range
    accuracy = float(probe.clean_right.float().mean())
    chance = float(probe.y.bincount().max() / len(probe))
    numbers = {"lowest": low, "highest": high, "clean_accuracy": accuracy, "chance": chance}
    if filled < smallest_range:
        text = f"The pixels fill only [{low:.3g}, {high:.3g}] of {list(probe.space.bounds)}; give images in these "
        return warned("input-range", text + "bounds, or the attack the true `bounds`.", numbers)
    if len(probe) > 1 and chance < 1 and accuracy < chance + margin:
        text = f"The clean accuracy {accuracy:.1%} is near chance; give the images in the form of the training (the "
        return warned("input-range", text + "model may expect [-1, 1] or another normalisation).", numbers)
    return fine("input-range", "The images fill their bounds and the model knows them.", numbers)


def _alone(probe: Probe, image: Tensor) -> Tensor:
    with probe.conditions():
        return full_precision(probe.network(image))


def _is_container(module: nn.Module) -> bool:
    """Whether a module only passes things on, so that its own flag means nothing."""
    return any(True for _ in module.children())
