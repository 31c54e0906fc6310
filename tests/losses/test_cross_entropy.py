import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import Criterion, CrossEntropy, cross_entropy

C = 5


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(6, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)


LABELS = torch.tensor([0, 4, 2, 2, 1, 3])
IGNORING = torch.tensor([0, -100, 2, 2, -100, 3])
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0], dtype=torch.float64)


def soft_targets() -> torch.Tensor:
    return torch.rand(6, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(1)


def same(ours: torch.Tensor, reference: torch.Tensor, logits: torch.Tensor) -> None:
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (ours, reference)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("target", [LABELS, IGNORING, soft_targets()], ids=["hard", "ignoring", "soft"])
def test_equals_torch(logits, target, smoothing, weight, reduction):
    ours = cross_entropy(logits, target, label_smoothing=smoothing, weight=weight, reduction=reduction)
    torchs = F.cross_entropy(logits, target, label_smoothing=smoothing, weight=weight, reduction=reduction)
    same(ours, torchs, logits)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_dense_logits_equal_torch(soft, reduction):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, C, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, C, (2, 3, 4), generator=generator)
    target[0, 0] = -100
    if soft:
        target = torch.randn(2, C, 3, 4, generator=generator, dtype=torch.float64).softmax(1)
    arguments = {"label_smoothing": 0.2, "weight": WEIGHT, "reduction": reduction}
    same(cross_entropy(logits, target, **arguments), F.cross_entropy(logits, target, **arguments), logits)


@pytest.mark.parametrize("smoothing", [-0.4, -0.1, 0.3])
def test_smoothing_is_the_logit_form(logits, smoothing):
    label_logit = logits.gather(1, LABELS[:, None]).squeeze(1)
    reference = F.cross_entropy(logits, LABELS) + smoothing * (label_logit - logits.mean(1)).mean()
    same(cross_entropy(logits, LABELS, label_smoothing=smoothing), reference, logits)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
def test_wrong_classes_only(logits, weight):
    target = torch.full((6, C), 0.3 / (C - 1), dtype=torch.float64).scatter(1, LABELS[:, None], 0.7)
    ours = cross_entropy(logits, LABELS, label_smoothing=0.3, off_value="k_minus_1", weight=weight, reduction="none")
    same(ours, F.cross_entropy(logits, target, weight=weight, reduction="none"), logits)


def test_smoothing_of_each_sample(logits):
    smoothing = torch.tensor([0.0, 0.1, -0.2, 0.3, 0.9, 0.5])
    ours = cross_entropy(logits, IGNORING, label_smoothing=smoothing, reduction="none")
    rows = [
        cross_entropy(logits[i : i + 1], IGNORING[i : i + 1], label_smoothing=float(smoothing[i])) for i in range(6)
    ]
    torch.testing.assert_close(ours, torch.stack(rows), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
def test_a_batch_without_labels_gives_zero(logits, weight):
    loss = cross_entropy(logits, torch.full((6,), -100), weight=weight, label_smoothing=0.1)
    assert loss == 0
    assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros_like(logits))


def test_another_ignored_label(logits):
    kept = LABELS != 2
    ours = cross_entropy(logits, LABELS, ignore_index=2)
    same(ours, F.cross_entropy(logits[kept], LABELS[kept]), logits)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_small_integer_labels(logits, dtype):
    same(cross_entropy(logits, LABELS.to(dtype)), F.cross_entropy(logits, LABELS), logits)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_extreme_logits_stay_finite_in_float32(smoothing):
    logits = torch.tensor([[120.0, -120.0, 0.0], [-120.0, 120.0, 119.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1, 0]), label_smoothing=smoothing)
    loss.backward()
    reference = cross_entropy(logits.detach().double(), torch.tensor([1, 0]), label_smoothing=smoothing)
    torch.testing.assert_close(loss.double(), reference, rtol=1e-6, atol=0)
    assert logits.grad.isfinite().all()


def test_half_precision_and_autocast_compute_in_float32():
    logits = torch.randn(4, C).bfloat16()
    reference = F.cross_entropy(logits.float(), LABELS[:4])
    with torch.autocast("cpu", torch.bfloat16):
        loss = CrossEntropy()(logits, LABELS[:4])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference)


def test_runs_on_the_meta_device():
    loss = cross_entropy(torch.empty(2, C, device="meta"), torch.empty(2, dtype=torch.long, device="meta"))
    assert loss.shape == ()


def test_second_derivative(logits):
    torch.autograd.gradgradcheck(lambda z: cross_entropy(z, LABELS, label_smoothing=0.1, weight=WEIGHT), logits)


def test_module_passes_every_argument(logits):
    module = CrossEntropy(
        label_smoothing=0.2, off_value="k_minus_1", weight=WEIGHT.tolist(), ignore_index=2, reduction="sum"
    ).double()
    function = cross_entropy(
        logits,
        LABELS,
        label_smoothing=0.2,
        off_value="k_minus_1",
        weight=WEIGHT.float().double(),
        ignore_index=2,
        reduction="sum",
    )
    assert isinstance(module, Criterion)
    assert torch.equal(module(logits, LABELS), function)
    assert not module.state_dict()
    assert repr(module) == "CrossEntropy(label_smoothing=0.2, off_value='k_minus_1', reduction='sum')"


@pytest.mark.parametrize("label", [5, -1, 17])
def test_refuses_a_label_out_of_range(logits, label):
    target = LABELS.clone()
    target[3] = label
    with pytest.raises(ValueError, match=rf"labels to be in \[0, 4\] for logits of 5 classes, .* but got {label}\."):
        cross_entropy(logits, target)


def test_other_runtime_errors_are_not_relabelled(logits):
    with pytest.raises(RuntimeError, match="device") as error:
        cross_entropy(logits, LABELS.to("meta"))
    assert not isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_smoothing": 1.1}, "`label_smoothing` to be a finite number <= 1 but got 1.1"),
        ({"label_smoothing": float("nan")}, "`label_smoothing` to be a finite number <= 1 but got nan"),
        ({"label_smoothing": torch.zeros(2)}, r"`label_smoothing` of shape \(6,\) but got \(2,\)"),
        ({"off_value": "all"}, "`off_value` to be one of 'k', 'k_minus_1' but got 'all'"),
        ({"reduction": "avg"}, "`reduction` to be one of 'mean', 'sum', 'none' but got 'avg'"),
        ({"weight": torch.ones(3)}, r"`weight` to have 5 entries but got shape \(3,\)"),
        ({"target": LABELS[:4]}, r"`target` to be class indices of shape \(6,\) or .* but got shape \(4,\)"),
        ({"target": torch.zeros(6, C, dtype=torch.long)}, r"but got shape \(6, 5\) and torch.int64"),
        ({"logits": torch.zeros(C)}, r"`logits` to be \[B, C\] or \[B, C, ...\] but got shape \(5,\)"),
        ({"logits": torch.zeros(6, 1), "off_value": "k_minus_1", "target": LABELS}, "at least 2 classes"),
    ],
)
def test_refusals(logits, arguments, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(**{"logits": logits, "target": LABELS} | arguments)


@pytest.mark.parametrize("name", ["label_smoothing", "off_value", "reduction"])
def test_the_module_refuses_at_construction(name):
    with pytest.raises(ValueError, match=f"Expected `{name}`"):
        CrossEntropy(**{name: {"label_smoothing": 2.0}.get(name, "?")})


def test_the_base_class_is_abstract(logits):
    with pytest.raises(NotImplementedError):
        Criterion()(logits, LABELS)


def test_classes_of_weight_zero_count_for_nothing(logits):
    weight = torch.ones(C)
    weight[LABELS.unique()] = 0.0
    logits = logits.detach().clone().requires_grad_()
    loss = cross_entropy(logits, LABELS, label_smoothing=0.1, weight=weight.to(logits.dtype))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))
