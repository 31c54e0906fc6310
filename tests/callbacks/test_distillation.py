import copy
import warnings

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lightning_robust.callbacks import Criterion, Distillation, SharpnessAware
from lightning_robust.distillation import KD, DistillationLoss, Teacher, TeacherSource, fingerprint
from lightning_robust.losses import CrossEntropy
from lightning_robust.models import ImageClassifier
from lightning_robust.training import Stage, StepCallback
from support.modules import (
    CHANNELS,
    CLASSES,
    DictModule,
    ManualModule,
    PlainModule,
    loader,
    network,
    trainer,
    weights_of,
)


def teacher_network(seed=7):
    torch.manual_seed(seed)
    net = network(dropout=0.5)
    for _ in range(3):  # norm statistics away from their start
        net(torch.rand(8, 2, 6, 6))
    return net


def teacher_of(callback):
    (name,) = callback.teachers
    return callback.teachers.teacher(name)


def fit(module, *callbacks, data=None, ckpt_path=None, **kwargs):
    L.seed_everything(0)
    run = trainer(*callbacks, **kwargs)
    run.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return run


@pytest.mark.parametrize(("module", "form"), [(PlainModule, "pair"), (DictModule, "dict")])
def test_one_step_is_the_weighted_sum(module, form):
    # No norm layer in the student: it would hide the biases before it, and AdamW turns rounding into whole steps.
    module, teacher = module(norm=False), teacher_network()
    reference = copy.deepcopy(module).train()
    optimizer = reference.configure_optimizers()
    optimizer = optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer
    x, y = next(iter(loader()))
    with torch.no_grad():
        q = (copy.deepcopy(teacher).eval()(x) / 3).softmax(1)
    z = reference.net(x)
    kd = 9 * F.kl_div((z / 3).log_softmax(1), q, reduction="batchmean")
    (0.3 * F.cross_entropy(z, y) + 0.6 * kd).backward()
    optimizer.step()
    callback = Distillation(teacher, KD(temperature=3.0), weight=0.6, base_weight=0.3)
    run = fit(module, callback, data=loader(form=form), max_steps=1)
    torch.testing.assert_close(weights_of(module), weights_of(reference))
    torch.testing.assert_close(run.callback_metrics["train/kd"], kd.detach())


def test_the_defaults_are_those_of_the_common_comparison():
    callback = Distillation(nn.Linear(4, 3))
    assert (callback.weight, callback.base_weight, callback.loss.temperature) == (0.9, 0.1, 4.0)


class Trains(L.Callback):
    """What attacks of other projects do: a bare `.train()` on everything they can reach."""

    def __init__(self, callback):
        self.callback = callback

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.train()
        teacher_of(self.callback).network.train()


def test_the_teacher_is_bit_identical_after_the_fit():
    given = teacher_network()
    before = copy.deepcopy(given.state_dict())
    callback = Distillation(given)
    module = PlainModule()
    module.train()
    fit(module, callback, Trains(callback), max_epochs=2)
    teacher = teacher_of(callback)
    for state in (given.state_dict(), teacher.network.state_dict()):
        assert all(torch.equal(value, before[name]) for name, value in state.items())
    assert fingerprint(teacher.network) == teacher.fingerprint


def test_the_teacher_is_nowhere_in_the_module(tmp_path):
    module, callback = PlainModule(), Distillation(teacher_network())
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="a")
    run = fit(module, callback, checkpoint, enable_checkpointing=True)
    teachers = {id(parameter) for parameter in teacher_of(callback).network.parameters()}
    assert not teachers & {id(parameter) for parameter in module.parameters()}
    optimised = [parameter for group in run.optimizers[0].param_groups for parameter in group["params"]]
    assert not teachers & set(map(id, optimised))
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == PlainModule().state_dict().keys()
    assert saved["callbacks"]["Distillation[teacher]"] == {
        "teachers": {"teacher": teacher_of(callback).manifest()},
        "loss": {},
    }


@pytest.fixture
def trained(tmp_path):
    run = fit(PlainModule(), Distillation(teacher_network()))
    run.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def test_resume_with_the_same_teacher_equals_an_uninterrupted_run(trained):
    whole, resumed = PlainModule(), PlainModule()
    fit(whole, Distillation(teacher_network()), max_epochs=2)
    fit(resumed, Distillation(teacher_network()), max_epochs=2, ckpt_path=trained)
    assert torch.equal(weights_of(whole), weights_of(resumed))


def test_resume_with_another_teacher_is_refused(trained):
    message = (
        r"trained with the teacher Sequential \(fingerprint \w{16}\) but this run has Sequential \(\w{16}\); resume"
    )
    with pytest.raises(ValueError, match=message):
        fit(PlainModule(), Distillation(teacher_network(seed=8)), max_epochs=2, ckpt_path=trained)


def test_evaluation_of_a_checkpoint_needs_no_teacher(trained):
    callback = Distillation("gone.ckpt")
    run = trainer(callback)
    run.validate(PlainModule(), loader(), ckpt_path=trained, verbose=False)
    assert not callback.teachers._built
    other = Distillation(teacher_network(seed=8))
    run = trainer(other)
    run.validate(PlainModule(), loader(), ckpt_path=trained, verbose=False)
    run.fit(PlainModule(), loader())  # a new fit, with a teacher of its own


def test_two_teachers_at_once(tmp_path):
    module = PlainModule()
    nets = [teacher_network(1), teacher_network(2)]
    reference = copy.deepcopy(module).train()
    optimizer = reference.configure_optimizers()
    x, y = next(iter(loader()))
    z = reference.net(x)
    losses = [KD()(z, Teacher(net)(x)) for net in nets]
    (0.1 * F.cross_entropy(z, y) + 0.9 * losses[0] + 0.5 * losses[1]).backward()
    optimizer.step()
    callbacks = [Distillation(nets[0]), Distillation(nets[1], weight=0.5, base_weight=1.0, name="robust")]
    # Listed first is outermost, so the one that rescales the base loss comes last.
    run = fit(module, *reversed(callbacks), max_steps=1)
    torch.testing.assert_close(weights_of(module), weights_of(reference))
    torch.testing.assert_close(run.callback_metrics["train/kd"], losses[0].detach())
    torch.testing.assert_close(run.callback_metrics["train/kd_robust"], losses[1].detach())
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]
    prints = [saved[f"Distillation[{name}]"]["teachers"][name]["fingerprint"] for name in ("teacher", "robust")]
    assert prints == [teacher_of(callback).fingerprint for callback in callbacks]


class Darker(StepCallback):
    stage = Stage.BATCH

    def around_step(self, context, batch, run):
        return run(self.batch.repack(batch, x=batch[0] / 2))


class Recording(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.seen = nn.Sequential(nn.Flatten(), nn.Linear(72, CLASSES)), []

    def forward(self, x):
        self.seen.append(x.clone())
        return self.net(x)


@pytest.mark.parametrize(("sees", "factor"), [("step", 0.5), ("loaded", 1.0)])
def test_what_the_teacher_sees(sees, factor):
    callback = Distillation(Recording(), teacher_sees=sees)
    fit(PlainModule(), callback, Darker(), max_steps=1)
    (seen,) = teacher_of(callback).network.seen
    torch.testing.assert_close(seen, next(iter(loader()))[0] * factor)


def test_a_sharpness_method_asks_the_teacher_once_per_batch():
    callback = Distillation(Recording())
    fit(PlainModule(), callback, SharpnessAware())
    assert len(teacher_of(callback).network.seen) == len(loader())


class Supervised(DistillationLoss):
    name = "supervised"
    needs_target = True

    def forward(self, student_logits, teacher_logits, target=None):
        return F.cross_entropy(student_logits + teacher_logits, target)


def test_a_loss_that_needs_labels_gets_them():
    assert "train/supervised" in fit(PlainModule(), Distillation(teacher_network(), Supervised())).callback_metrics


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision):
    callback = Distillation(teacher_network())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is not supported for CPU.*")
        run = fit(PlainModule(), callback, precision=precision)
    assert run.callback_metrics["train/kd"].isfinite()
    dtype = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert next(teacher_of(callback).network.parameters()).dtype == dtype


def test_accumulation_equals_the_large_batch():
    small, large = PlainModule(norm=False), PlainModule(norm=False)
    fit(small, Distillation(teacher_network()), data=loader(batch_size=6), accumulate_grad_batches=2)
    fit(large, Distillation(teacher_network()), data=loader(batch_size=12))
    torch.testing.assert_close(weights_of(small), weights_of(large))


def test_a_file_is_read_at_setup_without_touching_the_random_numbers(tmp_path):
    torch.save(teacher_timm().state_dict(), tmp_path / "a.pt")
    callbacks = [
        Distillation(TeacherSource(str(tmp_path / "a.pt"), backbone="test_resnet", in_chans=2)),
        Distillation(teacher_timm()),
    ]
    modules = [PlainModule(dropout=0.4), PlainModule(dropout=0.4)]
    modules[0].num_classes = CLASSES  # found there, so it is not asked for twice
    for module, callback in zip(modules, callbacks, strict=True):
        fit(module, callback)
    assert teacher_of(callbacks[0]).fingerprint == teacher_of(callbacks[1]).fingerprint
    assert torch.equal(*map(weights_of, modules))


def teacher_timm():
    import timm

    torch.manual_seed(3)
    return timm.create_model("test_resnet", num_classes=CLASSES, in_chans=2)


def test_a_missing_file_is_refused_before_the_first_step():
    module = PlainModule()
    before = weights_of(module)
    with pytest.raises(FileNotFoundError, match=r"There is no teacher file gone.ckpt"):
        fit(module, Distillation("gone.ckpt"))
    assert torch.equal(weights_of(module), before)


def test_another_number_of_classes_is_refused_in_the_first_step():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(72, 9))
    with pytest.raises(ValueError, match="The teacher Sequential has 9 classes but the student has 4; take a teacher"):
        fit(PlainModule(), Distillation(teacher))


def test_other_samples_are_refused():
    class Doubled(StepCallback):
        stage = Stage.BATCH

        def around_step(self, context, batch, run):
            return run([torch.cat([entry, entry]) for entry in batch])

    message = r"student's logits have shape \(12, 4\) but those of the teacher \(6, 4\); show both the same samples"
    with pytest.raises(ValueError, match=message):
        fit(PlainModule(), Distillation(teacher_network(), teacher_sees="loaded"), Doubled())


def test_teachers_that_differ_between_processes_are_refused(monkeypatch):
    callback, run = Distillation(teacher_network()), trainer()
    monkeypatch.setattr(run.strategy, "broadcast", lambda value: "0" * 16)
    with pytest.raises(
        ValueError, match=r"differs between processes \(fingerprint 0{16} in the first, \w{16} in process"
    ):
        callback.on_pipeline_start(run, PlainModule())


def test_manual_optimization_is_refused():
    with pytest.raises(ValueError, match="Distillation needs automatic optimization"):
        fit(ManualModule(), Distillation(teacher_network()))


def test_a_skipped_step_stays_skipped():
    module = PlainModule()
    module.training_step = lambda batch, batch_idx: None
    before = weights_of(module)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*training_step.* returned `None`")
        fit(module, Distillation(teacher_network()))
    assert torch.equal(weights_of(module), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, "Expected `weight` to be a finite number >= 0 but got -1.0"),
        ({"base_weight": float("nan")}, "Expected `base_weight` to be a finite number >= 0 but got nan"),
        ({"teacher_sees": "all"}, "Expected `teacher_sees` to be one of 'step', 'loaded' but got 'all'"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Distillation("a.ckpt", **arguments)


def test_can_be_built_from_a_configuration(capsys):
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("--methods", type=dict[str, Callback | None], default={})
    # The newer name of one method; older versions of jsonargparse know only the second.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    chosen = ["--methods.kd", "Distillation", "--methods.kd.teacher", "a.ckpt", "--methods.kd.loss", "KD"]
    callback = instantiate(parser.parse_args([*chosen, "--methods.kd.loss.temperature", "2"])).methods["kd"]
    assert callback.loss.temperature == 2.0
    assert callback.state_key == "Distillation[teacher]"
    with pytest.raises(SystemExit):
        parser.parse_args(["--methods.help", "Distillation"])
    # An argument typed nn.Module would add every module that exists.
    assert len(capsys.readouterr().out.splitlines()) < 150


class MixesInTheStep(PlainModule):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(0.6 * x + 0.4 * x.flip(0)), y)


def test_a_step_that_changes_its_inputs_is_warned_about_once():
    with pytest.warns(UserWarning, match="training_step of MixesInTheStep changes its inputs") as record:
        fit(MixesInTheStep(), Distillation(teacher_network()), SharpnessAware())
    assert sum("changes its inputs" in str(each.message) for each in record) == 1


class MixedTargets(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        x, y = loader().dataset[index]
        return x, (y, (y + 1) % CLASSES, 0.7)


class TakesMixedTargets(PlainModule):
    def training_step(self, batch, batch_idx):
        x, (y_a, y_b, lam) = batch
        logits, lam = self(x), lam[0].float()
        return lam * F.cross_entropy(logits, y_a) + (1 - lam) * F.cross_entropy(logits, y_b)


def test_targets_of_any_form_are_left_alone_unless_the_loss_needs_them():
    data = torch.utils.data.DataLoader(MixedTargets(), batch_size=6)
    assert "train/kd" in fit(TakesMixedTargets(), Distillation(teacher_network()), data=data).callback_metrics
    with pytest.raises(TypeError, match="Expected entry 1 of the batch to be a tensor"):
        fit(TakesMixedTargets(), Distillation(teacher_network(), Supervised()), data=data)


def test_labels_are_read_before_the_step_takes_its_batch_apart():
    class Pops(PlainModule):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch.pop("image")), batch.pop("label"))

    run = fit(Pops(), Distillation(teacher_network(), Supervised()), data=loader(form="dict"))
    assert "train/supervised" in run.callback_metrics


@pytest.mark.parametrize("where", ["module", "checkpoint", "callback"])
def test_a_teacher_that_was_trained_with_label_smoothing_is_told_about(where, tmp_path):
    smoothed = CrossEntropy(label_smoothing=0.1)
    teacher = ImageClassifier(
        "resnet8_cifar",
        num_classes=CLASSES,
        in_chans=CHANNELS,
        criterion=smoothed if where != "callback" else None,
    )
    callbacks = [Criterion(smoothed)] if where == "callback" else []
    if where != "module":
        run = trainer(*callbacks, max_steps=1)
        run.fit(teacher, loader())
        run.save_checkpoint(tmp_path / "teacher.ckpt")
    source = teacher if where == "module" else tmp_path / "teacher.ckpt"
    with pytest.warns(UserWarning, match=r"was trained with label smoothing \(0.1\)"):
        trainer(Distillation(source), max_steps=1).fit(PlainModule(), loader())
