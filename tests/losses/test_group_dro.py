import math

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import ELR, Focal, GroupDRO, LogitClip, MixedTarget, group_weights

LABELS = torch.tensor([0, 3, 2, 2, 1, 3])
GROUPS = torch.tensor([0, 2, 2, 0, 0, 2])  # group 1 is missing


def random_logits(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(6, 4, generator=generator, dtype=torch.float64)).requires_grad_()


def naive(losses, groups, q, shifts, step_size, normalize):
    """Loss, and the weights of the groups after the step."""
    means = []
    for g in range(len(q)):
        own = losses[groups == g]
        means.append((own.mean() if len(own) else losses.sum() * 0) + shifts[g])
    means = torch.stack(means)
    move = means.detach() / means.detach().sum() if normalize else means.detach()
    q = q * torch.exp(step_size * move)
    q = q / q.sum()
    return (q * means).sum(), q


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("adjustment", [None, 2.0, [0.0, 1.0, 3.0]], ids=["none", "one", "each"])
def test_equals_a_loop_over_groups(adjustment, normalize):
    options = {} if adjustment is None else {"adjustment": adjustment, "group_counts": [50, 30, 20]}
    criterion = GroupDRO(num_groups=3, step_size=0.3, normalize=normalize, **options).double()
    each = adjustment if isinstance(adjustment, list) else [adjustment or 0.0] * 3
    shifts = [c / math.sqrt(n) for c, n in zip(each, [50, 30, 20], strict=True)]
    q = torch.full((3,), 1 / 3, dtype=torch.float64)
    for seed in range(3):
        logits = random_logits(seed)
        losses = F.cross_entropy(logits, LABELS, reduction="none")
        reference, q = naive(losses, GROUPS, q, shifts, 0.3, normalize)
        ours = criterion(logits, LABELS, group=GROUPS)
        torch.testing.assert_close(ours, reference, rtol=1e-7, atol=0)
        torch.testing.assert_close(criterion.q, q, rtol=1e-7, atol=0)
        gradients = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, reference))
        torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-12)


def test_the_worst_group_gains_weight_and_extreme_losses_stay_finite():
    weights = group_weights(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 4.0]), step_size=0.1)
    assert float(weights[1]) > 0.5
    weights = group_weights(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 4000.0]), step_size=1.0)
    assert weights.tolist() == [0.0, 1.0]
    assert group_weights(weights, torch.tensor([0.0, 9.0])).tolist() == [0.0, 1.0]


def test_ignored_samples_belong_to_no_group():
    ignoring = LABELS.where(torch.tensor([True, False, True, True, False, True]), -100)
    kept = ignoring != -100
    criterion, other = (GroupDRO(num_groups=3).double() for _ in range(2))
    loss = criterion(random_logits(), ignoring, group=GROUPS)
    torch.testing.assert_close(loss, other(random_logits()[kept], LABELS[kept], group=GROUPS[kept]))
    torch.testing.assert_close(criterion.q, other.q)
    logits = random_logits()
    loss = criterion(logits, torch.full_like(LABELS, -100), group=GROUPS)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0.0
    assert not bool(gradient.any())


def test_class_weights_make_weighted_means_as_in_torch():
    weight = [1.0, 0.5, 2.0, 3.0]
    criterion = GroupDRO(num_groups=3, step_size=0.0, base=Focal(gamma=0.0, weight=weight)).double()
    logits = random_logits()
    means = [
        F.cross_entropy(logits[g == GROUPS], LABELS[g == GROUPS], weight=torch.tensor(weight, dtype=torch.float64))
        for g in (0, 2)
    ]
    torch.testing.assert_close(criterion(logits, LABELS, group=GROUPS), sum(means) / 3, rtol=1e-7, atol=0)


def test_soft_and_mixed_targets():
    mixed = MixedTarget(LABELS, LABELS.roll(1), torch.linspace(0, 1, 6, dtype=torch.float64))
    values = [
        GroupDRO(num_groups=3)(random_logits(), target, group=GROUPS)
        for target in (mixed, mixed.probabilities(4, torch.float64))
    ]
    torch.testing.assert_close(*values)


def test_pixels_have_the_group_of_their_image():
    pixels = torch.stack([random_logits(seed).detach() for seed in range(2)], 2)
    labels = torch.stack([LABELS, LABELS.roll(1)], 1)
    flat = pixels.movedim(1, -1).reshape(-1, 4), labels.flatten()
    expected = GroupDRO(num_groups=3)(*flat, group=GROUPS.repeat_interleave(2))
    torch.testing.assert_close(GroupDRO(num_groups=3)(pixels, labels, group=GROUPS), expected)


def test_passes_that_do_not_count_use_the_weights_as_they_are():
    criterion = GroupDRO(num_groups=3, step_size=1.0).double()
    criterion(random_logits(1), LABELS, group=GROUPS)
    q = criterion.q.clone()
    losses = F.cross_entropy(random_logits(), LABELS, reduction="none")
    expected = q[0] * losses[GROUPS == 0].mean() + q[2] * losses[GROUPS == 2].mean()
    criterion.counted(False)
    torch.testing.assert_close(criterion(random_logits(), LABELS, group=GROUPS), expected)
    criterion.counted(True)
    torch.testing.assert_close(criterion.eval()(random_logits(), LABELS, group=GROUPS), expected)
    assert torch.equal(criterion.q, q)


def test_the_losses_of_two_batches_share_a_backward():
    criterion, logits = GroupDRO(num_groups=3).double(), random_logits()
    both = criterion(logits, LABELS, group=GROUPS) + criterion(2 * logits, LABELS, group=GROUPS)
    criterion.counted(False)
    both = both + criterion(3 * logits, LABELS, group=GROUPS)
    criterion.counted(True)
    criterion(logits, LABELS, group=GROUPS)
    (gradient,) = torch.autograd.grad(both, logits)
    assert bool(gradient.any())


def test_bases_that_remember_and_wrappers_around():
    criterion = GroupDRO(num_groups=3, base=ELR())
    assert criterion.needs == ("group", "index")
    criterion.samples_known(6)
    loss = LogitClip(base=criterion)(random_logits(), LABELS, group=GROUPS, index=torch.arange(6))
    assert bool(loss.isfinite())
    assert bool(criterion.base.memory.rows.any())
    with pytest.raises(TypeError, match="index is missing"):
        criterion(random_logits(), LABELS, group=GROUPS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 0}, "`num_groups` to be an integer >= 1"),
        ({"num_groups": 2, "step_size": -1.0}, "`step_size` to be a finite number >= 0"),
        ({"num_groups": 2, "adjustment": 1.0}, "`group_counts` with 2 entries for `adjustment` but got None"),
        ({"num_groups": 2, "adjustment": [1.0], "group_counts": [3, 4]}, "`adjustment` to have 2 entries but got 1"),
        ({"num_groups": 2, "adjustment": -1.0, "group_counts": [3, 4]}, "`adjustment` to be a finite number >= 0"),
        ({"num_groups": 2, "adjustment": 1.0, "group_counts": [3, 0]}, "`group_counts` to be an integer >= 1"),
        ({"num_groups": 2, "base": LogitClip()}, "LogitClip gives one of the whole batch"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GroupDRO(**options)


def test_groups_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"groups from 0 to 1 \(`num_groups` = 2\) but got 2"):
        GroupDRO(num_groups=2)(random_logits(), LABELS, group=GROUPS)
    with pytest.raises(ValueError, match=r"`group` of shape \[6\] but got \(3,\)"):
        GroupDRO(num_groups=3)(random_logits(), LABELS, group=GROUPS[:3])
    with pytest.raises(TypeError, match="group is missing"):
        GroupDRO(num_groups=3)(random_logits(), LABELS)
