from pathlib import Path

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import nn
from torch.nn import functional as F

from lightning_robust.callbacks import Mixout, SharpnessAware
from lightning_robust.regularization import mixout
from lightning_robust.sharpness import SAM
from support.modules import ManualModule, PlainModule, loader, trainer, weights_of
from support.ranks import WORLD, launch
from support.resumable import shuffled_loader

BATCHES = 4


class Seen(PlainModule):
    """Records the weights that its linear layer works with, in every pass."""

    def __init__(self, **kwargs):
        super().__init__(norm=False, **kwargs)
        self.initial = self.head.weight.detach().clone()
        self.passes = []

    @property
    def head(self):
        return self.net[-1]

    def used(self):
        with torch.no_grad():
            return (self.head(torch.eye(20)) - self.head.bias).T

    def forward(self, x):
        if self.training:
            self.passes.append((self.head.weight.detach().clone(), self.used()))
        return super().forward(x)


def replaced(module):
    """For each pass, which inputs had the initial weights; from the second step on."""
    return [(used - module.initial).abs().amax(0) < 1e-6 for _, used in module.passes]


def fit(module, *callbacks, data=None, ckpt_path=None, **kwargs):
    L.seed_everything(7, verbose=False)
    run = trainer(*callbacks, **kwargs)
    run.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return run


@pytest.mark.parametrize("p", [0.3, 0.7])
def test_training_sees_mixtures(p):
    module = Seen()
    fit(module, Mixout(p=p), max_epochs=5)
    masks = replaced(module)[1:]
    assert torch.stack(masks).float().mean().item() == pytest.approx(p, abs=0.1)
    for (weight, used), mask in zip(module.passes[1:], masks, strict=True):
        expected = mixout(weight, module.initial, (~mask).float(), p=p)
        torch.testing.assert_close(used, expected, rtol=1e-4, atol=1e-5)
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)  # a new one in each batch
    assert "forward" not in vars(module.head)


def test_evaluation_sees_the_weights():
    class Validated(Seen):
        def validation_step(self, batch, batch_idx):
            torch.testing.assert_close(self.used(), self.head.weight, rtol=0, atol=1e-6)
            self.validated = True

    module = Validated()
    run = trainer(Mixout(p=0.5), max_epochs=2)
    run.fit(module, loader(), loader())
    assert module.validated


def test_layers_in_evaluation_mode_are_left_alone():
    class Frozen(Seen):
        def on_train_epoch_start(self):
            self.head.eval()

    module = Frozen()
    fit(module, Mixout(p=0.5))
    for weight, used in module.passes:
        torch.testing.assert_close(used, weight, rtol=0, atol=1e-6)


def test_the_two_derivatives():
    def change(grad):
        module = PlainModule(norm=False)
        before = module.net[-1].weight.detach().clone()
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1.0)
        fit(module, Mixout(p=0.6, grad=grad), max_steps=1)
        return module.net[-1].weight.detach() - before

    reference, true = change("reference"), change("true")
    torch.testing.assert_close(true, reference / 0.4)
    columns = reference.abs().amax(0) == 0
    assert 0 < columns.sum() < 20  # inputs whose weights were those of the beginning


def test_all_passes_over_a_batch_share_a_mask():
    module = Seen()
    fit(module, SharpnessAware(SAM(rho=0.5)), Mixout(p=0.5), max_epochs=2)
    masks = replaced(module)
    assert len(masks) == 2 * 2 * BATCHES
    for first, second in zip(masks[2::2], masks[3::2], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(masks[2], masks[4])


def test_manual_optimization_and_accumulation():
    fit(ManualModule(norm=False), Mixout(p=0.5))
    module = Seen()
    fit(module, Mixout(p=0.5), accumulate_grad_batches=2, max_epochs=2)
    masks = replaced(module)[2:]
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)


def test_without_probability_nothing_changes():
    plain, mixed = PlainModule(), PlainModule()
    fit(plain)
    fit(mixed, Mixout(p=0.0))
    assert torch.equal(weights_of(plain), weights_of(mixed))


def test_depends_on_its_seed_alone():
    def weights(**kwargs):
        module = PlainModule(norm=False)
        fit(module, Mixout(p=0.5, **kwargs))
        return weights_of(module)

    assert torch.equal(weights(seed=7), weights())  # that of seed_everything
    assert not torch.equal(weights(seed=8), weights())


class SaveAt(L.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [4, 6])
def test_continues_exactly_from_checkpoints_with_ordinary_names(tmp_path, step):
    whole, continued = PlainModule(), PlainModule(seed=1)
    saved = SaveAt(step, tmp_path / "a.ckpt")
    fit(whole, Mixout(p=0.5), saved, data=shuffled_loader(), max_epochs=3)
    state = torch.load(saved.path, weights_only=True)
    assert state["state_dict"].keys() == PlainModule().state_dict().keys()
    fit(continued, Mixout(p=0.5), data=shuffled_loader(), max_epochs=3, ckpt_path=saved.path)
    assert torch.equal(weights_of(continued), weights_of(whole))
    plain = PlainModule.load_from_checkpoint(saved.path)
    plain.load_state_dict(state["state_dict"])


def test_a_checkpoint_after_the_fit_still_knows_the_initial_weights(tmp_path):
    module = PlainModule()
    initial = module.net[-1].weight.detach().clone()
    callback = Mixout(p=0.5)
    run = fit(module, callback)
    run.save_checkpoint(tmp_path / "a.ckpt")
    (state,) = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"].values()
    assert torch.equal(state["targets"]["net.5"], initial)
    run.validate(module, loader(), verbose=False)
    assert callback.state_dict()["targets"].keys() == {"net.5"}


def test_beside_a_moving_average():
    alone, averaged = PlainModule(), PlainModule()
    fit(alone, Mixout(p=0.5), max_epochs=2)
    steps = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            steps.append(weights_of(pl_module))

    fit(averaged, EMAWeightAveraging(decay=0.5), Mixout(p=0.5), Watch(), max_epochs=2)
    torch.testing.assert_close(steps[-1], weights_of(alone), rtol=0, atol=0)
    expected = steps[0]
    for weights in steps[1:]:
        expected = 0.5 * expected + 0.5 * weights
    torch.testing.assert_close(weights_of(averaged), expected)


@pytest.mark.parametrize("compiled", ["in place", "wrapped"])
def test_a_compiled_module_trains_alike(compiled):
    def make():
        module = PlainModule(norm=False)
        del module.train_acc  # counters of metrics are compiled anew in every step
        module.training_step = lambda batch, batch_idx: F.cross_entropy(module(batch[0]), batch[1])
        return module

    plain, fast = make(), make()
    torch._dynamo.reset()
    if compiled == "in place":
        fast.net.compile(backend="eager")
    else:
        fast.net = torch.compile(fast.net, backend="eager")
    torch._dynamo.utils.counters.clear()
    fit(plain, SharpnessAware(), Mixout(p=0.5), max_epochs=2)
    fit(fast, SharpnessAware(), Mixout(p=0.5), max_epochs=2)
    assert torch.equal(weights_of(fast), weights_of(plain))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # a new mask compiles nothing


def test_bfloat16():
    module = Seen()
    fit(module, Mixout(p=0.5), precision="bf16-mixed")
    assert bool(weights_of(module).isfinite().all())
    module = PlainModule(norm=False)
    fit(module, Mixout(p=0.5), precision="bf16-true")
    assert bool(weights_of(module).isfinite().all())


class Transformer(PlainModule):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        x = self.net(x)[None]
        return self.head(self.attention(x, x, x)[0])[0]


def test_chooses_layers():
    def names(callback):
        fit(Transformer(), callback, max_steps=1)
        return list(callback.state_dict()["targets"])

    assert names(Mixout()) == ["net.5", "head"]
    assert names(Mixout(exclude="^head$")) == ["net.5"]


def test_an_exception_gives_the_layers_their_forward_back():
    module = PlainModule()
    module.training_step = lambda batch, batch_idx: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(module, Mixout())
    assert "forward" not in vars(module.net[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 1.5}, r"Expected `p` to be in \[0.0, 1.0\] but got 1.5"),
        ({"p": 1.0}, "Expected `p` to be below 1 but got 1"),
        ({"grad": "none"}, "Expected `grad` to be one of 'reference', 'true' but got 'none'"),
        ({"seed": -1}, "Expected `seed` to be an integer >= 0 but got -1"),
        ({"exclude": "("}, r"Expected `exclude` to hold regular expressions but got '\('"),
    ],
    ids=["p", "one", "grad", "seed", "exclude"],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mixout(**arguments)


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"Mixout found no nn.Linear in PlainModule to work on .*exclude=\['net'\]"):
        fit(PlainModule(), Mixout(exclude="net"))
    saved = SaveAt(2, tmp_path / "a.ckpt")
    fit(Transformer(), Mixout(exclude="head"), saved)
    with pytest.raises(ValueError, match="holds Mixout's initial weights of other layers: 'head' differs"):
        fit(Transformer(), Mixout(), ckpt_path=saved.path, max_epochs=2)
    monkeypatch.setattr("lightning_robust.callbacks.mixout.keeps_whole_weights", lambda _: False)
    with pytest.raises(ValueError, match='SingleDeviceStrategy does not keep on one device; use strategy="ddp"'):
        fit(PlainModule(), Mixout())


def test_a_second_fit_begins_anew():
    module, callback = PlainModule(), Mixout(p=0.5)
    fit(module, callback)
    before = module.net[-1].weight.detach().clone()
    fit(module, callback)
    assert torch.equal(callback.state_dict()["targets"]["net.5"], before)


def test_two_processes(tmp_path):
    launch(Path(__file__).parents[1] / "support" / "ddp_weights.py", tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    assert torch.equal(first["weights"], second["weights"])
    assert first["rates"] == second["rates"] == [0.5, 0.5, 0.0, 0.0]
    assert not torch.equal(first["replaced"], second["replaced"])  # each process draws masks of its own
    # the penalty is the same in both processes, so its gradient passes the mean unchanged
    torch.testing.assert_close(first["penalised"], second["penalised"], rtol=0, atol=0)
    torch.testing.assert_close(first["penalised"], first["expected"])


def test_can_be_built_from_a_configuration():
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("--methods", type=dict[str, Callback | None], default={})
    # The newer name of one method; older versions of jsonargparse know only the second.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    built = instantiate(parser.parse_args(["--methods.m", "Mixout", "--methods.m.exclude", "head"])).methods["m"]
    assert built.p == 0.7
    assert "head" not in built.names
