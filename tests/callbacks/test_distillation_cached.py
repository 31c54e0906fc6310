"""Stored answers in the place of a teacher."""

import copy

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_robust.callbacks import Distillation, Mixing, SharpnessAware, cache_teacher
from lightning_robust.distillation import DHKD, KD
from lightning_robust.mixing import Mixup
from lightning_robust.training import Stage, StepCallback
from support.modules import CLASSES, Images, PlainModule, trainer, weights_of
from support.teachers import teacher_network


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return cache_teacher(
        teacher_network(), Images(), tmp_path_factory.mktemp("cache") / "a", dtype="float32", trainer=trainer()
    )


def fit(module, *callbacks, data=None, **options):
    L.seed_everything(0)
    run = trainer(*callbacks, **{"max_epochs": 2, **options})
    run.fit(module, DataLoader(Images() if data is None else data, batch_size=6, shuffle=True))
    return run


@pytest.mark.parametrize("loss", [KD(), DHKD(width=20, num_classes=CLASSES)], ids=["kd", "dhkd"])
@pytest.mark.parametrize("others", [[], [SharpnessAware()]], ids=["plain", "sharp"])
def test_equals_the_live_teacher_in_shuffled_epochs(cache, loss, others):
    modules = [PlainModule(), PlainModule()]
    for module, teacher in zip(modules, (cache, teacher_network()), strict=True):
        fit(module, Distillation(teacher, copy.deepcopy(loss)), *copy.deepcopy(others))
    torch.testing.assert_close(*map(weights_of, modules), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_names_the_teacher_behind_it(cache, tmp_path):
    callback = Distillation(cache)
    fit(PlainModule(), callback, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["Distillation[teacher]"]
    assert (
        saved["teachers"]["teacher"]["fingerprint"]
        == Distillation(teacher_network()).teachers.teacher("teacher").fingerprint
    )


def test_another_data_set_is_refused(cache):
    with pytest.raises(ValueError, match=r"was written for 24 samples but the training set has 18"):
        fit(PlainModule(), Distillation(cache), data=Images(18))
    with pytest.raises(ValueError, match=r"was written for another data set: the labels of the training set differ"):
        fit(PlainModule(), Distillation(cache), data=Images(seed=1))


class Halves(StepCallback):
    stage = Stage.BATCH

    def around_step(self, context, batch, run):
        return run(self.batch.repack(batch, x=batch[0] / 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (Halves(), "The teacher is a TeacherCache, which knows the images as they were loaded, but another callback"),
        (Mixing(Mixup(), num_classes=CLASSES), "Distillation remembers what the network says about each sample, but M"),
    ],
)
def test_images_that_another_callback_changes_are_refused(cache, changes, message):
    with pytest.raises(ValueError, match=message):
        fit(PlainModule(), Distillation(cache), changes)


def test_loaded_images_may_be_changed_for_the_student(cache):
    modules = [PlainModule(), PlainModule()]
    for module, teacher in zip(modules, (cache, teacher_network()), strict=True):
        fit(module, Distillation(teacher, teacher_sees="loaded"), Halves())
    torch.testing.assert_close(*map(weights_of, modules), rtol=1e-4, atol=1e-5)
