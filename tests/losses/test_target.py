"""What losses see of a target: hard, soft and mixed, with class weights and ignored samples."""

import pytest
import torch

from lightning_robust.losses import MixedTarget, Target

Z = torch.tensor([[2.0, 0.0, -1.0], [1.0, 4.0, 0.5]])
WEIGHT = torch.tensor([1.0, 2.0, 3.0])
HARD = torch.tensor([0, 2])
MIXED = MixedTarget(HARD, torch.tensor([1, 2]), torch.tensor([0.25, 0.5]))


def dense(target):
    return (
        target.probabilities(3) if isinstance(target, MixedTarget) else torch.nn.functional.one_hot(target, 3).float()
    )


@pytest.mark.parametrize("target", [HARD, MIXED, dense(MIXED)], ids=["hard", "mixed", "dense"])
def test_all_forms_mean_the_same(target):
    t = target if isinstance(target, torch.Tensor) and target.is_floating_point() else dense(target)
    seen = Target.of(Z, target, weight=WEIGHT)
    torch.testing.assert_close(seen.expected(Z, torch.exp), (WEIGHT * t * Z.exp()).sum(1))
    torch.testing.assert_close(seen.pick(Z), (t * Z).sum(1))
    torch.testing.assert_close(seen.weighted(torch.ones(2)), (WEIGHT * t).sum(1))
    torch.testing.assert_close(seen.probabilities(Z), t)
    assert seen.soft == (target is not HARD)
    assert Target.of(Z, seen) is seen


def test_what_hard_labels_evaluate_is_only_what_they_look_up():
    shapes = []
    Target.of(Z, HARD).expected(Z, lambda values: shapes.append(values.shape) or values)
    assert shapes == [(2,)]


def test_a_mixed_pair_with_an_ignored_label_does_not_count():
    seen = Target.of(Z, MixedTarget(torch.tensor([0, -100]), torch.tensor([1, 2]), torch.tensor(0.5)))
    losses = seen.expected(Z)
    assert float(losses[0]) == 1.0
    assert float(seen.reduce(losses, "mean")) == 1.0
    assert seen.reduce(losses, "none").tolist() == [1.0, 0.0]


def test_dense_tasks_have_the_classes_in_dimension_one():
    z, y = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 1, 2, -100]] * 2)
    seen = Target.of(z, y)
    kept = z.movedim(1, 2).reshape(8, 3)[y.flatten() >= 0].gather(1, y[y >= 0][:, None])
    torch.testing.assert_close(seen.reduce(seen.expected(z), "mean"), kept.mean())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([0]), r"class indices of shape \(2,\)"),
        (torch.zeros(2, 4), r"probabilities of shape \(2, 3\)"),
        (MixedTarget(HARD, HARD, torch.zeros(3)), "a mixed target of two labels"),
    ],
    ids=["labels", "probabilities", "mixed"],
)
def test_shapes_that_do_not_fit_are_refused(target, message):
    with pytest.raises(ValueError, match=message):
        Target.of(Z, target)


@pytest.mark.parametrize("use", ["expected", "probabilities"])
def test_labels_that_are_no_class_are_refused(use):
    with pytest.raises(ValueError, match=r"Expected labels to be in \[0, 2\] .* but got 3"):
        getattr(Target.of(Z, torch.tensor([0, 3])), use)(Z)


def test_soft_targets_have_no_labels():
    with pytest.raises(ValueError, match="OKO needs class indices"):
        Target.of(Z, MIXED).labels("OKO")
