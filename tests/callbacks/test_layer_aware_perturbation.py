"""LAP inside a Trainer against the plain loop."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_robust.attacks import FGSM, PGD
from lightning_robust.callbacks import (
    AdversarialTraining,
    Distillation,
    LayerAwarePerturbation,
    LogitRegularization,
    ObjectiveTraining,
    SharpnessAware,
)
from lightning_robust.distillation import KD
from lightning_robust.losses import MaxSup
from lightning_robust.sharpness import LAP, SAM, lap_backward
from lightning_robust.training import derive_seed
from support.modules import DictModule, ManualModule, PlainModule, loader, trainer, weights_of
from support.reference import teacher, trades

FORMS = {
    "V-LAP": FGSM(eps=0.1),
    "R-LAP": FGSM(eps=0.1, step_size=0.125, random_start=True),
    "N-LAP": FGSM(eps=0.1, random_start=True, start_scale=2, projection="box"),
}


def fit(module, *callbacks, form="pair", seed=3, **kwargs):
    L.seed_everything(seed)
    run = trainer(*callbacks, **{"max_epochs": 2, **kwargs})
    run.fit(module, loader(form=form))
    return run


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("track_start", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_plain_loop(form, track_start, replay):
    method = LAP(beta=0.05, track_start=track_start)
    ours = PlainModule(dropout=0.4)
    reference = copy.deepcopy(ours).train()
    fit(ours, LayerAwarePerturbation(method, attack=FORMS[form], replay=replay))
    optimizer = reference.configure_optimizers()
    L.seed_everything(3)
    for epoch in range(2):
        for index, (x, y) in enumerate(loader()):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(derive_seed("3", 0, epoch, index, "attack"))
            options = {"attack": FORMS[form], "generator": generator, "replay": replay}
            lap_backward(reference, x, y, method, optimizer, **options)
            optimizer.step()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-6, atol=1e-7)
    assert int(ours.net[1].num_batches_tracked) == 8 * (1 + track_start)


def test_the_second_pass_logs_and_counts():
    losses, images = [], []

    class Watched(PlainModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.detach())
            images.append(batch[0].detach())
            assert self.train_acc.update_count == batch_idx + (len(losses) + 1) % 2
            return loss

    run = fit(Watched(), LayerAwarePerturbation(LAP(beta=0.05), attack=FORMS["V-LAP"]), max_epochs=1)
    assert len(losses) == 8
    torch.testing.assert_close(run.callback_metrics["train_loss"], torch.stack(losses[1::2]).mean())
    assert "train/sharpness_gap" not in run.callback_metrics
    for start, attacked, (x, _) in zip(images[::2], images[1::2], loader(), strict=True):
        assert torch.equal(start, x)
        assert 0.09 < (attacked - x).abs().max() <= 0.1 + 1e-6


def test_every_hook_sees_weights_as_they_were_before_the_step():
    events = []

    class Probe(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.weights = weights_of(pl_module).clone()

        def see(self, name, pl_module):
            events.append(name)
            assert torch.equal(weights_of(pl_module), self.weights), name

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            self.see("zero", pl_module)

        def on_before_backward(self, trainer, pl_module, loss):
            self.see("before backward", pl_module)

        def on_after_backward(self, trainer, pl_module):
            self.see("after backward", pl_module)

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.see("optimizer", pl_module)

    fit(PlainModule(), LayerAwarePerturbation(), Probe(), max_epochs=1, limit_train_batches=2)
    assert events == ["zero", "before backward", "after backward", "optimizer"] * 2


def test_what_the_step_does_to_its_images_is_part_of_the_attack():
    class Inside(PlainModule):
        def forward(self, x):
            return self.net((x - 0.5) / 0.25)

    class InStep(PlainModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(((batch[0] - 0.5) / 0.25, batch[1]), batch_idx)

    first, second = Inside(), InStep()
    for module in (first, second):
        fit(module, LayerAwarePerturbation(LAP(beta=0.05), attack=FORMS["R-LAP"]))
    assert torch.equal(weights_of(first), weights_of(second))


def test_dictionary_batches_and_adamw():
    module = DictModule()
    before = weights_of(module).clone()
    fit(module, LayerAwarePerturbation(LAP(beta=0.05)), form="dict")
    assert not torch.equal(weights_of(module), before)


def test_terms_added_to_the_loss_see_the_images_of_each_pass():
    seen = []
    guide = teacher()
    guide.register_forward_pre_hook(lambda net, arguments: seen.append(arguments[0].detach()))
    fit(
        PlainModule(),
        LogitRegularization(MaxSup(alpha=0.5)),
        Distillation(guide, KD(temperature=2.0)),
        LayerAwarePerturbation(attack=FORMS["V-LAP"]),
        max_epochs=1,
        limit_train_batches=1,
    )
    x = next(iter(loader()))[0]
    assert len(seen) == 2
    assert torch.equal(seen[0], x)
    assert not torch.equal(seen[1], x)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_may_skip_a_batch():
    calls = []

    class Skipping(PlainModule):
        def training_step(self, batch, batch_idx):
            calls.append(batch_idx)
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    fit(Skipping(), LayerAwarePerturbation(), max_epochs=1)
    assert calls == [0, 0, 1, 1, 2, 2, 3, 3]


def test_overflow_leaves_weights_and_statistics_finite():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    module = PlainModule()
    callback = LayerAwarePerturbation(LAP(beta=0.05), attack=FORMS["R-LAP"])
    fit(module, callback, max_epochs=8, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaler.get_scale() < 2.0**40
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_a_skipped_step_moves_nothing():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    module = PlainModule()
    before = weights_of(module).clone()
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    fit(module, LayerAwarePerturbation(LAP(beta=0.5)), max_epochs=1, limit_train_batches=2, plugins=plugins)
    assert torch.equal(weights_of(module), before)


def test_a_step_that_hides_its_images_is_refused():
    class Hiding(PlainModule):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].detach(), batch[1]), batch_idx)

    with pytest.raises(ValueError, match="No gradient reaches the images from the training loss"):
        fit(Hiding(), LayerAwarePerturbation())


@pytest.mark.parametrize(
    "rival", [lambda: AdversarialTraining(PGD(eps=0.1)), lambda: ObjectiveTraining(trades())], ids=["pgd", "trades"]
)
def test_another_attack_is_refused(rival):
    callback = rival()
    name = type(callback).__name__
    with pytest.raises(ValueError, match=rf"which {name} would replace; remove {name}, or use SharpnessAware\(AWP"):
        fit(PlainModule(), LayerAwarePerturbation(), callback)


def test_what_sharpness_aware_training_refuses_is_refused():
    class WithAdafactor(PlainModule):
        def configure_optimizers(self):
            return torch.optim.Adafactor(self.parameters(), weight_decay=0.1)

    with pytest.raises(ValueError, match="set decay_at_perturbed=False"):
        fit(WithAdafactor(), LayerAwarePerturbation())
    with pytest.raises(ValueError, match="needs automatic optimization"):
        fit(ManualModule(), LayerAwarePerturbation())
    with pytest.raises(ValueError, match="cannot work in one Trainer"):
        fit(PlainModule(), LayerAwarePerturbation(), SharpnessAware(SAM()))


@pytest.mark.parametrize(
    "attack", [PGD(eps=0.1, steps=2), FGSM(random_start=True, restarts=2), FGSM(loss="dlr")], ids=repr
)
def test_attacks_that_need_passes_of_their_own_are_refused(attack):
    with pytest.raises(ValueError, match="uses the gradient of the training loss at its start"):
        LayerAwarePerturbation(attack=attack)


def test_the_method_alone_perturbs_for_the_loss_of_the_batch():
    """With any other attack, PGD for example: the gradient that leads is that of the training loss on its images."""

    class Slow(PlainModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    module = Slow()
    before = module.net[0].weight.detach().clone()
    pgd = AdversarialTraining(PGD(eps=0.1, steps=1))
    fit(module, SharpnessAware(LAP(beta=0.1)), pgd, max_epochs=1, limit_train_batches=1)
    length = (module.net[0].weight.detach() - before).norm()
    torch.testing.assert_close(length, 0.1 * before.norm(), rtol=1e-2, atol=0)
