import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import (
    Criterion,
    StableMax,
    log_stablemax,
    stable_exp,
    stablemax,
    stablemax_cross_entropy,
)

LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


def random_logits(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (5 * torch.randn(6, 5, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


def naive(logits):
    """One number at a time."""
    s = torch.tensor([[x + 1 if x >= 0 else 1 / (1 - x) for x in row] for row in logits.tolist()], dtype=torch.float64)
    return s / s.sum(1, keepdim=True)


def test_probabilities_are_the_definition():
    logits = random_logits()
    torch.testing.assert_close(stablemax(logits), naive(logits), rtol=1e-12, atol=0)
    torch.testing.assert_close(log_stablemax(logits), naive(logits).log(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(stablemax(logits).sum(1), torch.ones(6, dtype=torch.float64))
    s = stable_exp(logits)
    torch.testing.assert_close(s / s.sum(1, keepdim=True), naive(logits), rtol=1e-12, atol=0)


def test_hard_and_soft_targets():
    logits = random_logits()
    p = naive(logits)
    expected = -p.gather(1, LABELS[:, None]).log().squeeze(1)
    torch.testing.assert_close(stablemax_cross_entropy(logits, LABELS, reduction="none"), expected)
    torch.testing.assert_close(stablemax_cross_entropy(logits, LABELS), expected.mean())
    soft = torch.rand(6, 5, dtype=torch.float64).softmax(1)
    torch.testing.assert_close(stablemax_cross_entropy(logits, soft), -(soft * p.log()).sum(1).mean())
    one_hot = F.one_hot(LABELS, 5).double()
    torch.testing.assert_close(stablemax_cross_entropy(logits, one_hot), expected.mean())


def test_options_are_those_of_the_cross_entropy():
    logits, weight = random_logits(), torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0], dtype=torch.float64)
    ignoring = torch.tensor([0, 7, 2, 2, 7, 3])
    scores = naive(logits).log()
    options = {"weight": weight, "ignore_index": 7, "label_smoothing": 0.1, "reduction": "sum"}
    torch.testing.assert_close(
        stablemax_cross_entropy(logits, ignoring, **options), F.cross_entropy(scores, ignoring, **options)
    )


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("special", [0.0, 1.0, -1.0, -0.0])
def test_derivative_at_the_joint_of_the_branches_and_at_one(special, double):
    logits = torch.tensor([[special, 0.5, -2.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(stablemax_cross_entropy(logits, torch.tensor([0]), double=double), logits)
    s = stable_exp(logits.detach())
    slope = torch.where(logits >= 0, torch.ones_like(s), s**2)  # of s; 1 at zero from both sides
    expected = slope / s.sum() - torch.tensor([[1.0, 0, 0]]) * slope / s
    torch.testing.assert_close(gradient, expected)
    exponential = torch.autograd.grad(stable_exp(logits).sum(), logits)[0]
    torch.testing.assert_close(exponential, slope)


def test_first_and_second_derivative():
    logits = random_logits()
    torch.autograd.gradcheck(lambda z: stablemax_cross_entropy(z, LABELS), logits)
    torch.autograd.gradgradcheck(lambda z: stablemax_cross_entropy(z, LABELS), logits)
    torch.autograd.gradcheck(stable_exp, logits)


@pytest.mark.parametrize("scale", [1e2, 1e8, 1e30])
def test_extreme_logits_stay_finite(scale):
    logits = (torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.99]]) * scale).requires_grad_()
    loss = stablemax_cross_entropy(logits, torch.tensor([1, 0]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    if scale < 1e9:
        torch.testing.assert_close(loss.double(), -naive(logits)[[0, 1], [1, 0]].log().mean(), rtol=1e-6, atol=0)


def test_double_precision_resolves_what_single_cannot():
    logits = torch.tensor([[1e9, 0.0]], requires_grad=True)  # the wrong class has a share of 1e-9
    single = stablemax_cross_entropy(logits, torch.tensor([0]), double=False)
    double = stablemax_cross_entropy(logits, torch.tensor([0]))
    assert single == 0
    assert double.dtype == torch.float32
    assert float(double.detach()) == pytest.approx(1e-9)


def test_half_precision_and_autocast():
    logits = random_logits(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = StableMax()(logits, LABELS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), stablemax_cross_entropy(logits.double(), LABELS))
    assert log_stablemax(logits).dtype == torch.float32


def test_dense_logits():
    logits, labels = torch.randn(2, 5, 3, dtype=torch.float64), torch.randint(5, (2, 3))
    rows = stablemax_cross_entropy(logits.movedim(1, 2).reshape(6, 5), labels.flatten(), reduction="none")
    torch.testing.assert_close(stablemax_cross_entropy(logits, labels, reduction="none").flatten(), rows)


def test_a_constant_matters_unlike_for_the_softmax():
    logits = random_logits()
    assert not torch.allclose(stablemax(logits), stablemax(logits + 1), atol=1e-3)


def test_module_passes_every_argument():
    weight = [0.5, 1.0, 2.0, 0.1, 3.0]
    options = {"double": False, "label_smoothing": 0.2, "ignore_index": 2, "reduction": "sum"}
    module = StableMax(weight=weight, **options)
    logits = random_logits(torch.float32)
    assert isinstance(module, Criterion)
    assert torch.equal(
        module(logits, LABELS), stablemax_cross_entropy(logits, LABELS, weight=torch.tensor(weight), **options)
    )
    assert not module.state_dict()
    assert repr(module) == "StableMax(double=False, label_smoothing=0.2, reduction='sum')"
    module.double()  # of every module


@pytest.mark.parametrize("name", ["label_smoothing", "reduction"])
def test_refusals(name):
    with pytest.raises(ValueError, match=f"Expected `{name}`"):
        StableMax(**{name: {"label_smoothing": 2.0}.get(name, "?")})
    with pytest.raises(ValueError, match=r"labels to be in \[0, 4\]"):
        StableMax()(random_logits(), LABELS + 1)
