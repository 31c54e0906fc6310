"""Random logits and labels, and the naive form of a loss that is linear in the target."""

import torch

from lightning_robust.losses import MixedTarget


def logits_and_labels(seed=0, samples=6, classes=5, scale=4.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (samples,), generator=generator)
    return logits.to(dtype).requires_grad_(), labels


def soft_labels(seed=0, samples=6, classes=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, classes, generator=generator, dtype=torch.float64).softmax(1)


def mixed_labels(labels, seed=0):
    lam = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return MixedTarget(labels, labels.flip(0), lam)


def of_every_class(loss, logits):
    """The loss with each class as label, one class and one sample at a time, `[B, C]`."""
    rows = [
        [loss(row[None], torch.tensor([label])) for label in range(logits.shape[1])] for row in logits.double().detach()
    ]
    return torch.tensor(rows, dtype=torch.float64)


def same_gradients(ours, reference, logits, **tolerance):
    """Values and gradients of two functions of logits agree."""
    values, expected = ours(logits), reference(logits)
    torch.testing.assert_close(values, expected, **tolerance)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0], **tolerance)
