import pytest
import torch
from torch import nn

from lightning_robust.regularization import GOR, group_orthogonality


def naive(weight, groups, mode):
    """A loop over lists of filters."""
    filters = [row.flatten() for row in weight]
    size = len(filters) // groups
    if mode == "inter":
        sets = [filters[group * size : (group + 1) * size] for group in range(groups)]
    else:
        sets = [filters[position::size] for position in range(size)]
    total = 0.0
    for vectors in sets:
        matrix = torch.stack(vectors)
        rows = matrix.T if len(vectors) >= matrix.shape[1] else matrix
        for i, first in enumerate(rows):
            for j, second in enumerate(rows):
                total += (first.dot(second).item() - float(i == j)) ** 2
    return total


@pytest.mark.parametrize("mode", ["inter", "intra"])
@pytest.mark.parametrize(
    ("shape", "groups"), [((8, 2, 3, 3), 2), ((16, 3, 1, 1), 4), ((12, 5), 3), ((6, 4), 6), ((6, 4), 1)], ids=str
)
def test_equals_a_loop(shape, groups, mode):
    weight = torch.randn(shape, dtype=torch.float64)
    value = group_orthogonality(weight, groups=groups, mode=mode)
    assert value.item() == pytest.approx(naive(weight, groups, mode), rel=1e-10)
    check = torch.autograd.gradcheck
    assert check(lambda w: group_orthogonality(w, groups=groups, mode=mode), weight.requires_grad_())


def test_orthonormal_filters_cost_nothing():
    weight = torch.linalg.qr(torch.randn(16, 8, dtype=torch.float64)).Q.T.reshape(8, 4, 2, 2)
    for mode in ("inter", "intra"):
        assert group_orthogonality(weight, groups=2, mode=mode).item() == pytest.approx(0, abs=1e-24)


@pytest.mark.parametrize(
    ("filters", "groups"), [(8, 2), (64, 16), (128, 32), (1024, 32), (4, 1), (3, 0)], ids=lambda value: str(value)
)
def test_number_of_groups(filters, groups):
    assert GOR().groups_of(filters) == groups


def test_sums_over_convolutions():
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 16, 1), nn.Linear(4, 12))
    expected = naive(net[0].weight.detach(), 2, "inter") + naive(net[2].weight.detach(), 4, "inter")
    assert GOR(lam=0.5, num_groups=4)(net).item() == pytest.approx(0.5 * expected, rel=1e-5)
    head = naive(net[3].weight.detach(), 3, "intra")
    only = GOR(lam=1.0, linear=True, mode="intra", include="^3$")
    assert only(net).item() == pytest.approx(head, rel=1e-5)
    assert GOR().coefficient == 1e-2


def test_half_precision_weights_and_autocast_compute_in_float32():
    layer = nn.Conv2d(3, 8, 3)
    expected = GOR()(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(GOR()(layer), expected)
    penalty = GOR()(layer.bfloat16())
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, expected, rtol=0.02, atol=0)
    penalty.backward()
    assert layer.weight.grad.dtype == torch.bfloat16


def test_refuses_layers_that_cannot_be_grouped():
    net = nn.Sequential(nn.Conv2d(3, 18, 3), nn.Conv2d(18, 2, 3))
    with pytest.raises(
        ValueError, match=r"'0' has 18, which cannot be cut into 4 equal groups; leave it out with exclude=\"0\""
    ):
        GOR()(net)
    with pytest.raises(ValueError, match="'1' has 2, fewer than min_filters=4"):
        GOR(exclude="^0$")(net)
    assert GOR(min_filters=2, exclude="^1$")(net).item() > 0
    with pytest.raises(ValueError, match="'the layer' has 2, fewer"):
        GOR()(net[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "both"}, "Expected `mode` to be one of 'inter', 'intra' but got 'both'"),
        ({"num_groups": 0}, "Expected `num_groups` to be an integer >= 1 but got 0"),
        ({"min_filters": 0}, "Expected `min_filters` to be an integer >= 1 but got 0"),
        ({"lam": float("inf")}, "Expected `lam` to be a finite number but got inf"),
    ],
    ids=["mode", "groups", "filters", "lam"],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GOR(**arguments)


def test_the_function_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="Expected `groups` to divide the 6 filters but got 4"):
        group_orthogonality(torch.zeros(6, 2), groups=4)
