"""The optimizers inside a Trainer equal a plain loop, and resume."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch.nn import functional as F

from lightning_robust.callbacks import SharpnessAware
from lightning_robust.optimizers import AdaHessian, DoG, PolynomialAverage, SubsetNorm
from support.modules import PlainModule, loader, trainer

OPTIMIZERS = {
    "dog": lambda parameters: DoG(parameters, reps_rel=1e-2),
    "ldog": lambda parameters: DoG(parameters, reps_rel=1e-2, layer_wise=True),
    "subset-norm": lambda parameters: SubsetNorm(parameters, lr=0.02),
}
create_graph = pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")


class Module(PlainModule):
    def __init__(self, make, **kwargs):
        super().__init__(**kwargs)
        self.make = make

    def configure_optimizers(self):
        return self.make(self.parameters())


class Automatic(Module):
    """Second order in automatic optimization."""

    def backward(self, loss):
        loss.backward(create_graph=True)


class Manual(Module):
    def __init__(self, make, graph=True):
        super().__init__(make)
        self.automatic_optimization = False
        self.graph = graph

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]), create_graph=self.graph)
        optimizer.step()


def same(ours, reference):
    for name, value in reference.net.state_dict().items():
        torch.testing.assert_close(ours.net.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def loop(module, *, accumulate=1, clip=None, half=False, graph=False):
    """Two epochs by hand."""
    module.train()
    optimizer = module.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", enabled=half)
    for _ in range(2):
        for index, (x, y) in enumerate(loader(), 1):
            with torch.autocast("cpu", torch.float16, enabled=half, cache_enabled=False):
                loss = F.cross_entropy(module.net(x), y) / accumulate
            scaler.scale(loss).backward(create_graph=graph)
            if index % accumulate == 0:
                scaler.unscale_(optimizer)
                if clip:
                    torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    return module


@pytest.mark.parametrize(
    "setting", [{}, {"accumulate": 2, "clip": 0.3}, {"half": True, "accumulate": 2, "clip": 0.3}], ids=str
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_plain_loop(name, setting):
    ours, reference = Module(OPTIMIZERS[name]), Module(OPTIMIZERS[name])
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))] if setting.get("half") else None
    run = trainer(
        max_epochs=2,
        plugins=plugins,
        accumulate_grad_batches=setting.get("accumulate", 1),
        gradient_clip_val=setting.get("clip"),
    )
    run.fit(ours, loader())
    same(ours, loop(reference, **setting))
    assert not torch.allclose(ours.net[0].weight, Module(OPTIMIZERS[name]).net[0].weight, atol=1e-4)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "adahessian"])
@create_graph
def test_resumes_from_a_checkpoint(name, tmp_path):
    make = OPTIMIZERS.get(name, lambda parameters: AdaHessian(parameters, lr=0.01, update_each=2))
    kind = Manual if name == "adahessian" else Module
    whole, part, resumed = (kind(make) for _ in range(3))
    trainer(max_epochs=3).fit(whole, loader(length=18))
    run = trainer(max_epochs=1)
    run.fit(part, loader(length=18))
    run.save_checkpoint(tmp_path / "saved.ckpt")
    trainer(max_epochs=3).fit(resumed, loader(length=18), ckpt_path=tmp_path / "saved.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole.parameters(), part.parameters(), strict=True))


def test_weight_averaging_of_lightning_averages_the_iterates():
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(pl_module.net[0].weight.detach().clone())

    module = Module(OPTIMIZERS["dog"])
    trainer(Watch(), WeightAveraging(avg_fn=PolynomialAverage(gamma=8.0)), max_epochs=2).fit(module, loader())
    expected = torch.zeros_like(seen[0])
    for step, weight in enumerate(seen, 1):
        expected += 9 / (step + 8) * (weight - expected)
    torch.testing.assert_close(module.net[0].weight.data, expected)


@pytest.mark.parametrize("kind", [Manual, Automatic])
@create_graph
def test_adahessian_equals_the_plain_loop(kind):
    def make(parameters):
        return AdaHessian(parameters, lr=0.01, n_samples=2)

    ours = kind(make)
    trainer(max_epochs=2).fit(ours, loader())
    same(ours, loop(Module(make), graph=True))


def test_adahessian_says_what_is_missing():
    with pytest.raises(RuntimeError, match=r"No gradient has a graph.*manual optimization"):
        trainer().fit(Module(AdaHessian), loader())


@create_graph
def test_adahessian_refuses_the_scaler_of_mixed_precision():
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(RuntimeError, match="cannot be used with a GradScaler"):
        trainer(plugins=[plugin]).fit(Manual(AdaHessian), loader())


@create_graph
def test_adahessian_is_refused_under_sharpness_aware():
    with pytest.raises((RuntimeError, ValueError), match=r"AdaHessian"):
        trainer(SharpnessAware()).fit(Automatic(AdaHessian), loader())
