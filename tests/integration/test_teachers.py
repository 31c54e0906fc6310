"""What holds for a teacher wherever it lives: in a callback, in an objective, in a classifier."""

import copy
import warnings
from itertools import product

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import AdversarialTraining, ObjectiveTraining
from lightning_robust.distillation import TeacherSource, fingerprint
from lightning_robust.models import ImageClassifier
from support.modules import PlainModule, loader, trainer, weights_of
from support.reference import SEED, attack
from support.teachers import HOLDERS, PLACES, classifier, data_for, plain, taught, teacher_network, teachers_of


def fit(module, *callbacks, data=None, ckpt_path=None, **options):
    L.seed_everything(SEED)
    run = trainer(*callbacks, **{"max_epochs": 2, "limit_train_batches": 2, **options})
    run.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return run


class Trains(L.Callback):
    """What attacks of other projects do: a bare `.train()` on everything they can reach."""

    def __init__(self, holder):
        self.holder = holder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.train()
        for teacher in teachers_of(self.holder):
            teacher.network.train()


def identical(network, state):
    return all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("place", PLACES)
def test_the_teacher_is_bit_identical_after_the_fit(place):
    given = teacher_network()
    before = copy.deepcopy(given.state_dict())
    module, callbacks, holder = PLACES[place](given)
    student = weights_of(module)
    module.train()
    if place == "callback":
        callbacks = [AdversarialTraining(attack()), *callbacks]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*in eval mode")
        run = fit(module, *callbacks, Trains(holder), data=data_for(place))
    assert not torch.equal(weights_of(module), student)
    teachers = teachers_of(holder)
    assert identical(given, before)
    assert all(identical(teacher.network, before) for teacher in teachers)
    assert all(teacher.fingerprint == fingerprint(teacher.network) for teacher in teachers)
    theirs = {id(parameter) for teacher in teachers for parameter in teacher.network.parameters()}
    optimised = [parameter for group in run.optimizers[0].param_groups for parameter in group["params"]]
    assert not theirs & {id(parameter) for parameter in [*module.parameters(), *optimised]}
    assert all(parameter.grad is None for teacher in teachers for parameter in teacher.network.parameters())


def tensors(content):
    """All tensors of a checkpoint, however deep."""
    if isinstance(content, torch.Tensor):
        return [content]
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return [each for part in parts for each in tensors(part)]


@pytest.mark.parametrize("place", HOLDERS)
def test_a_checkpoint_holds_nothing_of_the_teacher(place, tmp_path):
    module, callbacks, holder = PLACES[place](teacher_network(width=200), teacher_network(8, width=200))
    untaught = classifier(teacher_network(8, width=200)) if isinstance(module, ImageClassifier) else plain(module.net)
    sizes = {}
    for name, student, extra in (("plain", untaught, []), ("taught", module, callbacks)):
        fit(student, *extra, max_epochs=1).save_checkpoint(tmp_path / f"{name}.ckpt")
        sizes[name] = (tmp_path / f"{name}.ckpt").stat().st_size
    assert sizes["taught"] < 1.2 * sizes["plain"]
    saved = torch.load(tmp_path / "taught.ckpt", weights_only=True)
    theirs = [value for teacher in teachers_of(holder) for value in teacher.network.state_dict().values()]
    for ours in tensors(saved):
        assert not any(ours.numel() > 4 and ours.shape == value.shape and torch.equal(ours, value) for value in theirs)
    assert teachers_of(holder)[0].fingerprint in str(saved["callbacks"])


@pytest.fixture
def checkpoints(tmp_path):
    """Of a place and a teacher: a checkpoint after one epoch."""

    def make(place, source):
        module, callbacks, _ = PLACES[place](source)
        fit(module, *callbacks, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
        return tmp_path / "a.ckpt"

    return make


@pytest.mark.parametrize("place", HOLDERS)
def test_another_teacher_is_refused_when_training_goes_on(place, checkpoints):
    path = checkpoints(place, teacher_network())
    module, callbacks, _ = PLACES[place](teacher_network(8))
    before = weights_of(module)
    trainer(*callbacks).validate(module, loader(), ckpt_path=path, verbose=False)  # which needs no teacher
    with pytest.raises(
        ValueError, match=r"trained with the .*\(fingerprint \w{16}\) but .* has .*; resume with the same"
    ):
        fit(module, *callbacks, ckpt_path=path)
    fit(module, *callbacks)  # a new fit from the student's weights
    module, callbacks, _ = PLACES[place](teacher_network())
    fit(module, *callbacks, ckpt_path=path)
    assert not torch.equal(weights_of(module), before)


@pytest.mark.parametrize("place", HOLDERS)
def test_the_same_teacher_in_another_type_is_warned_about(place, checkpoints):
    path = checkpoints(place, teacher_network())
    module, callbacks, _ = PLACES[place](TeacherSource(teacher_network(), dtype="bfloat16"))
    with pytest.warns(UserWarning, match="computing in run but this run has it in bfloat16"):
        fit(module, *callbacks, ckpt_path=path)


@pytest.mark.filterwarnings("ignore:.*is not supported for CPU")
@pytest.mark.parametrize(
    ("place", "precision"),
    [*((place, "bf16-true") for place in PLACES), *product(HOLDERS, ["bf16-mixed", "64-true"])],
)
def test_precisions(place, precision):
    given = teacher_network()
    before = copy.deepcopy(given.state_dict())
    module, callbacks, holder = PLACES[place](given)
    student = weights_of(module)
    run = fit(module, *callbacks, precision=precision, max_epochs=1, data=data_for(place))
    assert all(value.isfinite() for value in run.callback_metrics.values())
    assert not torch.equal(weights_of(module).float(), student)
    dtype = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    for teacher in teachers_of(holder):
        assert {parameter.dtype for parameter in teacher.network.parameters()} == {dtype}
        converted = {name: value.to(teacher.network.state_dict()[name].dtype) for name, value in before.items()}
        assert identical(teacher.network, converted)


@pytest.mark.parametrize("place", HOLDERS)
def test_a_type_of_its_own_is_kept_in_a_low_precision_run(place):
    given = teacher_network()
    module, callbacks, holder = PLACES[place](TeacherSource(given, dtype="float32"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is not supported for CPU.*")
        fit(module, *callbacks, precision="bf16-true", max_epochs=1)
    assert all(identical(teacher.network, given.state_dict()) for teacher in teachers_of(holder))


STILL = {"eps": 0.1, "steps": 2, "step_size": 0.05, "random_start": False}
ACCUMULATED = {
    "ARD": {"attack": PGD(**STILL), "alpha": 0.7, "temperature": 2.0},
    "IADII": {"attack": PGD(**STILL), "begin": 0},
    "MTARD": {"attack": PGD(**STILL), "weights_from": "previous-step", "weight_lr": 0.2, "temperature_lr": 0.1},
}


@pytest.mark.parametrize("name", ACCUMULATED)
def test_accumulation_with_an_attack_equals_the_large_batch(name):
    modules, objectives = [PlainModule(norm=False), PlainModule(norm=False)], []
    for module, size in zip(modules, (3, 12), strict=True):
        objectives.append(taught(name, teacher_network(), teacher_network(8), **ACCUMULATED[name]))
        options = {"accumulate_grad_batches": 12 // size, "limit_train_batches": 1.0}
        fit(module, ObjectiveTraining(objectives[-1]), data=loader(batch_size=size), **options)
    torch.testing.assert_close(*map(weights_of, modules), rtol=1e-5, atol=1e-6)
    first, second = (objective.state_dict() for objective in objectives)
    for key, value in first.items():
        if isinstance(value, torch.Tensor):  # the balances of MTARD
            torch.testing.assert_close(value, second[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", HOLDERS)
def test_copies_and_averages_of_the_module_share_the_teacher(place):
    module, callbacks, holder = PLACES[place](teacher_network())
    average = EMAWeightAveraging(decay=0.9)
    fit(module, *callbacks, average)
    theirs = {id(value) for teacher in teachers_of(holder) for value in teacher.network.parameters()}
    held = [each for each in vars(average).values() if isinstance(each, torch.nn.Module)]
    assert held
    assert len(list(held[0].parameters())) == len(list(module.parameters()))
    copied = teachers_of(copy.deepcopy(holder))
    assert {id(value) for teacher in copied for value in teacher.network.parameters()} == theirs


# what is refused, in each place


def refused(place, source, error, message, batches=0):
    """The fit is refused before that many batches are over, and leaves the module as it was."""
    module, callbacks, _ = PLACES[place](source)
    before, steps = weights_of(module), []

    class Counting(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            steps.append(batch_idx)

    with pytest.raises(error, match=message) as caught:
        fit(module, *callbacks, Counting(), data=data_for(place))
    assert len(steps) <= batches
    assert torch.equal(weights_of(module), before)
    assert "training_step" not in vars(module)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("place", PLACES)
def test_a_missing_file_is_refused_before_the_first_step(place):
    refused(place, "gone.ckpt", FileNotFoundError, "There is no teacher file gone.ckpt; train the teacher first")


@pytest.mark.parametrize("place", HOLDERS)
def test_a_file_that_is_not_weights_is_refused_before_the_first_step(place, tmp_path):
    (tmp_path / "a.pt").write_text("not weights")
    message = r"a.pt cannot be read as weights without running code; save it with"
    refused(place, str(tmp_path / "a.pt"), ValueError, message)


@pytest.mark.parametrize("place", [place for place in PLACES if "ARREST" not in place])  # which looks at features only
def test_another_number_of_classes_is_refused_in_the_first_step(place):
    message = (
        r"has 9 classes but the (student|model) has 4; take a teacher for|have 9 classes but the model has 4; take"
    )
    refused(place, teacher_network(classes=9), ValueError, message, batches=1)


@pytest.mark.parametrize("place", PLACES)
def test_a_teacher_that_answers_no_numbers_is_refused_in_the_first_step(place):
    broken = teacher_network()
    with torch.no_grad():
        broken[-1].bias[1] = float("nan")
    message = r"The .* Sequential answered with logits that are NaN or infinite; look whether its weights are finite"
    refused(place, broken, ValueError, message, batches=1)


@pytest.mark.parametrize("place", HOLDERS)
def test_other_objects_are_refused_at_once(place):
    with pytest.raises(TypeError, match=r"to be a network, a Teacher, a path or .* but got int"):
        PLACES[place](3)
