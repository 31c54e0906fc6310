"""IGDM around other objectives: its term, its ramp, and whose passes it uses."""

import pytest
import torch

from lightning_robust.attacks import PGD
from lightning_robust.objectives import (
    IADII,
    IGDM,
    RSLAD,
    TRADES,
    AdaAD,
    AdversarialCrossEntropy,
    Objective,
    ObjectiveOutput,
    Prepared,
    Running,
    igdm_loss,
)
from support.attacked import CountingNet, images


def nets(seed=3):
    torch.manual_seed(seed)
    return CountingNet().double().train(), CountingNet().double()


def attack(**options):
    return PGD(**{"eps": 0.1, "steps": 2, "loss": "kl", "random_start": "normal", **options})


def trades(**options):
    return TRADES(attack=attack(), **options)


class Clean(Objective):
    def prepare(self, model, x, y, *, generator=None):
        return Prepared(x, y)

    def forward(self, model, prepared):
        logits = model(prepared.x)
        return ObjectiveOutput(logits.sum(), logits, {})


def test_term_and_gradients():
    plus, minus, t_plus, t_minus = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(4))
    q = (t_plus - t_minus).softmax(1).detach()
    expected = (q * (q.log() - (plus - minus).log_softmax(1))).sum(1)
    found = igdm_loss(plus, minus, t_plus, t_minus)
    torch.testing.assert_close(found, expected)
    pair = [plus, minus]
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), pair, retain_graph=True), torch.autograd.grad(expected.sum(), pair)
    )
    assert torch.autograd.grad(found.sum(), [t_plus, t_minus], allow_unused=True) == (None, None)


@pytest.mark.parametrize("kind", ["adaad", "rslad", "trades", "joint"])
def test_added_to_any_objective(kind):
    student, teacher = nets()
    student.eval()
    x, y = images(dtype=torch.float64)
    inner = {
        "adaad": lambda: AdaAD(teacher, alpha=0.5, attack=attack()),
        "rslad": lambda: RSLAD(teacher, attack=attack()),
        "trades": trades,
        "joint": lambda: trades(forwards="joint"),
    }[kind]()
    own = teacher if isinstance(inner, TRADES) else None
    igdm = IGDM(objective=inner, alpha=4.0, ramp="none", teacher=own)
    prepared = igdm.prepare(student, x, y, generator=torch.Generator().manual_seed(0))
    expected = inner(student, inner.prepare(student, x, y, generator=torch.Generator().manual_seed(0)))
    mirror = x - (prepared.x_adv - x)
    teacher.eval()
    pair = [student(prepared.x_adv), student(mirror)]
    term = igdm_loss(*pair, teacher(prepared.x_adv), teacher(mirror))
    student.batches.clear()
    output = igdm(student, prepared)
    assert student.batches == ([16, 8, 8] if kind == "joint" else [8, 8, 8])
    torch.testing.assert_close(output.loss, expected.loss + 4 * term.mean())
    torch.testing.assert_close(output.sample_losses, expected.sample_losses + 4 * term)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.logs, {**expected.logs, "igdm": term.mean().detach()})
    parameters = list(student.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(output.loss, parameters), torch.autograd.grad(expected.loss + 4 * term.mean(), parameters)
    )
    assert igdm.passes(2) == inner.passes(2) + 2


def test_mirror_images_may_leave_the_pixels():
    student, teacher = nets()
    x, y = images(dtype=torch.float64)
    x[:4], x[4:] = 0.0, 1.0
    igdm = IGDM(objective=RSLAD(teacher, attack=attack()), ramp="none")
    prepared = igdm.prepare(student, x, y)
    mirror = prepared.extra["igdm_mirror"]
    assert float(mirror.min()) < 0
    assert float(mirror.max()) > 1
    torch.testing.assert_close(mirror + prepared.x_adv, 2 * x)


def test_ramp():
    _, teacher = nets()
    igdm = IGDM(objective=RSLAD(teacher), alpha=10.0)
    weights = []
    for epoch in range(4):
        igdm.epoch_starts(epoch, 4)
        weights.append(igdm.ramp.weight)
    assert weights == [2.5, 5.0, 7.5, 10.0]
    fixed = IGDM(objective=RSLAD(teacher), alpha=10.0, epochs=2)
    for epoch, weight in ((0, 5.0), (1, 10.0), (2, 10.0)):
        fixed.epoch_starts(epoch, -1)
        assert fixed.ramp.weight == weight
    with pytest.raises(ValueError, match="A weight of IGDM grows over the epochs, of unknown number; set `epochs`"):
        igdm.epoch_starts(0, -1)
    constant = IGDM(objective=RSLAD(teacher), alpha=3.0, ramp="none")
    constant.epoch_starts(0, -1)
    assert constant.ramp.weight == 3.0


def test_everything_is_handed_on():
    _, teacher = nets()
    inner = RSLAD(teacher, attack=attack())
    igdm = IGDM(objective=inner)
    igdm.running = Running(step=7)
    assert inner.running.step == 7
    assert igdm.attack is inner.attack
    assert igdm.current_attack is inner.attack
    assert igdm.attacks
    assert igdm.teachers is inner.teachers
    assert not igdm.needs_index
    assert "alpha=1.0, ramp='linear', epochs=None" in repr(igdm)


def test_state_holds_the_fingerprint_of_its_own_teacher():
    student, teacher = nets()
    x, y = images(dtype=torch.float64)
    igdm = IGDM(objective=trades(), teacher=teacher)
    state = igdm.state_dict()
    assert not any(isinstance(value, torch.Tensor) for value in state.values())
    same = IGDM(objective=trades(), teacher=teacher)
    same.load_state_dict(state)
    same.prepare(student, x, y)
    other = IGDM(objective=trades(), teacher=CountingNet().double())
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="was trained with the teacher CountingNet"):
        other.prepare(student, x, y)
    shared = IGDM(objective=RSLAD(teacher))
    shared.load_state_dict(shared.state_dict())
    assert shared.get_extra_state() == {}


def test_refusals(tmp_path):
    student, teacher = nets()
    x, y = images(dtype=torch.float64)
    with pytest.raises(TypeError, match="`objective`"):
        IGDM(objective=teacher)
    with pytest.raises(ValueError, match="both sides of an attack but Clean does not attack; give AdaAD"):
        IGDM(objective=Clean(), teacher=teacher)
    with pytest.raises(ValueError, match="the teacher of TRADES but it has none; give the one to match as `teacher`"):
        IGDM(objective=trades())
    two = IADII(teacher, clean_teacher=teacher)
    with pytest.raises(ValueError, match="the teacher of IADII but it has teacher and clean teacher; give the one"):
        IGDM(objective=two)
    with pytest.raises(ValueError, match="`alpha` to be a finite number >= 0"):
        IGDM(objective=RSLAD(teacher), alpha=-1.0)
    with pytest.raises(ValueError, match="`ramp` to be one of"):
        IGDM(objective=RSLAD(teacher), ramp="cosine")
    with pytest.raises(ValueError, match="`epochs` to be an integer >= 1"):
        IGDM(objective=RSLAD(teacher), epochs=0)
    wrong = IGDM(objective=trades(), teacher=CountingNet(3).double())
    with pytest.raises(ValueError, match="teacher of IGDM has 3 classes but the model has 4; take a teacher"):
        wrong(student, wrong.prepare(student, x, y))
    missing = IGDM(objective=AdversarialCrossEntropy(attack=attack()), teacher=str(tmp_path / "none.ckpt"))
    with pytest.raises(FileNotFoundError):
        missing.ready(4, 3)
