"""Two-process DDP: both ranks agree, and equal a loop that averages the ranks' own gradients."""

import pytest
import torch

from support.ddp_matrix import CASES, WORLD, build
from support.modules import Images, PlainModule
from support.ranks import launch
from support.reference import METHODS, SEED, train

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ddp")]  # one launch serves all of them


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """Weights of every case and rank, from one launch."""
    folder = tmp_path_factory.mktemp("ddp")
    launch("-m", "support.ddp_matrix", str(folder))
    return {
        name: [torch.load(folder / f"{name}_{rank}.pt", weights_only=True) for rank in range(WORLD)] for name in CASES
    }


def rank_batches():
    """What each rank's loader yields: every other sample, three at a time."""
    data = Images()
    epoch = []
    for rank in range(WORLD):
        x, y = data.x[rank::WORLD], data.y[rank::WORLD]
        epoch.append(list(zip(x.split(3), y.split(3), strict=True)))
    return [epoch, epoch]


def whole_batches():
    """The same as one process sees them."""
    return [
        [[(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in zip(*epoch, strict=True)]]
        for epoch in rank_batches()
    ]


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree(states, name, cell):
    if CASES[name].get("method") in METHODS:
        cell(CASES[name]["method"], "DDP")
    first, second = states[name]
    for key, value in first.items():
        if not key.startswith("train_acc") and "running" not in key:  # BatchNorm statistics are the ranks' own in DDP
            assert torch.equal(value, second[key]), key


COMPARED = [name for name, case in CASES.items() if "method" in case and not {"module", "norm"} & set(case)]


@pytest.mark.parametrize("name", COMPARED)
def test_equals_the_mean_of_the_ranks(states, name, cell):
    case = CASES[name]
    cell(case["method"], "DDP")
    module = build(case)
    clip = ("norm", case["clip"]) if "clip" in case else None
    method = METHODS[case["method"]]
    train(
        module,
        method,
        batches=rank_batches(),
        accumulate=case.get("accumulate", 1),
        clip=clip,
        seed=SEED,
        world=WORLD,
    )
    for key, value in module.state_dict().items():
        torch.testing.assert_close(states[name][0][key], value, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def test_synced_ascent_equals_one_process_with_whole_batches(states):
    module = build(CASES["sam-synced"])
    train(module, METHODS["sam"], batches=whole_batches())
    for key, value in module.state_dict().items():
        torch.testing.assert_close(states["sam-synced"][0][key], value, rtol=1e-5, atol=1e-6)


def test_balances_of_two_processes_equal_those_of_one_with_whole_batches(states):
    """Also the weights and temperatures of the teachers, which depend on all samples of a step."""
    module = build(CASES["mtard"])
    train(module, METHODS["mtard"], batches=whole_batches())
    for key, value in module.state_dict().items():
        torch.testing.assert_close(states["mtard"][0][key], value, rtol=1e-5, atol=1e-6)


def test_manual_optimization_equals_the_callback(states):
    for key, value in states["sam"][0].items():
        if key.startswith("net"):
            torch.testing.assert_close(states["sam-manual"][0][key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("reentrant", "straight"), [("sam-reentrant", "sam"), ("sam-reentrant-accumulate", None)])
def test_reentrant_checkpoints_equal_a_straight_pass(states, reentrant, straight):
    expected = states[straight] if straight else None
    if expected is None:
        module = PlainModule(norm=False)
        train(module, METHODS["sam"], batches=rank_batches(), accumulate=2, world=WORLD)
        expected = [module.state_dict()]
    for key, value in expected[0].items():
        if key.startswith("net"):
            torch.testing.assert_close(states[reentrant][0][key], value, rtol=1e-5, atol=1e-6)


def test_local_ascent_is_another_method(states):
    """The ascent of each rank's own half batch is not the ascent of the whole batch; the documentation says so."""
    local, synced = states["sam"][0], states["sam-synced"][0]
    assert not torch.allclose(local["net.0.weight"], synced["net.0.weight"], rtol=1e-5, atol=1e-6)
