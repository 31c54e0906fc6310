"""Accuracy under attack, watched from the outside."""

import lightning as L
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import RobustnessMonitor
from lightning_robust.metrics.accumulator import calibration_sums
from support.attacked import differences, snapshot
from support.modules import DictModule, PlainModule, loader, trainer, weights_of

EPS = 0.05


class Watched(PlainModule):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attacked = []

    def forward(self, x):
        if torch.is_grad_enabled() and not self.training:
            self.attacked.append(len(x))
        return super().forward(x)

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)


def attack(**kwargs):
    return PGD(**{"eps": EPS, "steps": 3, "random_start": False, **kwargs})


def expected(module, samples, length=24):
    """Attack the same images in one batch, outside Lightning."""
    data = loader(length, batch_size=length).dataset
    x, y = data.x[:samples], data.y[:samples]
    module.eval()
    x_adv = attack()(module, x, y)
    with torch.no_grad():
        logits = module(x_adv)
    return float((logits.argmax(1) == y).float().mean()), float(F.cross_entropy(logits, y))


@pytest.mark.parametrize(("limit", "samples"), [(None, 24), (24, 24), (100, 24), (10, 10), (1, 1)])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_values(limit, samples, stage):
    module = Watched()
    before = snapshot(module)
    run = trainer(RobustnessMonitor(attack(), max_samples=limit))
    (logged,) = getattr(run, stage)(module, loader(), verbose=False)
    assert differences(module, before) == []
    prefix = {"validate": "val", "test": "test"}[stage]
    accuracy, nll = expected(module, samples)
    assert logged[f"{prefix}/adv_acc"] == pytest.approx(accuracy, abs=1e-6)
    assert logged[f"{prefix}/adv_nll"] == pytest.approx(nll, rel=1e-5)


def test_calibration_and_confidence_of_clean_and_attacked_images():
    module = Watched()
    monitor = RobustnessMonitor(attack(), max_samples=None)
    (logged,) = trainer(monitor).validate(module, loader(), verbose=False)
    data = loader(24, batch_size=24).dataset
    x_adv = attack()(module.eval(), data.x, data.y)
    for prefix, images in (("val/adv_", x_adv), ("val/adv_clean_", data.x)):
        with torch.no_grad():
            confidence, answer = module(images).softmax(1).max(1)
        right = answer == data.y
        ece = multiclass_calibration_error(module(images).detach(), data.y, num_classes=4, n_bins=15)
        assert logged[f"{prefix}acc"] == pytest.approx(right.float().mean().item(), abs=1e-6)
        assert logged[f"{prefix}ece"] == pytest.approx(ece.item(), abs=1e-6)
        assert 0 < right.sum() < 24 or "attacked" in prefix
        for name, rows in (("conf_right", right), ("conf_wrong", ~right)):
            assert (f"{prefix}{name}" in logged) == bool(rows.any())
            if rows.any():
                assert logged[f"{prefix}{name}"] == pytest.approx(confidence[rows].mean().item(), abs=1e-6)
    assert int(monitor.tables["attacked"].total) == int(monitor.tables["clean"].total) == 24


def test_cost():
    module = Watched()
    trainer(RobustnessMonitor(attack(), max_samples=10)).validate(module, loader(), verbose=False)
    assert module.attacked == [6] * 3 + [4] * 3


def test_training_is_what_it_would_be_without():
    weights, states = [], []
    for callbacks in ([], [RobustnessMonitor(attack(random_start=True))]):
        module = PlainModule(dropout=0.5)
        torch.manual_seed(3)
        run = trainer(*callbacks, max_epochs=2)
        run.fit(module, loader(shuffle=True), loader())
        weights.append(weights_of(module))
        states.append(torch.get_rng_state())
    assert torch.equal(*weights)
    assert torch.equal(*states)
    assert {"val/adv_acc", "val/adv_nll"} <= set(run.callback_metrics)


def test_every_n_epochs_and_no_sanity_check():
    module = Watched(lr=0.0)
    values = []

    class Collect(L.Callback):
        def on_validation_batch_end(self, *_):
            values.append(len(module.attacked))

    run = trainer(
        RobustnessMonitor(attack(), every_n_epochs=2, max_samples=6), Collect(), max_epochs=4, num_sanity_val_steps=1
    )
    run.fit(module, loader(), loader(length=6))
    assert values == [0, 0, 3, 3, 6]


def test_stages():
    for stage, key in (("validate", "val/adv_acc"), ("test", "test/adv_acc")):
        for stages in (["validate"], ["test"]):
            (logged,) = getattr(trainer(RobustnessMonitor(attack(), stages=stages)), stage)(
                Watched(), loader(), verbose=False
            )
            assert (key in logged) == (stages == [stage])


def test_random_starts_are_the_same_in_every_validation():
    module = Watched()
    values = [
        trainer(RobustnessMonitor(attack(random_start=True, steps=1, step_size=0.01), seed=seed)).validate(
            module, loader(), verbose=False
        )[0]["val/adv_nll"]
        for seed in (0, 0, 1)
    ]
    assert values[0] == values[1] != values[2]


def test_two_monitors_and_other_batches():
    run = trainer(
        RobustnessMonitor(attack(), name="linf"), RobustnessMonitor(PGD(eps=0.5, norm="l2", steps=2), name="l2")
    )
    (logged,) = run.validate(DictModule(), loader(form="dict"), verbose=False)
    assert {"val/linf_acc", "val/linf_nll", "val/l2_acc", "val/l2_nll"} <= set(logged)


def test_one_of_several_loaders():
    class Several(Watched):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self(batch[0])

    module = Several()
    run = trainer(RobustnessMonitor(attack(), dataloader_idx=1, max_samples=None))
    run.validate(module, [loader(), loader(length=12)], verbose=False)
    assert sum(module.attacked) == 3 * 12
    assert float(run.callback_metrics["val/adv_acc"]) == pytest.approx(expected(module, 12, 12)[0])


def test_soft_targets_and_checkpoints(tmp_path):
    class Soft(Watched):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    x, y = loader(batch_size=24).dataset.x, loader().dataset.y
    soft = torch.utils.data.TensorDataset(x, 0.9 * F.one_hot(y, 4).float() + 0.025)
    keep = ModelCheckpoint(tmp_path, monitor="val/adv_acc", mode="max")
    run = trainer(RobustnessMonitor(attack()), keep, enable_checkpointing=True)
    run.fit(Soft(), loader(), torch.utils.data.DataLoader(soft, batch_size=12))
    assert keep.best_model_path


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_precision(precision, inference_mode):
    run = trainer(RobustnessMonitor(attack()), precision=precision, inference_mode=inference_mode)
    (logged,) = run.validate(Watched(), loader(), verbose=False)
    assert 0 <= logged["val/adv_acc"] <= 1


def test_modes_come_back():
    class Frozen(Watched):
        def on_train_start(self):
            self.net[1].eval()

        def on_train_batch_start(self, batch, batch_idx):
            modes.append((self.net[1].training, self.net[5].training))

    class Check(L.Callback):
        def on_validation_batch_end(self, run, pl_module, *_):
            assert not any(child.training for child in pl_module.modules())

    modes = []
    module = Frozen(dropout=0.5)
    assert isinstance(module.net[5], nn.Dropout)
    trainer(RobustnessMonitor(attack()), Check(), max_epochs=2).fit(module, loader(), loader())
    assert modes == [(False, True)] * 8


def test_diverged_weights_are_an_error():
    module = Watched()
    with torch.no_grad():
        module.net[-1].bias[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        trainer(RobustnessMonitor(attack())).validate(module, loader(), verbose=False)
    # as on a device, where the attack does not look at every batch
    sums = torch.stack([calibration_sums(torch.full((3, 4), float("nan")), torch.zeros(3, dtype=torch.long))] * 2)
    with pytest.raises(ValueError, match="Watched returned NaN or infinite logits"):
        RobustnessMonitor(attack()).conclude(trainer(), module, "validate", sums)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 0}, "Expected `every_n_epochs` to be an integer >= 1"),
        ({"max_samples": 0}, "Expected `max_samples` to be an integer >= 1"),
        ({"dataloader_idx": -1}, "Expected `dataloader_idx`"),
        ({"seed": -1}, "Expected `seed`"),
        ({"stages": ["val"]}, "Expected `stages` to be one of 'validate', 'test' but got 'val'"),
    ],
)
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        RobustnessMonitor(**options)


class NormalisesInTheStep(Watched):
    def validation_step(self, batch, batch_idx):
        self.net((batch[0] - 0.5) / 0.25)


class ScalesInTheStep(Watched):
    def validation_step(self, batch, batch_idx):
        return {"logits": self(batch[0]) * 1.1}


class ForwardGivesProbabilities(Watched):
    def forward(self, x):
        return super().forward(x).softmax(1)

    def validation_step(self, batch, batch_idx):
        return {"logits": self.net(batch[0])}


class ForwardGivesFeatures(Watched):
    def forward(self, x):
        return self.net[:-1](x)

    def validation_step(self, batch, batch_idx):
        return {"logits": self.net[-1](self(batch[0]))}


OTHERS = [NormalisesInTheStep, ScalesInTheStep, ForwardGivesProbabilities, ForwardGivesFeatures]


@pytest.mark.parametrize("module", OTHERS)
def test_a_step_that_validates_another_function_is_refused(module):
    module = module()
    with pytest.raises(ValueError, match=f"{type(module).__name__} computes other logits than its forward"):
        trainer(RobustnessMonitor(attack())).validate(module, loader(), verbose=False)
    assert not {"validation_step", "log", "log_dict"} & set(vars(module))
    assert not module.net._forward_hooks


class NormalisesInForward(Watched):
    def forward(self, x):
        return super().forward((x - 0.5) / 0.25)


class LogSoftmaxInTheStep(Watched):
    def validation_step(self, batch, batch_idx):
        return {"logits": self(batch[0]).log_softmax(1)}


class ShowsNothing(Watched):
    def validation_step(self, batch, batch_idx):
        nn.Sequential.forward(self.net, batch[0])


class TrainsWhileItValidates(Watched):
    def validation_step(self, batch, batch_idx):
        self.net.train()
        self(batch[0])


@pytest.mark.parametrize(
    "module", [NormalisesInForward, LogSoftmaxInTheStep, ShowsNothing, lambda: TrainsWhileItValidates(dropout=0.5)]
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_that_validates_what_is_attacked_passes(module, precision):
    trainer(RobustnessMonitor(attack()), precision=precision).validate(module(), loader(), verbose=False)


def test_the_comparison_costs_one_forward_per_run():
    class Counts(PlainModule):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    module = Counts(lr=0.0)
    run = trainer(RobustnessMonitor(attack(), every_n_epochs=2), max_epochs=4)
    run.fit(module, loader(length=6), loader())
    # 4 training steps, 4 x 4 validation steps, and twice 4 batches with 3 attack steps and 2 results
    assert module.calls == 4 + 16 + 2 * 4 * (3 + 2) + 1
    assert "validation_step" not in vars(module)


class CountsInForward(PlainModule):
    def __init__(self):
        super().__init__()
        self.seen = torchmetrics.SumMetric()

    def forward(self, x):
        self.seen.update(len(x))
        self.log("images", float(len(x)), reduce_fx="sum", batch_size=1)
        return self.net(x)

    def on_validation_epoch_end(self):
        self.log("count", self.seen.compute())


@pytest.mark.parametrize("monitors", [1, 2])
def test_metrics_and_logs_inside_forward_count_once(monitors):
    module = CountsInForward()
    run = trainer(*[RobustnessMonitor(attack(), name=f"adv{index}") for index in range(monitors)])
    for _ in range(2):
        module.seen.reset()
        run.validate(module, loader(), verbose=False)
        assert run.callback_metrics["count"] == 24
        assert run.callback_metrics["images"] == 24
    assert not {"log", "log_dict"} & set(vars(module))
    assert not any(type(value).__name__ == "_Gated" for value in vars(module.seen).values())
    assert f"val/adv{monitors - 1}_acc" in run.callback_metrics
