"""A run that is killed in mid-epoch and continued ends with the weights of the uninterrupted run, bit for bit."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint

from lightning_robust.callbacks import SeededSteps
from lightning_robust.data import DigitsDataModule, EpochSampler, ResumableDataLoader
from lightning_robust.models import ImageClassifier
from support.modules import Images, PlainModule

BATCHES, EPOCHS = 13, 3  # 1,295 images in batches of 100

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Killed(Exception):  # noqa: N818 - stands for a signal
    """The machine went away."""


class Kill(Callback):
    def __init__(self, step, hook="on_train_batch_end"):
        self.step = step
        setattr(self, hook, self.kill)

    def kill(self, trainer, *args):
        if trainer.global_step == self.step:
            raise Killed


def fit(folder, *extra, ckpt_path=None, num_workers=0, every=5, seed=3, batch_size=100, interval="step", **options):
    L.seed_everything(seed, verbose=False)
    data = DigitsDataModule(image_size=8, batch_size=batch_size, augment="shift", num_workers=num_workers, seed=3)
    model = ImageClassifier(
        "resnet8_cifar",
        num_classes=10,
        in_chans=1,
        lr_scheduler="cosine",
        scheduler_interval=interval,
        backbone_options={"width": 4, "drop_rate": 0.3},
    )
    saving = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=every)
    checkpoint = None if ckpt_path is None else folder / ckpt_path
    options = {"max_epochs": EPOCHS, **options}
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SeededSteps(seed=3), saving, *extra],
        **options,
    )
    try:
        trainer.fit(model, data, ckpt_path=checkpoint)
    except Killed:
        return None
    return model.state_dict()


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("whole"))


# an early batch, the middle of the second epoch, the last batch of an epoch
@pytest.mark.parametrize(("step", "every"), [(5, 5), (20, 5), (2 * BATCHES, BATCHES)])
def test_resume_in_mid_epoch(whole, step, every, tmp_path):
    assert fit(tmp_path, Kill(step + 2), every=every) is None
    resumed = fit(tmp_path, ckpt_path=f"step={step}.ckpt", every=every, seed=99)
    assert same(whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "every"), [(20, 5), (BATCHES, None)])
def test_resume_with_workers(whole, step, every, tmp_path):
    assert fit(tmp_path, Kill(step + 2), num_workers=2, every=every) is None
    resumed = fit(tmp_path, ckpt_path=f"step={step}.ckpt", num_workers=2, every=every, seed=99)
    assert same(whole, resumed)


@pytest.mark.parametrize(("step", "every"), [(BATCHES, None), (15, 5)])
def test_resume_of_a_run_that_counts_steps(step, every, tmp_path):
    options = {"max_epochs": -1, "max_steps": 30, "every": every}
    uninterrupted = fit(tmp_path, **options)
    resumed = fit(tmp_path, ckpt_path=f"step={step}.ckpt", seed=99, **options)
    assert same(uninterrupted, resumed)


def test_resume_with_a_schedule_by_epoch(tmp_path):
    # by step, the horizon is asked of the Trainer, which then forgets the state of the loader
    uninterrupted = fit(tmp_path, interval="epoch")
    resumed = fit(tmp_path, ckpt_path="step=20.ckpt", interval="epoch", seed=99)
    assert same(uninterrupted, resumed)


@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*there is no last checkpoint")
def test_batch_that_was_fetched_but_not_learned_comes_again(whole, tmp_path):
    exception = OnExceptionCheckpoint(tmp_path)
    assert fit(tmp_path, Kill(16, "on_train_batch_start"), exception) is None
    resumed = fit(tmp_path, exception, ckpt_path="on_exception.ckpt", seed=99)
    assert same(whole, resumed)


def test_resume_with_validation_and_limits_inside_an_epoch(tmp_path):
    options = {"val_check_interval": 4, "limit_train_batches": 9}
    uninterrupted = fit(tmp_path, **options)
    resumed = fit(tmp_path, ckpt_path="step=15.ckpt", seed=99, **options)
    assert same(uninterrupted, resumed)


@pytest.mark.parametrize("interval", ["epoch", "step"])  # by step, Lightning does not restore the loader itself
def test_another_batch_size_in_mid_epoch_is_refused(interval, tmp_path):
    fit(tmp_path, Kill(6), interval=interval)
    with pytest.raises(ValueError, match="Cannot continue in the middle of an epoch"):
        fit(tmp_path, ckpt_path="step=5.ckpt", batch_size=50, interval=interval)


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled val")
def test_overfit_batches_still_works(tmp_path):
    with pytest.warns(UserWarning, match="turning off the train dataloader shuffling"):
        assert fit(tmp_path, overfit_batches=2, max_epochs=1, every=None) is not None


def test_loader_works_in_any_project(tmp_path):
    """Without our data module, Lightning saves and restores the state of the loader itself."""

    def plain(ckpt_path=None):
        data = Images()
        loader = ResumableDataLoader(data, 5, sampler=EpochSampler(data, seed=1))
        saving = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3)
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=3,
            callbacks=[saving],
        )  # fmt: skip
        module = PlainModule()
        trainer.fit(module, loader, ckpt_path=ckpt_path)
        return module.state_dict()

    whole = plain()
    assert same(whole, plain(tmp_path / "step=9.ckpt"))
    assert same(whole, plain(tmp_path / "step=6.ckpt"))
