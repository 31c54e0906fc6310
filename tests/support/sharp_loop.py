"""A method in a Trainer against the same method in a plain loop, with optimizer groups that differ in everything."""

import lightning as L
import torch
from torch.nn import functional as F

from lightning_robust.callbacks import SharpnessAware
from lightning_robust.sharpness import sharp_backward
from support.modules import PlainModule, loader, trainer, weights_of


class Grouped(PlainModule):
    """Two groups with their own learning rate, weight decay and radii, and a schedule."""

    def configure_optimizers(self):
        weights = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        radii = {"rho": 0.1, "grad_rho": 0.02, "grad_norm_rho": 0.1}
        optimizer = torch.optim.SGD(
            [{"params": weights, "lr": 0.1, "weight_decay": 0.05}, {"params": others, "lr": 0.03, **radii}],
            momentum=0.9,
        )
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def follows_the_loop(method, *, accumulate=1, epochs=2, **options):
    """Fails unless both end with the same weights and buffers, bit by bit, and away from where they began."""
    ours, reference = Grouped(dropout=0.3), Grouped(dropout=0.3)
    before = weights_of(reference).clone()
    L.seed_everything(0)
    run = trainer(SharpnessAware(method, **options), max_epochs=epochs, accumulate_grad_batches=accumulate)
    run.fit(ours, loader())
    L.seed_everything(0)
    reference.train()
    (optimizer,), (scheduler,) = reference.configure_optimizers()
    steps = 0
    for _ in range(epochs):
        for index, (x, y) in enumerate(loader()):  # its iterator draws a seed, too
            sharp_backward(
                lambda x=x, y=y: F.cross_entropy(reference(x), y),
                method,
                optimizer,
                module=reference,
                step=steps,
                total_steps=epochs * len(loader()) // accumulate,
                accumulate=accumulate,
                **options,
            )
            if (index + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
        scheduler.step()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name
    assert not torch.equal(weights_of(ours), before)
