"""OverfittingMonitor against patterns that a plain loop computes."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lightning_robust.callbacks import OverfittingMonitor, SharpnessAware
from lightning_robust.metrics import draw_pairs, oui
from lightning_robust.sharpness import SAM
from support.modules import DictModule, Images, ManualModule, PlainModule, loader, trainer


def plain_loop(module, batches, every, pairs):
    """Values of one epoch; the network without BatchNorm, so that rows do not depend on each other."""
    data, values = Images(24), []
    optimizer = module.configure_optimizers()
    for number, rows in enumerate(torch.arange(24).split(batches)):
        hidden = module.net[0](data.x[rows])
        if number % every == 0:
            known = pairs[(pairs < len(rows)).all(1)]
            if len(known):
                values.append(oui([hidden > 0], known))
        optimizer.zero_grad()
        F.cross_entropy(module(data.x[rows]), data.y[rows]).backward()
        optimizer.step()
    return torch.stack(values)


@pytest.mark.parametrize(("batch", "every", "count"), [(6, 2, 28), (7, 1, 5), (8, 3, 28)])
def test_equals_the_plain_loop(batch, every, count):
    """Also with a short last batch, in which some pairs have no second sample."""
    module, reference = PlainModule(norm=False), PlainModule(norm=False)
    run = trainer(OverfittingMonitor(every_n_batches=every, pairs=count, seed=4))
    run.fit(module, loader(batch_size=batch))
    values = plain_loop(reference, batch, every, draw_pairs(batch, count, seed=4))
    torch.testing.assert_close(run.callback_metrics["train/oui"], values.mean())
    for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [DictModule, ManualModule])
def test_other_modules(kind):
    run = trainer(OverfittingMonitor(every_n_batches=1), max_epochs=2)
    run.fit(kind(), loader(form="dict" if kind is DictModule else "pair"))
    assert 0 < run.callback_metrics["train/oui"] <= 1


def test_under_sam_the_first_pass_is_measured():
    plain, sharp = (trainer(*others, OverfittingMonitor()) for others in ([], [SharpnessAware(SAM(rho=0.5))]))
    for run in (plain, sharp):
        run.fit(PlainModule(norm=False), loader(batch_size=24))
    assert plain.callback_metrics["train/oui"] == sharp.callback_metrics["train/oui"]


def test_batches_of_one_sample_are_left_out():
    run = trainer(OverfittingMonitor(every_n_batches=1))
    run.fit(PlainModule(norm=False), loader(length=3, batch_size=1))
    assert "train/oui" not in run.callback_metrics


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # the second run goes on in it
def test_the_pairs_stay_after_a_resume(tmp_path):
    """A resumed run may see another first batch."""
    first = OverfittingMonitor(every_n_batches=1, seed=1)
    saving = ModelCheckpoint(dirpath=tmp_path, filename="last")
    trainer(first, saving, enable_checkpointing=True).fit(PlainModule(), loader(batch_size=6))
    second = OverfittingMonitor(every_n_batches=1, seed=1)
    run = trainer(second, ModelCheckpoint(tmp_path), enable_checkpointing=True, max_epochs=2)
    run.fit(PlainModule(), loader(batch_size=12), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(second.state_dict()["pairs"], first.state_dict()["pairs"])
    assert second.state_dict()["pairs"].max() < 6


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch._dynamo itself
def test_compiled():
    torch._dynamo.reset()
    eager, compiled = PlainModule(), PlainModule()
    compiled.net = torch.compile(compiled.net, backend="aot_eager")
    values = []
    for module in (eager, compiled):
        run = trainer(OverfittingMonitor(every_n_batches=2), max_epochs=2)
        run.fit(module, loader())
        values.append(run.callback_metrics["train/oui"])
    assert values[0] == pytest.approx(values[1].item(), abs=1e-3)


def test_bf16_mixed():
    run = trainer(OverfittingMonitor(), precision="bf16-mixed")
    run.fit(PlainModule(), loader())
    assert 0 < run.callback_metrics["train/oui"] <= 1


def test_hooks_go_with_the_fit_even_if_it_fails():
    class Fails(PlainModule):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("on purpose")

    for module in (PlainModule(), Fails()):
        if isinstance(module, Fails):
            with pytest.raises(RuntimeError, match="on purpose"):
                trainer(OverfittingMonitor()).fit(module, loader())
        else:
            trainer(OverfittingMonitor()).fit(module, loader())
        assert not any(child._forward_hooks for child in module.net)


def test_refusals():
    for options in ({"every_n_batches": 0}, {"pairs": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` to be an integer"):
            OverfittingMonitor(**options)

    class Functional(PlainModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(72, 4))

    with pytest.raises(ValueError, match=r"Functional has no ReLU, SiLU or GELU module; .* name layers"):
        trainer(OverfittingMonitor()).fit(Functional(), loader())
    trainer(OverfittingMonitor(layers=["net.0"])).fit(Functional(), loader())

    class Idle(PlainModule):
        def __init__(self):
            super().__init__()
            self.unused = nn.ReLU()

    with pytest.raises(RuntimeError, match=r"None of the layers .* in Idle \(unused\) ran in the training step"):
        trainer(OverfittingMonitor(layers=["unused"])).fit(Idle(), loader())
