"""The average of a network's weights against its recursion, and what it must share with the network: nothing."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_robust.sharpness import WeightAverage


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def step(net):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    net(torch.randn(8, 3))  # moves the statistics


def test_recursion():
    net = network()
    average = WeightAverage(net, decay=0.9)
    expected = {name: value.detach().clone() for name, value in net.state_dict().items()}
    for _ in range(5):
        step(net)
        average.update(net)
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.9 * expected[name] + 0.1 * value
            else:
                expected[name] = value.clone()
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert average.module[1].num_batches_tracked == 5
    assert not any(module.training for module in average.module.modules())
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_what_does_not_move_stays_bit_for_bit():
    net = network()
    average = WeightAverage(net)
    for _ in range(50):
        average.update(net)
    for name, value in net.state_dict().items():
        assert torch.equal(average.module.state_dict()[name], value)


def test_half_precision_is_averaged_in_float32():
    net = nn.Linear(2, 2).bfloat16()
    average = WeightAverage(net, decay=0.999)
    with torch.no_grad():
        net.weight.add_(1.0)
    start = average.state_dict()["weight"].clone()
    for _ in range(1000):
        average.update(net)
    expected = start + (1 - 0.999**1000) * (net.weight.float() - start)
    torch.testing.assert_close(average.state_dict()["weight"], expected, rtol=1e-4, atol=1e-5)
    assert average.module.weight.dtype == torch.bfloat16
    assert torch.equal(average.module.weight, average.state_dict()["weight"].bfloat16())
    again = WeightAverage(net)
    again.load_state_dict(average.state_dict())
    assert torch.equal(again.module.weight, average.module.weight)
    again.to("cpu")
    assert torch.equal(again.state_dict()["weight"], average.state_dict()["weight"])


def test_state_continues_exactly_and_is_a_copy(tmp_path):
    net = network()
    first, second = WeightAverage(net, decay=0.5), WeightAverage(network(), decay=0.5)
    step(net)
    first.update(net)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    second.to("cpu")
    step(net)
    first.update(net)
    second.update(net)
    x = torch.randn(5, 3)
    assert torch.equal(first.module(x), second.module(x))
    state = copy.deepcopy(second.state_dict())
    first.update(network())
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in state.items())


def test_shared_weights_are_one():
    net = network()
    net.append(net[3])
    average = WeightAverage(net, decay=0.5)
    assert average.module[4] is average.module[3]
    assert average.state_dict().keys() == WeightAverage(network()).state_dict().keys()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", ["function", "method", "wrapper", "inside", "bound"])
def test_compiled_and_replaced_forwards_are_left_behind(how):
    """A compiled function goes on calling the network that it was made from: a copy must not keep it."""
    net = plain = network()
    if how == "function":
        net.forward = torch.compile(net.forward, backend="eager")
    elif how == "method":
        net.compile(backend="eager")
    elif how == "wrapper":
        net = torch.compile(net, backend="eager")
    elif how == "inside":
        net[3].forward = torch.compile(net[3].forward, backend="eager")
    else:
        net.forward = types.MethodType(lambda self, x: nn.Sequential.forward(self, x), net)
    x = torch.randn(5, 3)
    net(torch.randn(8, 3))  # compiles
    average = WeightAverage(net, decay=1.0)
    before = average.module(x)
    step(plain)
    average.update(net)
    assert torch.equal(average.module(x), before)
    assert not torch.equal(plain.eval()(x), before)


def test_datasets_are_shared_and_the_rest_is_not():
    net = network()
    net.data = TensorDataset(torch.zeros(3))
    net.options = {"depth": [1]}
    average = WeightAverage(net)
    assert average.module.data is net.data
    assert average.module.options == net.options
    assert average.module.options["depth"] is not net.options["depth"]


def test_refused():
    net = network()
    with pytest.raises(ValueError, match="decay"):
        WeightAverage(net, decay=1.5)
    average = WeightAverage(net)
    with pytest.raises(ValueError, match=r"another network: 0.bias, 0.weight, 1.bias ... differ"):
        average.load_state_dict(WeightAverage(nn.Identity()).state_dict())
    net[0] = nn.Linear(5, 4)
    with pytest.raises(ValueError, match=r"another network: 0.weight differ"):
        average.load_state_dict(WeightAverage(net).state_dict())
    net.kept = net(torch.randn(8, 5))  # part of a graph
    with pytest.raises(TypeError, match="Sequential cannot be copied"):
        WeightAverage(net)
    WeightAverage(nn.Identity()).update(nn.Identity())


def test_a_part_may_be_left_out():
    net = network()
    net.add_module("guest", nn.Linear(2, 2))
    average = WeightAverage(net, without=net.guest)
    assert set(average.state_dict()) == {name for name in net.state_dict() if not name.startswith("guest")}
    assert net.guest.weight.requires_grad
    step(net)
    average.update(net)
