import copy

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import OnlineLabelSmoothing

LABELS = torch.tensor([0, 1, 2, 2, 1, 0])


def random_logits(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(6, 4, generator=generator, dtype=torch.float64)).requires_grad_()


def one(tensor):
    return tensor


def learned(batches, classes=4):
    """Mean prediction of the correct samples of each class, `None` without one."""
    by_class = [[] for _ in range(classes)]
    for logits, labels in batches:
        for p, y in zip(logits.detach().softmax(1), labels.tolist(), strict=True):
            if y >= 0 and int(p.argmax()) == y:
                by_class[y].append(p)
    return [torch.stack(rows).mean(0) if rows else None for rows in by_class]


def test_the_first_epoch_is_label_smoothing_on_the_soft_share():
    logits = random_logits()
    ours = OnlineLabelSmoothing(num_classes=4, alpha=0.3, smoothing=0.2).double()(logits, LABELS)
    smoothed = F.one_hot(LABELS, 4).double() * (0.8 - 0.2 / 3) + 0.2 / 3
    reference = 0.3 * F.cross_entropy(logits, LABELS) + 0.7 * F.cross_entropy(logits, smoothed)
    torch.testing.assert_close(ours, reference, rtol=1e-7, atol=0)


@pytest.mark.parametrize("keep_empty", [True, False])
def test_an_epoch_leaves_the_mean_prediction_of_the_correct_samples(keep_empty):
    criterion = OnlineLabelSmoothing(num_classes=4, keep_empty=keep_empty).double()
    first = criterion.soft_labels.clone()
    batches = [(random_logits(seed), LABELS) for seed in range(3)]
    for logits, labels in batches:
        criterion(logits, labels)
        assert torch.equal(criterion.soft_labels, first)
    criterion.epoch_ends(0, one)
    expected = learned(batches)
    assert expected[3] is None  # no sample has this label
    for k, row in enumerate(expected):
        empty = first[k] if keep_empty else torch.zeros(4, dtype=torch.float64)
        torch.testing.assert_close(criterion.soft_labels[k], empty if row is None else row)
    assert not bool(criterion.sums.any())
    assert not bool(criterion.counts.any())
    logits = random_logits(7)
    reference = 0.5 * F.cross_entropy(logits, LABELS) + 0.5 * F.cross_entropy(logits, criterion.soft_labels[LABELS])
    torch.testing.assert_close(criterion(logits, LABELS), reference)


def test_ignored_samples_teach_nothing():
    criterion, other = (OnlineLabelSmoothing(num_classes=4).double() for _ in range(2))
    ignoring = LABELS.where(LABELS != 0, -100)
    logits = random_logits()
    criterion(logits, ignoring)
    other(logits[LABELS != 0], LABELS[LABELS != 0])
    torch.testing.assert_close(criterion.sums, other.sums)
    torch.testing.assert_close(criterion.counts, other.counts)


def test_pixels_are_samples():
    criterion, flat = (OnlineLabelSmoothing(num_classes=4).double() for _ in range(2))
    pixels = torch.stack([random_logits(seed).detach() for seed in range(3)], 2)
    labels = torch.stack([LABELS, LABELS.roll(1), LABELS.roll(2)], 1)
    rows = pixels.movedim(1, -1).reshape(-1, 4)
    torch.testing.assert_close(criterion(pixels, labels), flat(rows, labels.flatten()))
    torch.testing.assert_close(criterion.sums, flat.sums)


def test_the_gradient_is_the_true_one():
    criterion = OnlineLabelSmoothing(num_classes=4, reduction="none").double().eval()
    assert torch.autograd.gradcheck(lambda z: criterion(z, LABELS), random_logits())


def test_two_processes_end_an_epoch_as_one_does_and_a_checkpoint_in_its_middle_changes_nothing():
    whole, parts = OnlineLabelSmoothing(num_classes=4), [OnlineLabelSmoothing(num_classes=4) for _ in range(2)]
    for seed in range(3):
        logits = random_logits(seed)
        whole(logits, LABELS)
        for rank, part in enumerate(parts):
            part(logits[rank::2], LABELS[rank::2])
        if seed == 1:
            together(parts, lambda part, total: part.synchronise(total))
            saved = copy.deepcopy(parts[0].state_dict())  # the first process writes the file, for both
            parts = [OnlineLabelSmoothing(num_classes=4) for _ in range(2)]
            for part in parts:
                part.load_state_dict(saved)
    whole.epoch_ends(0, one)
    together(parts, lambda part, total: part.epoch_ends(0, total))
    for part in parts:
        torch.testing.assert_close(part.soft_labels, whole.soft_labels)


def together(criteria, call):
    """A call that every process makes at once, with sums over all of them."""
    offered = []
    for criterion in criteria:
        mine = []
        call(copy.deepcopy(criterion), lambda tensor, mine=mine: mine.append(tensor.clone()) or tensor)
        offered.append(mine)
    sums = [sum(parts) for parts in zip(*offered, strict=True)]
    for criterion in criteria:
        left = iter(sums)
        call(criterion, lambda tensor, left=left: next(left))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "`num_classes` to be an integer >= 2"),
        ({"num_classes": 3, "alpha": 1.5}, r"`alpha` to be in \[0, 1\]"),
        ({"num_classes": 3, "smoothing": -0.1}, r"`smoothing` to be in \[0, 1\]"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OnlineLabelSmoothing(**options)


def test_another_number_of_classes_and_soft_targets_are_refused():
    criterion = OnlineLabelSmoothing(num_classes=3)
    with pytest.raises(ValueError, match=r"logits of 3 classes \(`num_classes`\) but got 4"):
        criterion(random_logits(), LABELS)
    with pytest.raises(ValueError, match="OnlineLabelSmoothing needs class indices"):
        criterion(torch.zeros(2, 3), torch.full((2, 3), 1 / 3))
