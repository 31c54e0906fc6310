import copy
import warnings

import lightning as L
import pytest
import timm.loss
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.callbacks import LogitRegularization, SharpnessAware
from lightning_robust.losses import CrossEntropy, Linear, LogitPenalty, MaxSup
from lightning_robust.training import BatchAdapter
from support.modules import CollectionModule, DictModule, ManualModule, PlainModule, loader, trainer, weights_of


def fit(module, *callbacks, data=None, **kwargs):
    run = trainer(*callbacks, **kwargs)
    run.fit(module, loader() if data is None else data)
    return run


def one_step(module, loss):
    """Weights after one step of the module's own optimizer on `loss(logits)`."""
    reference = copy.deepcopy(module).train()
    optimizer = reference.configure_optimizers()
    optimizer = optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer
    batch = next(iter(loader()))
    loss(reference.net(batch[0]), batch[1]).backward()
    optimizer.step()
    return weights_of(reference)


@pytest.mark.parametrize(
    ("module", "form"), [(PlainModule, "pair"), (DictModule, "dict"), (CollectionModule, "triple")]
)
def test_the_penalty_is_added(module, form):
    module = module()
    expected = one_step(module, lambda z, y: F.cross_entropy(z, y) + 0.7 * (z.amax(1) - z.mean(1)).mean())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "To copy construct")
        fit(module, LogitRegularization(MaxSup(alpha=0.7)), data=loader(form=form), max_steps=1)
    torch.testing.assert_close(weights_of(module), expected)


def test_the_penalty_without_its_factor_is_logged():
    module = PlainModule(lr=0.0, norm=False)
    run = fit(module, LogitRegularization(LogitPenalty(beta=0.01)))
    x = torch.cat([x for x, _ in loader()])
    with torch.no_grad():
        expected = module.net(x).square().sum(1).mean() / 2
    torch.testing.assert_close(run.callback_metrics["train/logit_penalty"], expected)


class Epochs(L.Callback):
    def __init__(self, regularizer):
        self.regularizer, self.seen = regularizer, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(round(self.regularizer.coefficient, 6))


def test_the_schedule_moves_once_per_epoch():
    maxsup = MaxSup(alpha=Linear(start=0.1, end=0.3))
    watch = Epochs(maxsup)
    fit(PlainModule(), LogitRegularization(maxsup), watch, max_epochs=3)
    assert watch.seen == [0.1] * 4 + [0.2] * 4 + [0.3] * 4


class SaveAtSixthStep(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 6:
            trainer.save_checkpoint(self.path)


def test_the_schedule_continues_in_the_middle_of_an_epoch(tmp_path):
    def schedule():
        return MaxSup(alpha=Linear(start=0.1, end=0.3))

    fit(PlainModule(), LogitRegularization(schedule()), SaveAtSixthStep(tmp_path / "a.ckpt"), max_epochs=3)
    maxsup = schedule()
    watch = Epochs(maxsup)
    second = trainer(LogitRegularization(maxsup), watch, max_epochs=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        second.fit(PlainModule(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert watch.seen == [0.2] * 2 + [0.3] * 4


def test_ignored_samples_do_not_count():
    x, y = torch.cat([x for x, _ in loader()]), torch.cat([y for _, y in loader()])
    y[::3] = -100
    module = PlainModule(norm=False)
    module.train_acc = nn.Identity()
    module.training_step = lambda batch, batch_idx: F.cross_entropy(module(batch[0]), batch[1])
    data = DataLoader(TensorDataset(x, y), batch_size=24)
    kept = y != -100
    with torch.no_grad():
        logits = module.net(x)[kept]
    run = fit(module, LogitRegularization(MaxSup()), data=data)
    torch.testing.assert_close(run.callback_metrics["train/maxsup"], (logits.amax(1) - logits.mean(1)).mean())


class InputsOnly(PlainModule):
    def training_step(self, batch, batch_idx):
        return self(batch[0] if isinstance(batch, list) else batch).square().mean()


@pytest.mark.parametrize("given", [False, True])
def test_batches_without_labels(given):
    data = DataLoader(torch.cat([x for x, _ in loader()]), batch_size=6)
    callback = LogitRegularization(MaxSup(), batch=BatchAdapter() if given else None)
    if given:
        with pytest.raises(TypeError, match="Cannot read inputs and targets from a batch of type Tensor"):
            fit(InputsOnly(), callback, data=data)
    else:
        assert fit(InputsOnly(), callback, data=data).callback_metrics["train/maxsup"] > 0


def test_soft_labels_are_no_mask():
    x, y = torch.cat([x for x, _ in loader()]), torch.cat([y for _, y in loader()])
    data = DataLoader(TensorDataset(x, F.one_hot(y, 4).float()), batch_size=6)
    assert fit(InputsOnly(), LogitRegularization(MaxSup()), data=data).callback_metrics["train/maxsup"] > 0


def test_a_skipped_step_stays_skipped():
    module = PlainModule()
    module.training_step = lambda batch, batch_idx: None
    before = weights_of(module)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*training_step.* returned `None`")
        fit(module, LogitRegularization(MaxSup()))
    assert torch.equal(weights_of(module), before)


def test_the_penalty_belongs_to_the_loss_that_a_sharpness_method_sees():
    both, alone = PlainModule(), PlainModule()
    run = fit(both, LogitRegularization(MaxSup(alpha=0.5)), SharpnessAware())
    fit(alone, SharpnessAware())
    assert "train/maxsup" in run.callback_metrics
    assert not torch.equal(weights_of(both), weights_of(alone))


def test_validation_is_left_alone():
    module = PlainModule(lr=0.0)
    run = trainer(LogitRegularization(MaxSup(alpha=100.0)))
    run.fit(module, loader(), loader())
    plain = trainer().validate(module, loader(), verbose=False)[0]
    torch.testing.assert_close(float(run.callback_metrics["val_loss"]), plain["val_loss"])


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(label_smoothing=0.1),
        CrossEntropy(label_smoothing=0.1),
        timm.loss.LabelSmoothingCrossEntropy(0.1),
    ],
    ids=["torch", "ours", "timm"],
)
def test_warns_of_double_smoothing(criterion):
    module = PlainModule()
    module.criterion = criterion
    with pytest.warns(UserWarning, match=r"already smoothed by the criterion of PlainModule \(0.1\)"):
        fit(module, LogitRegularization(MaxSup()))


def test_a_loss_in_place_of_a_penalty_is_refused_at_once():
    with pytest.raises(TypeError, match=r"a LogitRegularizer but got CrossEntropy; .* the callback Criterion"):
        LogitRegularization(CrossEntropy())


def test_manual_optimization_is_refused():
    with pytest.raises(ValueError, match="LogitRegularization needs automatic optimization"):
        fit(ManualModule(), LogitRegularization(MaxSup()))


def test_a_schedule_over_a_run_of_unknown_length_is_refused():
    callback = LogitRegularization(MaxSup(alpha=Linear(start=0.1, end=0.2)))
    with pytest.raises(ValueError, match="`max_epochs` to be known for a linear schedule but got -1"):
        fit(PlainModule(), callback, max_epochs=-1, max_steps=3)
    fixed = LogitRegularization(MaxSup(alpha=Linear(start=0.1, end=0.2, epochs=5)))
    fit(PlainModule(), fixed, max_epochs=None, max_steps=3)


def test_can_be_built_from_a_configuration():
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("--methods", type=dict[str, Callback | None], default={})
    # The newer name of one method; older versions of jsonargparse know only the second.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    chosen = ["--methods.m", "LogitRegularization", "--methods.m.regularizer", "MaxSup"]
    line = ["--methods.m.regularizer.alpha", "Linear", "--methods.m.regularizer.alpha.start", "0.1"]
    for extra, expected in [
        (["--methods.m.regularizer.alpha", "0.3"], MaxSup(alpha=0.3)),
        ([*line, "--methods.m.regularizer.alpha.end", "0.2"], MaxSup(alpha=Linear(start=0.1, end=0.2))),
    ]:
        built = instantiate(parser.parse_args([*chosen, *extra])).methods["m"]
        assert built.regularizer.schedule == expected.schedule


def test_labels_are_read_before_the_step_takes_its_batch_apart():
    class Pops(PlainModule):
        def training_step(self, batch, batch_idx):
            y = batch.pop("label")
            return F.cross_entropy(self(batch["image"]), y)

    samples = [{"image": x, "label": y if index % 3 else torch.tensor(-100)} for index, (x, y) in enumerate(IMAGES)]
    data = DataLoader(samples, batch_size=24)
    module = Pops(norm=False)
    with torch.no_grad():
        logits = module.net(torch.stack([each["image"] for each in samples]))[torch.arange(24) % 3 != 0]
    run = fit(module, LogitRegularization(MaxSup()), data=data)
    torch.testing.assert_close(run.callback_metrics["train/maxsup"], (logits.amax(1) - logits.mean(1)).mean())
    fit(Pops(), LogitRegularization(MaxSup(), batch=BatchAdapter()), data=data)


IMAGES = loader().dataset


def test_two_penalties_of_one_kind_need_names():
    pair = [LogitRegularization(MaxSup(alpha=0.1)), LogitRegularization(MaxSup(alpha=0.2), name="second")]
    run = fit(PlainModule(), *pair)
    assert {"train/maxsup", "train/second"} <= set(run.callback_metrics)
    with pytest.raises(ValueError, match="Two LogitRegularization callbacks of this Trainer have the name 'maxsup'"):
        fit(PlainModule(), LogitRegularization(MaxSup()), LogitRegularization(MaxSup(alpha=0.2)))
