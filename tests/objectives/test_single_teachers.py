"""What holds for all objectives with one adversarially asked teacher: caches, files, classes, states, Trainers."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import ObjectiveTraining, SharpnessAware, cache_teacher
from lightning_robust.distillation import TeacherCache, fingerprint
from lightning_robust.objectives import ARD, IADI, IADII, IGDM, RSLAD, SAAD, AdaAD, AdaIAD
from lightning_robust.sharpness import AWP
from support.attacked import CountingNet, images
from support.modules import CHANNELS, CLASSES, Images, PlainModule, loader, network, trainer, weights_of
from support.resumable import shuffled_loader

ATTACK = PGD(eps=0.1, steps=2, step_size=0.05, loss="kl")
LABELS = PGD(eps=0.1, steps=2, step_size=0.05, mode="train")

KINDS = {
    "ard": lambda teacher: ARD(teacher, attack=LABELS),
    "iad-i": lambda teacher: IADI(teacher, begin=1, attack=LABELS),
    "iad-ii": lambda teacher: IADII(teacher, clean_teacher=teacher, begin=1, attack=LABELS),
    "rslad": lambda teacher: RSLAD(teacher, attack=ATTACK),
    "adaad": lambda teacher: AdaAD(teacher, attack=ATTACK),
    "adaiad": lambda teacher: AdaIAD(teacher, begin=1, attack=ATTACK),
    "igdm": lambda teacher: IGDM(objective=AdaAD(teacher, attack=ATTACK), alpha=5.0),
    "igdm-own": lambda teacher: IGDM(objective=AdaAD(network(), attack=ATTACK), teacher=teacher),
    "saad": lambda teacher: SAAD(teacher, beta=0.5, attack=ATTACK),
}
CACHEABLE = ("ard", "rslad")


def teacher(seed=99, classes=CLASSES):
    torch.manual_seed(seed)
    net = network().eval()
    if classes != CLASSES:
        net[-1] = torch.nn.Linear(20, classes)
    return net


def fit(kind, *callbacks, source=None, data=None, **options):
    L.seed_everything(3)
    module = PlainModule()
    objective = KINDS[kind](teacher() if source is None else source)
    run = trainer(ObjectiveTraining(objective), *callbacks, max_epochs=2, **options)
    run.fit(module, loader() if data is None else data)
    return module, objective, run


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "teacher"
    return cache_teacher(teacher(), Images(), folder, trainer=trainer(), dtype="float32")


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_neither_changed_nor_saved(kind, tmp_path):
    given = teacher()
    before = fingerprint(given)
    module, objective, run = fit(kind, source=given)
    assert not torch.equal(weights_of(module), weights_of(PlainModule()))
    held = objective.teachers.teacher("teacher")
    assert held.fingerprint == fingerprint(held.network) == before == fingerprint(given)
    assert not list(objective.parameters())
    assert not list(objective.buffers())
    run.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert before in str(saved["callbacks"])
    assert saved["state_dict"].keys() == PlainModule().state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_another_teacher_is_refused_when_training_goes_on(kind):
    first, second = KINDS[kind](teacher()), KINDS[kind](teacher(5))
    second.load_state_dict(first.state_dict())
    x, y = next(iter(loader()))
    with pytest.raises(ValueError, match="The checkpoint was trained with the teacher"):
        second.prepare(PlainModule(), x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_is_refused_before_the_attack(kind, tmp_path):
    objective = KINDS[kind](tmp_path / "none.ckpt")
    model = CountingNet(channels=CHANNELS)
    x, y = next(iter(loader()))
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        objective.prepare(model, x, y)
    assert model.batches == []
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        objective.ready(CLASSES, CHANNELS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_of_other_classes_is_refused(kind):
    objective = KINDS[kind](teacher(classes=5))
    x, y = next(iter(loader()))
    model = PlainModule()
    with pytest.raises(ValueError, match=r"has 5 classes but the (attacked )?model has 4; "):
        objective(model, objective.prepare(model, x, y))


@pytest.mark.parametrize("kind", KINDS)
def test_caches_stand_for_teachers_that_see_clean_images_only(kind, cache):
    if kind not in CACHEABLE:
        with pytest.raises(ValueError, match="The teacher cannot be a TeacherCache: it answers about inputs"):
            KINDS[kind](TeacherCache(cache.path))
        return
    asked, stored = fit(kind)[0], fit(kind, source=TeacherCache(cache.path))[0]
    torch.testing.assert_close(weights_of(stored), weights_of(asked))
    assert KINDS[kind](TeacherCache(cache.path)).needs_index


def test_igdm_needs_the_network_and_says_so(cache):
    objective = RSLAD(TeacherCache(cache.path), attack=ATTACK)
    with pytest.raises(
        ValueError, match="asks the teacher of RSLAD about attacked images, which a TeacherCache cannot"
    ):
        IGDM(objective=objective)
    assert IGDM(objective=objective, teacher=teacher()).needs_index


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_perturbed_while_the_batch_stays(kind):
    """AWP evaluates the loss at two points of the weights, on the images that were attacked before."""
    plain, perturbed = fit(kind)[0], fit(kind, SharpnessAware(AWP(gamma=0.05)))[0]
    assert bool(weights_of(perturbed).isfinite().all())
    assert not torch.allclose(weights_of(perturbed), weights_of(plain))
    student, objective = network().eval(), KINDS[kind](teacher())
    objective.epoch_starts(1, 2)
    x, y = next(iter(loader()))
    prepared = objective.prepare(student, x, y)
    before = objective(student, prepared)
    moved = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1.1)
    after = objective(moved, prepared)
    assert not torch.equal(before.loss, after.loss)
    assert torch.equal(objective(student, prepared).loss, before.loss)
    assert torch.equal(after.logits, moved(x))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays_near(kind):
    exact, mixed = fit(kind)[0], fit(kind, precision="bf16-mixed")[0]
    start = weights_of(PlainModule())
    assert bool(weights_of(mixed).isfinite().all())
    assert float((weights_of(mixed) - weights_of(exact)).norm()) < 0.5 * float((weights_of(exact) - start).norm())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("kind", ["ard", "iad-i", "adaiad", "igdm", "saad"])
def test_continues_in_the_second_epoch_as_if_never_interrupted(kind, tmp_path):
    def saving():
        return ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=6, save_top_k=-1, filename="{step}")

    whole = fit(kind, saving(), data=shuffled_loader(), enable_checkpointing=True)[0]
    L.seed_everything(3)
    module = PlainModule()
    callbacks = [ObjectiveTraining(KINDS[kind](teacher())), saving()]
    run = trainer(*callbacks, max_epochs=2, enable_checkpointing=True)
    run.fit(module, shuffled_loader(), ckpt_path=tmp_path / "step=6.ckpt", weights_only=True)
    assert run.global_step == 8
    assert torch.equal(weights_of(module), weights_of(whole))


def test_float64_images():
    net, other = (CountingNet().double() for _ in range(2))
    x, y = images(dtype=torch.float64)
    for kind, make in KINDS.items():
        if kind == "igdm-own":
            continue
        objective = make(other)
        objective.epoch_starts(1, 2)
        assert objective(net, objective.prepare(net, x, y)).loss.dtype == torch.float64, kind


@pytest.mark.parametrize("kind", [ARD, AdaAD])
@pytest.mark.parametrize(("alpha", "reached"), [(1.0, False), (0.5, True)])
def test_a_clean_term_without_weight_costs_no_backward_pass(kind, alpha, reached):
    model = torch.nn.Linear(4, 3)
    attack = PGD(eps=0.1, steps=1, loss="ce" if kind is ARD else "kl", random_start="normal")
    objective = kind(torch.nn.Linear(4, 3), alpha=alpha, attack=attack)
    output = objective(model, objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2])))
    (gradient,) = torch.autograd.grad(output.loss, output.logits, allow_unused=True)
    assert (gradient is not None) == reached
    assert output.logits.requires_grad  # what others add to the logits still trains
