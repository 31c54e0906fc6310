"""The calibration penalty that learns from validation, and the batch-level criteria, inside a Trainer."""

import copy

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.callbacks import Criterion, LogitRegularization
from lightning_robust.losses import CALS, MMCE, Brier, SoftECE
from support.modules import CLASSES, PlainModule, loader, trainer, weights_of

EPOCHS = 4


def penalty():
    return CALS(num_classes=CLASSES, alpha=0.3, margin=0.1, gamma=1.5, tau=1.01)


def validation():
    return loader(seed=1, batch_size=9)


def by_hand(module, epochs):
    """A loop that trains with the penalty and updates the weights of the classes as the rule says."""
    module, weights, previous = copy.deepcopy(module), torch.ones(CLASSES), None
    optimizer = module.configure_optimizers()

    def excess(z):
        return (z.max(1, keepdim=True).values - z - 0.1).relu()

    for _ in range(epochs):
        module.train()
        for x, y in loader():
            z = module.net(x)
            optimizer.zero_grad()
            (F.cross_entropy(z, y) + 0.3 * (weights * excess(z)).mean()).backward()
            optimizer.step()
        module.eval()
        with torch.no_grad():
            score = (weights * excess(torch.cat([module.net(x) for x, _ in validation()]))).mean(0)
        if previous is not None:
            up, down = score > 1.01 * previous, score < previous / 1.01
            weights = torch.where(up, weights * 1.5, torch.where(down, weights / 1.5, weights))
        previous = score
    return weights_of(module), weights


def test_class_weights_follow_the_validation_data():
    module, callback = PlainModule(), LogitRegularization(penalty())
    expected, weights = by_hand(module, EPOCHS)
    trainer(callback, max_epochs=EPOCHS, num_sanity_val_steps=2).fit(module, loader(), validation())
    torch.testing.assert_close(callback.regularizer.class_weights, weights)
    torch.testing.assert_close(weights_of(module), expected)
    assert len(weights.unique()) > 1


def test_a_run_that_continues_has_the_same_class_weights(tmp_path):
    whole, callback = PlainModule(), LogitRegularization(penalty())
    trainer(callback, max_epochs=EPOCHS).fit(whole, loader(), validation())
    first = trainer(LogitRegularization(penalty()), max_epochs=2)
    first.fit(PlainModule(), loader(), validation())
    first.save_checkpoint(tmp_path / "half.ckpt")
    again, resumed = PlainModule(seed=1), LogitRegularization(penalty())
    trainer(resumed, max_epochs=EPOCHS).fit(again, loader(), validation(), ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(weights_of(again), weights_of(whole), rtol=0, atol=0)
    assert torch.equal(resumed.regularizer.level, callback.regularizer.level)


def test_class_weights_need_validation_data():
    with pytest.raises(ValueError, match="CALS adapts itself on validation data, but this run has none"):
        trainer(LogitRegularization(penalty()), max_epochs=1).fit(PlainModule(), loader())


@pytest.mark.parametrize("criterion", [MMCE(weighted=True), SoftECE(base=Brier())], ids=["mmce", "soft_ece"])
def test_a_batch_level_criterion_takes_the_place_of_the_loss(criterion):
    module = PlainModule()
    reference = copy.deepcopy(module).train()
    optimizer = reference.configure_optimizers()
    for x, y in loader():
        optimizer.zero_grad()
        criterion(reference.net(x), y).backward()
        optimizer.step()
    trainer(Criterion(criterion), max_epochs=1).fit(module, loader())
    torch.testing.assert_close(weights_of(module), weights_of(reference))
