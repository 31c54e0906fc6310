"""WSAM against explicit vectors over several steps, coupled and decoupled, and the move that follows the step."""

from itertools import pairwise

import lightning as L
import pytest
import torch

from lightning_robust.callbacks import SharpnessAware
from lightning_robust.schedules import Piecewise
from lightning_robust.sharpness import SAM, WSAM, ParameterSelection, sharp_backward
from support.explicit import Problem, flat, identical, norm, plus, same
from support.modules import PlainModule, loader, trainer, weights_of
from support.sharp_loop import follows_the_loop


def gradients(problem, weights, rho, index, adaptive=False):
    """At the weights and at the perturbed ones; rho by name, of the perturbed weights only."""
    g0 = problem.gradient(weights, index)
    scale = {name: weights[name].abs() if adaptive else torch.ones_like(weights[name]) for name in rho}
    length = norm({name: scale[name] * g0[name] for name in rho})
    offsets = {name: rho[name] * scale[name] ** 2 * g0[name] / (length + 1e-12) for name in rho}
    return g0, problem.gradient(plus(weights, offsets), index)


def everywhere(problem, value):
    return dict.fromkeys(problem.weights, value)


class Momentum:
    """SGD with momentum and weight decay on dictionaries."""

    def __init__(self, lr, momentum=0.9, weight_decay=0.01):
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.buffers = None

    def step(self, weights, direction):
        decayed = {name: direction[name] + self.weight_decay * value for name, value in weights.items()}
        first = self.buffers is None
        self.buffers = decayed if first else plus(decayed, self.buffers, self.momentum)
        return {name: value - self.lr[name] * self.buffers[name] for name, value in weights.items()}


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("decouple", [True, False])
def test_steps_are_the_formula(decouple, adaptive):
    problem = Problem()
    gamma, alpha = 0.8, 0.8 / (1 - 0.8)
    biases = [p for name, p in problem.net.named_parameters() if "bias" in name]
    others = [p for name, p in problem.net.named_parameters() if "bias" not in name]
    optimizer = torch.optim.SGD(
        [{"params": biases, "lr": 0.02, "rho": 0.1}, {"params": others}], lr=0.05, momentum=0.9, weight_decay=0.01
    )
    lr = {name: 0.02 if "bias" in name else 0.05 for name in problem.weights}
    rho = {name: 0.1 if "bias" in name else 0.3 for name in problem.weights}
    method = WSAM(rho=0.3, gamma=gamma, decouple=decouple, adaptive=adaptive)
    weights, momentum = problem.weights, Momentum(lr)
    for index in range(5):
        g0, g1 = gradients(problem, weights, rho, index, adaptive)
        if decouple:
            weights = momentum.step(weights, g0)
            weights = {name: value - lr[name] * alpha * (g1[name] - g0[name]) for name, value in weights.items()}
        else:
            mixed = {name: (1 - alpha) * g0[name] + alpha * g1[name] for name in g0}
            weights = momentum.step(weights, mixed)
        optimizer.zero_grad()
        sharp_backward(problem.closure(index), method, optimizer, module=problem.net)
        assert len(problem.passes) == 2
        optimizer.step()
        same(problem.weights, weights)


def test_half_of_the_weight_is_sam_and_none_is_plain():
    grads = []
    for method in (WSAM(rho=0.3, gamma=0.5, decouple=False), SAM(rho=0.3), WSAM(gamma=0.0, decouple=False)):
        problem = Problem()
        sharp_backward(problem.closure(0), method, problem.net)
        grads.append(problem.grads())
    same(grads[0], grads[1])
    same(grads[2], problem.gradient(problem.weights, 0))


def test_without_momentum_both_forms_take_the_same_step():
    ended = []
    for decouple in (True, False):
        problem = Problem()
        optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1)
        for index in range(3):
            optimizer.zero_grad()
            sharp_backward(problem.closure(index), WSAM(rho=0.3, decouple=decouple), optimizer, module=problem.net)
            optimizer.step()
        ended.append(problem.weights)
    same(*ended)


def test_weights_that_are_not_perturbed_take_the_coupled_form():
    problem = Problem()
    alpha = 4.0
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1)
    chosen = {"first.weight": 0.3, "embed.weight": 0.3}
    before = problem.weights
    g0, g1 = gradients(problem, before, chosen, 0)
    perturb = ParameterSelection(include=list(chosen))
    sharp_backward(problem.closure(0), WSAM(rho=0.3, gamma=0.8), optimizer, module=problem.net, perturb=perturb)
    rest = {name: g0[name] if name in chosen else g0[name] + alpha * (g1[name] - g0[name]) for name in g0}
    same(problem.grads(), rest)
    optimizer.step()
    same(problem.weights, {name: before[name] - 0.1 * (g0[name] + alpha * (g1[name] - g0[name])) for name in g0})


def test_the_move_is_the_mean_of_accumulated_batches():
    problem = Problem()
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1)
    before = problem.weights
    expected = before
    for index in (0, 1):
        g0, g1 = gradients(problem, before, everywhere(problem, 0.3), index)
        expected = plus(expected, {name: g0[name] + 4.0 * (g1[name] - g0[name]) for name in g0}, -0.05)
        sharp_backward(problem.closure(index), WSAM(rho=0.3, gamma=0.8), optimizer, module=problem.net, accumulate=2)
        assert identical(problem.weights, before)
    optimizer.step()
    same(problem.weights, expected)


def test_the_radius_may_be_a_schedule():
    problem = Problem()
    method = WSAM(rho=Piecewise(values={0: 0.1, 5: 0.2}), decouple=False)
    for step, rho in ((4, 0.1), (5, 0.2)):
        sharp_backward(problem.closure(0), method, problem.net, step=step)
        assert norm(problem.offsets()) == pytest.approx(rho)


def test_a_learning_rate_may_be_a_tensor():
    ended = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        problem = Problem()
        optimizer = torch.optim.SGD(problem.net.parameters(), lr=lr)
        sharp_backward(problem.closure(0), WSAM(rho=0.3), optimizer, module=problem.net)
        optimizer.step()
        ended.append(problem.weights)
    same(*ended)


def test_zero_gradients_give_zero():
    problem = Problem()
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1)
    before = problem.weights
    sharp_backward(problem.closure(0, 0.0), WSAM(rho=5.0), optimizer, module=problem.net)
    assert not flat(problem.grads()).any()
    optimizer.step()
    assert identical(problem.weights, before)


@pytest.mark.parametrize("worst", [float("inf"), float("nan")])
def test_an_overflow_at_the_perturbed_weights_shows_in_what_the_optimizer_gets(worst):
    """Else a loss scaler would let the step pass, and the move would ruin the weights."""
    problem = Problem()
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1)
    clean = problem.closure(0)

    def closure():
        return clean() * (worst if len(problem.passes) == 2 else 1.0)

    sharp_backward(closure, WSAM(), optimizer, module=problem.net)
    assert flat(problem.grads()).isnan().all()


@pytest.mark.parametrize("decouple", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_a_trainer_it_is_the_plain_loop(accumulate, decouple):
    follows_the_loop(WSAM(rho=0.3, gamma=0.8, decouple=decouple), accumulate=accumulate)


def test_a_step_that_the_scaler_skips_drops_its_move():
    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((trainer.precision_plugin.scaler.get_scale(), weights_of(pl_module).clone()))

    module = PlainModule()
    plugin = L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**22))
    run = trainer(SharpnessAware(WSAM(rho=0.3)), Watch(), max_epochs=8, plugins=[plugin])
    run.fit(module, loader())
    seen.append((plugin.scaler.get_scale(), weights_of(module).clone()))
    skipped = [later[0] < earlier[0] for earlier, later in pairwise(seen)]
    stayed = [torch.equal(later[1], earlier[1]) for earlier, later in pairwise(seen)]
    assert skipped == stayed
    assert any(skipped)
    assert not all(skipped)
    assert weights_of(module).isfinite().all()


def test_what_the_two_forms_ask_of_their_surroundings():
    assert (WSAM().moves_after_step, WSAM().collective) == (True, True)
    assert (WSAM(decouple=False).moves_after_step, WSAM(decouple=False).collective) == (False, False)
    assert repr(WSAM(rho=0.1)) == "WSAM(rho=0.1, gamma=0.9, decouple=True, adaptive=False, norm_eps=1e-12)"


def test_the_decoupled_form_needs_an_optimizer_with_a_learning_rate():
    problem = Problem()
    with pytest.raises(ValueError, match="no optimizer with a learning rate; give the optimizer instead of parameters"):
        sharp_backward(problem.closure(0), WSAM(), problem.net)

    class Free(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

    with pytest.raises(ValueError, match="or use decouple=False"):
        sharp_backward(problem.closure(0), WSAM(), Free(problem.net.parameters()))
    sharp_backward(problem.closure(0), WSAM(decouple=False), Free(problem.net.parameters()))
    assert flat(problem.grads()).any()


@pytest.mark.parametrize("name", ["rho", "norm_eps"])
def test_numbers_that_are_not_positive_are_refused(name):
    with pytest.raises(ValueError, match=f"Expected `{name}` to be a finite number > 0 but got 0"):
        WSAM(**{name: 0.0})


def test_other_weights_are_refused():
    with pytest.raises(ValueError, match=r"Expected `gamma` to be in \[0.0, 1.0\] but got -0\.1"):
        WSAM(gamma=-0.1)
    with pytest.raises(
        ValueError, match="Expected `gamma` to be below 1 but got 1; the sharpness term would have infinite"
    ):
        WSAM(gamma=1)
