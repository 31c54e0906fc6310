"""Two-process DDP: both ranks agree, and equal one process that sees whole batches."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.optimizers import AdaHessian
from lightning_robust.sharpness import SAM, orthogonalize, sharp_backward
from support.ddp_optimizers import CASES, OPTIONS, batches
from support.modules import PlainModule, network
from support.ranks import WORLD, launch

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ddp-optimizers")]  # one launch serves all of them

NAMES = [*CASES, "adahessian-plain"]
SECOND_ORDER = [name for name in NAMES if name.startswith("adahessian")]


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """Weights of every case and rank, from one launch."""
    folder = tmp_path_factory.mktemp("ddp")
    launch("-m", "support.ddp_optimizers", str(folder))
    return {
        name: [torch.load(folder / f"{name}_{rank}.pt", weights_only=True) for rank in range(WORLD)] for name in NAMES
    }


def joint_batches():
    """The batches of the ranks, put together."""
    pairs = zip(*(batches(rank) for rank in range(WORLD)), strict=True)
    return [tuple(torch.cat(parts) for parts in zip(*pair, strict=True)) for pair in pairs]


@pytest.mark.parametrize("name", NAMES)
def test_ranks_agree(states, name):
    first, second = states[name]
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_adahessian_equals_one_process_with_whole_batches(states, name):
    torch.manual_seed(0)
    net = network(norm=False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimizer = AdaHessian(net.parameters(), **OPTIONS)
    for _ in range(2):
        for x, y in joint_batches():
            parameters = list(net.parameters())
            gradients = torch.autograd.grad(F.cross_entropy(net(x), y), parameters, create_graph=optimizer.needs_graph)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    for key, value in net.state_dict().items():
        assert not torch.allclose(value, before[key], atol=1e-3)
        torch.testing.assert_close(states[name][0][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["orthogonal", "orthogonal-sam"])
def test_orthogonal_gradient_equals_the_explicit_mean_of_the_ranks(states, name):
    case = CASES[name]
    module = PlainModule(norm=False)
    optimizer = module.configure_optimizers()
    every = case.get("accumulate", 1)
    for _ in range(2):
        optimizer.zero_grad()
        for index, pair in enumerate(zip(*(batches(rank) for rank in range(WORLD)), strict=True), 1):
            for x, y in pair:
                share = every * WORLD
                if "sam" in name:
                    sharp_backward(
                        lambda x=x, y=y: F.cross_entropy(module.net(x), y),
                        SAM(rho=0.2),
                        optimizer,
                        backward=lambda loss, share=share: (loss / share).backward(),
                    )
                else:
                    (F.cross_entropy(module.net(x), y) / share).backward()
            if index % every == 0:
                orthogonalize(optimizer)
                if "clip" in case:
                    torch.nn.utils.clip_grad_norm_(module.parameters(), case["clip"])
                optimizer.step()
                optimizer.zero_grad()
    for key, value in module.net.state_dict().items():
        torch.testing.assert_close(states[name][0][key], value, rtol=1e-5, atol=1e-6)
