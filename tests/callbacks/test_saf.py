"""SAF against a plain loop with a dictionary of past logits, in every setting of the Trainer that could disturb it."""

import contextlib
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import SAF, AdversarialTraining, LogitRegularization, SharpnessAware
from lightning_robust.losses import MaxSup
from lightning_robust.sharpness import SAM, sharp_backward
from support.modules import CollectionModule, DictModule, Images, ManualModule, PlainModule
from support.shuffled import close, differ, shuffled
from support.shuffled import fit as shuffled_fit

EPOCHS, BATCHES = 4, 4
fit = partial(shuffled_fit, max_epochs=EPOCHS)


def saf(**kwargs):
    return SAF(**{"weight": 2.0, "temperature": 2.0, "start_epoch": 0, "lag": 1, **kwargs})


def plain_loop(module, *, lag=1, active=range(1, 99), unseen="skip", sharp=None, accumulate=1, context=None):
    """What SAF must amount to: a dictionary from sample and slot to logits."""
    loader = shuffled()
    data, sampler = loader.dataset, loader.sampler
    optimizer = module.train().configure_optimizers()
    slots, terms = {}, []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for number, indices in enumerate(torch.tensor(list(sampler)).split(6)):
            seen = []

            def loss(indices=indices, seen=seen, epoch=epoch):
                with context or contextlib.nullcontext():
                    z = module(data.x[indices])
                    value = F.cross_entropy(z, data.y[indices])
                    seen.append(z.detach())
                    if epoch not in active:
                        return value
                    total = torch.zeros(())
                    for index, row in zip(indices.tolist(), z.float(), strict=True):
                        past = slots.get(((epoch - lag) % (lag + 1), index))
                        if past is None and unseen == "skip":
                            continue
                        past = torch.zeros_like(row) if past is None else past
                        p, q = torch.softmax(past / 2, 0), torch.log_softmax(row / 2, 0)
                        total = total + 4 * F.kl_div(q, p, reduction="sum") / len(z)
                    terms.append(total.detach())
                    return value + 2.0 * total

            if number % accumulate == 0:
                optimizer.zero_grad()
            if sharp is None:
                (loss() / accumulate).backward()
            else:
                sharp_backward(loss, sharp, optimizer, module=module)
            for index, row in zip(indices.tolist(), seen[0].float(), strict=True):
                slots[epoch % (lag + 1), index] = row
            if (number + 1) % accumulate == 0 or number + 1 == BATCHES:
                optimizer.step()
    return slots, terms


CASES = {
    "plain": ({}, {}, {}),
    "lag": ({"lag": 2}, {"lag": 2}, {}),
    "uniform": ({"lag": 2, "unseen": "uniform"}, {"lag": 2, "unseen": "uniform"}, {}),
    "window": ({"start_epoch": 1, "end_epoch": 3}, {"active": range(2, 3)}, {}),
    "cpu": ({"storage": "cpu"}, {}, {}),
    "accumulate": ({}, {"accumulate": 3}, {"accumulate_grad_batches": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_loop(case):
    options, loop, settings = CASES[case]
    ours, reference = PlainModule(), PlainModule()
    callback = saf(**options)
    run = fit(ours, callback, **settings)
    slots, terms = plain_loop(reference, **loop)
    close(ours, reference)
    history = callback.history
    for epoch in range(EPOCHS, EPOCHS + history.lag):  # as later epochs would look them up
        found, known = history.look_up(torch.arange(22), epoch=epoch)
        assert known.all()
        expected = torch.stack([slots[(epoch - history.lag) % (history.lag + 1), index] for index in range(22)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if loop.get("active", range(9))[-1] >= EPOCHS - 1:
        last = torch.stack(terms[-BATCHES:])
        torch.testing.assert_close(run.callback_metrics["train/saf"], (last * torch.tensor([6, 6, 6, 4])).sum() / 22)
    without = PlainModule()
    fit(without)
    assert differ(ours, without)


def test_bf16_mixed():
    ours, reference = PlainModule(), PlainModule()
    fit(ours, saf(), precision="bf16-mixed")
    plain_loop(reference, context=torch.autocast("cpu", torch.bfloat16, cache_enabled=False))
    close(ours, reference, rtol=1e-3, atol=1e-4)


def test_under_sam_the_counted_pass_is_remembered_and_all_have_the_term():
    ours, reference = PlainModule(), PlainModule()
    callback = saf()
    fit(ours, SharpnessAware(SAM(rho=0.2)), callback)
    slots, _ = plain_loop(reference, sharp=SAM(rho=0.2))
    close(ours, reference)
    found, _ = callback.history.look_up(torch.arange(22), epoch=EPOCHS)
    torch.testing.assert_close(
        found, torch.stack([slots[(EPOCHS - 1) % 2, index] for index in range(22)]), rtol=1e-4, atol=1e-5
    )


def test_an_ascent_on_part_of_the_batch():
    """Its pass has fewer logits than the batch has samples, and is not remembered."""
    callback, module = saf(), PlainModule()
    fit(module, SharpnessAware(SAM(rho=0.2), ascent_fraction=0.5), callback)
    assert callback.history.look_up(torch.arange(22), epoch=EPOCHS)[1].all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch._dynamo itself
@pytest.mark.parametrize("what", ["network", "module"])
def test_compiled(what):
    eager, compiled = PlainModule(), PlainModule()
    fit(eager, saf())
    torch._dynamo.reset()
    target = compiled
    if what == "network":
        compiled.net = torch.compile(compiled.net, backend="aot_eager")
    else:
        target = torch.compile(compiled, backend="aot_eager")
    fit(target, saf())
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", [DictModule, CollectionModule])
def test_modules_and_other_callbacks(module):
    form = {DictModule: "dict", CollectionModule: "triple"}[module]
    callback = saf()
    attack = AdversarialTraining(PGD(eps=0.1, steps=1))
    run = fit(module(), LogitRegularization(MaxSup(alpha=0.1)), callback, attack, loader=shuffled(form))
    assert torch.isfinite(run.callback_metrics["train/saf"])
    assert callback.history.look_up(torch.arange(22), epoch=EPOCHS)[1].all()
    named = saf(index_key={DictModule: "id", CollectionModule: 2}[module])
    fit(module(), LogitRegularization(MaxSup(alpha=0.1)), named, attack, loader=shuffled(form))
    for name, value in callback.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(named.state_dict()[name]))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resume_equals_the_uninterrupted_run(tmp_path):
    def run(ckpt_path=None, **kwargs):
        module, callback = PlainModule(), saf(**kwargs)
        saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        fit(module, callback, saving, enable_checkpointing=True, ckpt_path=ckpt_path)
        return module, callback

    whole, history = run()
    for step in (2, BATCHES, 6, 11):
        checkpoint = tmp_path / f"step={step}.ckpt"
        assert "logits" in torch.load(checkpoint, weights_only=True)["callbacks"]["SAF"]
        resumed, callback = run(checkpoint)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), (step, name)
        for name, value in history.state_dict().items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(callback.state_dict()[name])), (step, name)
    with pytest.raises(ValueError, match="lag=1 but this one has lag=2"):
        run(tmp_path / "step=6.ckpt", lag=2)


def test_a_checkpoint_of_another_dataset_or_network_is_refused(tmp_path):
    run = fit(PlainModule(), saf())
    run.save_checkpoint(tmp_path / "after.ckpt")
    options = {"ckpt_path": tmp_path / "after.ckpt", "max_epochs": EPOCHS + 1}
    with pytest.raises(ValueError, match="samples=22 but this one has samples=24"):
        fit(PlainModule(), saf(), loader=shuffled(length=24), **options)
    callback = saf()
    callback.load_state_dict(run.callbacks[0].state_dict())
    assert callback.state_dict()["logits"].shape == (2, 22, 4)  # a callback that has not trained gives it on
    with pytest.raises(ValueError, match=r"shape \(6, 4\) but got \(6, 5\)"):
        fit(OtherClasses(), saf())


class OtherClasses(PlainModule):
    """Has five classes from the second epoch on."""

    def training_step(self, batch, batch_idx):
        z = F.pad(self(batch[0]), (0, int(self.current_epoch > 0)))
        return {"loss": F.cross_entropy(z, batch[1]), "logits": z}


def test_a_fit_begins_with_an_empty_memory():
    callback, first, second = saf(), PlainModule(), PlainModule()
    fit(first, callback)
    fit(second, callback)
    assert not differ(first, second)


def test_overflowing_steps_leave_no_trace():
    class Overflowing(PlainModule):
        def training_step(self, batch, batch_idx):
            z = self(batch[0])
            if self.current_epoch == 0 and batch_idx == 1:
                return {"loss": F.cross_entropy(z, batch[1]), "logits": z * float("inf")}
            return F.cross_entropy(z, batch[1])

    module = Overflowing()
    fit(module, saf())
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": -1.0}, "weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"lag": 0}, "`lag` to be an integer >= 1"),
        ({"start_epoch": -2}, "start_epoch"),
        ({"start_epoch": 5, "end_epoch": 6}, "`end_epoch` to be an integer >= 7"),
        ({"unseen": "zeros"}, "'skip', 'uniform'"),
        ({"dtype": "float64"}, "dtype"),
        ({"storage": "gpu"}, "storage"),
        ({"num_samples": 0}, "num_samples"),
    ],
)
def test_refused_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SAF(**kwargs)


def test_refused_modules():
    with pytest.raises(ValueError, match="SAF needs automatic optimization"):
        fit(ManualModule(), saf())

    class Dense(PlainModule):
        def training_step(self, batch, batch_idx):
            z = self(batch[0])
            return {"loss": F.cross_entropy(z, batch[1]), "logits": z.view(-1, 2, 2)}

    with pytest.raises(ValueError, match=r"one row of logits \[B, C\] per sample but they have \[6, 2, 2\]"):
        fit(Dense(), saf())


def test_a_run_that_is_too_short_is_warned_about():
    with pytest.warns(UserWarning, match="SAF acts from epoch 6 on .* this run has 4"):
        fit(PlainModule(), SAF(), limit_train_batches=1)
    with pytest.warns(UserWarning, match="SAF acts from epoch 4 on"):
        fit(PlainModule(), saf(lag=4), limit_train_batches=1)
    fit(PlainModule(), saf(lag=4, unseen="uniform"), limit_train_batches=1)
    fit(PlainModule(), SAF(), fast_dev_run=True)
    fit(PlainModule(), SAF(), max_steps=1)


def test_defaults_are_the_published_ones():
    callback = SAF()
    assert (callback.weight, callback.temperature, callback.lag) == (0.3, 5.0, 3)
    assert [epoch in callback.window for epoch in (0, 5, 6, 300)] == [False, False, True, True]
    assert callback.passes(2.0) == 2.0


def test_works_with_a_plain_loader():
    module = PlainModule()
    run = fit(module, saf(), loader=DataLoader(Images(22), 6, shuffle=True, num_workers=1))
    assert run.callback_metrics["train/saf"] > 0
