"""The callback equals a loop that projects before it clips and steps."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.nn import functional as F

from lightning_robust.callbacks import OrthogonalGradient, SharpnessAware
from lightning_robust.sharpness import SAM, ParameterSelection, orthogonalize, sharp_backward
from support.modules import DictModule, ManualModule, PlainModule, loader, trainer

SETTINGS = {
    "plain": {},
    "accumulate": {"accumulate": 3},
    "clip-norm": {"accumulate": 2, "clip": ("norm", 0.3)},
    "clip-value": {"clip": ("value", 0.02)},
    "bf16": {"half": torch.bfloat16, "clip": ("norm", 0.3)},
    "fp16": {"half": torch.float16, "clip": ("norm", 0.3)},
    "sam": {"sam": True, "accumulate": 2, "clip": ("norm", 0.3)},
}


def loop(module, *, accumulate=1, clip=None, half=None, sam=False, selection=None, project=True):
    """Two epochs by hand."""
    module.train()
    optimizer = module.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", enabled=half is torch.float16)
    batches = list(loader())
    for _ in range(2):
        for index, (x, y) in enumerate(batches, 1):

            def loss(x=x, y=y):
                with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None, cache_enabled=False):
                    return F.cross_entropy(module.net(x), y)

            def backward(value):
                scaler.scale(value / accumulate).backward()

            if sam:
                sharp_backward(loss, SAM(rho=0.2), optimizer, module=module, backward=backward)
            else:
                backward(loss())
            if index % accumulate == 0 or index == len(batches):
                scaler.unscale_(optimizer)
                if project:
                    orthogonalize(optimizer, parameters=selection, module=module)
                if clip:
                    kind, size = clip
                    clipper = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[kind]
                    clipper(module.parameters(), size)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    return module


def fit(module, *callbacks, accumulate=1, clip=None, half=None, sam=False, **kwargs):
    options = {"gradient_clip_algorithm": clip[0], "gradient_clip_val": clip[1]} if clip else {}
    if half is torch.float16:
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    elif half is torch.bfloat16:
        options["precision"] = "bf16-mixed"
    extra = [SharpnessAware(SAM(rho=0.2))] if sam else []
    run = trainer(*callbacks, *extra, max_epochs=2, accumulate_grad_batches=accumulate, **options, **kwargs)
    run.fit(module, loader())
    return module


def same(ours, reference):
    values = ours.state_dict()
    for name, value in reference.state_dict().items():
        if not name.startswith("train_acc"):
            torch.testing.assert_close(values[name], value, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_the_plain_loop(setting):
    ours = fit(PlainModule(), OrthogonalGradient(), **SETTINGS[setting])
    same(ours, loop(PlainModule(), **SETTINGS[setting]))
    plain = loop(PlainModule(), **SETTINGS[setting], project=False)
    assert not torch.allclose(ours.net[-1].weight, plain.net[-1].weight, rtol=0, atol=1e-4)  # it is not inert


def test_an_overflow_is_skipped_as_without_it():
    scalers = []
    for callbacks in ([], [OrthogonalGradient()]):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        module = PlainModule()
        trainer(*callbacks, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]).fit(module, loader())
        assert all(bool(p.isfinite().all()) for p in module.parameters())
        scalers.append(scaler.get_scale())
    assert scalers[0] == scalers[1] < 2.0**40


def test_chosen_parameters():
    selection = ParameterSelection(min_ndim=2, exclude=r"net\.0")
    ours = fit(PlainModule(), OrthogonalGradient(selection))
    same(ours, loop(PlainModule(), selection=selection))
    assert not torch.allclose(ours.net[0].weight, loop(PlainModule()).net[0].weight, rtol=0, atol=1e-4)


def test_several_groups():
    module = DictModule()
    seen = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for parameter in pl_module.parameters():
                inner = float((parameter.detach() * parameter.grad).sum())
                seen.append(abs(inner) / float(parameter.detach().norm() * parameter.grad.norm() + 1e-12))

    trainer(OrthogonalGradient(), Watch()).fit(module, loader(form="dict"))
    assert max(seen) < 1e-5


def test_manual_optimization():
    ours = trainer(OrthogonalGradient(), max_epochs=2)
    module = ManualModule()
    ours.fit(module, loader())
    same(module, loop(PlainModule()))


class Past(ManualModule):
    """Steps the bare optimizer."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_a_step_past_lightning_is_not_silently_unprojected():
    with pytest.raises(RuntimeError, match=r"SGD stepped without Lightning's knowledge.*self\.optimizers\(\)"):
        trainer(OrthogonalGradient()).fit(Past(), loader())


def test_nothing_is_left_on_the_optimizer():
    callback = OrthogonalGradient()
    run = trainer(callback)
    run.fit(PlainModule(), loader())
    optimizer = run.optimizers[0] if run.optimizers else None
    assert not callback._handles
    assert optimizer is None or not optimizer._optimizer_step_post_hooks
    again = trainer(callback)
    again.fit(PlainModule(), loader())  # the same object serves a second fit
    copied = copy.deepcopy(callback)
    assert copied.parameters is callback.parameters is None
    run = trainer(callback)
    with pytest.raises(RuntimeError, match="stepped without"):
        run.fit(Past(), loader())
    assert not callback._handles


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_steps_that_the_module_skips():
    class Skips(PlainModule):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    trainer(OrthogonalGradient()).fit(Skips(), loader())


def test_refusals():
    class Quasi(PlainModule):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ValueError, match="cannot be combined with LBFGS"):
        trainer(OrthogonalGradient()).fit(Quasi(), loader())
    run = trainer()
    run.strategy.__class__ = FSDPStrategy  # which does not start on a CPU
    with pytest.raises(ValueError, match=r"FSDPStrategy does not keep on one device.*strategy=\"ddp\""):
        OrthogonalGradient().setup(run, PlainModule(), "fit")
    OrthogonalGradient().setup(run, PlainModule(), "validate")


def test_a_choice_of_nothing_is_refused():
    with pytest.raises(ValueError, match="chooses none"):
        trainer(OrthogonalGradient(ParameterSelection(include="nowhere"))).fit(PlainModule(), loader())
