"""Every step knows the samples of its batch, whatever loader and Trainer setting; what cannot be known is refused."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Subset

from lightning_robust.data import EpochSampler, ResumableDataLoader
from lightning_robust.training import PerSampleCallback, SampleIndices, Stage
from support.modules import CollectionModule, DictModule, Images, trainer


class Probe(PerSampleCallback):
    """Compares the indices that it is told with those that the dataset put into the batch."""

    stage = Stage.LOSS
    needs_logits = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []
        self.samples = []

    def on_samples_known(self, trainer, pl_module, num_samples):
        self.samples.append(num_samples)

    def around_step(self, context, batch, run):
        output = run(batch)
        indices = self.indices_of(context, len(context.logits(self)))
        truth = batch["id"] if isinstance(batch, dict) else batch[2]
        assert indices.tolist() == truth.tolist()
        self.seen.append((context.trainer.current_epoch, indices.tolist()))
        return output


class OwnLoader(CollectionModule):
    """Makes its loaders itself."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def train_dataloader(self):
        return self.make()


def images(length=24):
    return Images(length, form="triple")


def fit(loader, module=None, probe=None, callbacks=(), epochs=3, **kwargs):
    probe = probe or Probe()
    ckpt_path = kwargs.pop("ckpt_path", None)
    run = trainer(*callbacks, probe, **{"max_epochs": epochs, **kwargs})
    run.fit(module or CollectionModule(), loader, ckpt_path=ckpt_path)
    return probe


def seen_once(probe, epochs=3, samples=24):
    for epoch in range(epochs):
        found = sorted(index for at, indices in probe.seen if at == epoch for index in indices)
        assert found == list(range(samples)), epoch


def assert_untouched(run):
    assert not {"process_dataloader", "batch_to_device"} & set(vars(run.strategy))
    assert "setup_data" not in vars(run.fit_loop)


class Endless(BatchSampler):
    """A batch sampler without a length."""

    __len__ = None

    def __init__(self):
        pass

    def __iter__(self):
        return iter([[0, 5, 2], [7], [1, 3]])


LOADERS = {
    "ordered": lambda data: DataLoader(data, 5),
    "shuffled": lambda data: DataLoader(data, 5, shuffle=True),
    "workers": lambda data: DataLoader(data, 5, shuffle=True, num_workers=2),
    "persistent": lambda data: DataLoader(data, 5, shuffle=True, num_workers=1, persistent_workers=True),
    "batch_sampler": lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 7, False)),
    "list_of_batches": lambda data: DataLoader(data, batch_sampler=[list(range(12)), list(range(12, 24))]),
    "resumable": lambda data: ResumableDataLoader(data, 5, sampler=EpochSampler(data, seed=1)),
    "resumable_workers": lambda data: ResumableDataLoader(data, 5, sampler=EpochSampler(data, seed=1), num_workers=2),
    "subset": lambda data: DataLoader(Subset(Images(50, form="triple"), range(24)), 5, shuffle=True),
}


@pytest.mark.filterwarnings("ignore:The '?train_dataloader'? does not have many workers")
@pytest.mark.parametrize("kind", LOADERS)
def test_indices_are_those_of_the_batch(kind):
    loader = LOADERS[kind](images())
    before = dict(vars(loader))
    probe = fit(loader)
    seen_once(probe)
    assert probe.samples == [24]
    after = dict(vars(loader))
    for name in ("sampler", "batch_sampler"):
        assert after[name] is before[name]
        assert type(after[name]) is type(before[name])


def test_no_automatic_batching():
    """With batch_size=None the sampler itself names lists of indices, and the dataset returns whole batches."""
    data = images()
    data.__class__ = type(
        "Bulk", (Images,), {"__getitem__": lambda self, at: (self.x[at], self.y[at], torch.tensor(at))}
    )
    seen_once(fit(DataLoader(data, batch_size=None, sampler=BatchSampler(RandomSampler(data), 5, False))))
    resumable = ResumableDataLoader(data, None, sampler=Chunks(data))
    probe = fit(resumable)
    seen_once(probe)
    assert probe.seen[0][1] != probe.seen[4][1]  # the sampler was told its epoch


class Bulk(Images):
    def __getitem__(self, indices):
        return self.x[indices], self.y[indices], torch.tensor(indices)


class Chunks(EpochSampler):
    def __iter__(self):
        return iter(BatchSampler(super().__iter__(), 6, False))


def test_dictionary_batches_and_other_lengths():
    loader = DataLoader(Images(form="dict"), 5, shuffle=True)
    seen_once(fit(loader, module=DictModule()))
    probe = fit(DataLoader(images(), batch_sampler=Endless()))  # Lightning fetches one batch ahead
    assert [indices for _, indices in probe.seen] == 3 * [[0, 5, 2], [7], [1, 3]]


def test_drop_last_and_limits():
    probe = fit(DataLoader(images(), 7, shuffle=True, drop_last=True), epochs=2)
    assert [len(indices) for _, indices in probe.seen] == 6 * [7]
    for workers in (0, 2):
        probe = fit(DataLoader(images(), 3, shuffle=True, num_workers=workers), limit_train_batches=3)
        assert len(probe.seen) == 9


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 3},
        {"overfit_batches": 2},
        {"fast_dev_run": 2},
        {"max_epochs": -1, "max_steps": 11},
        {"val_check_interval": 2},
    ],
)
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled")
def test_trainer_settings(options):
    loader = DataLoader(images(), 5, shuffle=True)
    run = trainer(probe := Probe(), **{"max_epochs": 2, **options})
    run.fit(CollectionModule(), loader, DataLoader(images(), 4))
    assert probe.seen


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_made_anew(workers):
    module = OwnLoader(lambda: DataLoader(images(), 5, shuffle=True, num_workers=workers))
    seen_once(fit(None, module=module, reload_dataloaders_every_n_epochs=1))
    same = DataLoader(images(), 5, shuffle=True, num_workers=workers)
    sampler = same.batch_sampler
    seen_once(fit(None, module=OwnLoader(lambda: same), reload_dataloaders_every_n_epochs=1))
    assert same.batch_sampler is sampler


def test_loaders_that_configure_optimizers_asked_for():
    class Asking(CollectionModule):
        def configure_optimizers(self):
            assert self.trainer.estimated_stepping_batches == 15
            return super().configure_optimizers()

    seen_once(fit(DataLoader(images(), 5, shuffle=True), module=Asking()))


@pytest.mark.parametrize("workers", [0, 2])
def test_others_may_look_into_the_loader(workers):
    """Callbacks that take a batch of the training loader for themselves do not disturb the count."""

    class Peeking(Callback):
        def peek(self, trainer, *_):
            next(iter(trainer.train_dataloader))
            trainer.strategy.batch_to_device(torch.zeros(1))

        on_train_start = on_train_epoch_start = on_train_batch_start = on_train_batch_end = peek
        on_before_optimizer_step = on_validation_start = on_train_epoch_end = peek

    loader = DataLoader(images(), 9, shuffle=True, num_workers=workers)
    seen_once(fit(loader, callbacks=[Peeking()], epochs=2), epochs=2)


FINDERS = {
    "rate": lambda: LearningRateFinder(num_training_steps=7, update_attr=False),
    "size": lambda: BatchSizeFinder(steps_per_trial=2, max_trials=2),
}


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
@pytest.mark.parametrize("finder", FINDERS)
def test_after_a_finder_has_trained_by_itself(finder):
    """Finders set up loaders several times, those of validation during training, and count batches of their own."""

    class Sized(OwnLoader):
        batch_size = 5

        def __init__(self):
            super().__init__(lambda: DataLoader(images(), self.batch_size, shuffle=True))

        def val_dataloader(self):
            return DataLoader(Stream(), 5)

    run = trainer(probe := Probe(), FINDERS[finder](), max_epochs=2)
    run.fit(Sized())
    seen_once(probe, epochs=2)
    assert_untouched(run)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batches_without_a_step():
    """None and skipped batches take their indices with them."""

    class Skipping(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.skip = batch_idx in (1, 3)

    class Module(CollectionModule):
        def training_step(self, batch, batch_idx):
            return None if self.skip else super().training_step(batch, batch_idx)

    class Selective(Probe):
        def around_step(self, context, batch, run):
            return None if context.pl_module.skip else super().around_step(context, batch, run)

    def collate(samples):
        return None if samples[0][2] % 3 == 0 else torch.utils.data.default_collate(samples)

    loader = DataLoader(images(), 2, shuffle=True, collate_fn=collate)
    with pytest.warns(UserWarning, match="yielded None"):
        probe = fit(loader, module=Module(), probe=Selective(), callbacks=[Skipping()])
    assert 0 < len(probe.seen) < 36


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resumable", [True, False])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resume_in_mid_epoch(tmp_path, workers, resumable):
    def loader():
        if not resumable:
            return DataLoader(images(), 5, shuffle=True, num_workers=workers)
        return ResumableDataLoader(images(), 5, sampler=EpochSampler(images(), seed=1), num_workers=workers)

    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = fit(loader(), callbacks=[saving], enable_checkpointing=True)
    for step in (3, 5, 7, 14):
        probe = fit(loader(), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert len(probe.seen) == 15 - step
        if resumable:
            assert probe.seen == whole.seen[step:]


def test_two_callbacks_follow_one_loader():
    loader = DataLoader(images(), 5, shuffle=True)
    sampler = loader.batch_sampler
    first, second = Probe(), Probe()
    fit(loader, probe=first, callbacks=[second])
    assert first.seen == second.seen
    seen_once(second)
    assert loader.batch_sampler is sampler


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_gone_after_an_exception(error):
    class Failing(CollectionModule):
        def training_step(self, batch, batch_idx):
            raise error("stop")

    loader = DataLoader(images(), 5)
    before = dict(vars(loader))
    run = trainer(Probe())
    with pytest.raises((error, SystemExit)):
        run.fit(Failing(), loader)
    assert vars(loader) == before
    assert_untouched(run)


def test_gone_after_a_fit_that_fails_in_setup():
    class Failing(CollectionModule):
        def setup(self, stage):
            raise RuntimeError("stop")

    run = trainer(Probe())
    with pytest.raises(RuntimeError, match="stop"):
        run.fit(Failing(), DataLoader(images(), 5))
    assert_untouched(run)


def test_a_second_fit_and_kept_workers():
    loader = DataLoader(images(), 5, shuffle=True, num_workers=1, persistent_workers=True)
    assert len(list(loader)) == 5  # workers exist that know the loader's own sampler only
    for _ in range(2):
        seen_once(fit(loader, epochs=2), epochs=2)


def test_copies_of_loader_and_callback_are_plain():
    class Copying(Callback):
        def on_train_start(self, trainer, pl_module):
            self.copied = copy.deepcopy(trainer.train_dataloader)
            self.callback = pickle.loads(pickle.dumps(trainer.callbacks[-1]))

    probe = Probe(index_key=None, num_samples=24)
    loader = DataLoader(images(), 5)
    fit(loader, callbacks=[copying := Copying()], probe=probe)
    assert type(copying.copied.batch_sampler) is BatchSampler
    assert copying.callback._indices.num_samples == 24
    assert copying.callback._indices._trainer is None


@pytest.mark.parametrize(("form", "module", "key"), [("triple", CollectionModule, 2), ("dict", DictModule, "id")])
def test_indices_in_the_batch(form, module, key):
    loader = DataLoader(Images(form=form), 5, shuffle=True)
    before = dict(vars(loader))

    class Unfollowed(Callback):
        def on_train_start(self, trainer, pl_module):
            assert vars(loader) == before

    probe = fit(loader, module=module(), probe=Probe(index_key=key), callbacks=[Unfollowed()])
    seen_once(probe)
    assert probe.samples == [24]


class Stream(IterableDataset):
    def __iter__(self):
        data = images()
        return (data[index] for index in range(24))


def test_a_stream_that_names_its_samples():
    probe = fit(DataLoader(Stream(), 5), probe=Probe(index_key=2, num_samples=24))
    seen_once(probe)
    with pytest.raises(ValueError, match="name it with num_samples"):
        fit(DataLoader(Stream(), 5), probe=Probe(index_key=2))


class OwnIteration(DataLoader):
    def __iter__(self):
        return super().__iter__()


class Declared(OwnIteration):
    batches_follow_sampler = True


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataLoader(Stream(), 5), "Stream is an IterableDataset"),
        (lambda: DataLoader(images(), 5, num_workers=1, in_order=False), "in_order=False"),
        (lambda: OwnIteration(images(), 5), "OwnIteration iterates in a way of its own"),
        (lambda: Ellipsis_(), "is a Ellipsis_, whose samples"),
    ],
)
def test_loaders_that_cannot_be_followed(make, message):
    with pytest.raises(TypeError, match=message) as refused:
        fit(make())
    assert "index_key" in str(refused.value)


class Ellipsis_:  # noqa: N801 - any iterable will do
    def __iter__(self):
        return iter([torch.utils.data.default_collate([images()[0]])])


def test_a_subclass_that_declares_its_order():
    seen_once(fit(Declared(images(), 5, shuffle=True)))


@pytest.mark.parametrize(
    "loaders",
    [
        lambda: [DataLoader(images(), 5), DataLoader(images(), 5)],
        lambda: CombinedLoader({"a": DataLoader(images(), 5), "b": DataLoader(images(), 5)}),
    ],
)
def test_several_loaders(loaders):
    with pytest.raises(ValueError, match="There are 2 training loaders"):
        fit(loaders())


def test_one_loader_in_a_container():
    class Wrapped(CollectionModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    class Inner(Probe):
        def around_step(self, context, batch, run):
            output = run(batch)
            assert self.indices_of(context, 6).tolist() == batch["a"][2].tolist()
            self.seen.append(1)
            return output

    probe = fit({"a": DataLoader(images(), 6, shuffle=True)}, module=Wrapped(), probe=Inner())
    assert len(probe.seen) == 12


def test_another_number_of_samples_in_the_batch():
    def dropping(samples):
        return torch.utils.data.default_collate(samples[:-1])

    with pytest.raises(ValueError, match="put 6 samples into this batch but the step has logits of 5"):
        fit(DataLoader(images(), 6, collate_fn=dropping))
    # whole batches from the dataset: one index stands for all of them
    data = [torch.utils.data.default_collate([images()[index] for index in range(4)])]
    with pytest.raises(ValueError, match="put 1 samples into this batch but the step has logits of 4"):
        fit(DataLoader(data, batch_size=None))


def test_a_dataset_that_changes_its_length():
    lengths = iter([24, 24, 20])
    module = OwnLoader(lambda: DataLoader(images(next(lengths)), 5))
    with pytest.raises(ValueError, match="had 24 samples and has 20"):
        fit(None, module=module, reload_dataloaders_every_n_epochs=1)


def test_a_loader_that_was_replaced():
    class Replacing(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.fit_loop._combined_loader.flattened = [DataLoader(images(), 5)]

    with pytest.raises(RuntimeError, match="was replaced after its set-up"):
        fit(DataLoader(images(), 5), callbacks=[Replacing()])


def test_what_is_no_index_is_refused():
    read = SampleIndices(index_key=1).current
    assert read((0, [3, 4]), count=2).tolist() == [3, 4]
    assert read((0, torch.tensor([3, 4], dtype=torch.int32)), count=1, partial=True).tolist() == [3]
    with pytest.raises(ValueError, match="put 2 samples into this batch but the step has logits of 3"):
        read((0, [3, 4]), count=3, partial=True)
    for entry, described in [
        (torch.zeros(2), r"shape \(2,\) and type torch.float32"),
        (torch.zeros(2, 1, dtype=torch.long), r"shape \(2, 1\)"),
        (["a", "b"], "2 entries, the first a str"),
        ("ab", "the type str"),
    ]:
        with pytest.raises(TypeError, match=described):
            read((0, entry), count=2)
    with pytest.raises(KeyError, match="index_key=1 names no entry of the batch, which has the type int"):
        read(3, count=1)
    with pytest.raises(KeyError, match=r"has the keys \['x', 'y'\]"):
        SampleIndices(index_key="id").current({"x": 0, "y": 1}, count=1)
    with pytest.raises(ValueError, match="num_samples"):
        SampleIndices(num_samples=0)


@pytest.mark.parametrize("offset", [-1, 1])
def test_indices_out_of_range(offset):
    class Shifted(Images):
        def __getitem__(self, index):
            x, y, at = super().__getitem__(index)
            return x, y, at + offset

    with pytest.raises(
        ValueError, match="Expected sample indices from 0 to 23 but got " + ("-1" if offset < 0 else "24")
    ):
        fit(DataLoader(Shifted(form="triple"), 5), probe=Probe(index_key=2))


def test_samplers_of_keys_are_refused():
    class Keyed(Images):
        def __getitem__(self, key):
            return super().__getitem__(int(key))

    data = Keyed(form="triple")
    with pytest.raises(TypeError, match="5 entries, the first a str"):
        fit(DataLoader(data, 5, sampler=[str(index) for index in range(24)]))
