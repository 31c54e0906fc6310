"""Targets in place of labels: what a wrapped objective is told, and LTD."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD, ScheduledAttack
from lightning_robust.objectives import (
    LTD,
    MART,
    TRADES,
    AdversarialCrossEntropy,
    Objective,
    ObjectiveOutput,
    Prepared,
    Running,
    SoftTargets,
    ltd_targets,
)
from lightning_robust.schedules import Linear
from support.attacked import SIZE, CountingNet, images

ATTACK = PGD(eps=0.1, steps=2)


def seeded():
    return torch.Generator().manual_seed(0)


class Told(Objective):
    """Writes down what it is told."""

    def __init__(self):
        super().__init__()
        self.heard = []

    @property
    def needs_index(self):
        return True

    def ready(self, num_classes=None, in_chans=None):
        self.heard.append(("ready", num_classes, in_chans))

    def epoch_starts(self, epoch, max_epochs):
        self.heard.append(("epoch_starts", epoch, max_epochs))

    def batch_ends(self, output, total):
        self.heard.append(("batch_ends", output.logs))

    def step_ends(self, model, total):
        self.heard.append(("step_ends", total(1)))

    def epoch_ends(self, epoch, total):
        self.heard.append(("epoch_ends", epoch))

    def passes(self, inner):
        return 7 * inner

    def prepare(self, model, x, y, *, generator=None):
        return Prepared(x, y, extra={"first": y})

    def forward(self, model, prepared):
        logits = model(prepared.x)
        return ObjectiveOutput(F.cross_entropy(logits, prepared.y), logits, {})


class Uniform(SoftTargets):
    def targets(self, model, x, y):
        return torch.full((len(y), 4), 0.25, requires_grad=True)


def test_the_objective_inside_is_told_everything():
    inside = Told()
    objective = Uniform(objective=inside)
    objective.ready(4, 3)
    objective.epoch_starts(2, 9)
    objective.batch_ends(ObjectiveOutput(torch.zeros(()), torch.zeros(1, 4), {"a": 1}), None)
    objective.step_ends(None, lambda value: value + 1)
    objective.epoch_ends(2, None)
    assert inside.heard == [
        ("ready", 4, 3),
        ("epoch_starts", 2, 9),
        ("batch_ends", {"a": 1}),
        ("step_ends", 2),
        ("epoch_ends", 2),
    ]
    assert objective.needs_index
    assert objective.passes(2) == 14
    assert (objective.attack, objective.current_attack, objective.attacks) == (None, None, False)
    running = Running(step=3, counted=False)
    objective.running = running
    assert inside.running is objective.running is running
    assert not objective.recording
    assert not inside.recording


def test_the_targets_take_the_place_of_the_labels_without_gradients():
    x, y = images()
    objective = Uniform(objective=Told())
    prepared = objective.prepare(CountingNet(), x, y)
    assert torch.equal(prepared.y, torch.full((8, 4), 0.25))
    assert torch.equal(prepared.extra["first"], prepared.y)
    assert not prepared.y.requires_grad


def test_the_attack_may_keep_the_labels():
    x, y = images()
    net = CountingNet().eval()
    found = {
        attack_with: Uniform(objective=AdversarialCrossEntropy(attack=ATTACK), attack_with=attack_with).prepare(
            net, x, y, generator=seeded()
        )
        for attack_with in ("targets", "labels")
    }
    assert torch.equal(found["targets"].y, found["labels"].y)
    assert torch.equal(found["labels"].x_adv, ATTACK(net, x, y, generator=seeded()))
    assert torch.equal(found["targets"].x_adv, ATTACK(net, x, found["targets"].y, generator=seeded()))
    assert not torch.equal(found["targets"].x_adv, found["labels"].x_adv)


def test_a_scheduled_attack_inside_is_followed():
    scheduled = ScheduledAttack(PGD(eps=0.2, steps=1), eps=Linear(start=0.0, end=0.2, epochs=3))
    objective = Uniform(objective=AdversarialCrossEntropy(attack=scheduled))
    assert objective.attacks
    assert objective.attack is scheduled
    objective.epoch_starts(0, 3)
    x, y = images()
    assert torch.equal(objective.prepare(CountingNet().eval(), x, y).x_adv, x)
    assert objective.current_attack is objective.objective.current_attack


@pytest.mark.parametrize("inside", [TRADES(attack=ATTACK), MART(attack=ATTACK), AdversarialCrossEntropy(attack=ATTACK)])
def test_ltd_is_the_objective_on_the_teachers_soft_labels(inside):
    x, y = images(dtype=torch.float64)
    net, teacher = CountingNet().double().eval(), CountingNet().double().eval()
    objective = LTD(teacher=teacher, temperature=3.0, objective=inside)
    ours = objective(net, objective.prepare(net, x, y, generator=seeded()))
    soft = (teacher(x).detach() / 3).softmax(1)
    theirs = inside(net, inside.prepare(net, x, soft, generator=seeded()))
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(each.loss, list(net.parameters())) for each in (ours, theirs)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    assert objective.passes(1) == inside.passes(1)


def test_no_temperature_of_the_student_and_no_factor():
    logits = torch.tensor([[5.0, 0.0, -5.0]])
    torch.testing.assert_close(ltd_targets(logits, 5.0), torch.tensor([[1.0, 0.0, -1.0]]).softmax(1))
    assert ltd_targets(logits.bfloat16(), 5.0).dtype == torch.float32
    assert not ltd_targets(logits.clone().requires_grad_(), 5.0).requires_grad


def test_the_state_holds_the_fingerprint_of_the_teacher_and_no_weights(tmp_path):
    teacher = CountingNet()
    objective = LTD(teacher=teacher, objective=AdversarialCrossEntropy(attack=ATTACK))
    state = objective.state_dict()
    assert list(state) == ["_extra_state"]
    assert list(objective.parameters()) == []
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    x, y = images()
    same, other = (
        LTD(teacher=each, objective=AdversarialCrossEntropy(attack=ATTACK)) for each in (teacher, CountingNet())
    )
    same.load_state_dict(state)
    same.prepare(CountingNet(), x, y)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="same teacher"):
        other.prepare(CountingNet(), x, y)


@pytest.mark.parametrize(
    "inside", [TRADES(attack=PGD(eps=0.1, steps=1, loss="kl")), AdversarialCrossEntropy(attack=ATTACK)]
)
def test_a_teacher_of_other_classes_is_refused(inside):
    x, y = images()
    objective = LTD(teacher=CountingNet(classes=7), objective=inside)
    net = CountingNet()
    with pytest.raises(ValueError, match="targets of LTD have 7 classes but the model has 4; take a teacher"):
        objective(net, objective.prepare(net, x, y))


def test_what_is_no_objective_and_what_is_out_of_range_is_refused():
    with pytest.raises(TypeError, match="`objective` to be a Objective but got str"):
        Uniform(objective="trades")
    with pytest.raises(ValueError, match="attack_with"):
        Uniform(objective=Told(), attack_with="both")
    with pytest.raises(ValueError, match="`temperature` to be a finite number > 0"):
        LTD(teacher=nn.Linear(3 * SIZE * SIZE, 4), temperature=0.0)
