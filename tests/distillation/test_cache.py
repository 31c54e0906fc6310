"""Stored answers of a teacher: exact or bounded, refused when anything about them is wrong."""

import json
import math
import os
import pickle
import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from lightning_robust.distillation import TeacherBank, TeacherCache
from lightning_robust.distillation.cache_data import describe_dataset, labels_of
from lightning_robust.distillation.cache_rows import decode_rows, encode_rows
from lightning_robust.distillation.cache_writing import CacheFiles
from support.cached import Ask

ROWS, CLASSES = 37, 11
TEACHER = {"source": "net.ckpt", "fingerprint": "0123456789abcdef", "dtype": "run"}


def logits_and_labels(rows=ROWS, classes=CLASSES, scale=6.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator) * scale + 40 * torch.randn(rows, 1, generator=generator)
    return logits, torch.randint(classes, (rows,), generator=generator)


def dataset(rows=ROWS, seed=0):
    return TensorDataset(torch.zeros(rows, 2), logits_and_labels(rows, seed=seed)[1])


def written(path, *, data=None, teacher=TEACHER, rows=ROWS, overwrite=False, seed=0, **options):
    logits, labels = logits_and_labels(rows, seed=seed)
    files = CacheFiles(path, rows=rows, overwrite=overwrite, **options)
    files.begin()
    for index in torch.randperm(rows).split(8):
        files.write(index, logits[index], labels[index])
    files.flush()
    files.finish(teacher, describe_dataset(dataset(rows, seed) if data is None else data))
    return TeacherCache(path)


# ---- numbers


@pytest.mark.parametrize("seed", [0, 1])
def test_float32_is_exact(tmp_path, seed):
    cache = written(tmp_path / "c", dtype="float32", seed=seed)
    index = torch.tensor([5, 0, 36, 5])
    found = cache.logits(index)
    assert found.dtype == torch.float32
    assert torch.equal(found, logits_and_labels(seed=seed)[0][index])


def test_float16_errs_relative_to_the_distance_from_the_maximum(tmp_path):
    cache = written(tmp_path / "c")
    wanted = logits_and_labels()[0]
    found = cache.logits(torch.arange(ROWS))
    distance = wanted.amax(1, keepdim=True) - wanted
    # float16 has 11 bits, and the sum with the offset is rounded once more in float32
    assert bool(((found - wanted).abs() <= distance * 2.0**-11 + wanted.abs().amax() * 2.0**-22).all())
    assert torch.equal(found.amax(1), wanted.amax(1))
    assert not torch.equal(found, wanted)


def test_answers_are_fresh(tmp_path):
    cache = written(tmp_path / "c")
    index = torch.tensor([3, 4])
    first = cache.logits(index)
    kept = first.clone()
    first.div_(7)
    assert torch.equal(cache.logits(index), kept)
    assert torch.equal(index, torch.tensor([3, 4]))


def naive_top_k(logits, label, k):
    """Probabilities of one row, in float64 and loops."""
    exps = [math.exp(value - max(logits)) for value in logits]
    p = [value / sum(exps) for value in exps]
    order = sorted(range(len(p)), key=lambda c: -p[c])[:k]
    if label not in order:
        order[-1] = label
    rest = 1 - sum(p[c] for c in order)
    return [p[c] if c in order else rest / (len(p) - k) for c in range(len(p))]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 8e-3)])
@pytest.mark.parametrize("top_k", [1, 3, 10])
def test_top_k_against_a_naive_loop(tmp_path, dtype, tolerance, top_k):
    cache = written(tmp_path / "c", dtype=dtype, top_k=top_k)
    logits, labels = logits_and_labels()
    found = cache.logits(torch.arange(ROWS)).double().softmax(1)
    wanted = torch.tensor(
        [naive_top_k(row, label, top_k) for row, label in zip(logits.tolist(), labels.tolist(), strict=True)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=1e-12)
    # the label's probability is the teacher's, whether it is among the largest or not
    true = logits.double().softmax(1).gather(1, labels[:, None])
    torch.testing.assert_close(found.gather(1, labels[:, None]), true, rtol=tolerance, atol=1e-12)
    assert bool((~(logits.topk(top_k).indices == labels[:, None]).any(1)).any())


def test_top_k_keeps_the_logits_of_kept_classes(tmp_path):
    cache = written(tmp_path / "c", dtype="float32", top_k=3)
    logits = logits_and_labels()[0]
    best = logits.argmax(1, keepdim=True)
    found = cache.logits(torch.arange(ROWS)).gather(1, best)
    torch.testing.assert_close(found, logits.gather(1, best), rtol=1e-5, atol=1e-4)


def test_more_classes_than_16_bits_count():
    logits = torch.zeros(2, 70_000)
    logits[0, 69_999], logits[1, 3] = 20.0, 20.0
    rows = encode_rows(logits, top_k=2, labels=torch.tensor([1, 3]), dtype="float32")
    rows["classes"] = rows["classes"].astype(np.int32)
    assert decode_rows(rows, 70_000).argmax(1).tolist() == [69_999, 3]


# ---- what cannot be stored


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("top_k", [None, 2])
def test_logits_that_are_not_finite(bad, top_k):
    with pytest.raises(ValueError, match="NaN or infinite"):
        encode_rows(torch.tensor([[0.0, 1.0, bad]]), top_k=top_k, labels=torch.tensor([0]))


def test_logits_too_far_apart_for_float16():
    logits = torch.tensor([[0.0, -7e4]])
    with pytest.raises(ValueError, match=r"70000 below the largest.*float32"):
        encode_rows(logits)
    assert torch.equal(decode_rows(encode_rows(logits, dtype="float32"), 2), logits)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "one class for each sample"),
        (torch.zeros(2), "one class for each sample"),
        (torch.zeros(1, dtype=torch.long), "one class for each sample"),
        (torch.tensor([0, 3]), "labels from 0 to 2.*got 0 to 3"),
        (torch.tensor([-1, 1]), "labels from 0 to 2.*got -1 to 1"),
    ],
)
def test_top_k_needs_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        encode_rows(torch.zeros(2, 3), top_k=1, labels=labels)


def test_writer_refuses(tmp_path):
    with pytest.raises(ValueError, match="`rows`"):
        CacheFiles(tmp_path, rows=0)
    with pytest.raises(ValueError, match="`dtype`"):
        CacheFiles(tmp_path, rows=1, dtype="int8")
    with pytest.raises(ValueError, match="`top_k`"):
        CacheFiles(tmp_path, rows=1, top_k=0)
    files = CacheFiles(tmp_path / "c", rows=3)
    files.begin()
    with pytest.raises(ValueError, match=r"one row for each of the 2 samples.*\(3, 4\)"):
        files.write(torch.arange(2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="one row"):
        files.write(torch.arange(3), torch.zeros(3))
    with pytest.raises(ValueError, match="from 0 to 2 but got 1 to 3"):
        files.write(torch.tensor([1, 3]), torch.zeros(2, 4))
    files.write(torch.arange(2), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="4 classes in one batch and 5"):
        files.write(torch.tensor([2]), torch.zeros(1, 5))
    with pytest.raises(ValueError, match="1 of 3 samples were not predicted"):
        files.finish(TEACHER, {})
    with pytest.raises(ValueError, match="less than the 4 classes of the teacher but got 4"):
        CacheFiles(tmp_path / "c", rows=3, top_k=4).write(torch.arange(3), torch.zeros(3, 4), torch.zeros(3).long())


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "c").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        CacheFiles(tmp_path / "c", rows=3).begin()
    assert (tmp_path / "c").read_text() == "mine"


def test_processes_that_disagree(tmp_path):
    first, second = (CacheFiles(tmp_path / "c", rows=rows) for rows in (3, 4))
    first.begin()
    first.write(torch.arange(3), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="disagree about its shape"):
        second.write(torch.arange(3), torch.zeros(3, 4))


# ---- nothing half-written


def test_interrupted_writing_is_no_cache(tmp_path):
    files = CacheFiles(tmp_path / "c", rows=3)
    files.begin()
    files.write(torch.arange(2), torch.zeros(2, 4))
    files.flush()
    with pytest.raises(FileNotFoundError, match=r"was not finished.*cache_teacher"):
        TeacherCache(tmp_path / "c").logits(torch.tensor([0]))
    # the next attempt begins anew, and leaves nothing of the first
    cache = written(tmp_path / "c")
    assert cache.num_samples == ROWS
    assert sorted(os.listdir(tmp_path / "c")) == ["logits.npy", "manifest.json", "offset.npy"]


@pytest.mark.parametrize("step", range(4))
def test_interrupted_finishing_is_no_cache(tmp_path, monkeypatch, step):
    calls = []

    def replace(*paths):
        if len(calls) == step:
            raise KeyboardInterrupt
        calls.append(paths)
        return real(*paths)

    real = os.replace
    monkeypatch.setattr("lightning_robust.distillation.cache_writing.os.replace", replace)
    try:
        written(tmp_path / "c")
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    assert interrupted == (step < 3)
    if interrupted:
        with pytest.raises(FileNotFoundError):
            TeacherCache(tmp_path / "c").manifest()
    else:
        assert TeacherCache(tmp_path / "c").num_samples == ROWS


def test_a_cache_stays_until_the_new_one_is_complete(tmp_path):
    old = written(tmp_path / "c")
    with pytest.raises(FileExistsError, match="already; set `overwrite`"):
        written(tmp_path / "c")
    files = CacheFiles(tmp_path / "c", rows=5, overwrite=True)
    files.begin()
    files.write(torch.arange(3), torch.zeros(3, 4))
    again = TeacherCache(tmp_path / "c")
    assert torch.equal(again.logits(torch.arange(ROWS)), old.logits(torch.arange(ROWS)))
    files.write(torch.arange(5), torch.ones(5, 4))
    files.finish(TEACHER, describe_dataset(dataset(5)))
    assert TeacherCache(tmp_path / "c").num_samples == 5
    assert old.num_samples == ROWS  # who has it mapped keeps it
    assert old.logits(torch.tensor([0])).shape == (1, CLASSES)


def test_another_form_replaces_all_files(tmp_path):
    written(tmp_path / "c", top_k=2)
    assert len(os.listdir(tmp_path / "c")) == 5
    written(tmp_path / "c", dtype="float32", overwrite=True)
    assert sorted(os.listdir(tmp_path / "c")) == ["logits.npy", "manifest.json"]


# ---- what is refused


def test_nothing_is_opened_before_it_is_needed(tmp_path):
    cache = TeacherCache(tmp_path / "nowhere")
    assert "nowhere" in repr(cache)
    for ask in (
        lambda: cache.num_samples,
        lambda: cache.num_classes,
        cache.manifest,
        lambda: cache.logits(torch.arange(1)),
    ):
        with pytest.raises(FileNotFoundError, match=r"no teacher cache at .*nowhere.*cache_teacher"):
            ask()


def change(path, **values):
    told = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**told, **values}))


@pytest.mark.parametrize(
    "values",
    [
        {"rows": "many"},
        {"rows": 0},
        {"dtype": "object"},
        {"teacher": {}},
        {"teacher": None},
        {"data": []},
        {"unknown": 1},
        {"top_k": 0},
    ],
    ids=str,
)
def test_damaged_manifest(tmp_path, values):
    written(tmp_path / "c")
    change(tmp_path / "c", **values)
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        TeacherCache(tmp_path / "c").manifest()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"rows": 3}', "\x00\xff"])
def test_manifest_that_is_none(tmp_path, text):
    written(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        TeacherCache(tmp_path / "c").manifest()


def test_another_version(tmp_path):
    written(tmp_path / "c")
    change(tmp_path / "c", version=2)
    with pytest.raises(ValueError, match="format 2, expected 1; write it anew"):
        TeacherCache(tmp_path / "c").manifest()


@pytest.mark.parametrize("change_to", [{"rows": 36}, {"num_classes": 12}, {"dtype": "float32"}], ids=str)
def test_arrays_of_another_shape_than_told(tmp_path, change_to):
    written(tmp_path / "c")
    change(tmp_path / "c", **change_to)
    with pytest.raises(ValueError, match=r"Expected .*npy to hold .* but it holds"):
        TeacherCache(tmp_path / "c", verify=False).manifest()


def test_missing_and_truncated_files(tmp_path):
    for name in ("logits.npy", "offset.npy"):
        written(tmp_path / "c", overwrite=True)
        file = tmp_path / "c" / name
        whole = file.read_bytes()
        for part in (whole[:-1], whole[:50], b""):
            file.write_bytes(part)
            with pytest.raises(ValueError, match=f"{name} of a teacher cache is missing or damaged"):
                TeacherCache(tmp_path / "c").manifest()
        file.unlink()
        with pytest.raises(ValueError, match=f"{name} of a teacher cache is missing or damaged"):
            TeacherCache(tmp_path / "c").manifest()


def test_one_changed_bit(tmp_path):
    written(tmp_path / "c")
    file = tmp_path / "c" / "logits.npy"
    content = bytearray(file.read_bytes())
    content[-7] ^= 4
    file.write_bytes(content)
    with pytest.raises(ValueError, match="its checksum differs"):
        TeacherCache(tmp_path / "c").manifest()
    assert TeacherCache(tmp_path / "c", verify=False).num_classes == CLASSES


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_nothing_is_executed(tmp_path, own_folder):
    written(tmp_path / "c")
    file = tmp_path / "c" / "logits.npy"
    np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="missing or damaged"):
        TeacherCache(tmp_path / "c").manifest()
    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="missing or damaged"):
        TeacherCache(tmp_path / "c").manifest()
    assert not (own_folder / "exploded").exists()


def test_another_teacher_than_demanded(tmp_path):
    written(tmp_path / "c")
    assert TeacherCache(tmp_path / "c", fingerprint=TEACHER["fingerprint"]).manifest() == TEACHER
    with pytest.raises(ValueError, match=r"answers of net.ckpt \(fingerprint 0123456789abcdef\) but fff was asked for"):
        TeacherCache(tmp_path / "c", fingerprint="fff").logits(torch.tensor([0]))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([0, ROWS]), "knows the samples 0 to 36 but was asked for 0 to 37"),
        (torch.tensor([-1]), "asked for -1"),
        (torch.tensor([0.0]), "integers"),
        (torch.tensor(3), "integers"),
        (torch.tensor([[3]]), "integers"),
    ],
)
def test_positions_that_are_none(tmp_path, index, message):
    with pytest.raises(ValueError, match=message):
        written(tmp_path / "c").logits(index)


def test_no_samples(tmp_path):
    assert written(tmp_path / "c").logits(torch.empty(0, dtype=torch.long)).shape == (0, CLASSES)


# ---- copies, processes, the bank


def test_pickles_small_and_copies(tmp_path):
    cache = written(tmp_path / "c")
    wanted = cache.logits(torch.arange(ROWS))
    raw = pickle.dumps(cache)
    assert len(raw) < 2000
    for copy in (pickle.loads(raw), deepcopy(cache), pickle.loads(pickle.dumps(TeacherCache(tmp_path / "c")))):
        assert torch.equal(copy.logits(torch.arange(ROWS)), wanted)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_in_workers(tmp_path, context):
    cache = written(tmp_path / "c")
    loader = torch.utils.data.DataLoader(Ask(cache, ROWS), 10, num_workers=1, multiprocessing_context=context)
    assert torch.equal(torch.cat(list(loader)), cache.logits(torch.arange(ROWS)))


def test_in_a_bank(tmp_path):
    cache = written(tmp_path / "c")
    with pytest.raises(ValueError, match="robust teacher cannot be a TeacherCache"):
        TeacherBank({"robust teacher": cache}, cacheable=["clean teacher"])
    bank = TeacherBank({"clean teacher": cache}, cacheable=["clean teacher"])
    assert bank.needs_index
    assert torch.equal(
        bank.ask("clean teacher", torch.zeros(2), index=torch.tensor([4, 2])), cache.logits(torch.tensor([4, 2]))
    )
    assert bank.state_dict()["clean teacher"]["fingerprint"] == TEACHER["fingerprint"]


# ---- data sets


class Listed(Dataset):
    """Labels as torchvision has them, samples that must not be loaded."""

    def __init__(self, labels, transform=None):
        self.targets = labels.tolist()
        self.transform = transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        raise AssertionError("loaded")


class Silent(Dataset):
    """Only its samples know their labels, and loading one draws."""

    def __init__(self, labels, form="pair"):
        self.y = labels
        self.form = form

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        image, label = torch.rand(2), self.y[index]
        return {"image": image, "label": int(label)} if self.form == "dict" else (image, label)


def test_labels_without_loading():
    labels = logits_and_labels()[1]
    assert torch.equal(labels_of(Listed(labels)), labels)
    assert torch.equal(labels_of(Subset(Subset(Listed(labels), range(9, 20)), [3, 0])), labels[[12, 9]])
    assert labels_of(Silent(labels)) is None
    assert labels_of(Subset(Silent(labels), [1])) is None
    assert labels_of(TensorDataset(torch.zeros(3))) is None
    assert labels_of(TensorDataset(torch.zeros(3, 2), torch.zeros(3, 2).long())) is None


@pytest.mark.parametrize("kind", ["tensors", "listed", "silent", "silent-dict"])
def test_the_same_labels_are_the_same_data(tmp_path, kind):
    cache, labels = written(tmp_path / "c"), logits_and_labels()[1]
    data = {
        "tensors": dataset(),
        "listed": Listed(labels),
        "silent": Silent(labels),
        "silent-dict": Silent(labels, "dict"),
    }[kind]
    state = torch.get_rng_state()
    cache.check_dataset(data)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [TensorDataset, Listed, Silent], ids=lambda kind: kind.__name__)
def test_another_data_set(tmp_path, kind):
    cache, labels = written(tmp_path / "c"), logits_and_labels()[1]

    def made(of):
        return TensorDataset(torch.zeros(len(of), 2), of) if kind is TensorDataset else kind(of)

    with pytest.raises(ValueError, match="written for 37 samples but the training set has 36"):
        cache.check_dataset(made(labels[1:]))
    other = labels.clone()
    other[1] = (other[1] + 1) % CLASSES
    with pytest.raises(ValueError, match="another data set: the labels of the training set differ"):
        cache.check_dataset(made(other))
    with pytest.raises(ValueError, match="another data set"):
        cache.check_dataset(made(labels.flip(0)))


def flipped(image):
    return image.flip(-1)


def test_a_student_that_sees_other_views_is_warned_about(tmp_path):
    labels = logits_and_labels()[1]
    cache = written(tmp_path / "c", data=Listed(labels))
    with pytest.warns(UserWarning, match=r"as they are, while the student sees them transformed by <function flipped>"):
        cache.check_dataset(Listed(labels, flipped))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written(tmp_path / "d", data=Listed(labels, flipped)).check_dataset(Listed(labels, flipped))
