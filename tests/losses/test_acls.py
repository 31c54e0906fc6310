import pytest
import torch

from lightning_robust.losses import ACLS, acls_penalty


def random_logits():
    generator = torch.Generator().manual_seed(0)
    return (4 * torch.randn(6, 5, generator=generator, dtype=torch.float64)).requires_grad_()


def by_hand(row, margin, positive, negative):
    top = max(row)
    first = sum(max(0.0, z - margin) ** 2 for z in row if z == top)
    second = sum(max(0.0, top - z - margin) ** 2 for z in row if z != top) / (len(row) - 1)
    return positive * first + negative * second


@pytest.mark.parametrize("margin", [0.0, 2.0])
def test_equals_a_loop_over_samples_and_classes(margin):
    logits = random_logits()
    expected = [by_hand(row, margin, 1.5, 0.3) for row in logits.tolist()]
    ours = acls_penalty(logits, margin=margin, positive_weight=1.5, negative_weight=0.3)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))
    regularizer = ACLS(alpha=0.2, margin=margin, positive_weight=1.5, negative_weight=0.3)
    torch.testing.assert_close(regularizer(logits), 0.2 * ours.mean())


def test_the_gaps_send_no_gradient_to_the_largest_logit():
    logits = torch.tensor([[5.0, 0.0, 4.0]], dtype=torch.float64, requires_grad=True)
    acls_penalty(logits, margin=3.0, positive_weight=1.0, negative_weight=0.1).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[4.0, -0.2, 0.0]], dtype=torch.float64))


def test_at_a_tie_each_largest_logit_counts_and_one_of_them_gets_the_gradient():
    logits = torch.tensor([[5.0, 5.0, 0.0]], requires_grad=True)
    values = acls_penalty(logits, margin=3.0, negative_weight=0.0)
    values.sum().backward()
    assert values.tolist() == [8.0]
    assert sorted(logits.grad[0].tolist()) == [0.0, 0.0, 8.0]


def test_dense_logits_and_masked_samples():
    logits = 5 * torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    flat = acls_penalty(logits.movedim(1, -1).flatten(0, 1), margin=1.0).reshape(2, 3)
    torch.testing.assert_close(acls_penalty(logits, margin=1.0), flat)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    torch.testing.assert_close(ACLS(alpha=1.0, margin=1.0)(logits, mask), flat[mask].mean())


def test_many_classes_and_extreme_logits_in_float32():
    logits = (120 * torch.randn(3, 21_000, generator=torch.Generator().manual_seed(2)).sign()).requires_grad_()
    ACLS()(logits).backward()
    assert bool(logits.grad.isfinite().all())


def test_refusals():
    for name in ("margin", "positive_weight", "negative_weight"):
        with pytest.raises(ValueError, match=f"Expected `{name}` to be a finite number >= 0 but got -1"):
            ACLS(**{name: -1.0})
    with pytest.raises(ValueError, match="at least 2 classes"):
        acls_penalty(torch.zeros(3, 1))
