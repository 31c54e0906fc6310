"""AWP and RWP with attacks and objectives inside a Trainer: x' is made once, at the unperturbed weights."""

import lightning as L
import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import AdversarialTraining, ObjectiveTraining, SharpnessAware
from lightning_robust.losses import CrossEntropy
from lightning_robust.objectives import TRADES, ARoW
from lightning_robust.sharpness import AWP, RWP, GlobalAWP, SAMStyleAWP
from support.modules import PlainModule, loader, trainer, weights_of
from support.reference import Method, attack, trades, train, twin


def fit(module, *callbacks, seed=3, **kwargs):
    L.seed_everything(seed)
    run = trainer(*callbacks, **{"max_epochs": 2, **kwargs})
    run.fit(module, loader())
    return run


METHODS = [
    AWP(gamma=0.1),
    AWP(gamma=0.1, decay_at_perturbed=False),
    GlobalAWP(rho=0.1),
    SAMStyleAWP(rho=0.1),
    RWP(gamma=0.1, loss_threshold=1.5, inner_steps=3),
]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("with_objective", [False, True], ids=["pgd", "trades"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_equals_the_explicit_loop(method, with_objective, accumulate):
    """In float64: the sign of the TRADES attack turns rounding errors into other images."""
    ours = PlainModule()
    reference = twin(ours).double()
    inside = ObjectiveTraining(trades()) if with_objective else AdversarialTraining(attack())
    fit(ours, SharpnessAware(method), inside, precision="64-true", accumulate_grad_batches=accumulate)
    explicit = Method(list, adversarial=not with_objective, objective=trades if with_objective else None, sharp=method)
    batches = [[[(x.double(), y) for x, y in loader()]] for _ in range(2)]
    train(reference, explicit, batches=batches, accumulate=accumulate)
    state = reference.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


class CountedPGD(PGD):
    calls = 0

    def run(self, problem, x_adv):
        self.calls += 1
        return super().run(problem, x_adv)


def counted_forwards(module):
    seen = []
    module.net.register_forward_pre_hook(lambda net, arguments: seen.append((net.training, arguments[0].detach())))
    return seen


@pytest.mark.parametrize("method", [AWP(), GlobalAWP(), SAMStyleAWP(), RWP(inner_steps=4)], ids=repr)
def test_one_attack_for_all_passes(method):
    module = PlainModule()
    seen = counted_forwards(module)
    pgd = CountedPGD(eps=0.1, steps=3)
    adversarial = AdversarialTraining(pgd)
    perturbing = SharpnessAware(method)
    fit(module, perturbing, adversarial, max_epochs=1)
    assert pgd.calls == 4
    trained = [x for training, x in seen if training]
    attacked = [x for training, x in seen if not training]
    assert len(attacked) == 4 * 3
    per_step = int(method.extra_passes) + 1
    assert len(trained) == 4 * per_step
    assert all(torch.equal(trained[i], trained[i - i % per_step]) for i in range(len(trained)))
    assert adversarial.passes(perturbing.passes(1)) == 3 + per_step


@pytest.mark.parametrize(("method", "passes"), [(AWP(gamma=0.005), 2), (RWP(gamma=0.005, inner_steps=4), 5)])
def test_trades_is_prepared_once(method, passes):
    module = PlainModule()
    seen = counted_forwards(module)
    objective = trades()
    inside, perturbing = ObjectiveTraining(objective), SharpnessAware(method)
    fit(module, perturbing, inside, max_epochs=1)
    trained = [x for training, x in seen if training]
    assert len(trained) == 4 * 2 * passes
    assert len(seen) - len(trained) == 4 * (objective.attack.steps + 1)
    for step in range(4):
        clean, adv = trained[2 * passes * step : 2 * passes * step + 2]
        images = trained[2 * passes * step : 2 * passes * (step + 1)]
        assert all(torch.equal(x, (clean, adv)[i % 2]) for i, x in enumerate(images))
    assert inside.passes(perturbing.passes(1)) == objective.attack.passes + 2 * passes


def test_the_pass_at_the_perturbed_weights_counts():
    losses = []

    class Watched(PlainModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.detach())
            return loss

    module = Watched()
    run = fit(module, SharpnessAware(AWP(gamma=0.3)), max_epochs=1)
    clean, moved = torch.stack(losses[0::2]), torch.stack(losses[1::2])
    assert (moved > clean).all()
    torch.testing.assert_close(run.callback_metrics["train_loss"], moved.mean())
    torch.testing.assert_close(run.callback_metrics["train/sharpness_gap"], (moved - clean).mean())
    assert int(module.net[1].num_batches_tracked) == 4


def test_training_may_begin_without_perturbation():
    plain, ours = PlainModule(), PlainModule()
    fit(plain, AdversarialTraining(attack()), max_epochs=2)
    fit(ours, AdversarialTraining(attack()), SharpnessAware(AWP(gamma=0.1), start_epoch=2), max_epochs=2)
    assert torch.equal(weights_of(plain), weights_of(ours))


def test_an_optimizer_that_decays_elsewhere_is_refused_before_the_first_step():
    class WithAdamW(PlainModule):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

        def training_step(self, batch, batch_idx):
            raise AssertionError("too late")

    for method in (AWP(), RWP()):
        with pytest.raises(ValueError, match=r"AdamW decays weights apart .* set decay_at_perturbed=False"):
            fit(WithAdamW(), SharpnessAware(method))


def test_an_objective_without_losses_of_samples_is_refused():
    objective = TRADES(attack=PGD(eps=0.1, steps=1, loss="kl"), criterion=CrossEntropy(label_smoothing=0.1))
    with pytest.raises(ValueError, match="RWP reads the losses of single samples, which this objective does not know"):
        fit(PlainModule(), SharpnessAware(RWP()), ObjectiveTraining(objective))
    fit(PlainModule(), SharpnessAware(AWP()), ObjectiveTraining(objective), max_epochs=1)


def test_a_step_may_say_its_own_losses_of_samples():
    class Named(PlainModule):
        def training_step(self, batch, batch_idx):
            losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
            return {"loss": losses.mean(), "sample_losses": self.factor * losses}

    results = []
    # halving the losses is the same as doubling the threshold
    for factor, threshold in ((1.0, 1.4), (0.5, 0.7), (0.5, 1.4)):
        module = Named()
        module.factor = factor
        fit(module, SharpnessAware(RWP(gamma=0.1, loss_threshold=threshold, inner_steps=2)), max_epochs=1)
        results.append(weights_of(module))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(results[0], results[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "objective", [trades(), TRADES(forwards="published-awp"), ARoW(), ARoW(weighting="cow", label_smoothing=0.0)]
)
def test_losses_of_samples_are_those_of_the_objective(objective):
    torch.manual_seed(0)
    model = PlainModule().eval()
    x, y = next(iter(loader()))
    prepared = objective.prepare(model, x, y)
    whole = objective(model, prepared)
    assert whole.sample_losses.shape == (6,)
    torch.testing.assert_close(whole.sample_losses.mean(), whole.loss)
    first = type(prepared)(x[:1], y[:1], prepared.x_adv[:1])
    torch.testing.assert_close(whole.sample_losses[0], objective(model, first).loss)
