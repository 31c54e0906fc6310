"""MESA against a plain loop with its own average, and that nothing of the average shows from outside."""

import contextlib
import copy
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from lightning_robust.callbacks import MESA, SharpnessAware
from lightning_robust.sharpness import SAM, sharp_backward
from support.modules import CollectionModule, DictModule, ManualModule, PlainModule, trainer
from support.shuffled import close, differ, shuffled
from support.shuffled import fit as shuffled_fit

EPOCHS, BATCHES, DECAY = 3, 4, 0.8
fit = partial(shuffled_fit, max_epochs=EPOCHS)


def mesa(**kwargs):
    return MESA(**{"weight": 2.0, "temperature": 2.0, "start_epoch": 0, "decay": DECAY, **kwargs})


def plain_loop(module, *, active=range(1, 99), sharp=None, accumulate=1, context=None):
    """What MESA must amount to; returns the average's state."""
    loader = shuffled()
    data, sampler = loader.dataset, loader.sampler
    optimizer = module.train().configure_optimizers()
    average = copy.deepcopy(module.net).eval()
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for number, indices in enumerate(torch.tensor(list(sampler)).split(6)):

            def loss(indices=indices, epoch=epoch):
                with context or contextlib.nullcontext():
                    z = module(data.x[indices])
                    value = F.cross_entropy(z, data.y[indices])
                    if epoch not in active:
                        return value
                    with torch.no_grad():
                        p = torch.softmax(average(data.x[indices]).float() / 2, 1)
                    term = 4 * F.kl_div(torch.log_softmax(z.float() / 2, 1), p, reduction="batchmean")
                    return value + 2.0 * term

            if number % accumulate == 0:
                optimizer.zero_grad()
            if sharp is None:
                (loss() / accumulate).backward()
            else:
                sharp_backward(loss, sharp, optimizer, module=module)
            if (number + 1) % accumulate == 0 or number + 1 == BATCHES:
                optimizer.step()
                state = module.net.state_dict()
                for name, value in average.state_dict().items():
                    if value.is_floating_point():
                        value.copy_(DECAY * value + (1 - DECAY) * state[name])
    return average.state_dict()


CASES = {
    "plain": ({}, {}, {}),
    "window": ({"start_epoch": -1, "end_epoch": 2}, {"active": range(2)}, {}),
    "accumulate": ({}, {"accumulate": 3}, {"accumulate_grad_batches": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_loop(case):
    options, loop, settings = CASES[case]
    ours, reference = PlainModule(), PlainModule()
    callback = mesa(**options)
    fit(ours, callback, **settings)
    expected = plain_loop(reference, **loop)
    close(ours, reference)
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(callback.state_dict()[f"net.{name}"], value, rtol=1e-5, atol=1e-6)
    without = PlainModule()
    fit(without)
    assert differ(ours, without)


def test_bf16_mixed():
    ours, reference = PlainModule(), PlainModule()
    fit(ours, mesa(), precision="bf16-mixed")
    plain_loop(reference, context=torch.autocast("cpu", torch.bfloat16, cache_enabled=False))
    close(ours, reference, rtol=1e-3, atol=1e-4)


def test_under_sam_the_average_is_asked_once_per_batch():
    ours, reference = PlainModule(), PlainModule()
    callback, calls = mesa(), []

    class Counting(L.Callback):
        def on_train_start(self, trainer, pl_module):
            callback.average.module.net.register_forward_hook(lambda *_: calls.append(1))

    fit(ours, SharpnessAware(SAM(rho=0.2)), callback, Counting())
    plain_loop(reference, sharp=SAM(rho=0.2))
    close(ours, reference)
    assert len(calls) == (EPOCHS - 1) * BATCHES
    assert callback.passes(1.0) == pytest.approx(4 / 3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch._dynamo itself
@pytest.mark.parametrize("what", ["network", "module", "method"])
def test_compiled(what):
    """A compiled module must not be asked for its own logits in place of the average's."""
    eager, compiled = PlainModule(), PlainModule()
    fit(eager, mesa())
    torch._dynamo.reset()
    target = compiled
    if what == "network":
        compiled.net = torch.compile(compiled.net, backend="aot_eager")
    elif what == "method":
        compiled.compile(backend="aot_eager")
    else:
        target = torch.compile(compiled, backend="aot_eager")
    fit(target, mesa())
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", [DictModule, CollectionModule])
def test_other_modules(module):
    form = {DictModule: "dict", CollectionModule: "triple"}[module]
    ours, without = module(), module()
    run = fit(ours, mesa(), loader=shuffled(form))
    assert torch.isfinite(run.callback_metrics["train/mesa"])
    fit(without, loader=shuffled(form))
    assert differ(ours, without)


def test_the_average_shows_nowhere():
    module, callback = PlainModule(), mesa()
    names = set(module.state_dict())

    class Watching(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            assert not held & {id(p) for p in callback.average.module.parameters()}
            assert not callback.average.module.training
            assert pl_module.training

    run = fit(module, callback, Watching())
    assert set(module.state_dict()) == names
    assert not any(value is callback.average.module for value in vars(module).values())
    assert callback.average.module._trainer is None
    # the metrics that the step counts saw each sample once
    assert run.callback_metrics["train_acc"] <= 1
    assert "train/mesa" in run.callback_metrics


def test_without_weight_training_is_the_same_bit_for_bit():
    """Dropout, statistics and random numbers of the module do not notice the average."""
    ours, without = PlainModule(dropout=0.4), PlainModule(dropout=0.4)
    fit(ours, mesa(weight=0.0))
    fit(without)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, without.state_dict()[name]), name


def test_a_forward_that_looks_at_its_trainer_and_logs():
    class Curious(PlainModule):
        def forward(self, x):
            self.log("epoch", float(self.trainer.current_epoch))
            return self.net(x)

    ours, quiet = Curious(), PlainModule()
    run = fit(ours, mesa())
    fit(quiet, mesa())
    assert not differ(ours, quiet)
    assert run.callback_metrics["epoch"] == EPOCHS - 1


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resume_equals_the_uninterrupted_run(tmp_path):
    def run(ckpt_path=None):
        module, callback = PlainModule(), mesa()
        saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        fit(module, callback, saving, enable_checkpointing=True, ckpt_path=ckpt_path)
        return module, callback

    whole, averaging = run()
    for step in (2, BATCHES, 6, 11):
        checkpoint = tmp_path / f"step={step}.ckpt"
        assert "net.0.weight" in torch.load(checkpoint, weights_only=True)["callbacks"]["MESA"]
        resumed, callback = run(checkpoint)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), (step, name)
        for name, value in averaging.state_dict().items():
            assert torch.equal(value, callback.state_dict()[name]), (step, name)


def test_a_checkpoint_of_another_network_is_refused():
    callback = mesa()
    fit(PlainModule(), callback)

    class Restoring(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            other.load_state_dict(callback.state_dict())

    other = mesa()
    with pytest.raises(ValueError, match="another network"):
        fit(PlainModule(norm=False), Restoring(), other)
    other = mesa()
    other.load_state_dict(callback.state_dict())
    assert other.state_dict() == callback.state_dict()  # a callback that has not trained gives it on


def test_a_fit_begins_with_a_new_average():
    callback, first, second = mesa(), PlainModule(), PlainModule()
    fit(first, callback)
    fit(second, callback)
    assert not differ(first, second)


class Normalising(PlainModule):
    """Changes its inputs in the step, where the average cannot see it."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net((batch[0] - 0.5) / 0.2), batch[1])


def test_inputs_that_only_the_step_changes_are_warned_about():
    with pytest.warns(UserWarning, match="Normalising changes its inputs before the network sees them"):
        fit(Normalising(), mesa())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # once per process
def test_a_step_without_a_loss_is_skipped():
    class Skipping(PlainModule):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    module = Skipping()
    fit(module, mesa())
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": -1.0}, "weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"decay": 1.1}, "decay"),
        ({"start_epoch": -2}, "start_epoch"),
        ({"start_epoch": 5, "end_epoch": 6}, "`end_epoch` to be an integer >= 7"),
    ],
)
def test_refused_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MESA(**kwargs)


def test_refused_modules_and_strategies():
    with pytest.raises(ValueError, match="MESA needs automatic optimization"):
        fit(ManualModule(), mesa())

    run = trainer(mesa())
    run.strategy.__class__ = type("FSDPStrategy", (run.strategy.__class__.__mro__[1],), {})
    with pytest.raises(ValueError, match="MESA averages whole weights, which FSDPStrategy does not keep"):
        run.callbacks[0].check(run, PlainModule())

    class Holding(PlainModule):
        def __init__(self):
            super().__init__()
            self.kept = self.net(torch.zeros(2, 2, 6, 6))

    with pytest.raises(TypeError, match="Holding cannot be copied"):
        fit(Holding(), mesa())

    class Another(PlainModule):
        def training_step(self, batch, batch_idx):
            z = self(batch[0])[:, :3]
            return {"loss": F.cross_entropy(z, batch[1].clamp(max=2)), "logits": z}

    with pytest.raises(ValueError, match=r"of one shape but got \(6, 3\) and \(6, 4\)"):
        fit(Another(), mesa())


def test_a_run_that_is_too_short_is_warned_about():
    with pytest.warns(UserWarning, match="MESA acts from epoch 6 on .* this run has 3"):
        fit(PlainModule(), MESA(), limit_train_batches=1)


def test_defaults_are_the_published_ones():
    callback = MESA()
    assert (callback.weight, callback.temperature, callback.decay) == (0.8, 5.0, 0.9998)
    assert [epoch in callback.window for epoch in (0, 5, 6, 300)] == [False, False, True, True]
