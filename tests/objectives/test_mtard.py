"""MTARD: what a step computes, when its state moves, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from lightning_robust.attacks import PGD
from lightning_robust.distillation import TeacherSource
from lightning_robust.objectives import MTARD, Prepared, Running, mtard_loss
from lightning_robust.schedules import Linear, Piecewise

CLASSES, FEATURES = 3, 4
ATTACK = PGD(eps=0.1, steps=2, random_start=False)


def net(seed, classes=CLASSES, scale=3.0):
    torch.manual_seed(seed)
    network = nn.Linear(FEATURES, classes).double()
    with torch.no_grad():
        network.weight.mul_(scale)
    return network


def mtard(**options):
    return MTARD(net(1), net(2, scale=1.0), **{"attack": ATTACK, **options})


def batches(count=5, size=6):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.rand(size, FEATURES, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def state(objective):
    return torch.cat([objective.loss_balance.weights, objective.temperature_balance.temperatures]).clone()


class Paper:
    """A step as the paper writes it, with floats."""

    def __init__(self, temperature_balance=True):
        self.adapts = temperature_balance
        self.weights, self.temperatures, self.start = [0.5, 0.5], [1.0, 1.0], None

    def step(self, logits, teachers, weight_lr=0.025, temperature_lr=0.001):
        losses, entropy = [], []
        for z, t, temperature in zip(logits, teachers, self.temperatures, strict=True):
            q = torch.softmax(t.detach() / temperature, 1)
            losses.append((q * (torch.log(q + 1e-5) - torch.log_softmax(z, 1))).mean())
            entropy.append(float(-(q * torch.log(q)).mean()))
        if self.start is None:
            self.start = [loss.item() for loss in losses]
        left = [loss.item() / start for loss, start in zip(losses, self.start, strict=True)]
        self.weights = [w - weight_lr * (w - part / sum(left)) for w, part in zip(self.weights, left, strict=True)]
        total = self.weights[0] * losses[0] + self.weights[1] * losses[1]
        if self.adapts:
            sign = (entropy[0] > entropy[1]) - (entropy[0] < entropy[1])
            moved = [self.temperatures[0] - temperature_lr * sign, self.temperatures[1] + temperature_lr * sign]
            self.temperatures = [min(max(temperature, 1.0), 10.0) for temperature in moved]
        return total


@pytest.mark.parametrize("temperature_balance", [True, False])
def test_steps_are_those_of_the_paper(temperature_balance):
    objective, paper, student = mtard(temperature_balance=temperature_balance), Paper(temperature_balance), net(0)
    reference = copy.deepcopy(student)
    for x, y in batches(8):
        prepared = objective.prepare(student, x, y)
        output = objective(student, prepared)
        expected = paper.step((reference(x), reference(prepared.x_adv)), (net(1)(x), net(2, scale=1.0)(prepared.x_adv)))
        torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)
        told = torch.tensor([*paper.weights, *paper.temperatures], dtype=torch.float64)
        torch.testing.assert_close(state(objective), told, rtol=1e-12, atol=0)
        for network, loss in ((student, output.loss), (reference, expected)):
            network.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= 0.5 * parameter.grad
        torch.testing.assert_close(student.weight, reference.weight, rtol=1e-10, atol=1e-12)
    assert paper.temperatures != [1.0, 1.0] or not temperature_balance


def test_loss_is_a_weighted_sum_of_divergences():
    generator = torch.Generator().manual_seed(2)
    clean, attacked, by_clean, by_robust = torch.randn(4, 6, 5, generator=generator, dtype=torch.float64)

    def divergence(teacher, student):
        pair = (torch.distributions.Categorical(logits=logits) for logits in (teacher, student))
        return torch.distributions.kl_divergence(*pair).mean()

    expected = divergence(by_clean / 2, clean), divergence(by_robust / 3, attacked)
    options = {"weights": (0.3, 0.7), "temperatures": (2.0, 3.0), "eps_log": 0.0}
    told = mtard_loss(clean, attacked, by_clean, by_robust, reduction="batchmean", loss_factor=4.0, **options)
    torch.testing.assert_close(told[1:], tuple(4 * value for value in expected))
    torch.testing.assert_close(told[0], 4 * (0.3 * expected[0] + 0.7 * expected[1]))
    published = mtard_loss(clean, attacked, by_clean, by_robust, **options)
    torch.testing.assert_close(published[0], told[0] / 4 / 5)


def test_the_constant_in_the_logarithm_shifts_the_value_only():
    student, teacher = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    losses, gradients = [], []
    for eps in (0.0, 1e-5):
        leaf = student.clone().requires_grad_()
        loss, _, _ = mtard_loss(leaf, leaf, teacher, teacher, eps_log=eps)
        (gradient,) = torch.autograd.grad(loss, leaf)
        losses.append(loss.detach())
        gradients.append(gradient)
    assert losses[0] < losses[1]
    assert torch.equal(*gradients)


def test_extreme_logits_stay_finite():
    teacher = torch.tensor([[500.0, -500.0, 0.0]], dtype=torch.float32)
    student = (-teacher).requires_grad_()
    loss, _, _ = mtard_loss(student, student, teacher, teacher, eps_log=0.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_objective_is_the_function_at_its_weights_and_temperatures():
    clean, robust, student = net(1), net(2), net(0)
    objective = MTARD(clean, robust, attack=ATTACK, initial_temperatures=(2.0, 1.5), initial_weights=(0.2, 0.8))
    x, y = batches(1)[0]
    prepared = objective.prepare(student, x, y)
    output = objective.eval()(student, prepared)
    told, _, _ = mtard_loss(
        student(x),
        student(prepared.x_adv),
        clean(x),
        robust(prepared.x_adv),
        weights=(0.2, 0.8),
        temperatures=(2.0, 1.5),
    )
    torch.testing.assert_close(output.loss, told)


def test_no_gradient_reaches_the_teachers_and_their_networks_stay_as_they_are():
    clean, robust = net(1), net(2)
    objective, student = MTARD(clean, robust, attack=ATTACK), net(0)
    before = [{name: value.clone() for name, value in network.state_dict().items()} for network in (clean, robust)]
    for x, y in batches(3):
        objective(student, objective.prepare(student, x, y)).loss.backward()
    for network, values in zip((clean, robust), before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in network.state_dict().items())
        assert all(parameter.grad is None for parameter in network.parameters())
    assert not list(objective.parameters())


def test_the_attack_leaves_modes_as_they_were():
    student = nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)).double()
    student[1].eval()  # frozen by its owner
    objective = mtard()
    x, y = batches(1)[0]
    objective(student, objective.prepare(student, x, y))
    assert [module.training for module in student.modules()] == [True, True, False, True]


@pytest.mark.parametrize(("forwards", "updates"), [("separate", 2), ("joint", 1)])
def test_forwards_for_batchnorm(forwards, updates):
    seen = []

    class Watched(nn.BatchNorm1d):
        def forward(self, x):
            if self.training:
                seen.append(len(x))
            return super().forward(x)

    student = nn.Sequential(Watched(FEATURES), nn.Linear(FEATURES, CLASSES)).double()
    objective = mtard(forwards=forwards)
    (x, y), x_adv = batches(1)[0], torch.zeros(6, FEATURES, dtype=torch.float64)
    objective(student, Prepared(x, y, x_adv))
    assert seen == [12 // updates] * updates
    if forwards == "separate":  # clean last
        torch.testing.assert_close(student[0].running_mean, 0.1 * x.mean(0))


def test_loss_is_the_mean_of_sample_losses():
    objective, student = mtard(), net(0)
    x, y = batches(1)[0]
    output = objective(student, objective.prepare(student, x, y))
    torch.testing.assert_close(output.sample_losses.mean(), output.loss)
    assert torch.equal(output.logits, student(x))


def test_scale_of_the_loss_leaves_the_balances_alone():
    student, losses, states = net(0), {}, []
    for name, options in {
        "element": {},
        "batch": {"reduction": "batchmean"},
        "ten": {"loss_factor": 10.0},
    }.items():
        objective = mtard(**options)
        for x, y in batches(3):
            losses[name] = objective(student, objective.prepare(student, x, y)).loss
        states.append(state(objective))
    torch.testing.assert_close(losses["batch"], CLASSES * losses["element"])
    torch.testing.assert_close(losses["ten"], 10 * losses["element"])
    for other in states[1:]:
        torch.testing.assert_close(other, states[0], rtol=1e-12, atol=0)


def test_what_is_logged():
    student, (x, y) = net(0), batches(1)[0]
    for objective in (mtard(), mtard(temperature_balance=False)):
        output = objective(student, objective.prepare(student, x, y))
        kinds = ["weight", "loss"] + (["temperature", "entropy"] if objective.adapts_temperatures else [])
        expected = {f"mtard_{teacher}_{kind}" for teacher in ("clean", "robust") for kind in kinds}
        assert set(output.logs) == expected
        assert all(not value.requires_grad and value.ndim == 0 for value in output.logs.values())
        pair = [output.logs[f"mtard_{kind}_loss"] * output.logs[f"mtard_{kind}_weight"] for kind in ("clean", "robust")]
        torch.testing.assert_close(sum(pair), output.loss.detach())


def test_evaluations_that_do_not_count_change_nothing_and_see_the_same_targets():
    objective, student = mtard(temperature_lr=0.5), net(0)
    (x, y), *others = batches(4)
    for images, labels in others:
        objective(student, objective.prepare(student, images, labels))
    prepared = objective.prepare(student, x, y)
    before = state(objective)
    objective.running = Running(counted=False)
    ascent = objective(student, prepared).loss
    assert torch.equal(state(objective), before)
    objective.running = Running()
    counted = objective(student, prepared).loss
    after = state(objective)
    assert not torch.equal(after, before)
    objective.running = Running(counted=False)
    again = objective(student, prepared).loss  # the second pass of SAM minimises what the first has
    assert torch.equal(again, counted)
    assert not torch.equal(ascent, counted)  # the weights have moved in between
    assert torch.equal(state(objective), after)
    objective.running = Running()
    objective.eval()
    objective(student, prepared)
    assert torch.equal(state(objective), after)


def test_the_teachers_are_asked_once_per_batch():
    asked = []

    class Counting(nn.Linear):
        def forward(self, x):
            asked.append(len(x))
            return super().forward(x)

    objective = MTARD(Counting(FEATURES, CLASSES).double(), net(2), attack=ATTACK)
    student, (x, y) = net(0), batches(1)[0]
    prepared = objective.prepare(student, x, y)
    for counted in (True, False, False):
        objective.running = Running(counted=counted)
        objective(student, prepared)
    assert asked == [6]


def window(objective, student, parts):
    losses = []
    for place, (x, y) in enumerate(parts):
        objective.running = Running(first=place == 0, last=place == len(parts) - 1)
        losses.append(objective(student, objective.prepare(student, x, y)).loss)
    objective.running = Running()
    return losses


def test_accumulated_batches_move_the_state_once_and_as_one_batch():
    student, whole, parted = net(0), mtard(temperature_lr=0.5), mtard(temperature_lr=0.5)
    for x, y in batches(6, size=7):
        whole(student, whole.prepare(student, x, y))
        before = state(parted)
        parted.running = Running(first=True, last=False)
        parted(student, parted.prepare(student, x[:2], y[:2]))  # a step that is never finished counts for nothing
        assert torch.equal(state(parted), before)
        window(parted, student, list(zip(x.split([3, 3, 1]), y.split([3, 3, 1]), strict=True)))
        torch.testing.assert_close(state(parted), state(whole), rtol=1e-12, atol=0)


def test_batches_before_the_last_are_weighted_by_what_is_known():
    student, objective = net(0), mtard(weight_lr=0.5)
    (first, second, third) = batches(3)
    window(objective, student, [first])
    alone = copy.deepcopy(objective)
    window(alone, student, [second])
    objective.running = Running(first=True, last=False)
    output = objective(student, objective.prepare(student, *second))
    told = torch.stack([output.logs["mtard_clean_weight"], output.logs["mtard_robust_weight"]])
    torch.testing.assert_close(told, alone.loss_balance.weights)  # as if the window ended here
    objective.running = Running(first=False, last=True)
    output = objective(student, objective.prepare(student, *third))
    told = torch.stack([output.logs["mtard_clean_weight"], output.logs["mtard_robust_weight"]])
    assert torch.equal(told, objective.loss_balance.weights)


def test_with_the_weights_of_the_previous_step_accumulation_changes_nothing_at_all():
    student = net(0)
    whole, parted = (mtard(weights_from="previous-step", weight_lr=0.5) for _ in range(2))
    for number, (x, y) in enumerate(batches(4, size=6)):
        before = whole.loss_balance.weights.clone()
        output = whole(student, whole.prepare(student, x, y))
        losses = window(parted, student, list(zip(x.split(2), y.split(2), strict=True)))
        torch.testing.assert_close(sum(losses) / 3, output.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(state(parted), state(whole), rtol=1e-12, atol=0)
        told = torch.stack([output.logs["mtard_clean_weight"], output.logs["mtard_robust_weight"]])
        assert torch.equal(told, before)
        assert number == 0 or not torch.equal(before, whole.loss_balance.weights)


def test_state_goes_on_from_a_checkpoint_and_never_begins_anew():
    student, (first, *rest) = net(0), batches(6)
    once = mtard()
    for x, y in (first, *rest[:2]):
        once(student, once.prepare(student, x, y))
    resumed = mtard()
    resumed.load_state_dict(once.state_dict())
    assert torch.equal(resumed.loss_balance.initial, once.loss_balance.initial)
    for x, y in rest[2:]:
        outputs = [objective(student, objective.prepare(student, x, y)).loss for objective in (once, resumed)]
        assert torch.equal(*outputs)
    assert torch.equal(state(once), state(resumed))
    assert not [name for name in once.state_dict() if "weight" in name and "balance" not in name]  # no teacher


def test_rates_follow_their_schedules():
    objective = mtard(weight_lr=Piecewise(values={0: 0.5, 2: 0.05}), temperature_lr=Linear(start=0.4, end=0.0))
    student, data = net(0), batches(4)
    with pytest.raises(RuntimeError, match="follow a schedule that was not told the epoch"):
        objective(student, objective.prepare(student, *data[0]))
    temperatures = []
    for epoch, (x, y) in enumerate(data[:3]):
        objective.epoch_starts(epoch, 3)
        objective(student, objective.prepare(student, x, y))
        temperatures.append(objective.temperature_balance.temperatures.max())
    moves = torch.stack(temperatures).diff(prepend=torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(moves, torch.tensor([0.4, 0.2, 0.0], dtype=torch.float64))


def test_logits_in_half_precision_are_compared_in_float32():
    objective = MTARD(net(1).float(), net(2).float(), attack=ATTACK)
    student = net(0).float()
    x, y = batches(1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = objective(student, objective.prepare(student, x.float(), y))
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert all(value.dtype in (torch.float32, torch.float64) for value in output.logs.values())


def test_a_teacher_that_is_saturated_gets_hotter_and_the_other_does_not():
    certain = net(1, scale=1e6)
    x, y = batches(1)[0]
    student = net(0)
    for entropy, expected in (("exact", [2.5, 1.5]), ("published", [2.5, 2.5])):
        objective = MTARD(
            certain,
            net(2, scale=0.1),
            attack=ATTACK,
            entropy=entropy,
            temperature_lr=0.5,
            initial_temperatures=(2.0, 2.0),
        )
        objective(student, Prepared(x, y, x))
        assert objective.temperature_balance.temperatures.tolist() == expected


def test_no_step_waits_for_the_device():
    """A tensor on the meta device has no value that anything could wait for."""
    objective, student = mtard().to("meta"), net(0).to("meta")
    x = torch.rand(6, FEATURES, dtype=torch.float64, device="meta")
    answers = {f"{kind} teacher": torch.rand(6, CLASSES, device="meta") for kind in ("clean", "robust")}
    for last in (False, True):
        objective.running = Running(first=not last, last=last)
        output = objective(student, Prepared(x, torch.zeros(6, device="meta"), x, answers))
    assert output.loss.device.type == "meta"


def test_passes_count_the_attack_and_two_forwards():
    assert mtard().passes(1) == ATTACK.passes + 2
    assert mtard().passes(2) == ATTACK.passes + 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_lr": 1.5}, r"`weight_lr` to be in \[0, 1\] but got 1.5"),
        ({"temperature_lr": -0.1}, "`temperature_lr` to be a finite number >= 0 but got -0.1"),
        ({"eps_log": -1.0}, "`eps_log` to be a finite number >= 0"),
        ({"loss_factor": 0.0}, "`loss_factor` to be a finite number > 0"),
        ({"reduction": "mean"}, "`reduction` to be one of 'elementmean', 'batchmean'"),
        ({"entropy": "code"}, "`entropy` to be one of 'exact', 'published'"),
        ({"weights_from": "now"}, "`weights_from` to be one of 'this-step', 'previous-step'"),
        ({"forwards": "published"}, "`forwards` to be one of 'separate', 'joint'"),
        ({"temperature_range": (10.0, 1.0)}, r"`limits` to be \(smallest, largest\) temperature"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        mtard(**options)


@pytest.mark.parametrize("place", ["clean", "robust"])
def test_a_teacher_with_other_classes_is_refused(place):
    teachers = {"clean_teacher": net(1), "robust_teacher": net(2)} | {f"{place}_teacher": net(3, classes=5)}
    objective, student = MTARD(**teachers, attack=ATTACK), net(0)
    x, y = batches(1)[0]
    with pytest.raises(ValueError, match=f"The {place} teacher of MTARD has 5 classes but the model has 3"):
        objective(student, objective.prepare(student, x, y))


def test_teachers_may_have_options_of_their_own():
    objective = MTARD(TeacherSource(net(1, classes=5), classes=[4, 0, 2]), net(2), attack=ATTACK)
    student, (x, y) = net(0), batches(1)[0]
    assert objective(student, objective.prepare(student, x, y)).loss.isfinite()


def test_processes_with_uneven_batches_are_one_process():
    """What each adds to the sum is collected first, then all get the sum."""
    student, whole, shares = net(0), mtard(temperature_lr=0.5), []

    def collected(share):
        shares.append(share)
        return share

    ranks = [mtard(temperature_lr=0.5) for _ in range(2)]
    for x, y in batches(5, size=7):
        whole(student, whole.prepare(student, x, y))
        parts = list(zip(x.split([5, 2]), y.split([5, 2]), strict=True))
        shares.clear()
        for objective, part in zip(ranks, parts, strict=True):
            trial = copy.deepcopy(objective)
            trial.running = Running(total=collected)
            trial(student, trial.prepare(student, *part))
        assert len(shares) == 2  # one sum per batch and process
        for objective, part in zip(ranks, parts, strict=True):
            objective.running = Running(total=lambda _: shares[0] + shares[1])
            objective(student, objective.prepare(student, *part))
            torch.testing.assert_close(state(objective), state(whole), rtol=1e-12, atol=0)
