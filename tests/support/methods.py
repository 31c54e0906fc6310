"""Sharpness-aware methods that exist for tests."""

from lightning_robust.sharpness import SharpnessMethod


class Late(SharpnessMethod):
    """Climbs along the gradient; the pass at the perturbed weights counts."""

    counted = "perturbed"
    ascent_only = True

    def direction(self, weights, gradients, probe):
        return probe.gradient_at(gradients, 0.5)
