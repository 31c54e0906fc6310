import pytest
import torch

from lightning_robust.regularization import mixout


def draw(shape=(4, 6)):
    weight, target = torch.randn(2, *shape, dtype=torch.float64)
    return weight, target, (torch.rand(shape[-1]) < 0.5).double()


@pytest.mark.parametrize("grad", ["reference", "true"])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.7])
def test_equals_the_definition(p, grad):
    weight, target, keep = draw()
    out = mixout(weight, target, keep, p=p, grad=grad)
    torch.testing.assert_close(out, (keep * weight + (1 - keep) * target - p * target) / (1 - p))


def test_the_mean_is_the_weight():
    weight, target, _ = draw()
    p = 0.7
    expected = p * mixout(weight, target, torch.zeros(6), p=p) + (1 - p) * mixout(weight, target, torch.ones(6), p=p)
    torch.testing.assert_close(expected, weight)


def test_the_two_derivatives():
    weight, target, keep = draw()
    weight.requires_grad_()
    for grad, factor in {"reference": 1.0, "true": 1 / 0.4}.items():
        (gradient,) = torch.autograd.grad(mixout(weight, target, keep, p=0.6, grad=grad).sum(), weight)
        torch.testing.assert_close(gradient, (factor * keep).expand(4, 6))
    assert torch.autograd.gradcheck(lambda w: mixout(w, target, keep, p=0.6, grad="true"), weight)


def test_both_have_the_same_value_to_the_last_bit():
    weight, target, keep = (tensor.float() for tensor in draw())
    pair = [mixout(weight, target, keep, p=0.7, grad=grad) for grad in ("reference", "true")]
    assert torch.equal(*pair)


def test_what_is_replaced_is_the_target_to_the_last_bit():
    weight, target, keep = (tensor.float() for tensor in draw())
    out = mixout(weight, target, keep.bool(), p=0.7)
    assert torch.equal(out[:, keep == 0], target[:, keep == 0])


def test_certain_replacement():
    weight, target, keep = draw()
    out = mixout(weight.requires_grad_(), target, keep, p=1.0)
    assert torch.equal(out, target)
    assert torch.equal(torch.autograd.grad(out.sum(), weight)[0], torch.zeros(4, 6, dtype=torch.float64))


def test_dropout_is_the_case_of_a_zero_target():
    weight, _, keep = draw()
    torch.testing.assert_close(mixout(weight, torch.zeros(4, 6), keep, p=0.5), 2 * keep * weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": 1.1}, r"Expected `p` to be in \[0.0, 1.0\] but got 1.1"),
        ({"grad": "none"}, "Expected `grad` to be one of 'reference', 'true' but got 'none'"),
    ],
    ids=["p", "grad"],
)
def test_refuses_arguments(change, message):
    weight, target, keep = draw()
    with pytest.raises(ValueError, match=message):
        mixout(weight, target, keep, **change)


def test_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"Expected `target` of shape \(2, 3\) but got \(3,\)"):
        mixout(torch.zeros(2, 3), torch.zeros(3), torch.ones(3))
