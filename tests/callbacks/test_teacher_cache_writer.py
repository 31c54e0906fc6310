"""A teacher's answers about a whole training set, written through trainer.predict."""

import pickle

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_robust.callbacks import TeacherCacheWriter, TeacherPredictor, cache_teacher
from lightning_robust.data import DigitsDataModule, ImageView, SeededViews
from lightning_robust.distillation import Teacher, TeacherCache, TeacherSource
from lightning_robust.training import BatchAdapter
from support.modules import Images, loader, network, trainer


def teacher(seed=0, **options):
    torch.manual_seed(seed)
    return Teacher(network(), name="teacher", source="net.ckpt", **options)


def answers(of, data):
    return of(torch.stack([data[index][0] for index in range(len(data))]))


def predict(path, data, of=None, run=None, **options):
    writer = TeacherCacheWriter(path, **options)
    predictor = TeacherPredictor(of or teacher())
    (run or trainer)(writer).predict(predictor, DataLoader(data, 5), return_predictions=False)
    return TeacherCache(path)


# ---- the writer


@pytest.mark.parametrize("form", ["pair", "dict", "triple"])
def test_every_row_is_its_samples_answer(tmp_path, form):
    data = Images(23, form)
    cache = predict(tmp_path / "c", data, dtype="float32", top_k=None)
    torch.testing.assert_close(cache.logits(torch.arange(23)), answers(teacher(), Images(23)))
    assert cache.manifest() == {"source": "net.ckpt", "fingerprint": teacher().fingerprint, "dtype": "run"}
    cache.check_dataset(data)


def test_a_shuffled_loader_writes_the_same(tmp_path):
    data = Images(23)
    TeacherCacheWriter(tmp_path / "c")
    writer = TeacherCacheWriter(tmp_path / "c", dtype="float32")
    shuffled = DataLoader(data, 5, sampler=torch.randperm(23).tolist(), num_workers=1)
    trainer(writer).predict(TeacherPredictor(teacher()), shuffled, return_predictions=False)
    torch.testing.assert_close(TeacherCache(tmp_path / "c").logits(torch.arange(23)), answers(teacher(), data))


@pytest.mark.parametrize("form", ["pair", "dict"])
def test_top_k(tmp_path, form):
    cache = predict(tmp_path / "c", Images(23, form), top_k=2)
    wanted = answers(teacher(), Images(23)).softmax(1)
    found = cache.logits(torch.arange(23)).softmax(1)
    torch.testing.assert_close(found.amax(1), wanted.amax(1), rtol=2e-3, atol=0)
    label = Images(23).y[:, None]
    torch.testing.assert_close(found.gather(1, label), wanted.gather(1, label), rtol=2e-3, atol=0)


class Predicting(L.LightningModule):
    """A module that people have; its logits come in a dictionary."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = network()

    def predict_step(self, batch, batch_idx):
        return {"logits": self.net(batch[0]), "other": 1}


def test_any_module_that_predicts_logits(tmp_path):
    module = Predicting()
    trainer(TeacherCacheWriter(tmp_path / "c")).predict(module, loader(), return_predictions=False)
    told = TeacherCache(tmp_path / "c").manifest()
    assert told == {"source": "Predicting", "fingerprint": Teacher(module).fingerprint, "dtype": "run"}


def test_options_of_the_teacher_count_and_are_told(tmp_path):
    of = teacher(temperature=2.0, classes=[1, 0, [2, 3]])
    cache = predict(tmp_path / "c", Images(23), of, dtype="float32")
    torch.testing.assert_close(cache.logits(torch.arange(23)), answers(of, Images(23)))
    assert cache.num_classes == 3
    assert cache.described.teacher["temperature"] == 2.0
    assert cache.described.teacher["classes"] == [1, 0, [2, 3]]


def test_writers_can_be_copied_and_arguments_are_checked(tmp_path):
    writer = pickle.loads(pickle.dumps(TeacherCacheWriter(tmp_path / "c", top_k=3)))
    assert (writer.path, writer.top_k, writer.dtype) == (tmp_path / "c", 3, "float16")
    with pytest.raises(ValueError, match="`dtype`"):
        TeacherCacheWriter(tmp_path, dtype="float64")
    with pytest.raises(ValueError, match="`top_k`"):
        TeacherCacheWriter(tmp_path, top_k=0)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Images(4))


class Wrong(L.LightningModule):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def predict_step(self, batch, batch_idx):
        return self.answer


def run(tmp_path, module=None, loaders=None, writer=None, **options):
    writer = TeacherCacheWriter(tmp_path / "c") if writer is None else writer
    loaders = loader() if loaders is None else loaders
    trainer(writer, **options).predict(module or TeacherPredictor(teacher()), loaders, return_predictions=False)


def test_what_the_writer_refuses(tmp_path):
    with pytest.raises(ValueError, match="one predict loader but there are 2"):
        run(tmp_path, loaders=[loader(), loader()])
    with pytest.raises(ValueError, match=r"map-style data set.*got a DataLoader of Stream"):
        run(tmp_path, loaders=DataLoader(Stream(), 2))
    with pytest.raises(TypeError, match=r"predict_step of Wrong to return logits.*got str.*TeacherPredictor"):
        run(tmp_path, Wrong("class 3"))
    with pytest.raises(ValueError, match=r"one row for each of the 6 samples .* \(5, 4\)"):
        run(tmp_path, Wrong(torch.zeros(5, 4)))
    with pytest.raises(ValueError, match=r"18 of 24 samples were not predicted.*limit_predict_batches"):
        run(tmp_path, limit_predict_batches=1)
    with pytest.raises(ValueError, match="18 of 24 samples were not predicted"):
        run(tmp_path, fast_dev_run=1)
    with pytest.raises(FileNotFoundError, match="not finished"):
        TeacherCache(tmp_path / "c").manifest()
    run(tmp_path)
    with pytest.raises(FileExistsError, match="already"):
        run(tmp_path)
    run(tmp_path, writer=TeacherCacheWriter(tmp_path / "c", overwrite=True))


def test_a_crash_in_the_middle_leaves_no_cache(tmp_path):
    class Crash(TeacherPredictor):
        def predict_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("crashed on purpose")
            return super().predict_step(batch, batch_idx)

    writer = TeacherCacheWriter(tmp_path / "c")
    with pytest.raises(RuntimeError, match="on purpose"):
        run(tmp_path, Crash(teacher()), writer=writer)
    with pytest.raises(FileNotFoundError, match="not finished"):
        TeacherCache(tmp_path / "c").manifest()
    run(tmp_path, writer=writer)
    assert TeacherCache(tmp_path / "c").num_samples == 24


# ---- the function


def quiet(**options):
    return trainer(**options)


def test_a_data_set(tmp_path):
    network_given = network()
    mode = [module.training for module in network_given.modules()]
    run = quiet()
    before = list(run.callbacks)
    cache = cache_teacher(network_given, Images(23), tmp_path / "c", trainer=run, dtype="float32", batch_size=7)
    assert run.callbacks == before
    assert [module.training for module in network_given.modules()] == mode
    torch.testing.assert_close(cache.logits(torch.arange(23)), answers(Teacher(network_given), Images(23)))
    with pytest.raises(FileExistsError, match="already"):
        cache_teacher(network_given, Images(23), tmp_path / "c", trainer=run)
    assert run.callbacks == before
    again = cache_teacher(network_given, Images(20), tmp_path / "c", trainer=run, overwrite=True, top_k=1)
    assert (again.num_samples, again.described.top_k) == (20, 1)


def test_its_own_trainer(tmp_path, own_folder, capsys):
    cache = cache_teacher(TeacherSource(network(), classes=[0, 1]), Images(9), tmp_path / "c")
    assert cache.num_classes == 2
    assert [path.name for path in own_folder.iterdir()] == ["c"]  # no logs, no checkpoints
    assert "Predicting" in capsys.readouterr().out


def digits(**options):
    return DigitsDataModule(image_size=8, **{"augment": "shift", "seed": 0, "val_fraction": 0.3, **options})


def flat():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def test_our_data_without_augmentation(tmp_path):
    cache = cache_teacher(flat(), digits(), tmp_path / "c", trainer=quiet(), dtype="float32")
    data = digits()
    data.setup("fit")
    clean = ImageView(data.train_set.dataset, data.train_set.indices)
    torch.testing.assert_close(cache.logits(torch.arange(len(clean))), answers(Teacher(flat()), clean))
    with pytest.warns(
        UserWarning, match=r"images as they are, while the student sees them transformed by .*RandomCrop"
    ):
        cache.check_dataset(data.train_set)
    plain = digits(augment="none")
    plain.setup("fit")
    cache.check_dataset(plain.train_set)
    for other in ({"val_fraction": 0.2}, {"split_seed": 1}, {"label_noise": 0.1}, {"train_fraction": 0.5}):
        changed = digits(augment="none", **other)
        changed.setup("fit")
        with pytest.raises(ValueError, match=r"samples|labels"):
            cache.check_dataset(changed.train_set)


def test_our_data_with_seeded_views(tmp_path):
    data = digits(augment_variants=2)
    cache = cache_teacher(flat(), data, tmp_path / "c", trainer=quiet(), view="seeded", dtype="float32")
    again = digits(augment_variants=2)
    again.setup("fit")
    loader = again.train_dataloader()
    cache.check_dataset(loader.dataset)
    for epoch in (0, 1, 2):
        loader.sampler.set_epoch(epoch)
        index = torch.tensor(list(loader.sampler))
        images = torch.cat([images for images, _ in loader])
        torch.testing.assert_close(cache.logits(index), Teacher(flat())(images))
    for other in ({"seed": 1}, {"augment": "crop-flip"}):
        changed = digits(augment_variants=2, **other)
        changed.setup("fit")
        with pytest.raises(ValueError, match=r"2 seeded augmentation.*but the training set makes others"):
            cache.check_dataset(changed.train_views())
    with pytest.raises(ValueError, match=r"written for .* samples"):
        cache.check_dataset(again.train_set)


class Noisy(Images):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.rand_like(x), y


def test_seeded_views_of_any_data_set(tmp_path):
    cache = cache_teacher(
        teacher(), Noisy(9), tmp_path / "c", trainer=quiet(), view="seeded", variants=3, seed=4, dtype="float32"
    )
    views = SeededViews(Noisy(9), variants=3, seed=4)
    torch.testing.assert_close(cache.logits(torch.arange(27)), answers(teacher(), views))
    cache.check_dataset(views)
    with pytest.raises(ValueError, match="makes others"):
        cache.check_dataset(SeededViews(Noisy(9), variants=3, seed=5))
    given = cache_teacher(teacher(), views, tmp_path / "d", trainer=quiet(), view="seeded", dtype="float32")
    assert torch.equal(given.logits(torch.arange(27)), cache.logits(torch.arange(27)))


class OwnModule(L.LightningDataModule):
    """Somebody's data, which are prepared once, with batches of their own form."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare")

    def setup(self, stage):
        self.calls.append(stage)
        self.data = Images(11)

    def train_dataloader(self):
        return DataLoader(self.data, 3, shuffle=True, collate_fn=collated)


def collated(samples):
    return {
        "ids": torch.zeros(1),
        "view": torch.stack([x for x, _ in samples]),
        "t": torch.stack([y for _, y in samples]),
    }


def test_somebodys_data(tmp_path):
    data = OwnModule()
    cache = cache_teacher(
        teacher(), data, tmp_path / "c", trainer=quiet(), dtype="float32", batch=BatchAdapter("view", "t")
    )
    assert data.calls == ["prepare", "fit"]
    torch.testing.assert_close(cache.logits(torch.arange(11)), answers(teacher(), Images(11)))
    cache_teacher(teacher(), data, tmp_path / "d", trainer=quiet(), top_k=2, batch=BatchAdapter("view", "t"))


class Two(OwnModule):
    def train_dataloader(self):
        return [super().train_dataloader(), super().train_dataloader()]


def test_what_the_function_refuses(tmp_path):
    def ask(data, **options):
        cache_teacher(teacher(), data, tmp_path / "c", trainer=quiet(), **options)

    with pytest.raises(ValueError, match="`view`"):
        ask(Images(4), view="crop-list")
    with pytest.raises(ValueError, match="`variants` are those of view='seeded'"):
        ask(Images(4), variants=2)
    with pytest.raises(ValueError, match="`batch_size`"):
        ask(Images(4), batch_size=0)
    with pytest.raises(TypeError, match="`data` to be a LightningDataModule or a map-style data set but got int"):
        ask(3)
    with pytest.raises(ValueError, match=r"Sample . of the Noisy differs each time.*view='seeded'"):
        ask(Noisy(4))
    with pytest.raises(ValueError, match="SeededViews are augmented; set view='seeded'"):
        ask(SeededViews(Noisy(4)))
    with pytest.raises(ValueError, match="have 2 variants but 3 were asked for"):
        ask(SeededViews(Noisy(4), variants=2), view="seeded", variants=3)
    with pytest.raises(ValueError, match="augment_variants=None but seeded variants were asked for"):
        ask(digits(), view="seeded")
    with pytest.raises(ValueError, match="augment_variants=2 but 3 variants"):
        ask(digits(augment_variants=2), view="seeded", variants=3)
    with pytest.raises(ValueError, match="Two has 2 training loaders"):
        ask(Two())
    assert not list(tmp_path.iterdir())
