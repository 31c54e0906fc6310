from collections import Counter

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_robust.callbacks import Criterion
from lightning_robust.data import OKOSampler, ResumableDataLoader
from lightning_robust.losses import OKO

# classes of very different sizes
LABELS = [0] * 40 + [1] * 2 + [2] * 10 + [3] * 5 + [4] * 3


def sets_of(sampler):
    indices = list(sampler)
    size = sampler.k + 2
    return [indices[i : i + size] for i in range(0, len(indices), size)]


@pytest.mark.parametrize("k", [0, 1, 3])
def test_every_set_has_one_pair_and_k_other_classes_of_different_samples(k):
    sampler = OKOSampler(LABELS, k=k, num_sets=50, seed=3)
    sets = sets_of(sampler)
    assert len(sampler) == 50 * (k + 2)
    assert len(sets) == 50
    for members in sets:
        assert len(set(members)) == k + 2
        assert sorted(Counter(LABELS[i] for i in members).values()) == [1] * k + [2]


def test_classes_are_equally_frequent_and_the_pair_has_no_fixed_place():
    sets = sets_of(OKOSampler(LABELS, k=1, num_sets=4000))
    classes = Counter(LABELS[i] for members in sets for i in members)
    assert all(count == pytest.approx(12_000 / 5, rel=0.06) for count in classes.values())
    samples = Counter(i for members in sets for i in members)
    of_largest = [samples[i] for i in range(40)]
    assert min(of_largest) > 0.5 * sum(of_largest) / 40
    places = Counter(place for members in sets for place in odd_places([LABELS[i] for i in members]))
    assert all(places[place] == pytest.approx(4000 / 3, rel=0.1) for place in range(3))


def odd_places(labels):
    return [place for place, label in enumerate(labels) if labels.count(label) == 1]


def test_an_epoch_is_a_function_of_seed_epoch_and_rank():
    def draw(epoch=0, **options):
        sampler = OKOSampler(LABELS, num_sets=20, **options)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert draw(seed=1) == draw(seed=1)
    others = [draw(seed=2), draw(seed=1, epoch=1), draw(seed=1, num_replicas=2, rank=1)]
    assert all(other != draw(seed=1) for other in others)
    ranks = [OKOSampler(LABELS, num_sets=21, num_replicas=2, rank=rank) for rank in range(2)]
    assert [len(sampler) for sampler in ranks] == [33, 33]  # 11 sets each
    assert list(ranks[0]) != list(ranks[1])


def test_the_default_number_of_sets_is_as_many_as_the_samples_fill():
    assert OKOSampler(LABELS, k=1).num_sets == len(LABELS) // 3
    assert OKOSampler(torch.tensor(LABELS), k=3).num_sets == len(LABELS) // 5


def test_it_can_begin_in_the_middle():
    whole = OKOSampler(LABELS, num_sets=8)
    data = TensorDataset(torch.arange(len(LABELS)))
    first = ResumableDataLoader(data, 6, sampler=whole)
    batches = iter(first)
    next(batches)
    second = ResumableDataLoader(data, 6, sampler=OKOSampler(LABELS, num_sets=8))
    second.load_state_dict(first.state_dict())
    rest = [batch[0].tolist() for batch in second]
    assert rest == [batch[0].tolist() for batch in batches]
    assert len(rest) == 3


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 5)
        self.criterion = torch.nn.CrossEntropyLoss()
        self.seen = []

    def training_step(self, batch):
        x, y = batch
        self.seen.append(y.tolist())
        return self.criterion(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_leaves_it_alone_and_tells_it_the_epoch():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(len(LABELS), 3), torch.tensor(LABELS))
    sampler = OKOSampler(LABELS, k=1, num_sets=8, seed=5)
    assert isinstance(sampler, DistributedSampler)  # which Lightning does not replace in several processes
    module = Module()
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Criterion(OKO(k=1))],
    )
    trainer.fit(module, DataLoader(data, batch_size=12, sampler=sampler))
    assert len(module.seen) == 4
    fresh = OKOSampler(LABELS, k=1, num_sets=8, seed=5)
    for epoch in range(2):
        fresh.set_epoch(epoch)
        drawn = [LABELS[i] for i in fresh]
        assert module.seen[2 * epoch] + module.seen[2 * epoch + 1] == drawn


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 0, 1, 1], {"k": 2}, "at least 3 classes for sets with k=2 but got 2"),
        ([0, 0, 1], {}, "at least 2 samples of each class but class 1 has 1"),
        (LABELS, {"k": -1}, "`k` to be an integer >= 0"),
        (LABELS, {"num_sets": 0}, "`num_sets` to be an integer >= 1"),
    ],
)
def test_what_makes_no_sets_is_refused(labels, options, message):
    with pytest.raises(ValueError, match=message):
        OKOSampler(labels, **options)
