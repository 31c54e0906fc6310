"""Overfitting of adversarial training, noticed on validation images."""

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import FGSM, PGD, GeneratorDraws
from lightning_robust.callbacks import OverfittingGuard, RobustnessMonitor
from lightning_robust.callbacks._overfitting_signals import Signals, signal_sums
from support.attacked import CountingNet, differences, images, snapshot
from support.modules import DictModule, PlainModule, loader, trainer, weights_of

ATTACK = PGD(eps=0.05, steps=3)


class Scripted(OverfittingGuard):
    """A guard that is told what it sees: (robust accuracy, single-step accuracy) of each validation."""

    def __init__(self, *seen, **options):
        super().__init__(ATTACK, **options)
        self.seen = iter(seen)

    def measure(self, model, x, y, seed):
        if not self._left:  # the last batch of the validation
            robust, single = next(self.seen)
            self.now = 8.0 * torch.tensor([1.0, robust, single, single, 0.0, 0.5])
            return self.now
        return torch.zeros(6)


def fit(guard, *callbacks, epochs=4, module=None, **options):
    run = trainer(guard, *callbacks, max_epochs=epochs, **options)
    run.fit(module or PlainModule(lr=0.05), loader(), loader())
    return run


def test_signals_are_what_their_names_say():
    net = CountingNet().double().eval()
    x, y = images(8, dtype=torch.float64)
    single = FGSM(eps=0.1, step_size=0.125, random_start=True)
    before = snapshot(net)
    sums = signal_sums(net, x, y, PGD(eps=0.1, steps=3), single, seed=5)
    assert differences(net, before) == []
    signals = Signals.from_sums(sums)

    start = single.draw_start(x, GeneratorDraws(torch.Generator().manual_seed(5)))
    stepped = single(net, x, y, start=start)
    x_adv = PGD(eps=0.1, steps=3)(net, x, y, generator=torch.Generator().manual_seed(5))

    def accuracy(at: Tensor) -> float:
        return float((net(at).argmax(1) == y).double().mean())

    def gradient(at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(net(at), y, reduction="sum"), at)[0].flatten(1)

    lower = F.cross_entropy(net(stepped), y, reduction="none") < F.cross_entropy(net(start), y, reduction="none")
    cosine = F.cosine_similarity(gradient(x), gradient(start)).mean()
    assert signals.robust_acc == pytest.approx(accuracy(x_adv))
    assert signals.single_step_acc == pytest.approx(accuracy(stepped))
    assert signals.half_step_acc == pytest.approx(accuracy((x + stepped) / 2))
    assert signals.abnormal == pytest.approx(float(lower.double().mean()))
    assert signals.gradient_cosine == pytest.approx(float(cosine), abs=1e-6)


def test_values_are_logged_and_training_is_what_it_would_be_without():
    plain, watched = PlainModule(lr=0.05), PlainModule(lr=0.05)
    watched.load_state_dict(plain.state_dict())
    trainer(max_epochs=2).fit(plain, loader(), loader())
    run = fit(OverfittingGuard(ATTACK, train_monitor="train_acc"), epochs=2, module=watched)
    assert torch.equal(weights_of(plain), weights_of(watched))
    logged = {name.removeprefix("val/guard_") for name in run.callback_metrics if name.startswith("val/guard_")}
    assert {
        "robust_acc",
        "single_step_acc",
        "half_step_acc",
        "abnormal",
        "gradient_cosine",
        "robust_gap",
    } <= logged


def test_cost():
    class Counted(PlainModule):
        images = 0

        def forward(self, x):
            if not self.training:
                self.images += len(x)
            return super().forward(x)

    module = Counted()
    run = trainer(OverfittingGuard(ATTACK, max_samples=10), max_epochs=1)
    run.fit(module, loader(), loader())
    # validation of 24 and the comparison of one batch of 6; 3 attack steps, 1 single step, 4 results, 2 gradients
    assert module.images == 24 + 6 + 10 * (3 + 1 + 4 + 2)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([(0.5, 0.6), (0.2, 0.9)], ["catastrophic"]),
        ([(0.5, 0.6), (0.26, 0.9)], []),  # not yet half
        ([(0.5, 0.6), (0.2, 0.5)], []),  # both fell: the network is just worse
        ([(0.5, 0.6)] + [(0.44, 0.6)] * 3, ["robust"]),
        ([(0.5, 0.6)] + [(0.44, 0.6)] * 2, []),  # patience
        ([(0.5, 0.6), (0.44, 0.6), (0.47, 0.6), (0.44, 0.6)], []),  # it came back in between
        ([(0.5, 0.6)] + [(0.1, 0.6)] * 3, ["catastrophic", "robust"]),
        ([(0.3, 0.4), (0.4, 0.5), (0.5, 0.6)], []),
        ([(0.0, 0.1)], []),
        ([(0.0, 0.1), (0.0, 0.2)], []),
        ([], []),
    ],
)
def test_diagnosis(seen, expected):
    guard = OverfittingGuard()
    guard._history = [{"robust_acc": robust, "single_step_acc": single} for robust, single in seen]
    assert guard.diagnose() == expected


def test_a_warning_comes_once_and_training_goes_on():
    guard = Scripted((0.5, 0.6), (0.1, 0.9), (0.1, 0.9), (0.1, 0.9), max_samples=24)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(guard)
    texts = [str(each.message) for each in caught if "overfitting" in str(each.message)]
    assert len(texts) == 2
    assert texts[0].startswith("Catastrophic overfitting in epoch 1: accuracy under PGD 10.0%, at best 50.0%, under a")
    assert texts[1].startswith("Robust overfitting since 3 validations: accuracy under PGD 10.0%")
    assert run.current_epoch == 4
    assert run.callback_metrics["val/guard_robust_gap"] == pytest.approx(0.4)
    assert guard._found == ["catastrophic", "robust"]


def test_stop():
    guard = Scripted((0.5, 0.6), (0.1, 0.9), (0.1, 0.9), (0.1, 0.9), max_samples=24, action="stop")
    with pytest.warns(UserWarning, match="Catastrophic"):
        assert fit(guard).current_epoch == 2


class Remembers(L.Callback):
    def __init__(self):
        self.weights = []

    def on_validation_epoch_end(self, trainer, pl_module):
        self.weights.append(weights_of(pl_module))


@pytest.mark.parametrize("monitor", ["val/guard_robust_acc", "val/adv_acc"])
def test_restore_loads_the_most_robust_epoch(tmp_path, monitor):
    scripted = [(0.3, 0.6), (0.5, 0.6), (0.4, 0.6), (0.4, 0.6), (0.4, 0.6)]
    guard = Scripted(*scripted, max_samples=24, action="restore", patience=2)
    keep = ModelCheckpoint(tmp_path, monitor=monitor, mode="max", filename="{epoch}")
    seen = Remembers()
    options = {"epochs": 5, "module": PlainModule(lr=0.1)}
    with pytest.warns(UserWarning, match="Robust overfitting since 2 validations"):
        run = fit(guard, RobustnessMonitor(ATTACK), keep, seen, enable_checkpointing=True, **options)
    assert run.current_epoch == 4
    best = int(keep.best_model_path.rpartition("=")[2].removesuffix(".ckpt"))
    assert best == 1 or monitor == "val/adv_acc"
    assert torch.equal(weights_of(options["module"]), seen.weights[best])


class Setting:
    """Something that a checkpoint should not hold."""


def test_a_checkpoint_that_holds_objects_is_refused(tmp_path):
    class Keeps(PlainModule):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["setting"] = Setting()

    guard = Scripted((0.3, 0.6), max_samples=24, action="restore")
    keep = ModelCheckpoint(tmp_path, monitor="val/guard_robust_acc", mode="max")
    with pytest.raises(ValueError, match=r"holds objects beside weights.*save_weights_only=True"):
        fit(guard, keep, epochs=1, module=Keeps(), enable_checkpointing=True)


@pytest.mark.parametrize("keep", [[], [ModelCheckpoint(monitor="val_loss", mode="min")]])
def test_restore_needs_a_checkpoint_of_the_most_robust_epoch(keep):
    with pytest.raises(ValueError, match=r"add ModelCheckpoint\(monitor='val/guard_robust_acc', mode='max'\)"):
        fit(OverfittingGuard(ATTACK, action="restore"), *keep, epochs=1, enable_checkpointing=bool(keep))


def test_test_images_are_never_looked_at():
    class Tested(PlainModule):
        def test_step(self, batch, batch_idx):
            self(batch[0])

    guard = Scripted(action="stop")
    run = trainer(guard)
    run.validate(Tested(), loader(), verbose=False)
    run.test(Tested(), loader(), verbose=False)
    assert not any("guard" in name for name in run.callback_metrics)


def test_history_survives_a_restart():
    guard = OverfittingGuard(ATTACK)
    fit(guard, epochs=2)
    state = guard.state_dict()
    other = OverfittingGuard(ATTACK)
    other.load_state_dict(state)
    assert other._history == guard._history
    assert len(other._history) == 2
    fit(guard, epochs=1)
    assert len(guard._history) == 1  # a new fit begins anew


def test_defaults_follow_the_attack_and_other_batches():
    guard = OverfittingGuard(PGD(eps=0.2, norm="l2", mean=[0.5, 0.5], std=[0.5, 0.5]))
    assert repr(guard.single_step) == repr(
        FGSM(eps=0.2, norm="l2", step_size=0.25, random_start=True, mean=[0.5, 0.5], std=[0.5, 0.5])
    )
    run = trainer(OverfittingGuard(ATTACK), max_epochs=1)
    run.fit(DictModule(), loader(form="dict"), loader(form="dict"))
    assert "val/guard_robust_acc" in run.callback_metrics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": "panic"}, "Expected `action` to be one of 'warn', 'stop', 'restore'"),
        ({"drop": 1.5}, "Expected `drop`"),
        ({"max_gap": -0.1}, "Expected `max_gap`"),
        ({"patience": 0}, "Expected `patience` to be an integer >= 1"),
    ],
)
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        OverfittingGuard(**options)


def test_a_dead_network_gives_numbers():
    class Dead(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :4] * 0

    signals = Signals.from_sums(signal_sums(Dead(), *images(4), ATTACK, FGSM(eps=0.1, random_start=True), 0))
    assert signals.gradient_cosine == 0
    assert signals.abnormal == 0
