"""The losses with a state of their own, in a Trainer: AdaFocal's exponents and the weights of the truncated GCE."""

import lightning as L
import pytest
import torch

from lightning_robust.callbacks import Criterion
from lightning_robust.losses import AdaFocal, TruncatedGCE, adafocal_loss, gce_loss
from support.modules import PlainModule, loader, trainer
from support.shuffled import close, shuffled

EPOCHS = 3


def truncated():
    # the network knows little yet: chance is 1 / 4
    return TruncatedGCE(k=0.25, start_epoch=2, every=1)


def batches(epoch):
    data = shuffled()
    data.sampler.set_epoch(epoch)
    for index in torch.tensor(list(data.sampler)).split(6):
        yield index, data.dataset.x[index], data.dataset.y[index]


def run(criterion, *others, ckpt_path=None):
    L.seed_everything(0)
    module, callback = PlainModule(norm=False), Criterion(criterion)
    trainer(callback, *others, max_epochs=EPOCHS).fit(module, shuffled(), loader(batch_size=16), ckpt_path=ckpt_path)
    return module, callback.criterion


def test_truncated_gce_is_a_loop_with_a_list_of_weights():
    module, criterion = run(truncated())
    reference = PlainModule(norm=False).train()
    optimizer = reference.configure_optimizers()
    weights, losses = torch.ones(22), torch.zeros(22)
    pruned = []
    for epoch in range(EPOCHS):
        for index, x, y in batches(epoch):
            each = gce_loss(reference(x), y)
            losses[index] = each.detach()
            loss = (weights[index] * (each - criterion.threshold)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights = (losses < criterion.threshold).float()
        pruned.append(int((weights == 0).sum()))
    assert all(0 < count < 22 for count in pruned), pruned
    close(module, reference)
    torch.testing.assert_close(criterion.weights.rows, weights)


def test_adafocal_is_a_loop_that_validates_after_every_epoch():
    module, criterion = run(AdaFocal(n_bins=3))
    reference, again = PlainModule(norm=False).train(), AdaFocal(n_bins=3)
    optimizer = reference.configure_optimizers()
    for epoch in range(EPOCHS):
        for _, x, y in batches(epoch):
            optimizer.zero_grad()
            adafocal_loss(reference(x), y, gammas=again.gammas, bounds=again.bounds).mean().backward()
            optimizer.step()
        with torch.no_grad():
            for x, y in loader(batch_size=16):
                again.observe(reference(x), y)
        again.validation_ends(lambda count: count)
    close(module, reference)
    torch.testing.assert_close(criterion.gammas, again.gammas, rtol=1e-3, atol=0)
    assert criterion.gammas.ne(1).all()


class Save(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, run, *_):
        if run.global_step == 6:  # in the middle of the second epoch
            run.save_checkpoint(self.path)


@pytest.mark.parametrize("make", [truncated, lambda: AdaFocal(n_bins=3)], ids=["truncated", "adafocal"])
def test_a_continued_run_equals_one_that_was_not_interrupted(make, tmp_path):
    path = tmp_path / "run.ckpt"
    module, criterion = run(make(), Save(path))
    torch.load(path, weights_only=True)
    continued, other = run(make(), ckpt_path=path)
    close(continued, module, rtol=0, atol=0)
    state = criterion.state_dict()
    assert state
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
