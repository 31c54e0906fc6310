import copy
import warnings

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from torch.nn import functional as F

from lightning_robust.callbacks import SharpnessAware, WeightRegularization
from lightning_robust.losses import Linear, MaxSup
from lightning_robust.regularization import GOR, NormLoss, norm_loss
from lightning_robust.sharpness import SAM
from support.modules import CollectionModule, DictModule, ManualModule, PlainModule, loader, trainer, weights_of
from support.resumable import shuffled_loader


def penalty_of(net):
    """The norm loss of every convolution and linear layer."""
    return sum(norm_loss(layer.weight) for layer in net if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear))


def fit(module, *callbacks, data=None, ckpt_path=None, **kwargs):
    run = trainer(*callbacks, **kwargs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "To copy construct")
        warnings.filterwarnings("ignore", "NormLoss takes the place of weight decay")
        run.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return run


def optimizer_of(module):
    optimizer = module.configure_optimizers()
    return optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer


@pytest.mark.parametrize(
    ("module", "form"), [(PlainModule, "pair"), (DictModule, "dict"), (CollectionModule, "triple")]
)
def test_the_penalty_is_added(module, form):
    module = module()
    reference = copy.deepcopy(module).train()
    optimizer = optimizer_of(reference)
    x, y = next(iter(loader()))
    (F.cross_entropy(reference.net(x), y) + 0.7 * penalty_of(reference.net)).backward()
    optimizer.step()
    fit(module, WeightRegularization(NormLoss(lam=0.7)), data=loader(form=form), max_steps=1)
    torch.testing.assert_close(weights_of(module), weights_of(reference))


def test_accumulated_batches_and_clipping():
    module = PlainModule(norm=False)
    reference = copy.deepcopy(module).train()
    optimizer = optimizer_of(reference)
    for x, y in list(loader())[:2]:
        ((F.cross_entropy(reference.net(x), y) + 0.7 * penalty_of(reference.net)) / 2).backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    optimizer.step()
    callback = WeightRegularization(NormLoss(lam=0.7))
    fit(module, callback, max_steps=1, accumulate_grad_batches=2, gradient_clip_val=0.5)
    torch.testing.assert_close(weights_of(module), weights_of(reference))


def test_a_sharpness_aware_method_differentiates_it_at_its_perturbed_weights():
    module = PlainModule(norm=False)
    reference = copy.deepcopy(module).train()
    optimizer = optimizer_of(reference)
    x, y = next(iter(loader()))

    def gradients():
        loss = F.cross_entropy(reference.net(x), y) + 0.7 * penalty_of(reference.net)
        return torch.autograd.grad(loss, list(reference.parameters()))

    ascent = gradients()
    length = torch.cat([g.flatten() for g in ascent]).norm()
    with torch.no_grad():
        for parameter, gradient in zip(reference.parameters(), ascent, strict=True):
            parameter += 0.3 * gradient / length
    descent = gradients()
    with torch.no_grad():
        for parameter, before, after in zip(reference.parameters(), ascent, descent, strict=True):
            parameter -= 0.3 * before / length
            parameter.grad = after
    optimizer.step()
    fit(module, SharpnessAware(SAM(rho=0.3)), WeightRegularization(NormLoss(lam=0.7)), max_steps=1)
    torch.testing.assert_close(weights_of(module), weights_of(reference))


@pytest.mark.parametrize("callbacks", [[], [SharpnessAware()]], ids=["alone", "sam"])
def test_the_penalty_without_its_factor_is_logged_once_per_step(callbacks):
    module = PlainModule(lr=0.0, norm=False)
    run = fit(module, WeightRegularization(GOR(lam=0.3, min_filters=5)), *copy.deepcopy(callbacks))
    torch.testing.assert_close(run.callback_metrics["train/gor"], GOR(min_filters=5).total(module.net).detach())


@pytest.mark.parametrize("where", ["net", "module"])
def test_a_compiled_module_trains_alike(where):
    plain, compiled = PlainModule(norm=False), PlainModule(norm=False)
    fit(plain, WeightRegularization(NormLoss(lam=0.7)))
    torch._dynamo.reset()
    del compiled.train_acc  # counters of metrics are compiled anew in every step
    compiled.training_step = lambda batch, batch_idx: F.cross_entropy(compiled(batch[0]), batch[1])
    if where == "net":
        compiled.net.compile(backend="eager")
    else:
        compiled.net = torch.compile(compiled.net, backend="eager")
    fit(compiled, WeightRegularization(NormLoss(lam=0.7)))
    torch.testing.assert_close(weights_of(compiled), weights_of(plain))


def test_mixed_precision_computes_it_in_float32():
    class Watch(WeightRegularization):
        def around_step(self, context, batch, run):
            assert torch.is_autocast_enabled("cpu")
            return super().around_step(context, batch, run)

    module = PlainModule(lr=0.0, norm=False)
    run = fit(module, Watch(GOR(min_filters=5)), precision="bf16-mixed")
    assert torch.equal(run.callback_metrics["train/gor"], GOR(min_filters=5).total(module.net).detach())


class Epochs(L.Callback):
    def __init__(self, regularizer):
        self.regularizer, self.seen = regularizer, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(round(self.regularizer.coefficient, 6))


class SaveAtSixthStep(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 6:
            trainer.save_checkpoint(self.path)


def test_the_schedule_continues_in_the_middle_of_an_epoch(tmp_path):
    def regularizer():
        return NormLoss(lam=Linear(start=0.1, end=0.3))

    whole, continued = PlainModule(), PlainModule(seed=1)
    watch = Epochs(first := regularizer())
    save = SaveAtSixthStep(tmp_path / "a.ckpt")
    fit(whole, WeightRegularization(first), watch, save, max_epochs=3, data=shuffled_loader())
    assert watch.seen == [0.1] * 4 + [0.2] * 4 + [0.3] * 4
    watch = Epochs(second := regularizer())
    callback = WeightRegularization(second)
    fit(continued, callback, watch, max_epochs=3, data=shuffled_loader(), ckpt_path=tmp_path / "a.ckpt")
    assert watch.seen == [0.2] * 2 + [0.3] * 4
    torch.testing.assert_close(weights_of(continued), weights_of(whole), rtol=0, atol=0)


def test_warns_that_norm_loss_replaces_weight_decay():
    run = trainer(WeightRegularization(NormLoss()))
    with pytest.warns(UserWarning, match=r"decays 2 of the same weights \(weight_decay=0.05\); set weight_decay=0"):
        run.fit(DictModule(), loader(form="dict"))


def test_does_not_warn_where_both_do_not_meet():
    module = DictModule()
    module.configure_optimizers = lambda: torch.optim.SGD(
        [
            {"params": [p for p in module.parameters() if p.ndim > 1]},
            {"params": [p for p in module.parameters() if p.ndim <= 1], "weight_decay": 0.1},
        ],
        lr=0.1,
    )
    trainer(WeightRegularization(NormLoss())).fit(module, loader(form="dict"))  # warnings are errors
    trainer(WeightRegularization(GOR(min_filters=5))).fit(PlainModule(), loader())


def test_a_skipped_step_stays_skipped():
    module = PlainModule()
    module.training_step = lambda batch, batch_idx: None
    before = weights_of(module)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*training_step.* returned `None`")
        fit(module, WeightRegularization(NormLoss(lam=1.0)))
    assert torch.equal(weights_of(module), before)


@pytest.mark.parametrize(
    ("module", "regularizer", "options", "message"),
    [
        (ManualModule, NormLoss(), {}, "WeightRegularization needs automatic optimization"),
        (PlainModule, GOR(), {}, None),
        (PlainModule, GOR(min_filters=2), {}, "'net.0' has 5, which cannot be cut into 2 equal groups"),
        (PlainModule, NormLoss(include="head"), {}, "NormLoss found no weight in PlainModule"),
        (
            PlainModule,
            NormLoss(lam=Linear(start=0.0, end=1.0)),
            {"max_epochs": -1, "max_steps": 2},
            "`max_epochs` to be known for a linear schedule but got -1",
        ),
    ],
    ids=["manual", "allowed", "groups", "names", "length"],
)
def test_refusals(module, regularizer, options, message):
    if message is None:
        fit(module(), WeightRegularization(regularizer), **options)
        return
    with pytest.raises(ValueError, match=message):
        fit(module(), WeightRegularization(regularizer), **options)


def test_two_penalties_of_one_kind_need_names():
    pair = [WeightRegularization(NormLoss()), WeightRegularization(NormLoss(), name="second")]
    assert {"train/norm_loss", "train/second"} <= set(fit(PlainModule(), *pair).callback_metrics)
    with pytest.raises(
        ValueError, match="Two WeightRegularization callbacks of this Trainer have the name 'norm_loss'"
    ):
        fit(PlainModule(), WeightRegularization(NormLoss()), WeightRegularization(NormLoss()))


def test_a_penalty_on_logits_is_refused_at_once():
    with pytest.raises(TypeError, match=r"a WeightRegularizer but got MaxSup; .* the callback LogitRegularization"):
        WeightRegularization(MaxSup())


def test_sharded_weights_are_refused(monkeypatch):
    monkeypatch.setattr("lightning_robust.callbacks.weight_regularization.keeps_whole_weights", lambda _: False)
    with pytest.raises(ValueError, match='SingleDeviceStrategy does not keep on one device; use strategy="ddp"'):
        fit(PlainModule(), WeightRegularization(NormLoss()))


def test_can_be_built_from_a_configuration():
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("--methods", type=dict[str, Callback | None], default={})
    # The newer name of one method; older versions of jsonargparse know only the second.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    line = ["--methods.m", "WeightRegularization", "--methods.m.regularizer", "GOR", "--methods.m.regularizer.lam", "1"]
    regularizer = instantiate(parser.parse_args(line)).methods["m"].regularizer
    assert isinstance(regularizer, GOR)
    assert regularizer.coefficient == 1
