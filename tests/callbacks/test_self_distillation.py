"""ADR in a Trainer: its average and its schedules over accumulation, precisions, restarts and further passes."""

import copy

import lightning as L
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import Criterion, ObjectiveTraining, SharpnessAware, cache_teacher
from lightning_robust.losses import PSKD
from lightning_robust.objectives import ADR, ARREST, LTD, SRSTAWR, TRADES, AdversarialCrossEntropy, Running
from lightning_robust.schedules import Cosine
from lightning_robust.sharpness import AWP, SAM, SAMStyleAWP
from support.modules import CLASSES, CollectionModule, Images, PlainModule, loader, trainer
from support.shuffled import shuffled

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory",
    "ignore:You're resuming from a checkpoint that ended before",
    "ignore:The ``compute`` method of metric",  # of modules whose own step does not run
)
DECAY, EPOCHS, BATCHES = 0.8, 2, 4


class Watched(ADR):
    """Keeps where in the training its targets were made."""

    def __init__(self, **options):
        super().__init__(**options)
        self.asked = []

    def targets(self, model, x, y):
        self.asked.append((self.running.step, self.running.max_steps))
        return super().targets(model, x, y)


class WithTest(PlainModule):
    def __init__(self):
        super().__init__()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES, average="micro")

    def training_step(self, batch, batch_idx):
        self.accuracy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.accuracy(self(batch[0]), batch[1])
        self.log("seen", self.accuracy)

    test_step = validation_step


def adr(kind=ADR, **options):
    attack = PGD(eps=0.1, steps=1, mode="train")
    return kind(objective=AdversarialCrossEntropy(attack=attack), decay=DECAY, **options)


def fit(objective, *callbacks, module=None, ckpt_path=None, epochs=EPOCHS, **options):
    L.seed_everything(0)
    module = PlainModule() if module is None else module
    run = trainer(ObjectiveTraining(objective), *callbacks, max_epochs=epochs, **options)
    run.fit(module, shuffled(), ckpt_path=ckpt_path)
    return module, run


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name
        else:
            assert str(value) == str(second[name])


def saving(folder):
    return ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")


class Follow(L.Callback):
    """The average as a loop has it, with the weights after each optimizer step."""

    def on_train_start(self, run, module):
        self.average = copy.deepcopy(module).eval()
        self.steps = 0

    def on_train_batch_end(self, run, module, *_):
        if run.global_step == self.steps:
            return
        self.steps = run.global_step
        with torch.no_grad():
            for mine, theirs in zip(self.average.state_dict().values(), module.state_dict().values(), strict=True):
                mine.copy_(DECAY * mine + (1 - DECAY) * theirs if mine.is_floating_point() else theirs)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_the_average_moves_once_per_optimizer_step_and_so_do_the_schedules(accumulate):
    objective, follow = adr(Watched), Follow()
    _, run = fit(objective, follow, accumulate_grad_batches=accumulate)
    per_epoch = -(-BATCHES // accumulate)
    assert run.global_step == EPOCHS * per_epoch
    steps = [epoch * per_epoch + batch // accumulate for epoch in range(EPOCHS) for batch in range(BATCHES)]
    assert objective.asked == [(step, EPOCHS * per_epoch) for step in steps]
    for name, value in objective.averaged().net.state_dict().items():
        torch.testing.assert_close(value, follow.average.net.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_equals_the_uninterrupted_run(tmp_path, accumulate):
    whole = adr(Watched)
    options = {"accumulate_grad_batches": accumulate, "enable_checkpointing": True}
    module, run = fit(whole, saving(tmp_path), **options)
    for step in range(1, run.global_step):
        resumed = adr(Watched)
        again, _ = fit(resumed, saving(tmp_path), ckpt_path=tmp_path / f"step={step}.ckpt", **options)
        assert resumed.asked[0][0] == step
        same(module.net, again.net)
        same(whole.averaged(), resumed.averaged())


def test_the_checkpoint_holds_one_average_and_reads_without_code(tmp_path):
    objective = adr()
    _, run = fit(objective)
    run.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert not any("average" in name or "objective" in name for name in checkpoint["state_dict"])
    (state,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("ObjectiveTraining"))
    saved = state["objective"]["_extra_state"]
    for name, value in objective.averaged().named_parameters():
        assert torch.equal(saved[name], value)


@pytest.mark.parametrize("where", ["callback", "module"])
def test_the_average_is_evaluated_like_any_module(where):
    module = WithTest()
    objective = adr()
    if where == "module":  # as people do who want it in their own checkpoint
        module.objective = objective
    L.seed_everything(0)
    trainer(ObjectiveTraining(objective), max_epochs=1).fit(module, shuffled(), loader())
    averaged = objective.averaged()
    (found,) = trainer().test(averaged, loader(), verbose=False)
    with torch.no_grad():
        expected = torch.cat([objective.average.module(x).argmax(1) == y for x, y in loader()]).float().mean()
    assert found["seen"] == pytest.approx(float(expected))
    assert sum(p.numel() for p in averaged.parameters()) == sum(p.numel() for p in module.parameters())


def test_a_second_fit_begins_anew():
    objective, fresh = adr(), adr()
    callback = ObjectiveTraining(objective)
    for seed in (1, 0):
        L.seed_everything(0)
        trainer(callback, max_epochs=1).fit(PlainModule(seed=seed), shuffled())
    fit(fresh, epochs=1)
    same(objective.averaged().net, fresh.averaged().net)


@pytest.mark.parametrize("method", [AWP(), SAMStyleAWP(), SAM()], ids=["awp", "sam-style", "sam"])
def test_weight_perturbations_use_one_set_of_labels_and_the_average_of_unperturbed_weights(method):
    objective, follow = adr(Watched), Follow()
    fit(objective, follow, SharpnessAware(method))
    assert len(objective.asked) == EPOCHS * BATCHES
    for name, value in objective.averaged().net.named_parameters():
        torch.testing.assert_close(value, follow.average.net.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("method", ["adr", "trades", "ltd", "arrest"])
def test_precisions(method, precision):
    attack = PGD(eps=0.1, steps=1)
    teacher = PlainModule(seed=2).net
    objective = {
        "adr": adr,
        "trades": lambda: ADR(
            objective=TRADES(attack=PGD(eps=0.1, steps=1, loss="kl", mode="train"), forwards="joint"), decay=DECAY
        ),
        "ltd": lambda: LTD(teacher=teacher, objective=AdversarialCrossEntropy(attack=attack)),
        "arrest": lambda: ARREST(teacher=teacher, attack=attack),
    }[method]()
    _, run = fit(objective, precision=precision, gradient_clip_val=1.0, epochs=1)
    assert bool(run.callback_metrics["train/loss"].isfinite())
    if method in ("adr", "trades"):
        dtype = torch.float64 if precision == "64-true" else torch.float32  # never averaged in 16 bits
        state = objective.state_dict()["_extra_state"]
        assert {value.dtype for value in state.values() if value.is_floating_point()} == {dtype}


def test_a_module_without_forward_is_averaged_too():
    objective = adr()
    L.seed_everything(0)
    trainer(ObjectiveTraining(objective, logits_from="net"), max_epochs=1).fit(
        CollectionModule(), loader(form="triple")
    )
    assert set(objective.state_dict()["_extra_state"]) >= {"net.0.weight", "net.1.running_mean"}


def test_a_run_without_end_needs_a_schedule_with_one():
    with pytest.raises(ValueError, match="to be known for a cosine schedule"):
        fit(adr(), epochs=-1, max_steps=-1, limit_train_batches=2)
    ended = {
        "temperature": Cosine(start=2.5, end=2.0, denominator="T", epochs=4),
        "interpolation": Cosine(start=0.7, end=0.9, denominator="T", epochs=4),
    }
    fit(adr(**ended), Stop(), epochs=-1, max_steps=-1, limit_train_batches=2)


class Stop(L.Callback):
    def on_train_epoch_end(self, run, module):
        run.should_stop = True


def test_pskd_resumes_with_its_table(tmp_path):
    def run(folder, ckpt_path=None):
        L.seed_everything(0)
        module, callback = PlainModule(), Criterion(PSKD(alpha=1.0))
        fitting = trainer(callback, saving(folder), max_epochs=3, enable_checkpointing=True)
        fitting.fit(module, shuffled(), ckpt_path=ckpt_path)
        return module, callback.criterion

    module, criterion = run(tmp_path)
    for step in (2, 4, 6, 9):  # in an epoch and at its end
        again, resumed = run(tmp_path, ckpt_path=tmp_path / f"step={step}.ckpt")
        same(module.net, again.net)
        same(criterion, resumed)


@pytest.fixture
def cached(tmp_path):
    """A teacher, and its answers about the images of `shuffled`."""
    teacher = PlainModule(seed=2).net
    return teacher, cache_teacher(teacher, Images(22), tmp_path / "cache", dtype="float32", trainer=trainer())


def test_ltd_asks_a_cache_by_position(cached):
    attack = PGD(eps=0.1, steps=1)
    objectives = [LTD(teacher=each, objective=AdversarialCrossEntropy(attack=attack)) for each in cached]
    assert [each.needs_index for each in objectives] == [False, True]
    live, stored = (fit(each)[0] for each in objectives)
    for ours, theirs in zip(live.net.parameters(), stored.net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_srst_awr_asks_a_cache_about_what_has_no_label(cached):
    data, net = Images(22), PlainModule().net.eval()
    index = torch.tensor([7, 21, 0, 3])
    labels = torch.tensor([-100, 1, -100, 2])
    losses = []
    for each in cached:
        objective = SRSTAWR(teacher=each, attack=PGD(eps=0.1, steps=1, loss="kl"))
        objective.running = Running(index=index)
        prepared = objective.prepare(net, data.x[index], labels, generator=torch.Generator().manual_seed(0))
        losses.append(objective(net, prepared).loss)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def test_arrest_has_no_use_for_a_cache(cached):
    with pytest.raises(ValueError, match="teacher cannot be a TeacherCache"):
        ARREST(teacher=cached[1])
