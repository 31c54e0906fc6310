"""Every method that may ask stored answers learns the same from them; the others refuse them."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import Distillation, Mixing, ObjectiveTraining, cache_teacher
from lightning_robust.data import PartialLabels
from lightning_robust.distillation import DKD, KD, Teacher, TeacherCache
from lightning_robust.mixing import Mixup
from lightning_robust.objectives import LTD, AdversarialCrossEntropy
from lightning_robust.training import Stage, StepCallback
from support.modules import Images, PlainModule, trainer, weights_of
from support.teachers import TAUGHT, taught, teacher_network

SAMPLES = 21
#: Methods that ask their (first) teacher about the clean images of the training set only, and no more of it.
CACHEABLE = ["ARD", "MTARD", "RSLAD", "SRSTAWR"]


def teacher():
    return Teacher(teacher_network(), source="net.ckpt")


@pytest.fixture
def cache(tmp_path):
    return cache_teacher(teacher(), Images(SAMPLES), tmp_path / "t", trainer=trainer(), dtype="float32", batch_size=4)


def shuffled(data=None):
    order = torch.Generator().manual_seed(2)
    return DataLoader(Images(SAMPLES) if data is None else data, 5, shuffle=True, generator=order)


def fit(*callbacks, data=None):
    module = PlainModule(norm=False)
    trainer(*callbacks, max_epochs=2).fit(module, shuffled(data))
    return weights_of(module)


def attack(**options):
    return PGD(eps=0.05, step_size=0.02, steps=2, **options)


def objective(name, source):
    options = {} if name in ("ARD", "LTD") else {"loss": "kl"}
    if name == "LTD":
        return LTD(teacher=source, objective=AdversarialCrossEntropy(attack=attack()))
    return taught(name, source, teacher(), attack=attack(**options))


@pytest.mark.parametrize("name", [*CACHEABLE, "LTD"])
def test_objectives_learn_the_same_from_the_cache(tmp_path, name):
    data = Images(SAMPLES)
    if name == "SRSTAWR":  # which asks about the samples without label only
        data = PartialLabels(data, labelled=range(0, SAMPLES, 3))
    cache = cache_teacher(teacher(), data, tmp_path / "t", trainer=trainer(), dtype="float32", batch_size=4)
    live, cached = (fit(ObjectiveTraining(objective(name, source)), data=data) for source in (teacher(), cache))
    torch.testing.assert_close(cached, live, rtol=1e-4, atol=1e-5)
    assert not torch.equal(live, weights_of(PlainModule(norm=False)))


@pytest.mark.parametrize("loss", [KD(), DKD()], ids=lambda loss: loss.name)
def test_losses_learn_the_same_from_the_cache(cache, loss):
    live, cached = (fit(Distillation(source, loss)) for source in (teacher(), cache))
    torch.testing.assert_close(cached, live, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in TAUGHT if name not in (*CACHEABLE, "LTD")])
def test_the_others_refuse_it(cache, name):
    with pytest.raises(ValueError, match=r"The .* cannot be a TeacherCache: it answers about inputs that are made"):
        taught(name, cache)


def test_the_robust_teacher_of_mtard_refuses_it(cache):
    with pytest.raises(ValueError, match="robust teacher cannot be a TeacherCache"):
        taught("MTARD", teacher(), cache)


def callback(kind, source):
    return Distillation(source) if kind == "Distillation" else ObjectiveTraining(objective(kind, source))


KINDS = ["Distillation", "RSLAD", "LTD"]


@pytest.mark.parametrize("kind", KINDS)
def test_other_data_are_refused(cache, kind):
    with pytest.raises(ValueError, match="written for 21 samples but the training set has 20"):
        fit(callback(kind, cache), data=Images(20))
    with pytest.raises(ValueError, match="another data set: the labels"):
        fit(callback(kind, cache), data=Images(SAMPLES, seed=1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_cache_is_refused_before_the_first_step(tmp_path, kind):
    module = PlainModule()
    before = weights_of(module)
    with pytest.raises(FileNotFoundError, match="There is no teacher cache"):
        trainer(callback(kind, TeacherCache(tmp_path / "none"))).fit(module, shuffled())
    assert torch.equal(weights_of(module), before)


class Flip(StepCallback):
    """Somebody's augmentation of whole batches."""

    stage = Stage.BATCH

    def around_step(self, context, batch, run):
        return run(self.batch.repack(batch, x=self.batch.input_of(batch).flip(-1)))


@pytest.mark.parametrize("kind", KINDS)
def test_changed_images_are_refused(cache, kind):
    with pytest.raises(ValueError, match="TeacherCache, which knows the images as they were loaded, but another"):
        fit(Flip(), callback(kind, cache))
    with pytest.raises(ValueError, match="remembers what the network says about each sample, but Mixing"):
        fit(Mixing(Mixup(), targets="soft"), callback(kind, cache))
    fit(Flip(), callback(kind, teacher()))
