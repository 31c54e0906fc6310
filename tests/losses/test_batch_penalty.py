"""What the criteria with a calibration error of the whole batch have in common."""

import pytest
import torch
import torch.multiprocessing as mp

from lightning_robust.losses import MMCE, Brier, Criterion, CrossEntropy, LogitClip, SoftECE, cross_entropy
from support.ddp_calibrated import CRITERIA, data, gathered

LABELS = torch.tensor([0, 3, 1, 4, 2, 2])


def random_logits():
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)


class Hooked(Criterion):
    """A criterion with state that writes down what it is told."""

    needs = ("index",)
    needs_epoch = True
    needs_validation = True

    def __init__(self):
        super().__init__()
        self.told = []

    def forward(self, logits, target, *, index):
        self.told.append(("forward", index))
        return logits.sum()

    def samples_known(self, num_samples):
        self.told.append(("samples_known", num_samples))

    def epoch_starts(self, epoch, max_epochs):
        self.told.append(("epoch_starts", epoch, max_epochs))

    def epoch_ends(self, epoch, total):
        self.told.append(("epoch_ends", epoch))

    def observe(self, logits, target):
        self.told.append(("observe", logits))

    def validation_ends(self, total):
        self.told.append(("validation_ends",))


@pytest.mark.parametrize("kind", [MMCE, SoftECE])
def test_any_criterion_can_be_the_base(kind):
    logits = random_logits()
    penalty = kind(weight=3.0)(logits, LABELS) - cross_entropy(logits, LABELS)
    weight = [0.5, 1.0, 2.0, 3.0, 0.25]
    for base in (Brier(), CrossEntropy(label_smoothing=0.1, weight=weight), CrossEntropy(reduction="sum")):
        base = base.double()
        torch.testing.assert_close(kind(weight=3.0, base=base)(logits, LABELS), base(logits, LABELS) + penalty)


def test_the_ignored_label_of_the_base_is_ignored_in_the_penalty_too():
    logits = random_logits()
    labels = torch.where(LABELS == 2, 4, LABELS)
    ours = MMCE(base=Brier(ignore_index=4))(logits, labels)
    kept = labels != 4
    torch.testing.assert_close(ours, MMCE(base=Brier())(logits[kept], labels[kept]))
    wrapped = LogitClip(max_norm=100.0, base=Brier(ignore_index=4))
    torch.testing.assert_close(MMCE(base=wrapped)(logits, labels), ours)
    torch.testing.assert_close(MMCE(ignore_index=4)(logits, labels), MMCE()(logits[kept], labels[kept]))


def test_what_the_base_needs_is_asked_for_and_passed_on():
    base = Hooked()
    criterion = SoftECE(base=base)
    assert criterion.needs == ("index",)
    assert criterion.needs_epoch
    assert criterion.needs_validation
    assert criterion.batch_level
    index, logits = torch.arange(6), random_logits()
    criterion.samples_known(10)
    criterion.epoch_starts(1, 3)
    criterion(logits, LABELS, index=index)
    criterion.epoch_ends(1, lambda tensor: tensor)
    criterion.observe(logits, LABELS)
    criterion.validation_ends(lambda tensor: tensor)
    assert base.told == [
        ("samples_known", 10),
        ("epoch_starts", 1, 3),
        ("forward", index),
        ("epoch_ends", 1),
        ("observe", logits),
        ("validation_ends",),
    ]
    criterion.counted(False)
    assert not base.recording


def test_without_a_base_hooks_do_nothing_and_nothing_is_needed():
    criterion = MMCE()
    before = criterion(random_logits(), LABELS)
    criterion.samples_known(10)
    criterion.epoch_starts(1, 3)
    criterion.epoch_ends(1, lambda tensor: tensor)
    criterion.observe(random_logits(), LABELS)
    criterion.validation_ends(lambda tensor: tensor)
    assert torch.equal(criterion(random_logits(), LABELS), before)
    assert (criterion.needs, criterion.needs_epoch, criterion.needs_validation) == ((), False, False)
    with pytest.raises(TypeError, match="MMCE needs nothing beside logits and target but was given index"):
        criterion(random_logits(), LABELS, index=torch.arange(6))


def test_a_base_without_reduction_is_refused():
    with pytest.raises(ValueError, match='Expected `base` to give a scalar but got reduction="none"'):
        MMCE(base=CrossEntropy(reduction="none"))


@pytest.mark.parametrize("kind", [MMCE, SoftECE])
def test_to_gather_in_one_process_changes_nothing(kind):
    torch.testing.assert_close(kind(gather=True)(random_logits(), LABELS), kind()(random_logits(), LABELS))


@pytest.mark.parametrize("name", CRITERIA)
def test_the_penalty_is_one_graph_under_compile(name):
    torch._dynamo.reset()
    criterion, logits = CRITERIA[name], random_logits()
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)(logits, LABELS)
    expected = criterion(logits, LABELS)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (compiled, expected)))


@pytest.mark.slow
def test_two_processes_take_the_gradient_of_their_common_batch(tmp_path):
    mp.start_processes(gathered, (str(tmp_path / "store"), str(tmp_path / "rank")), nprocs=2, start_method="spawn")
    found = [torch.load(tmp_path / f"rank{rank}") for rank in (0, 1)]
    logits, labels = data()
    for name, criterion in CRITERIA.items():
        # each process: the cross-entropy of its half and the penalty of the whole; the mean of both is the loss of DDP
        leaf = logits.clone().requires_grad_()
        penalty = criterion(leaf, labels) - cross_entropy(leaf, labels)
        own = [cross_entropy(part, y) for part, y in zip(leaf.split(6), labels.split(6), strict=True)]
        for rank in (0, 1):
            torch.testing.assert_close(found[rank][name][0], own[rank] + penalty)
        (expected,) = torch.autograd.grad((own[0] + own[1]) / 2 + penalty, leaf)
        gradients = torch.cat([found[rank][name][1] for rank in (0, 1)])
        torch.testing.assert_close(gradients / 2, expected)
        for rank in (0, 1):  # no exchange without gradients: the numbers of samples may differ
            torch.testing.assert_close(found[rank][name][2], criterion(logits[rank:], labels[rank:]))
