"""An exception inside an attack, under a Trainer: everything is as if the attack had not begun."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.attacks import FGSM
from lightning_robust.callbacks import AdversarialTraining, ObjectiveTraining, RobustnessMonitor
from lightning_robust.objectives import TRADES
from support.attacked import CountingNet, differences, images, snapshot
from support.every_attack import EVERY
from support.modules import trainer, weights_of

CHOSEN = [
    *("FGSM-random-linf", "PGD-l2", "PGD-restarts-l1", "PGD-kl-l2", "MIM-linf", "APGD-linf", "APGD-T-l2", "FAB-T-linf"),
    *("Square-linf", "MD-l2", "PMAPlus-linf", "BETA-l1", "AutoAttack-fast", "AttackSequence", "ThreatUnion"),
    *("AttackMixture-random", "AttackMixture-max", "ScheduledAttack", "ForeignAttack"),
]


class Module(L.LightningModule):
    """With a layer that its user froze."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = CountingNet(dropout=0.3)
        self.net.conv.requires_grad_(False)

    def forward(self, x):
        return self.net(x)

    def on_train_start(self):
        self.net.conv.eval()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD([each for each in self.parameters() if each.requires_grad], lr=1e-4)


class ForwardError(Exception):
    pass


class Before(L.Callback):
    """The state of the module and the generators when a batch arrives, after which the forward fails once."""

    def __init__(self, fatal):
        self.fatal = fatal
        self.forwards = 0

    def arm(self, module):
        self.module = snapshot(module)
        self.generators = generators()
        self.hook = module.net.head.register_forward_pre_hook(self.fail)

    def fail(self, module, inputs):
        self.forwards += 1
        if self.forwards == self.fatal:
            raise ForwardError

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            self.arm(pl_module)


def generators():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def data():
    x, _ = images(12)
    with torch.no_grad():
        y = Module().eval()(x).argmax(1)  # right at first, so that no attack is done before it begins
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)


@pytest.mark.parametrize("name", CHOSEN)
def test_adversarial_training(name):
    attack = EVERY[name]()
    module, before = Module(), Before(fatal=1 if isinstance(attack, FGSM) else 2)
    original = module.training_step
    with pytest.raises(ForwardError):
        trainer(before, AdversarialTraining(attack), limit_val_batches=0).fit(module, data())
    found = differences(module, before.module)
    assert [each for each in found if not each.startswith("gradient")] == []
    assert generators() == before.generators
    # Lightning frees gradients of the last step when a fit ends
    assert all(each.grad is None or torch.isfinite(each.grad).all() for each in module.parameters())
    assert module.training_step == original
    before.hook.remove()
    kept = weights_of(module)
    trainer(limit_val_batches=0).fit(module.train(), data())  # goes on without the callback
    assert not torch.equal(weights_of(module), kept)


def test_an_objective_and_its_attack():
    module, before = Module(), Before(fatal=3)
    with pytest.raises(ForwardError):
        trainer(before, ObjectiveTraining(TRADES()), limit_val_batches=0).fit(module, data())
    assert [each for each in differences(module, before.module) if not each.startswith("gradient")] == []
    assert generators() == before.generators


def test_the_attack_of_a_monitor():
    class Validation(Before):
        def on_train_batch_start(self, *args):
            pass

        def on_validation_batch_end(self, trainer, pl_module, *args):
            self.arm(pl_module)

    module, before = Module(), Validation(fatal=2)
    monitor = RobustnessMonitor(EVERY["PGD-linf"](), max_samples=4)
    with pytest.raises(ForwardError):
        trainer(before, monitor, max_epochs=1, limit_val_batches=1).fit(module, data(), data())
    assert [each for each in differences(module, before.module) if not each.startswith("gradient")] == []
    assert generators() == before.generators


def test_the_states_can_be_told_apart():
    """The comparison would see a moved statistic, mode or gradient."""
    module = Module()
    before = snapshot(module)
    module.train()(images(4)[0]).sum().backward()
    module.net.conv.eval()
    kinds = {each.split()[0] for each in differences(module, before)}
    assert kinds == {"value", "gradient", "mode"}
    assert isinstance(module.net.norm, nn.BatchNorm2d)
