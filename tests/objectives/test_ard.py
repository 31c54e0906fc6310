"""ARD against its formula, order of passes and statistics."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.objectives import ARD, ard_loss
from support.attacked import CountingNet, images


def nets(seed=3):
    torch.manual_seed(seed)
    return CountingNet().double().train(), CountingNet().double()


def objective(teacher, **options):
    return ARD(teacher, **{"attack": PGD(eps=0.1, steps=2, mode="train"), **options})


@pytest.mark.parametrize("alpha", [1.0, 0.75])
@pytest.mark.parametrize("reduction", ["elementmean", "batchmean"])
def test_loss_and_gradients(alpha, reduction):
    clean, adv = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    teacher, y = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (6,))
    options = {"alpha": alpha, "temperature": 3.0, "reduction": reduction, "loss_factor": 2.0}
    loss, distilled, natural = ard_loss(clean, adv, teacher, y, **options)
    q = (teacher / 3).softmax(1).detach()
    kl = (q * (q.log() - (adv / 3).log_softmax(1))).sum(1).mean() / (5 if reduction == "elementmean" else 1)
    torch.testing.assert_close(distilled, 2 * 9 * kl)
    torch.testing.assert_close(natural, F.cross_entropy(clean, y))
    whole = alpha * 2 * 9 * kl + (1 - alpha) * F.cross_entropy(clean, y)
    torch.testing.assert_close(loss, whole)
    expected = torch.autograd.grad(whole, [clean, adv], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, [clean, adv], retain_graph=True), expected)
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)


def test_the_teacher_sees_clean_images_and_the_student_the_attacked_ones_first():
    student, teacher = nets()
    x, y = images(dtype=torch.float64)
    ard = objective(teacher, alpha=0.5, temperature=2.0)
    student.eval()
    prepared = ard.prepare(student, x, y)
    torch.testing.assert_close(prepared.extra["teacher"], teacher.eval()(x).detach())
    seen = []
    output = ard(lambda images: seen.append(images) or student(images), prepared)
    assert [images is part for images, part in zip(seen, (prepared.x_adv, x), strict=True)] == [True, True]
    expected, *_ = ard_loss(student(x), student(prepared.x_adv), teacher(x), y, alpha=0.5, temperature=2.0)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.sample_losses.mean(), expected)
    torch.testing.assert_close(output.logits, student(x))
    torch.testing.assert_close(output.logs["distilled"] * 0.5 + output.logs["natural"] * 0.5, expected)


def test_published_attack_moves_the_statistics():
    student, teacher = nets()
    x, y = images(dtype=torch.float64)
    ard = ARD(teacher)
    assert ard.attack.mode == "train"
    prepared = ard.prepare(student, x, y)
    assert int(student.norm.num_batches_tracked) == 10
    ard(student, prepared)
    assert int(student.norm.num_batches_tracked) == 12


def test_cost():
    _, teacher = nets()
    assert objective(teacher).passes(2) == 2 + 2 * 1.5
    assert objective(teacher, alpha=0.5).passes(2) == 2 + 2 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"`alpha` to be in \[0, 1\]"),
        ({"temperature": 0.0}, "`temperature` to be a finite number > 0"),
        ({"loss_factor": -1.0}, "`loss_factor` to be a finite number >= 0"),
        ({"reduction": "mean"}, "`reduction` to be one of 'batchmean', 'elementmean' but got 'mean'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        objective(torch.nn.Linear(4, 3), **options)
