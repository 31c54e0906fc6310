"""The sanity checks: each broken defence is caught by the right check, and a healthy one passes all."""

import random
import re

import numpy as np
import pytest
import torch
from torch import nn

from lightning_robust.attacks import FGSM, PGD
from lightning_robust.attacks.sequence import AttackSequence
from lightning_robust.attacks.square import Square
from lightning_robust.evaluation.checks import BUDGETS, CHECKS, run_checks
from lightning_robust.evaluation.probe import Probe
from support import defences
from support.attacked import differences, snapshot
from support.defences import EPS, digits, trained

ATTACK = PGD(eps=EPS, steps=20, early_stop=True)


# left out where the question is another one
SLOW = {"black-box", "convergence", "eps-sweep", "random-search"}


def images(count=64):
    _, _, x, y = digits()
    return x[:count], y[:count]


def checked(model, attack=ATTACK, **options):
    x, y = images()
    return {check.name: check for check in run_checks(model.eval(), x, y, attack, **options)}


def only(name, model, attack=ATTACK, **options):
    """One check alone."""
    return checked(model, attack, skip=set(CHECKS) - {name}, **options)[name]


def warned(model, attack=ATTACK, **options):
    return {name for name, check in checked(model, attack, **options).items() if check.status == "warn"}


ATTACKS = {
    "linf": ATTACK,
    "l2": PGD(eps=0.5, norm="l2", steps=20, early_stop=True),
    "margin": PGD(eps=EPS, steps=20, early_stop=True, loss="margin"),
    "sequence": AttackSequence(
        attacks={"ce": ATTACK, "margin": PGD(eps=EPS, steps=20, early_stop=True, loss="margin")}
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_healthy_network_passes_every_check(name):
    found = checked(trained(attacked=True), ATTACKS[name], surrogate=trained())
    assert tuple(found) == tuple(CHECKS)
    assert {check.message for check in found.values() if check.status == "warn"} == set()


def test_the_full_budget_looks_closer():
    x, y = digits()[2:]
    skip = set(CHECKS) - {"random-search", "convergence", "single-step"}
    found = {check.name: check for check in run_checks(trained(attacked=True), x, y, ATTACK, budget="full", skip=skip)}
    assert found["random-search"].numbers["points"] == 1000
    assert found["convergence"].numbers["steps"] == 200
    # on 256 samples it shows that the cross-entropy alone misses a few
    assert {name for name, check in found.items() if check.status == "warn"} == {"convergence"}
    assert found["convergence"].numbers["only_longer"] == 4


# how to break it, the checks that have to see it, and whether they are the only ones
BROKEN = {
    "gradient killer": (
        defences.GradientKiller,
        {"zero-gradients", "finite-differences", "black-box", "random-search", "unbounded"},
        True,
    ),
    "quantiser": (defences.Quantiser, {"zero-gradients", "finite-differences", "black-box", "unbounded"}, False),
    "straight-through quantiser": (
        lambda model: defences.Quantiser(model, straight_through=True),
        {"finite-differences"},
        True,
    ),
    "probabilities": (defences.Softmax, {"outputs"}, True),
    "noise": (defences.Noise, {"determinism"}, False),
    "seeded noise": (lambda model: defences.Noise(model, seed=1), {"determinism"}, False),
    "purifier": (defences.Purifier, {"autograd-in-forward"}, True),
    "purifier with backward": (lambda model: defences.Purifier(model, "backward"), {"autograd-in-forward"}, True),
    "purifier with torch.func": (lambda model: defences.Purifier(model, "func"), {"autograd-in-forward"}, True),
    "test-time adaptation": (defences.Adapting, {"fixed-state"}, True),
    "batch norm in training": (defences.BatchNormInTraining, {"batch-independence", "fixed-state"}, False),
    "huge logits": (lambda model: defences.Scaled(model, 1e4), {"zero-gradients", "convergence"}, False),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_defence_is_caught(name):
    make, expected, alone = BROKEN[name]
    found = warned(make(trained(attacked=True)))
    assert found == expected if alone else found >= expected


def test_the_margin_is_the_remedy_for_huge_logits():
    huge = defences.Scaled(trained(attacked=True), 1e4)
    attack = PGD(eps=EPS, steps=20, early_stop=True, loss="margin")
    # its gradients are fine, but the reader learns that those of the cross-entropy are not
    assert warned(huge, attack) == {"zero-gradients"}


def test_images_in_other_bounds_are_an_error():
    x, y = images()
    with pytest.raises(
        ValueError, match=r"Expected pixels in \[0, 1\] but got \[-1, 1\]. If the images are normalised"
    ):
        run_checks(trained(), 2 * x - 1, y, ATTACK)


def test_images_in_other_bounds_are_fine_if_the_attack_knows_them():
    x, y = images()
    model = Rescaled(trained(attacked=True))
    for options in ({"eps": 2 * EPS, "bounds": (-1.0, 1.0)}, {"eps": EPS, "mean": [0.5], "std": [0.5]}):
        attack = PGD(steps=20, early_stop=True, **options)
        plain = checked(model.inner, skip=SLOW)
        for check in run_checks(model, 2 * x - 1, y, attack, skip=SLOW):
            assert check.status == "ok", check
            if check.name in {"single-step", "unbounded"}:
                mine, theirs = (each.numbers for each in (check, plain[check.name]))
                assert mine == pytest.approx({**theirs, **({"eps": mine["eps"]} if "eps" in mine else {})}, abs=0.04)


class Rescaled(defences.Wrapped):
    """Takes images in [-1, 1]."""

    def forward(self, x):
        return self.inner((x + 1) / 2)


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (trained, lambda x: x / 255, "The pixels fill only"),
        (lambda: Rescaled(trained()), lambda x: x, ""),
        (lambda: defences.Wrapped(nn.Sequential(Negative(), trained())), lambda x: x, "is near chance"),
    ],
    ids=["divided twice", "other normalisation", "inverted"],
)
def test_images_of_another_form(model, x, message):
    clean, y = images()
    (check,) = run_checks(model().eval(), x(clean), y, ATTACK, skip=set(CHECKS) - {"input-range"})
    assert check.status == ("warn" if message else "ok")
    assert message in check.message


class Negative(nn.Module):
    def forward(self, x):
        return 1 - x


def test_a_model_in_training_mode_is_reported_and_left_so():
    model = nn.Sequential(nn.BatchNorm2d(1), trained(attacked=True))
    model[0].train()
    before = snapshot(model)
    x, y = images()
    found = [check for check in run_checks(model, x, y, ATTACK) if check.status == "warn"]
    assert [check.name for check in found] == ["fixed-state"]
    assert found[0].message.startswith("1 layers were in training mode")
    assert differences(model, before) == []


def test_a_plain_callable_whose_batch_norm_trains():
    model = nn.Sequential(nn.BatchNorm2d(1), trained(attacked=True)).train()
    found = checked_callable(lambda x: model(x))
    assert found["batch-independence"].status == "warn"
    assert found["fixed-state"].message == "A plain callable: its state cannot be seen."


def checked_callable(model):
    x, y = images()
    return {check.name: check for check in run_checks(model, x, y, ATTACK)}


def test_non_finite_logits_are_the_only_thing_that_is_reported():
    model = trained()
    with torch.no_grad():
        model[-1].bias[3] = float("nan")
    found = checked(model)
    assert list(found) == ["finite"]
    assert found["finite"].numbers == {"not_finite": 128}
    assert found["finite"].message.startswith("128 of 128 images have NaN or infinite logits")


def test_a_model_without_gradients():
    class Detached(defences.Wrapped):
        def forward(self, x):
            return self.inner(x.detach())

    model = Detached(trained(attacked=True)).requires_grad_(False)
    found = checked(model, Square(eps=EPS, queries=300))
    assert found["zero-gradients"].message.startswith("No gradient reaches the images")
    assert found["finite-differences"].status == "warn"
    assert {"single-step", "unbounded", "eps-sweep", "convergence"} & found.keys() == set()
    assert {"black-box", "random-search", "quantisation"} <= found.keys()


class Forgetful(PGD):
    """Returns the clean images."""

    def run(self, problem, x_adv):
        super().run(problem, x_adv)
        return problem.x.clone()


WEAK = {
    "tiny steps": (PGD(eps=EPS, steps=3, step_size=1e-4, random_start=False), {"single-step", "convergence"}),
    "forgets its successes": (Forgetful(eps=EPS), {"silent-success", "single-step", "convergence"}),
    "beyond the budget": (
        FGSM(eps=EPS, random_start=True, start_scale=2, projection="box"),
        {"within-budget"},
    ),
}


@pytest.mark.parametrize("name", WEAK)
def test_a_weak_or_cheating_attack_is_caught(name):
    attack, expected = WEAK[name]
    assert expected <= warned(trained(attacked=True), attack)


def test_points_that_rounding_repairs():
    found = only("quantisation", trained(), thresholds={"quantisation": {"levels": 16}})
    assert found.status == "warn"
    x, y = images()
    x_adv = ATTACK(trained(), x, y, indices=torch.arange(len(x)))
    by_hand = trained()((x_adv * 16).round() / 16).argmax(1) == y
    clean = trained()(x).argmax(1) == y
    assert found.numbers["rounded_accuracy"] == pytest.approx(float((by_hand & clean).float().mean()))
    assert found.numbers["repaired"] == int((by_hand & clean & (trained()(x_adv).argmax(1) != y)).sum())


def test_points_of_a_surrogate():
    killer = defences.GradientKiller(trained(attacked=True))
    found = only("transfer", killer, surrogate=trained(attacked=True, seed=1))
    assert found.status == "warn"
    assert found.numbers["only_transfer"] > 3


def test_precision_of_the_run_against_float32():
    class Coarse(defences.Wrapped):
        """Another function under autocast."""

        def forward(self, x):
            return self.inner(1 - x) if torch.is_autocast_enabled("cpu") else self.inner(x)

    model = Coarse(trained(attacked=True)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = {check.name: check for check in run_checks(model, *images(), ATTACK)}
    assert {name for name, check in found.items() if check.status == "warn"} == {"precision"}
    assert found["precision"].numbers["different"] > 20
    assert only("precision", model).status == "ok"


def test_everything_is_left_as_it_was():
    for make in (defences.Noise, defences.BatchNormInTraining, defences.Wrapped):
        model = make(trained(attacked=True)).train()
        before = snapshot(model)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)["state"]["pos"]
        x, y = images(16)
        x.requires_grad_(False)
        run_checks(model, x, y, ATTACK)
        mode = {"mode norm"} if make is defences.BatchNormInTraining else set()
        assert set(differences(model, before)) <= mode
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1:] == (random.getstate(), np.random.get_state(legacy=False)["state"]["pos"])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_same_answers_in_inference_mode_and_with_given_points(context):
    model = trained(attacked=True)
    x, y = images()
    expected = run_checks(model, x, y, ATTACK, skip=SLOW - {"random-search"})
    x_adv = ATTACK(model, x, y, indices=torch.arange(len(x)))
    with context():
        inside = x.clone()
        assert run_checks(model, inside, y, ATTACK, skip=SLOW - {"random-search"}) == expected
        assert run_checks(model, x, y, ATTACK, adversarial=x_adv, skip=SLOW - {"random-search"}) == expected


def test_the_checks_repeat_and_the_first_samples_count():
    model = defences.Noise(trained(attacked=True)).eval()
    x, y = digits()[2:]
    skip = SLOW - {"random-search"}
    first = run_checks(model, x[:200], y[:200], ATTACK, seed=3, skip=skip)
    torch.rand(7)
    assert run_checks(model, x[:64], y[:64], ATTACK, seed=3, skip=skip) == first


def test_soft_labels_count_as_their_most_probable_class():
    model = trained(attacked=True)
    x, y = images()
    soft = nn.functional.one_hot(y, 10).float()
    skip = SLOW - {"black-box"}
    assert run_checks(model, x, soft, ATTACK, skip=skip) == run_checks(model, x, y, ATTACK, skip=skip)


@pytest.mark.parametrize("attack", [PGD(eps=0.0, steps=2), FGSM(eps=EPS)], ids=["eps 0", "one step"])
@pytest.mark.parametrize("count", [1, 2])
def test_edge_cases(attack, count):
    x, y = images(count)
    found = run_checks(trained(attacked=True), x, y, attack)
    assert [check.name for check in found] == [name for name in CHECKS if name != "transfer"]
    for check in found:
        assert all(value is None or value == value for value in check.numbers.values()), check


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes):
    x, _ = images()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).eval()
    attack = PGD(eps=0.02, steps=20, early_stop=True, loss="margin")
    found = run_checks(model, x, model(x).argmax(1), attack)
    assert {check.name for check in found if check.status == "warn"} <= {"quantisation"}


def test_an_attack_that_is_too_dear_is_not_run_again():
    attack = PGD(eps=EPS, steps=101)
    x, y = images(8)
    x_adv = attack(trained(), x, y)
    assert "silent-success" not in {c.name for c in run_checks(trained(), x, y, attack, adversarial=x_adv)}
    assert "silent-success" in {c.name for c in run_checks(trained(), x, y, attack)}
    assert BUDGETS["quick"].watched_passes == 100


def test_thresholds():
    model = defences.Scaled(trained(attacked=True), 12.0)
    assert only("zero-gradients", model).status == "warn"
    loose = {"zero-gradients": {"largest_gap": 100.0, "tolerance": 1.0}}
    assert only("zero-gradients", model, thresholds=loose).status == "ok"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "huge"}, "Expected `budget` to be one of 'quick', 'full' but got 'huge'."),
        ({"skip": ["nothing"]}, "Expected `skip` to be one of 'finite', "),
        ({"thresholds": {"nothing": {}}}, "Expected `thresholds` to be one of 'finite', "),
        (
            {"thresholds": {"transfer": {"toleranc": 1}}},
            "Expected `thresholds of transfer` to be one of 'tolerance', 'slack' but got 'toleranc'.",
        ),
        ({"attack": PGD(targeted=True)}, "The sanity checks understand untargeted attacks only"),
        (
            {"attack": AttackSequence(attacks={"a": PGD(), "b": PGD(norm="l2")})},
            "The sanity checks need an attack with one of the norms ",
        ),
        ({"adversarial": torch.rand(4, 1, 8, 7)}, r"Expected `adversarial` to have shape [4, 1, 8, 8] but got "),
        ({"x": torch.rand(0, 1, 8, 8), "y": torch.zeros(0).long()}, "Expected at least one sample to check"),
    ],
)
def test_refusals(options, message):
    x, y = images(4)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        run_checks(trained(), **{"x": x, "y": y, "attack": ATTACK, **options})


def test_the_probe_counts_as_one_does_by_hand():
    x, y = images()
    model = trained(attacked=True)
    probe = Probe(model, x, y, ATTACK, batch_size=10)
    x_adv = ATTACK(model, x, y, indices=torch.arange(len(x)))
    assert torch.allclose(probe.adversarial, x_adv, atol=1e-6)
    robust = (model(x).argmax(1) == y) & (model(x_adv).argmax(1) == y)
    assert torch.equal(probe.robust, robust)
    assert int(robust.sum()) == 47
