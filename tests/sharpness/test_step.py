"""The order of passes: which one counts, what leads the ascent, and what waits for the optimizer."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_robust.sharpness import SAM, SharpnessMethod, sharp_backward
from support.methods import Late


class Ahead(SharpnessMethod):
    """One pass, away from the weights."""

    counted = "perturbed"
    needs_ascent = False
    extra_passes = 0

    def direction(self, weights, gradients, probe):
        assert gradients == []
        return probe.gradient_at([torch.ones_like(tensor) for tensor in weights.tensors], 0.1)


class Moving(SharpnessMethod):
    """The plain gradient, and one more move once the optimizer has stepped."""

    moves_after_step = True
    extra_passes = 0

    def direction(self, weights, gradients, probe):
        probe.move_after_step([torch.full_like(tensor, 10.0) for tensor in weights.tensors])
        return gradients


class Hard(SharpnessMethod):
    """Climbs the loss of the worst sample only."""

    needs_sample_losses = True

    def ascent_loss(self, evaluation):
        return evaluation.sample_losses().max()

    def direction(self, weights, gradients, probe):
        return gradients


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
    return net, torch.randn(8, 4), torch.randint(3, (8,))


def test_the_counted_pass_moves_buffers_and_generators():
    net, x, y = problem()
    passes = []

    def closure():
        passes.append((net[0].weight.detach().clone(), torch.get_rng_state()))
        return nn.functional.cross_entropy(net(x), y)

    plain = copy.deepcopy(net)
    before = net[0].weight.detach().clone()
    loss = sharp_backward(closure, Late(), net)
    assert len(passes) == 2
    assert torch.equal(passes[0][0], before)
    assert not torch.equal(passes[1][0], before)
    assert torch.equal(passes[0][1], passes[1][1])  # the same masks
    assert torch.equal(net[0].weight, before)
    after = torch.get_rng_state()
    torch.set_rng_state(passes[0][1])
    plain(x)
    assert torch.equal(torch.get_rng_state(), after)
    assert net[1].num_batches_tracked == 1
    assert not torch.equal(net[1].running_mean, plain[1].running_mean)
    assert not loss.requires_grad


def test_a_method_may_need_one_pass_elsewhere():
    w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    calls = []

    def closure():
        calls.append(w.item())
        return (w**3).sum()

    loss = sharp_backward(closure, Ahead(), [w])
    assert calls == [2.1]
    assert loss.item() == pytest.approx(2.1**3)
    assert w.grad.item() == pytest.approx(3 * 2.1**2)
    assert w.item() == 2.0


def test_another_loss_may_lead_the_ascent():
    net, x, y = problem()
    net.eval()
    sizes = []

    def closure(count):
        sizes.append(count)
        return nn.functional.cross_entropy(net(x[:count]), y[:count])

    expected = copy.deepcopy(net)
    sharp_backward(lambda: closure(8), SAM(rho=0.3), net, ascent_closure=lambda: closure(2))
    assert sizes == [2, 8]
    gradients = torch.autograd.grad(nn.functional.cross_entropy(expected(x[:2]), y[:2]), list(expected.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    with torch.no_grad():
        for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
            parameter += 0.3 * gradient / norm
    nn.functional.cross_entropy(expected(x), y).backward()
    for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    with pytest.raises(ValueError, match="Hard uses the gradient at the unperturbed weights for more than the ascent"):
        sharp_backward(lambda: closure(8), Hard(), net, ascent_closure=lambda: closure(2))


def test_sample_losses_may_lead_the_ascent():
    net, x, y = problem()
    net.eval()

    def losses():
        return nn.functional.cross_entropy(net(x), y, reduction="none")

    expected = torch.autograd.grad(losses().max(), list(net.parameters()))
    assert sharp_backward(losses, Hard(), net) == losses().mean()
    torch.testing.assert_close([p.grad for p in net.parameters()], list(expected))
    with pytest.raises(ValueError, match=r"return losses \[B\]"):
        sharp_backward(lambda: losses().mean(), Hard(), net)


def test_moves_wait_for_the_step_and_are_shared_by_accumulated_calls():
    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([w], lr=0.5)
    for _ in range(2):
        sharp_backward(lambda: (2 * w).sum(), Moving(), optimizer, accumulate=2)
        assert w.item() == 1.0
    assert w.grad.item() == 2.0
    optimizer.step()
    assert w.item() == 1.0 - 0.5 * 2.0 + 10.0
    optimizer.step()  # nothing is left over
    assert w.item() == 9.0
    with pytest.raises(ValueError, match="needs the optimizer; give that instead of parameters"):
        sharp_backward(lambda: (2 * w).sum(), Moving(), [w])


def test_parameters_that_took_no_part_keep_no_gradient():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    sharp_backward(lambda: (used**2).sum(), SAM(rho=0.1), [used, unused])
    assert used.grad is not None
    assert unused.grad is None
    with pytest.raises(ValueError, match="depends on none of the given parameters"):
        sharp_backward(lambda: (used**2).sum(), SAM(rho=0.1), [unused])
    with pytest.raises(ValueError, match="does not require gradients"):
        sharp_backward(lambda: (used.detach() ** 2).sum(), SAM(rho=0.1), [used])


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints_and_gradients_that_are_there_already(reentrant):
    net, x, y = problem()
    net[2].p = 0.0
    inputs = x.clone().requires_grad_()
    straight = copy.deepcopy(net)
    for parameter, other in zip(net.parameters(), straight.parameters(), strict=True):
        parameter.grad = torch.ones_like(parameter)
        other.grad = torch.ones_like(other)

    def through():
        return nn.functional.cross_entropy(net[3](checkpoint(net[:3], inputs, use_reentrant=reentrant)), y)

    sharp_backward(through, SAM(rho=0.1), net)
    sharp_backward(lambda: nn.functional.cross_entropy(straight(x), y), SAM(rho=0.1), straight)
    for ours, theirs in zip(net.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_second_derivatives_are_refused():
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="create_graph=True"):
        sharp_backward(lambda: (w**2).sum(), SAM(), [w], backward=lambda loss: loss.backward(create_graph=True))
    assert torch.equal(w, torch.ones(2))


def test_an_exception_in_any_pass_leaves_everything_as_found():
    net, x, y = problem()
    state = copy.deepcopy(net.state_dict())
    for failing in (1, 2):
        calls = []

        def closure(calls=calls, failing=failing):
            calls.append(1)
            loss = nn.functional.cross_entropy(net(x), y)
            if len(calls) == failing:
                raise KeyboardInterrupt
            return loss

        with pytest.raises(KeyboardInterrupt):
            sharp_backward(closure, Late(), net)
        for name, value in net.named_parameters():
            assert torch.equal(value, state[name])
            assert value.grad is None


def test_memory_is_kept_by_the_name_of_the_parameter(tmp_path):
    class Remembering(SAM):
        def direction(self, weights, gradients, probe):
            first = self.recall("first", weights)
            if first[0] is None:
                self.remember("first", weights, [gradient.clone() for gradient in gradients])
            return super().direction(weights, gradients, probe)

    net, x, y = problem()
    method = Remembering()
    sharp_backward(lambda: nn.functional.cross_entropy(net(x), y), method, net)
    torch.save(method.state_dict(), tmp_path / "method.pt")
    assert sorted(method.state_dict()) == sorted(f"first/{name}" for name, _ in net.named_parameters())
    other = Remembering()
    other.load_state_dict(torch.load(tmp_path / "method.pt", weights_only=True))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in method.state_dict().items())
    other.reset()
    assert other.state_dict() == {}
    assert len(method.state_dict()) == 6
