import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_robust.callbacks import ObjectiveTraining, SharpnessAware
from lightning_robust.objectives import TRADES
from lightning_robust.schedules import Linear
from lightning_robust.sharpness import ASAM, MSAM, SAM, ParameterSelection, SharpnessMethod, sharp_backward
from support.methods import Late
from support.modules import CollectionModule, DictModule, ManualModule, PlainModule, loader, trainer, weights_of


class Still(SharpnessMethod):
    """Evaluates again at the same weights: training must equal plain training, bit by bit."""

    def direction(self, weights, gradients, probe):
        return probe.gradient_at(gradients, 0.0)


def fit(module, *callbacks, form="pair", seed=0, ckpt_path=None, **kwargs):
    L.seed_everything(seed)
    run = trainer(*callbacks, **{"max_epochs": 2, **kwargs})
    run.fit(module, loader(form=form), ckpt_path=ckpt_path)
    return run


@pytest.mark.parametrize("module", [PlainModule, DictModule, CollectionModule])
def test_no_perturbation_is_plain_training(module):
    form = {PlainModule: "pair", DictModule: "dict", CollectionModule: "triple"}[module]
    plain, ours = module(dropout=0.4), module(dropout=0.4)
    first, second = fit(plain, form=form), fit(ours, SharpnessAware(Still()), form=form)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    for name, value in first.callback_metrics.items():
        assert torch.equal(value, second.callback_metrics[name]), name
    assert second.callback_metrics["train/sharpness_gap"] == 0


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("method", [SAM(rho=0.2), ASAM(rho=0.5)], ids=["sam", "asam"])
def test_equals_the_plain_loop(method, replay):
    ours = PlainModule(dropout=0.4)
    reference = copy.deepcopy(ours).train()
    optimizer = reference.configure_optimizers()
    fit(ours, SharpnessAware(method, replay=replay))
    L.seed_everything(0)
    for _ in range(2):
        for x, y in loader():
            optimizer.zero_grad()
            sharp_backward(
                lambda x=x, y=y: F.cross_entropy(reference.net(x), y),
                method,
                optimizer,
                module=reference,
                replay=replay,
            )
            optimizer.step()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name


def test_logs_and_metrics_are_those_of_the_clean_pass():
    losses, counts = [], []

    class Watched(PlainModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.detach())
            counts.append(self.train_acc.update_count)
            return loss

    run = fit(Watched(), SharpnessAware(SAM(rho=0.5)), max_epochs=1)
    clean, moved = losses[0::2], losses[1::2]
    torch.testing.assert_close(run.callback_metrics["train_loss"], torch.stack(clean).mean())
    torch.testing.assert_close(
        run.callback_metrics["train/sharpness_gap"], (torch.stack(moved) - torch.stack(clean)).mean()
    )
    assert counts == [1, 1, 2, 2, 3, 3, 4, 4]


class Watched(PlainModule):
    """Notes loss, batch size and number of metric updates of every pass, and uses a metric's value."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        error = 1 - self.train_acc(self(batch[0]), batch[1])
        self.log("train_error", error, on_step=False, on_epoch=True)
        self.seen = [*getattr(self, "seen", []), (loss.detach(), len(batch[0]), self.train_acc.update_count)]
        return loss


def test_a_method_may_count_the_perturbed_pass():
    module = Watched(dropout=0.3)
    plain = copy.deepcopy(module)
    run = fit(module, SharpnessAware(Late()), max_epochs=1)
    losses, sizes, counts = zip(*module.seen, strict=True)
    assert sizes == (6,) * 8
    assert counts == (0, 2, 2, 4, 4, 6, 6, 8)
    torch.testing.assert_close(run.callback_metrics["train_loss"], torch.stack(losses[1::2]).mean())
    gaps = torch.stack(losses[1::2]) - torch.stack(losses[0::2])
    torch.testing.assert_close(run.callback_metrics["train/sharpness_gap"], gaps.mean())
    assert module.net[1].num_batches_tracked == 8  # the module runs its network twice per pass
    fit(plain, max_epochs=1)
    state = torch.get_rng_state()
    fit(Watched(dropout=0.3), SharpnessAware(Late()), max_epochs=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_part_of_the_batch_may_lead_the_ascent():
    module = Watched(norm=False)
    callback = SharpnessAware(SAM(rho=0.2), ascent_fraction=0.3)
    assert callback.passes(1) == 1.3
    run = fit(module, callback, max_epochs=1)
    losses, sizes, counts = zip(*module.seen, strict=True)
    assert sizes == (2, 6) * 4
    assert counts == (0, 2, 2, 4, 4, 6, 6, 8)
    torch.testing.assert_close(run.callback_metrics["train_loss"], torch.stack(losses[1::2]).mean())
    assert "train/sharpness_gap" not in run.callback_metrics  # the two losses belong to different samples
    reference = PlainModule(norm=False)
    optimizer = reference.configure_optimizers()
    for x, y in loader():
        optimizer.zero_grad()
        sharp_backward(
            lambda x=x, y=y: F.cross_entropy(reference.net(x), y),
            SAM(rho=0.2),
            optimizer,
            module=reference,
            ascent_closure=lambda x=x, y=y: F.cross_entropy(reference.net(x[:2]), y[:2]),
        )
        optimizer.step()
    assert torch.equal(weights_of(module), weights_of(reference))


@pytest.mark.parametrize("form", ["pair", "dict"])
def test_a_part_of_any_batch(form):
    module = {"pair": PlainModule, "dict": DictModule}[form]()
    fit(module, SharpnessAware(ascent_fraction=0.5), form=form, max_epochs=1)
    assert torch.isfinite(weights_of(module)).all()


@pytest.mark.parametrize(
    ("options", "sharp"), [({"every_n_steps": 3}, [0, 3, 6]), ({"start_epoch": 1}, [4, 5, 6, 7])], ids=str
)
def test_steps_that_are_plain(options, sharp):
    module, reference = PlainModule(), PlainModule()
    fit(module, SharpnessAware(SAM(rho=0.2), **options))
    optimizer = reference.train().configure_optimizers()
    for step, (x, y) in enumerate([*loader(), *loader()]):
        optimizer.zero_grad()
        rho = 0.2 if step in sharp else 1e-30
        sharp_backward(lambda x=x, y=y: F.cross_entropy(reference.net(x), y), SAM(rho=rho), optimizer, module=reference)
        optimizer.step()
    torch.testing.assert_close(weights_of(module), weights_of(reference), rtol=1e-5, atol=1e-6)


def test_an_interval_counts_optimizer_steps_not_batches():
    module = Watched()
    fit(module, SharpnessAware(every_n_steps=2), max_epochs=1, accumulate_grad_batches=2)
    assert len(module.seen) == 2 * 2 + 2  # the first window is sharp, the second plain
    assert SharpnessAware(every_n_steps=2).passes(3) == 4.5


def test_a_selection_and_a_schedule():
    def run(**options):
        module = PlainModule()
        fit(module, SharpnessAware(SAM(rho=Linear(start=0.0, end=0.4)), **options))
        return weights_of(module)

    everything, weights, again = run(), run(perturb=ParameterSelection(min_ndim=2)), run()
    assert torch.equal(everything, again)
    assert not torch.equal(everything, weights)
    reference = PlainModule().train()
    optimizer = reference.configure_optimizers()
    for step, (x, y) in enumerate([*loader(), *loader()]):
        optimizer.zero_grad()
        sharp_backward(
            lambda x=x, y=y: F.cross_entropy(reference.net(x), y),
            SAM(rho=Linear(start=0.0, end=0.4)),
            optimizer,
            module=reference,
            perturb=ParameterSelection(min_ndim=2),
            step=step,
            total_steps=8,
        )
        optimizer.step()
    assert torch.equal(weights, weights_of(reference))


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="Still uses the clean gradient for more than the ascent"):
        SharpnessAware(Still(), ascent_fraction=0.5)
    with pytest.raises(ValueError, match="MSAM spends no pass on an ascent"):
        SharpnessAware(MSAM(), ascent_fraction=0.5)
    with pytest.raises(ValueError, match="`ascent_fraction` to be > 0"):
        SharpnessAware(ascent_fraction=0.0)
    with pytest.raises(ValueError, match="`every_n_steps` to be an integer >= 1"):
        SharpnessAware(every_n_steps=0)
    with pytest.raises(ValueError, match="ObjectiveTraining prepares whole batches"):
        fit(PlainModule(), SharpnessAware(ascent_fraction=0.5), ObjectiveTraining(TRADES()))
    with pytest.raises(ValueError, match="chooses none of the"):
        fit(PlainModule(), SharpnessAware(perturb=ParameterSelection(include="nothing")))


def test_hooks_see_clean_weights_and_the_clean_loss_once():
    events = []

    class Probe(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.weights = weights_of(pl_module).clone()
            with torch.no_grad():
                net = copy.deepcopy(pl_module.net)
                self.loss = F.cross_entropy(net(batch[0]), batch[1])

        def see(self, name, pl_module):
            events.append(name)
            assert torch.equal(weights_of(pl_module), self.weights), name

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            self.see("zero", pl_module)

        def on_before_backward(self, trainer, pl_module, loss):
            self.see("before backward", pl_module)
            assert torch.equal(loss.detach(), self.loss)

        def on_after_backward(self, trainer, pl_module):
            self.see("after backward", pl_module)

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.see("optimizer", pl_module)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert torch.equal(outputs["loss"], self.loss)

    fit(PlainModule(), SharpnessAware(), Probe(), max_epochs=1, limit_train_batches=2)
    assert events == ["zero", "before backward", "after backward", "optimizer"] * 2


def test_scaler_backs_off_like_plain_training():
    def scale_after(*callbacks):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        plugin = L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)
        module = PlainModule()
        run = trainer(*callbacks, max_epochs=8, plugins=[plugin])
        run.fit(module, loader())
        assert torch.isfinite(weights_of(module)).all()
        return scaler.get_scale()

    assert scale_after(SharpnessAware(Still())) == scale_after() < 2.0**40
    assert scale_after(SharpnessAware(SAM(rho=0.05))) < 2.0**40


def test_parameters_are_read_in_every_step():
    class Unfreeze(L.pytorch.callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)

    class Trainable(PlainModule):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    module = Trainable()
    before = module.net[0].weight.clone()
    fit(module, SharpnessAware(), Unfreeze(), max_epochs=1)
    assert torch.equal(module.net[0].weight, before)
    module = Trainable()
    fit(module, SharpnessAware(), Unfreeze(), max_epochs=2)
    assert not torch.equal(module.net[0].weight, before)


def test_tied_unused_and_unoptimized_parameters():
    class Odd(PlainModule):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.ones(2))
            self.scale = nn.Parameter(torch.ones(1))
            self.net[0].bias.requires_grad_(False)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.scale * self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD([p for n, p in self.named_parameters() if n != "scale"], lr=0.1)

    module = Odd()
    bias = module.net[0].bias.clone()
    fit(module, SharpnessAware(), max_epochs=1)
    assert module.unused.grad is None
    assert module.scale.grad is not None
    assert torch.equal(module.scale, torch.ones(1))
    assert torch.equal(module.net[0].bias, bias)


def test_averaging_and_checkpoints_hold_clean_weights(tmp_path):
    module = PlainModule()
    saved = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")

    class Probe(L.Callback):
        def __init__(self):
            self.weights = {}

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.weights[trainer.global_step] = weights_of(pl_module).clone()

    probe = Probe()
    fit(module, SharpnessAware(), probe, saved, max_epochs=1, enable_checkpointing=True)
    for step, weights in probe.weights.items():
        state = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(torch.cat([state[n].flatten() for n, _ in module.named_parameters()]), weights)
    run = fit(PlainModule(), SharpnessAware(), EMAWeightAveraging(decay=0.5), max_epochs=1)
    assert run.state.finished


def test_the_same_object_fits_twice():
    callback = SharpnessAware()
    first, second = PlainModule(), PlainModule()
    fit(first, callback)
    fit(second, callback)
    assert torch.equal(weights_of(first), weights_of(second))


@pytest.mark.parametrize("mode", [{"fast_dev_run": True}, {"barebones": True}, {"overfit_batches": 1}])
def test_trainer_modes(mode):
    module = PlainModule()
    before = weights_of(module).clone()
    if "barebones" in mode:
        mode = {**mode, **dict.fromkeys(("logger", "enable_checkpointing", "num_sanity_val_steps"), None)}
        mode |= {"enable_progress_bar": None, "enable_model_summary": None}

        class Silent(PlainModule):
            def training_step(self, batch, batch_idx):
                return F.cross_entropy(self(batch[0]), batch[1])

        module = Silent()
    L.seed_everything(0)
    run = trainer(SharpnessAware(), **mode)
    run.fit(module, loader())
    assert not torch.equal(weights_of(module), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_exact(reentrant):
    class Checkpointed(PlainModule):
        def forward(self, x):
            # a re-entrant segment needs an input that requires grad to give its parameters any
            x = x.detach().requires_grad_() if reentrant else x
            hidden = checkpoint(self.net[:3], x, use_reentrant=reentrant, preserve_rng_state=True)
            return self.net[3:](hidden)

    plain, ours = PlainModule(norm=False), Checkpointed(norm=False)
    fit(plain, SharpnessAware(), accumulate_grad_batches=2)
    fit(ours, SharpnessAware(), accumulate_grad_batches=2)
    assert torch.equal(weights_of(plain), weights_of(ours))


@pytest.mark.parametrize("precision", ["bf16-true"])
def test_pure_half_precision_warns(precision):
    with pytest.warns(UserWarning, match='prefer "bf16-mixed"'):
        fit(PlainModule(norm=False), SharpnessAware(), precision=precision, fast_dev_run=True)


class Named(PlainModule):
    optimizer: type[torch.optim.Optimizer] | None = None

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def test_optimizers_that_cannot_work_are_refused():
    class Inner(torch.optim.SGD):
        def first_step(self):
            raise AssertionError

        second_step = first_step

    class WithSAM(Named):
        optimizer = Inner

    class WithLBFGS(Named):
        optimizer = torch.optim.LBFGS

    class FriendlySAM(torch.optim.SGD):
        """A peer's class without the usual method names."""

    class Peer(Named):
        optimizer = FriendlySAM

    class AdaHessian(torch.optim.SGD):
        """Needs second derivatives."""

    class SecondOrder(Named):
        optimizer = AdaHessian

    class CreateGraph(PlainModule):
        def backward(self, loss):
            loss.backward(create_graph=True)

    with pytest.raises(ValueError, match="Inner is itself sharpness-aware"):
        fit(WithSAM(), SharpnessAware())
    with pytest.raises(ValueError, match="FriendlySAM is itself sharpness-aware"):
        fit(Peer(), SharpnessAware())
    with pytest.raises(ValueError, match="LBFGS"):
        fit(WithLBFGS(), SharpnessAware())
    with pytest.raises(ValueError, match="AdaHessian needs second derivatives"):
        fit(SecondOrder(), SharpnessAware())
    module = CreateGraph()
    before = weights_of(module).clone()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        fit(module, SharpnessAware())
    assert torch.equal(weights_of(module), before)


def test_two_optimizers_are_refused():
    class Two(PlainModule):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]

    # by Lightning itself, whose advice leads to manual optimization, which we refuse with the alternative
    with pytest.raises(RuntimeError, match="multiple optimizers is only supported with manual optimization"):
        fit(Two(), SharpnessAware())

    class TwoByHand(ManualModule, Two):
        configure_optimizers = Two.configure_optimizers

    with pytest.raises(ValueError, match="needs automatic optimization, but TwoByHand steps its optimizers by hand"):
        fit(TwoByHand(), SharpnessAware())


@pytest.mark.parametrize(
    ("name", "callback", "message"),
    [
        ("FSDPStrategy", SharpnessAware(), "FSDPStrategy does not keep on one device"),
        ("DeepSpeedStrategy", SharpnessAware(), "DeepSpeedStrategy does not keep on one device"),
        ("ModelParallelStrategy", SharpnessAware(), "say so by sync_ascent=True"),
        (
            "ModelParallelStrategy",
            SharpnessAware(Still(), sync_ascent=True),
            "Still cannot work on parameters in shards",
        ),
    ],
)
def test_sharded_strategies_are_refused(name, callback, message):
    strategy = object.__new__(getattr(L.pytorch.strategies, name))
    run = trainer()
    run._accelerator_connector.strategy = strategy
    with pytest.raises(ValueError, match=message):
        callback.check(run, PlainModule())


def test_a_step_that_vanishes_on_repetition_is_refused():
    class Forgetful(PlainModule):
        calls = 0

        def training_step(self, batch, batch_idx):
            self.calls += 1
            return super().training_step(batch, batch_idx) if self.calls % 2 else None

    with pytest.raises(RuntimeError, match="None when evaluated again"):
        fit(Forgetful(), SharpnessAware())


@pytest.mark.parametrize("change", ["replace", "pop"])
def test_a_step_may_take_its_batch_apart(change):
    class Tidy(DictModule):
        def training_step(self, batch):
            image = batch.pop("image") if change == "pop" else batch["image"]
            batch["image"] = (image - 0.5) / 0.5
            return super().training_step(batch)

    class Plain(DictModule):
        def training_step(self, batch):
            return super().training_step({**batch, "image": (batch["image"] - 0.5) / 0.5})

    tidy, plain = Tidy(), Plain()
    fit(tidy, SharpnessAware(), form="dict")
    fit(plain, SharpnessAware(), form="dict")
    assert torch.equal(weights_of(tidy), weights_of(plain))


def test_a_step_that_changes_its_images_in_place_is_refused():
    class Rough(PlainModule):
        def training_step(self, batch, batch_idx):
            batch[0].sub_(0.5)
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="changes a tensor of its batch in place"):
        fit(Rough(), SharpnessAware())


def test_hooks_on_parameters_act_once():
    def slowed(*callbacks):
        module = PlainModule(norm=False)
        module.net[0].weight.register_hook(lambda g: 0.1 * g)
        before = module.net[0].weight.detach().clone()
        fit(module, *callbacks, max_steps=1, max_epochs=1)
        return module.net[0].weight.detach() - before

    torch.testing.assert_close(slowed(SharpnessAware(Still())), slowed())


def test_an_option_of_the_optimizer_itself_is_not_a_radius():
    class Adadelta(PlainModule):
        def configure_optimizers(self):
            return torch.optim.Adadelta(self.parameters(), lr=0.1)  # its group option rho is 0.9

    near, far = Adadelta(), Adadelta()
    fit(near, SharpnessAware(SAM(rho=1e-6)))
    fit(far, SharpnessAware(SAM(rho=0.9)))
    assert not torch.equal(weights_of(near), weights_of(far))


class Remembering(SAM):
    """SAM that keeps a running sum of its gradients."""

    def direction(self, weights, gradients, probe):
        before = self.recall("sum", weights)
        self.remember(
            "sum", weights, [g.clone() if b is None else b + g for b, g in zip(before, gradients, strict=True)]
        )
        return super().direction(weights, gradients, probe)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_memory_is_resumed_and_not_handed_to_another_method(tmp_path):
    def run(method, folder, path=None):
        saving = ModelCheckpoint(tmp_path / folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")
        fit(PlainModule(), SharpnessAware(method), saving, enable_checkpointing=True, ckpt_path=path)
        return method.state_dict()

    method = Remembering(rho=0.1)
    whole = run(method, "whole")
    half = torch.load(tmp_path / "whole" / "step=4.ckpt", weights_only=True)["lightning_robust.SharpnessAware"]
    assert half["method"] == "Remembering"
    assert not torch.equal(half["memory"]["sum/net.0.weight"], whole["sum/net.0.weight"])
    resumed = run(Remembering(rho=0.1), "resumed", tmp_path / "whole" / "step=4.ckpt")
    again = run(method, "again")  # a new fit with the same object starts from nothing
    for name, value in whole.items():
        assert torch.equal(value, resumed[name])
        assert torch.equal(value, again[name])
    with pytest.raises(ValueError, match="trained with Remembering, whose memory SAM cannot continue"):
        run(SAM(), "other", tmp_path / "whole" / "step=4.ckpt")
    run(SAM(), "sam")
    assert "lightning_robust.SharpnessAware" not in torch.load(tmp_path / "sam" / "step=8.ckpt", weights_only=True)
