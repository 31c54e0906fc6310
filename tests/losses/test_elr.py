import copy
import math

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import ELR, MixedTarget, elr_loss, elr_ramp, elr_update

LABELS = torch.tensor([0, 3, 2, 2, 1, 3])
FIRST, SECOND = torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([4, 3, 9, 8, 7, 5])


def random_logits(seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(6, 4, generator=generator, dtype=torch.float64)).requires_grad_()


def naive(logits, labels, index, memory, beta, lam):
    """Sample by sample; changes `memory`, a dictionary."""
    losses = []
    for z, y, i in zip(logits, labels.tolist(), index.tolist(), strict=True):
        p = z.softmax(0).clamp(1e-4, 1 - 1e-4)
        memory[i] = beta * memory.get(i, torch.zeros(4)) + (1 - beta) * p.detach() / p.detach().sum()
        losses.append(-z.log_softmax(0)[y] + lam * torch.log(1 - memory[i] @ p))
    return torch.stack(losses)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_equals_a_loop_over_samples_with_a_memory(scale):
    criterion, memory = ELR(beta=0.9, lam=7.0, num_samples=10, reduction="none"), {}
    for step, index in enumerate((FIRST, SECOND, FIRST)):
        logits = random_logits(step, scale)
        ours = criterion(logits, LABELS, index=index)
        reference = naive(logits, LABELS, index, memory, 0.9, 7.0)
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
        gradients = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, reference))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    for index, row in memory.items():
        torch.testing.assert_close(criterion.memory.rows[index], row)
    assert not bool(criterion.memory.rows[6].any())


def test_the_gradient_is_the_true_one_and_none_goes_to_the_memory():
    criterion = ELR(num_samples=6, reduction="none").eval()
    assert torch.autograd.gradcheck(
        lambda z: elr_loss(z, LABELS, torch.full((6, 4), 0.2, dtype=torch.float64), lam=3.0), random_logits(scale=1.0)
    )
    criterion.train()(random_logits(), LABELS, index=FIRST)
    assert not criterion.memory.rows.requires_grad


def test_the_second_term_pulls_towards_what_is_remembered_and_against_a_wrong_label():
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    remembered = torch.tensor([[0.0, 0.0, 0.9, 0.0]], dtype=torch.float64)
    gradients = {
        lam: torch.autograd.grad(elr_loss(logits, torch.tensor([0]), remembered, lam=lam).sum(), logits)[0][0]
        for lam in (0.0, 3.0)
    }
    assert gradients[3.0][2] < gradients[0.0][2]
    assert abs(gradients[3.0][0]) < abs(gradients[0.0][0])


def test_a_pass_that_does_not_count_sees_the_same_loss_and_leaves_the_memory_alone():
    criterion, other = (ELR(num_samples=10) for _ in range(2))
    for each in (criterion, other):
        each(random_logits(1), LABELS, index=FIRST)
    before = criterion.memory.rows.clone()
    criterion.counted(False)
    first = criterion(random_logits(2), LABELS, index=FIRST)
    assert torch.equal(criterion.memory.rows, before)
    torch.testing.assert_close(first, other(random_logits(2), LABELS, index=FIRST))


def test_two_processes_have_one_memory_after_an_epoch():
    whole, parts = ELR(num_samples=12), [ELR(num_samples=12) for _ in range(2)]
    for seed in (0, 1):
        logits, index = torch.cat([random_logits(seed), random_logits(9)]), torch.arange(12).flip(0)
        whole(logits, LABELS.repeat(2), index=index)
        for rank, part in enumerate(parts):
            rows = slice(rank, None, 2)
            part(logits[rows], LABELS.repeat(2)[rows], index=index[rows])
        merge(parts)
        for part in parts:
            torch.testing.assert_close(part.memory.rows, whole.memory.rows)


def merge(criteria):
    """`synchronise` of all, each sum over all of them, with the tables as they were before."""
    offered = []
    for criterion in criteria:
        mine = []
        copy.deepcopy(criterion).synchronise(lambda tensor, mine=mine: mine.append(tensor.clone()) or tensor)
        offered.append(mine)
    for criterion in criteria:
        # writers are asked for first; the rows, of all tables of this size at once, second
        sums = iter([sum(parts) for parts in zip(*offered, strict=True)])
        criterion.synchronise(lambda tensor, sums=sums: next(sums))


def test_class_weights_weigh_both_terms_and_mixtures_are_linear():
    remembered = torch.full((6, 4), 0.1, dtype=torch.float64)
    lam = torch.full((), 0.3, dtype=torch.float64)
    logits, mixed = random_logits(), MixedTarget(LABELS, LABELS.roll(1), lam)
    both = [elr_loss(logits, labels, remembered) for labels in (mixed.first, mixed.second)]
    torch.testing.assert_close(elr_loss(logits, mixed, remembered), lam * both[0] + (1 - lam) * both[1])
    weighted = ELR(weight=[0.0, 1.0, 1.0, 1.0], num_samples=6, reduction="none")
    losses = weighted(logits, LABELS, index=FIRST).detach()
    assert float(losses[0]) == 0.0
    assert bool(losses[1:].all())


def test_a_refined_target_is_the_product_with_the_memory():
    logits, soft = random_logits(), torch.rand(6, 4, dtype=torch.float64).softmax(1)
    remembered = 0.8 * random_logits(3).detach().softmax(1)
    product = soft * remembered
    reference = F.cross_entropy(logits, product / product.sum(1, keepdim=True), reduction="none")
    torch.testing.assert_close(elr_loss(logits, soft, remembered, lam=0.0, refine_target=True), reference)


def test_updates_of_the_two_variants():
    logits = torch.tensor([[100.0, 0.0]], dtype=torch.float64)
    zeros = torch.zeros(1, 2, dtype=torch.float64)
    torch.testing.assert_close(elr_update(zeros, logits, beta=0.0, clamp=False)[0, 0].item(), 1.0)
    torch.testing.assert_close(elr_update(zeros, logits, beta=0.0)[0].tolist(), [1 - 1e-4, 1e-4])


def test_the_ramp_ends_at_one_and_is_refused_below_zero():
    assert elr_ramp(0, 40) == pytest.approx(math.exp(-5))
    assert elr_ramp(10, 40) == pytest.approx(math.exp(-5 * 0.75**2))
    assert elr_ramp(40, 40) == elr_ramp(99, 40) == 1.0
    with pytest.raises(ValueError, match="`step` to be an integer >= 0"):
        elr_ramp(-1, 4)


def test_twenty_one_thousand_classes():
    criterion = ELR(num_samples=4)
    logits = torch.randn(4, 21_000, requires_grad=True)
    loss = criterion(logits, torch.arange(4), index=torch.arange(4))
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.5}, r"`beta` to be in \[0, 1\] but got 1.5"),
        ({"lam": -1.0}, "`lam` to be a finite number >= 0"),
        ({"num_samples": 0}, "`num_samples` to be an integer >= 1"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ELR(**options)


def test_what_has_no_row_is_refused():
    with pytest.raises(RuntimeError, match="number of training samples is not known"):
        ELR()(random_logits(), LABELS, index=FIRST)
    with pytest.raises(ValueError, match=r"ELR remembers one row per sample: expected `logits` \[B, C\]"):
        ELR(num_samples=6)(torch.zeros(2, 4, 3), torch.zeros(2, 3, dtype=torch.long), index=FIRST[:2])
    with pytest.raises(ValueError, match="belongs to 6 training samples, but there are 7 now"):
        ELR(num_samples=6).samples_known(7)
