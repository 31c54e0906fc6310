"""An attack leaves the model, its gradients and modes, and the global generators as they were."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_robust.attacks import PGD
from support.attacked import CountingNet, differences, images, snapshot


@pytest.fixture
def net():
    net = CountingNet(dropout=0.3)
    net.train()
    net.norm.eval()  # a user froze this layer
    net.head.bias.requires_grad_(False)
    x, y = images()
    nn.functional.cross_entropy(net(x), y).backward()
    net.norm.train()
    net.norm.weight.requires_grad_(False)
    return net


def test_train_mode_moves_running_statistics_only(net):
    before = snapshot(net)
    x, y = images()
    PGD(steps=4, mode="train")(net, x, y)
    assert {key.split()[1] for key in differences(net, before)} == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    counted = net.norm.num_batches_tracked - before["value norm.num_batches_tracked"]
    assert int(counted) == 4


@pytest.mark.parametrize(
    ("options", "updates"), [({"evaluate_result": True}, 5), ({"restarts": 2}, 10), ({"loss": "kl"}, 5)]
)
def test_further_forwards_count_in_train_mode(net, options, updates):
    before = int(net.norm.num_batches_tracked)
    PGD(steps=4, mode="train", **options)(net, *images())
    assert int(net.norm.num_batches_tracked) - before == updates


def test_train_mode_respects_a_frozen_layer(net):
    net.norm.eval()
    before = snapshot(net)
    PGD(steps=4, mode="train")(net, *images())
    assert differences(net, before) == []


@pytest.mark.parametrize("mode", ["eval", "train", "train-frozen-stats"])
def test_mode_decides_what_the_model_does(mode, net):
    seen = []
    net.dropout.register_forward_hook(
        lambda module, inputs, output: seen.append((module.training, (output == 0).any()))
    )
    PGD(steps=2, mode=mode)(net, *images())
    assert [training for training, _ in seen] == [mode != "eval"] * 2
    assert [bool(dropped) for _, dropped in seen] == [mode != "eval"] * 2


def test_dropout_draws_differ_from_those_of_the_next_forward(net):
    masks = []
    net.dropout.register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    x, y = images()
    PGD(steps=2, mode="train-frozen-stats")(net, x, y)
    net(x)
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])


def test_dropout_draws_follow_the_attacks_generator(net):
    x, y = images()
    attack = PGD(steps=3, mode="train-frozen-stats")
    first = attack(net, x, y, generator=torch.Generator().manual_seed(1))
    torch.rand(7)
    again = attack(net, x, y, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, again)


@pytest.mark.parametrize("mode", ["eval", "train", "train-frozen-stats"])
def test_everything_is_restored_after_an_exception(mode, net):
    calls = []

    def fail(module, inputs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    net.head.register_forward_pre_hook(fail)
    before, state = snapshot(net), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        PGD(steps=4, mode=mode)(net, *images())
    ignore = ("running", "batches_tracked") if mode == "train" else ()
    assert differences(net, before, ignore) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_no_parameter_gradient_is_computed(net):
    seen = []
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient, name=name: seen.append(name))
    PGD(steps=2)(net, *images())
    assert seen == []


def test_a_callable_names_its_module(net):
    class Function:
        module = net

        def __call__(self, x):
            modes.append(net.norm.training)
            return net(x)

    modes = []
    x, y = images()
    attack = PGD(steps=2, random_start=False)
    attacked = attack(Function(), x, y)
    assert modes == [False, False]
    assert torch.equal(attacked, attack(net, x, y))
    assert net.norm.training


def test_a_plain_callable_works(net):
    net.eval()
    x, y = images()
    attack = PGD(steps=2, random_start=False)
    assert torch.equal(attack(lambda z: net(z), x, y), attack(net, x, y))


def test_own_generator_gives_new_draws_and_is_seeded(net):
    x, y = images()
    attack, twin, other = (PGD(steps=1, step_size=0.01, seed=seed) for seed in (0, 0, 1))
    first, second = attack(net, x, y), attack(net, x, y)
    assert not torch.equal(first, second)
    assert torch.equal(first, twin(net, x, y))
    assert not torch.equal(first, other(net, x, y))
    assert torch.equal(second, twin(net, x, y))


def test_copies_and_pickles_start_from_the_seed(net):
    x, y = images()
    attack = PGD(steps=1, step_size=0.01)
    first = attack(net, x, y)
    for twin in (copy.deepcopy(attack), pickle.loads(pickle.dumps(attack))):
        assert repr(twin) == repr(attack)
        assert torch.equal(twin(net, x, y), first)
