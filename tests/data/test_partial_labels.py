import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import ObjectiveTraining
from lightning_robust.data import LabelledAndUnlabelled, PartialLabels
from lightning_robust.objectives import SRSTAWR
from support.modules import Images, PlainModule, trainer


@pytest.mark.parametrize("labels", [torch.arange(4), [0, 1, 2, 3]], ids=["tensors", "numbers"])
def test_labels_are_shown_where_they_are_known(labels):
    data = [(torch.full((2,), float(i)), label, "extra") for i, label in enumerate(labels)]
    dataset = PartialLabels(data, torch.tensor([3, 0]))
    assert len(dataset) == 4
    assert [int(label) for _, label, _ in dataset] == [0, -100, -100, 3]
    assert [float(x[0]) for x, _, _ in dataset] == [0.0, 1.0, 2.0, 3.0]
    assert all(extra == "extra" for _, _, extra in dataset)
    batch = next(iter(DataLoader(dataset, 4)))
    assert batch[1].dtype == torch.long
    assert int(data[1][1]) == 1  # the data set keeps its own


def test_a_position_outside_is_refused():
    dataset = TensorDataset(torch.zeros(3, 2), torch.arange(3))
    with pytest.raises(IndexError, match="positions in a data set of 3 samples but got 3"):
        PartialLabels(dataset, [0, 3])
    with pytest.raises(IndexError, match="no sample 7 in a data set of 3"):
        PartialLabels(dataset, [0])[7]


@pytest.mark.parametrize(
    "unlabelled",
    [torch.rand(3, 2), (torch.rand(3, 2),), (torch.rand(3, 2), torch.arange(3)), {"image": torch.rand(3, 2)}],
    ids=["tensor", "one", "pair", "mapping"],
)
def test_two_loaders_make_one_batch(unlabelled):
    x, y = LabelledAndUnlabelled("few", "many").unpack(
        {"few": {"image": torch.zeros(2, 2), "label": torch.tensor([5, 6])}, "many": unlabelled}
    )
    assert x.shape == (5, 2)
    assert float(x[:2].abs().sum()) == 0
    assert y.tolist() == [5, 6, -100, -100, -100]


def test_a_batch_without_the_parts_is_refused():
    adapter = LabelledAndUnlabelled()
    with pytest.raises(KeyError, match="the part 'labelled' but got tuple"):
        adapter.unpack((torch.zeros(2, 2), torch.arange(2)))
    with pytest.raises(KeyError, match=r"the part 'unlabelled' but got \['labelled'\]; train with CombinedLoader"):
        adapter.unpack({"labelled": (torch.zeros(2, 2), torch.arange(2))})
    assert repr(adapter) == "LabelledAndUnlabelled(labelled='labelled', unlabelled='unlabelled')"


def objective():
    return SRSTAWR(teacher=PlainModule(seed=1).net, attack=PGD(eps=0.1, steps=1, loss="kl"))


@pytest.mark.parametrize("kind", ["two loaders", "one data set"])
def test_a_trainer_trains_on_few_labels(kind):
    if kind == "two loaders":
        loaders = {"labelled": DataLoader(Images(6), 2), "unlabelled": DataLoader(Images(24, seed=1), 6)}
        data, batch = CombinedLoader(loaders, "max_size_cycle"), LabelledAndUnlabelled()
    else:
        data, batch = DataLoader(PartialLabels(Images(24), range(0, 24, 4)), 6), None
    module = PlainModule()
    before = module.net[0].weight.detach().clone()
    run = trainer(ObjectiveTraining(objective(), batch=batch), max_epochs=2)
    run.fit(module, data)
    assert run.global_step == 8
    assert not torch.equal(before, module.net[0].weight)
    assert all(float(run.callback_metrics[f"train/{name}"]) > 0 for name in ("supervised", "regularizer", "knowledge"))
