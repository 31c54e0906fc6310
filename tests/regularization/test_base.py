import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_robust.losses import Linear
from lightning_robust.regularization import GOR, NamePatterns, NormLoss, WeightRegularizer, norm_loss


class Squares(WeightRegularizer):
    def penalty(self, weight):
        return weight.square().sum()


def network():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(12, 4))


def names(regularizer, net):
    return list(regularizer.layers(net))


def test_chooses_by_kind_and_name():
    net = network()
    assert names(Squares(coefficient=1.0), net) == ["0", "2"]
    assert names(Squares(coefficient=1.0, linear=True), net) == ["0", "2", "4"]
    assert names(Squares(coefficient=1.0, linear=True, include=["2", "4"]), net) == ["2", "4"]
    assert names(Squares(coefficient=1.0, linear=True, include=["2", "4"], exclude="4"), net) == ["2"]


def test_names_of_a_compiled_module_are_the_ordinary_ones():
    net = nn.Sequential(torch.compile(network(), backend="eager"), nn.ReLU())
    assert names(Squares(coefficient=1.0, include=r"^0\.2$"), net) == ["0.2"]
    assert names(Squares(coefficient=1.0), nn.Sequential(torch.compile(nn.Conv2d(1, 1, 1), backend="eager"))) == ["0"]


def test_frozen_weights_do_not_count():
    net = network()
    net[0].weight.requires_grad_(False)
    squares = Squares(coefficient=1.0)
    layers = squares.layers(net)
    torch.testing.assert_close(squares(net), net[2].weight.square().sum())
    net[2].weight.requires_grad_(False)
    assert squares(net).item() == 0
    net[0].weight.requires_grad_(True)  # thawed later
    torch.testing.assert_close(squares(squares.weights(layers)), net[0].weight.square().sum())


def test_a_shared_weight_counts_once():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    torch.testing.assert_close(Squares(coefficient=1.0, linear=True)(net), net[0].weight.square().sum())


def test_a_parametrised_weight_is_the_computed_one():
    layer = parametrizations.weight_norm(nn.Linear(3, 4))
    loss = NormLoss(lam=1.0)(layer)
    torch.testing.assert_close(loss, norm_loss(layer.weight))
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in layer.named_parameters() if name != "bias")


def test_float64_and_half_precision():
    net = network()
    single = NormLoss()(net)
    assert single.dtype == torch.float32
    assert NormLoss()(network().double()).dtype == torch.float64
    assert NormLoss()(network().half()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(NormLoss()(net), single)


def test_a_schedule_needs_the_epoch():
    squares = Squares(coefficient=Linear(start=0.0, end=1.0))
    with pytest.raises(RuntimeError, match=r"coefficient of Squares follows a schedule that was not told the epoch"):
        squares(network())
    squares.set_progress(1, 3)
    assert squares.coefficient == 0.5
    net = network()
    torch.testing.assert_close(squares(net), 0.5 * squares.total(net))


def test_finding_nothing_is_refused():
    with pytest.raises(ValueError, match=r"Squares found no weight in Linear to work on: .*\(linear=True adds"):
        Squares(coefficient=1.0)(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"NormLoss found no weight in Sequential .* \(include=\['x'\], exclude=\[\]\)"
    ):
        NormLoss(include="x")(network())


def test_patterns():
    assert "head.fc" not in NamePatterns(exclude=["stem", "head"])
    assert "blocks.fc" in NamePatterns(include="fc", exclude=["stem", "head"])
    with pytest.raises(ValueError, match=r"Expected `exclude` to hold regular expressions but got '\('"):
        NamePatterns(exclude="(")
    with pytest.raises(ValueError, match=r"Expected `include` to hold regular expressions but got '\['"):
        NormLoss(include=["a", "["])


def test_repr_names_the_arguments():
    assert repr(GOR(lam=0.5, exclude="stem")) == (
        "GOR(lam=Constant(value=0.5), linear=False, include=None, exclude=['stem'])"
    )
