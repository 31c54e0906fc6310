"""What holds for every loss that compares logits."""

import copy
import pickle

import pytest
import torch

from lightning_robust.distillation import DistillationLoss, SampleDistillationLoss
from support.distillation_losses import NAMES, SAMPLE_NAMES, build, call, labels, logits

B, C = 7, 5
STUDENT, TEACHER, LABELS = logits(0, B, C), logits(1, B, C), labels(2, C, B)

every = pytest.mark.parametrize("name", NAMES)
every_mean = pytest.mark.parametrize("name", SAMPLE_NAMES)


def value_and_gradient(name, student, teacher, target):
    student = student.clone().requires_grad_()
    loss = call(build(name), student, teacher, target)
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient


def test_the_losses_of_this_page_are_among_them():
    assert {"KD", "DKD", "DIST", "NKD", "PLD", "FKD", "FerKD", "SquaredErrorLogit"} <= set(NAMES)
    assert len({build(name).name for name in NAMES}) == len(NAMES)  # logs would overwrite each other
    assert set(NAMES) - set(SAMPLE_NAMES) == {"DIST"}


@every
def test_a_scalar_with_the_gradient_of_differences(name):
    loss, gradient = value_and_gradient(name, STUDENT, TEACHER, LABELS)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    student = STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: call(build(name), z, TEACHER, LABELS), student)
    assert gradient.abs().max() > 1e-3


@every
def test_no_gradient_reaches_the_teacher(name):
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    call(build(name), student, teacher, LABELS).backward()
    assert teacher.grad is None
    assert student.grad is not None


@every
def test_inputs_are_left_alone(name):
    student, teacher, target = STUDENT.clone(), TEACHER.clone(), LABELS.clone()
    call(build(name), student, teacher, target)
    assert torch.equal(student, STUDENT)
    assert torch.equal(teacher, TEACHER)
    assert torch.equal(target, LABELS)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast_computes_in_float32(name, dtype):
    student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        half, half_gradient = value_and_gradient(name, student, teacher, LABELS)
    full, full_gradient = value_and_gradient(name, student.float(), teacher.float(), LABELS)
    assert half.dtype == torch.float32
    assert half == full
    assert torch.equal(half_gradient, full_gradient.to(dtype))


@every
def test_float32_is_close_to_float64(name):
    exact, exact_gradient = value_and_gradient(name, STUDENT, TEACHER, LABELS)
    single, single_gradient = value_and_gradient(name, STUDENT.float(), TEACHER.float(), LABELS)
    torch.testing.assert_close(single.double(), exact, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(single_gradient.double(), exact_gradient, rtol=2e-5, atol=2e-6)


@every
@pytest.mark.parametrize(("size", "rtol"), [(120.0, 1e-5), (1e4, 3e-3)])
def test_extreme_logits_stay_finite_and_right(name, size, rtol):
    rows = torch.tensor([[size, -size, 0.0, 0.0], [-size, size, -size, -size], [0.0, 0.0, size, size]])
    target = torch.tensor([1, 0, 3])
    for student, teacher in ((rows, rows.roll(1, 1)), (rows, rows), (0 * rows, rows), (rows, 0 * rows)):
        loss, gradient = value_and_gradient(name, student, teacher, target)
        exact, exact_gradient = value_and_gradient(name, student.double(), teacher.double(), target)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        torch.testing.assert_close(loss.double(), exact, rtol=rtol, atol=rtol / 10)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=rtol, atol=rtol / 10)


@every
def test_a_constant_in_the_logits_does_not_matter(name):
    if name == "FocalLogitMatching":
        pytest.skip("compares the logits themselves")
    loss = call(build(name), STUDENT, TEACHER, LABELS)
    torch.testing.assert_close(call(build(name), STUDENT + 7, TEACHER - 3, LABELS), loss)


@every
def test_positions_count_like_samples(name):
    volume = [tensor.view(B, 1, 1, C).permute(0, 3, 1, 2) for tensor in (STUDENT, TEACHER)]
    expected, gradient = value_and_gradient(name, STUDENT, TEACHER, LABELS)
    found, found_gradient = value_and_gradient(name, *volume, LABELS.view(B, 1, 1))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_gradient.view(B, C), gradient)
    wide = [tensor[:6].view(2, 3, C).movedim(2, 1) for tensor in (STUDENT, TEACHER)]
    found, _ = value_and_gradient(name, *wide, LABELS[:6].view(2, 3))
    torch.testing.assert_close(found, call(build(name), STUDENT[:6], TEACHER[:6], LABELS[:6]))


@every
def test_the_order_of_samples_and_of_classes_does_not_matter(name):
    samples, classes = torch.randperm(B), torch.randperm(C)
    target = classes.argsort()[LABELS]  # where each label's class went
    shuffled = (tensor[:, classes][samples] for tensor in (STUDENT, TEACHER))
    torch.testing.assert_close(
        call(build(name), *shuffled, target[samples]), call(build(name), STUDENT, TEACHER, LABELS)
    )


@every
def test_other_shapes_are_refused(name):
    with pytest.raises(ValueError, match=r"`teacher_logits` of the student's shape \(7, 5\).*got \(7, 6\)"):
        call(build(name), STUDENT, logits(1, B, C + 1), LABELS)
    with pytest.raises(ValueError, match=r"`teacher_logits` of the student's shape \(7, 5\).*got \(6, 5\)"):
        call(build(name), STUDENT, TEACHER[:6], LABELS)
    with pytest.raises(ValueError, match=r"\(7,\)"):
        call(build(name), STUDENT[:, 0], TEACHER[:, 0], LABELS)


@every
def test_copies_and_pickles(name):
    loss = build(name)
    expected = call(loss, STUDENT, TEACHER, LABELS)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert call(twin, STUDENT, TEACHER, LABELS) == expected
    assert not loss.state_dict()


@every
def test_repr_names_the_arguments(name):
    shown = repr(build(name))
    arguments = [key for key in vars(build(name)) if not key.startswith("_") and key not in ("training", "warmup")]
    assert all(f"{argument}=" in shown for argument in arguments)


@every
def test_compiles(name):
    torch._dynamo.reset()
    compiled = torch.compile(build(name), backend="eager", fullgraph=True)
    args = (STUDENT, TEACHER, LABELS) if build(name).needs_target else (STUDENT, TEACHER)
    torch.testing.assert_close(compiled(*args), build(name)(*args))


@every_mean
def test_the_loss_is_the_mean_of_its_samples(name):
    loss = build(name)
    target = LABELS if loss.needs_target else None
    each = loss.sample_losses(STUDENT, TEACHER, target)
    assert each.shape == (B,)
    kept = (TEACHER.softmax(1).amax(1) >= 0.4) if name == "FerKD" else torch.ones(B)
    torch.testing.assert_close(loss(STUDENT, TEACHER, target), each.sum() / kept.sum())
    for i in range(B):
        one = loss.sample_losses(*(None if t is None else t[i : i + 1] for t in (STUDENT, TEACHER, target)))
        torch.testing.assert_close(one, each[i : i + 1])


@every_mean
def test_the_samples_are_computed_in_float32_too(name):
    loss = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        each = loss.sample_losses(STUDENT.bfloat16(), TEACHER.bfloat16(), LABELS if loss.needs_target else None)
    assert each.dtype == torch.float32


@every_mean
def test_no_samples_give_zero(name):
    student = STUDENT[:0].clone().requires_grad_()
    loss = call(build(name), student, TEACHER[:0], LABELS[:0])
    assert loss == 0
    loss.backward()


@every_mean
def test_labels_that_are_needed(name):
    loss = build(name)
    if not loss.needs_target:
        assert loss(STUDENT, TEACHER) == loss(STUDENT, TEACHER, LABELS)
        return
    with pytest.raises(ValueError, match=f"{name} needs the labels of the samples; pass `target`"):
        loss(STUDENT, TEACHER)
    with pytest.raises(ValueError, match="Expected `target` to be class indices of shape"):
        loss(STUDENT, TEACHER, LABELS[:3])
    if not name.startswith("Focal"):  # a label that the teacher does not know is no mistake there
        with pytest.raises(ValueError, match=r"labels to be in \[0, 4\]"):
            loss(STUDENT, TEACHER, torch.full_like(LABELS, 5))


@every_mean
def test_ignored_labels_do_not_count(name):
    loss = build(name)
    if not loss.needs_target:
        pytest.skip("does not look at labels")
    some = LABELS.clone()
    some[[1, 4]] = -100
    kept = some != -100
    student = STUDENT.clone().requires_grad_()
    found = loss(student, TEACHER, some)
    torch.testing.assert_close(found, loss(STUDENT[kept], TEACHER[kept], LABELS[kept]))
    (gradient,) = torch.autograd.grad(found, student)
    assert (gradient[~kept] == 0).all()
    nothing = loss(student, TEACHER, torch.full_like(LABELS, -100))
    assert nothing == 0
    assert (torch.autograd.grad(nothing, student)[0] == 0).all()


def test_a_mean_written_by_a_user():
    class Half(SampleDistillationLoss):
        needs_target = True

        def sample_losses(self, student_logits, teacher_logits, target=None):
            assert student_logits.dtype == teacher_logits.dtype == torch.float32
            assert not teacher_logits.requires_grad
            assert (student_logits @ student_logits.T).dtype == torch.float32  # autocast is off
            return (student_logits - teacher_logits).square().mean(1)

    student, teacher = STUDENT.bfloat16(), TEACHER.bfloat16().requires_grad_()
    target = torch.tensor([0, -100, 0, 0, 0, 0, 0])
    with torch.autocast("cpu", torch.bfloat16):
        found = Half()(student, teacher, target)
    kept = target == 0
    torch.testing.assert_close(found, (student.float() - teacher.float())[kept].square().mean().detach())


def test_epochs_may_be_told_to_any_loss():
    DistillationLoss().epoch_starts(0, -1)
    with pytest.raises(TypeError, match="abstract"):
        SampleDistillationLoss()
