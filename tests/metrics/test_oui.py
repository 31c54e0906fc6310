"""The activation indicator against a loop over pairs, layers and units."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_robust.metrics import ActivationPatterns, draw_pairs, oui


def naive(patterns, pairs):
    values = []
    for first, second in pairs.tolist():
        for bits in patterns:
            limit = bits[0].numel() // 2
            differing = sum(
                bool(a) != bool(b) for a, b in zip(bits[first].flatten(), bits[second].flatten(), strict=True)
            )
            values.append(min(differing, limit) / limit)
    return sum(values) / len(values)


def test_loop():
    generator = torch.Generator().manual_seed(0)
    patterns = [torch.rand(9, *shape, generator=generator) > 0.3 for shape in ((7,), (3, 2, 2), (40,))]
    pairs = draw_pairs(9, 20, seed=3)
    assert oui(patterns, pairs).item() == pytest.approx(naive(patterns, pairs))
    assert oui([*patterns, torch.ones(9, 1, dtype=torch.bool)], pairs) == oui(patterns, pairs)  # a single unit


def test_pairs_are_distinct_and_reproducible():
    for rows, count in ((2, 28), (7, 28), (8, 28), (64, 28), (9, 5)):
        pairs = draw_pairs(rows, count, seed=1)
        assert torch.equal(pairs, draw_pairs(rows, count, seed=1))
        assert len(pairs) == min(count, rows * (rows - 1) // 2)
        assert len({frozenset(pair) for pair in pairs.tolist()}) == len(pairs)
        assert pairs.min() >= 0
        assert pairs.max() < rows
        assert (pairs[:, 0] < pairs[:, 1]).all()
    assert {tuple(pair) for pair in draw_pairs(5).tolist()} == {(i, j) for i in range(5) for j in range(i + 1, 5)}
    assert not torch.equal(draw_pairs(64, seed=0), draw_pairs(64, seed=1))


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 5), nn.SiLU()), nn.Tanh())


def test_patterns_of_chosen_rows():
    net, x = network(), torch.randn(8, 4)
    with ActivationPatterns(net) as patterns:
        net(x)
        assert patterns.take() == {}  # nothing was asked for
        patterns.rows = torch.tensor([5, 0, 5])
        net(x)
        found = patterns.take()
        assert list(found) == patterns.names == ["1", "2.1"]
        hidden = net[0](x).relu()
        assert torch.equal(found["1"], hidden[[5, 0, 5]] > 0)
        assert torch.equal(found["2.1"], nn.functional.silu(net[2][0](hidden))[[5, 0, 5]] > 0)
        assert patterns.take() == {}
        patterns.least = 9
        net(x)
        assert patterns.take() == {}
    patterns.least = 0
    net(x)
    assert patterns.take() == {}


def test_the_last_call_of_a_layer_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, x):
            return self.act(-self.act(x.clone()) + 0.5)

    net, x = Twice(), torch.randn(3, 4)
    with ActivationPatterns(net) as patterns:
        patterns.rows = slice(None)
        net(x)
        assert torch.equal(patterns.take()["act"], 0.5 - x.relu() > 0)


@pytest.mark.parametrize(
    ("layers", "found"), [(["3"], ["3"]), (["Tanh"], ["3"]), (["2.*"], ["2.0", "2.1"]), (None, ["1", "2.1"])]
)
def test_named_layers(layers, found):
    assert ActivationPatterns(network(), layers).names == found


def test_copies_do_not_carry_the_hooks():
    net = network()
    with ActivationPatterns(net) as patterns:
        patterns.rows = slice(None)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            twin(torch.randn(3, 4))
        assert patterns.take() == {}


def test_refusals():
    with pytest.raises(ValueError, match="no ReLU, SiLU or GELU module; activations that are called as functions"):
        ActivationPatterns(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(
        ValueError, match="layers='relu' names no sub-module and no class of one in Sequential; it has 0"
    ):
        ActivationPatterns(network(), ["relu"])
    with pytest.raises(
        ValueError, match="one layer of two or more units and one pair of samples but got 0 layers and 1"
    ):
        oui([torch.ones(2, 1, dtype=torch.bool)], torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="`rows` to be an integer >= 2"):
        draw_pairs(1)
