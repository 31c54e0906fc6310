import copy

import pytest
import torch

from lightning_robust.losses import CALS, MaxSup, MbLS, margin_penalty
from support.simulated import together


def random_logits(scale=3.0, samples=6):
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(samples, 5, generator=generator, dtype=torch.float64)


def by_hand(logits, margin, weights):
    """Sample by sample, class by class."""
    rows = logits.tolist()
    values = [
        sum(w * max(0.0, max(row) - z - margin) for z, w in zip(row, weights, strict=True)) / len(row) for row in rows
    ]
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("margin", [0.0, 2.0, 10.0])
def test_is_the_mean_excess_over_the_margin(margin):
    logits = random_logits()
    torch.testing.assert_close(margin_penalty(logits, margin=margin), by_hand(logits, margin, [1.0] * 5))
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.25])
    weighted = margin_penalty(logits, margin=margin, class_weights=weights)
    torch.testing.assert_close(weighted, by_hand(logits, margin, weights.tolist()))


def test_without_a_margin_it_is_maxsup():
    logits = random_logits().requires_grad_()
    pair = MbLS(alpha=0.2, margin=0.0)(logits), MaxSup(alpha=0.2)(logits)
    torch.testing.assert_close(*pair)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in pair))


def test_gradients_flow_through_the_largest_logit():
    logits = torch.tensor([[5.0, 0.0, 4.0]], dtype=torch.float64, requires_grad=True)
    margin_penalty(logits, margin=3.0).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1 / 3, -1 / 3, 0.0]], dtype=torch.float64))


def test_a_tie_sends_the_gradient_to_one_index():
    logits = torch.tensor([[5.0, 5.0, 0.0]], requires_grad=True)
    margin_penalty(logits, margin=3.0).sum().backward()
    assert sorted(logits.grad[0].tolist()) == pytest.approx([-1 / 3, 0.0, 1 / 3])


def test_dense_logits_and_masked_samples():
    logits = 5 * torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    flat = margin_penalty(logits.movedim(1, -1).flatten(0, 1), margin=1.0).reshape(2, 3)
    torch.testing.assert_close(margin_penalty(logits, margin=1.0), flat)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    torch.testing.assert_close(MbLS(alpha=1.0, margin=1.0)(logits, mask), flat[mask].mean())
    weights = CALS(num_classes=4, alpha=1.0, margin=1.0)
    torch.testing.assert_close(weights(logits, mask), flat[mask].mean())


def test_many_classes_and_two():
    for classes in (2, 21_000):
        logits = (20 * torch.randn(3, classes, generator=torch.Generator().manual_seed(2))).requires_grad_()
        CALS(num_classes=classes)(logits).backward()
        assert bool(logits.grad.isfinite().all())


def test_refusals():
    with pytest.raises(ValueError, match="Expected `margin` to be a finite number >= 0 but got -1"):
        MbLS(margin=-1.0)
    with pytest.raises(ValueError, match=r"Expected `gamma` to be > 1 but got 1\.0"):
        CALS(num_classes=3, gamma=1.0)
    with pytest.raises(ValueError, match="Expected `tau` to be >= 1 but got nan"):
        CALS(num_classes=3, tau=float("nan"))
    with pytest.raises(ValueError, match="Expected `every` to be an integer >= 1 but got 0"):
        CALS(num_classes=3, every=0)
    with pytest.raises(ValueError, match="Expected logits of 3 classes, as `num_classes` says, but got 5"):
        CALS(num_classes=3)(random_logits())
    with pytest.raises(RuntimeError, match="saw no validation sample"):
        CALS(num_classes=3).validation_ends(lambda tensor: tensor)


def epoch(cals, logits, labels=None):
    with torch.inference_mode():  # as in a validation loop
        labels = torch.zeros(len(logits), dtype=torch.long) if labels is None else labels
        for part, label in zip(logits.split(2), labels.split(2), strict=True):
            cals.observe(part, label)
        cals.validation_ends(lambda tensor: tensor)


def test_weights_follow_the_score_of_their_class():
    # gaps of the classes in three validation epochs; the weights enter the scores
    gaps = [[0.0, 4.0, 4.0, 4.0, 0.0], [0.0, 8.0, 4.2, 2.0, 0.0], [0.0, 8.0, 4.2, 9.0, 0.0]]
    cals, weights, previous = CALS(num_classes=5, margin=1.0, gamma=2.0, tau=1.1), [1.0] * 5, None
    for row in gaps:
        score = [w * max(0.0, gap - 1.0) for w, gap in zip(weights, row, strict=True)]
        if previous is not None:
            steps = zip(weights, score, previous, strict=True)
            weights = [w * 2 if s > 1.1 * p else w / 2 if s < p / 1.1 else w for w, s, p in steps]
        previous = score
        epoch(cals, -torch.tensor([row, row, row]))
        assert cals.class_weights.tolist() == weights
        torch.testing.assert_close(cals.score, torch.tensor(score))
    assert weights == [1.0, 4.0, 1.0, 1.0, 1.0]
    logits = random_logits()
    torch.testing.assert_close(cals(logits), 0.1 * by_hand(logits, 1.0, weights).mean())


def test_weights_change_every_so_many_epochs():
    cals = CALS(num_classes=2, margin=1.0, gamma=2.0, every=2)
    seen = []
    for gap in (2.0, 4.0, 8.0, 16.0):
        epoch(cals, torch.tensor([[gap, 0.0]]))
        seen.append(cals.class_weights[1].item())
    assert seen == [1.0, 2.0, 2.0, 4.0]


def test_weights_are_bounded():
    cals = CALS(num_classes=2, margin=0.0, gamma=1e3, tau=1.0)
    for power in range(8):
        epoch(cals, torch.tensor([[2.0**power, 0.0]]))
    assert cals.class_weights.tolist() == [1.0, 1e6]


def test_observations_leave_out_what_is_no_class():
    cals, alone = CALS(num_classes=5, margin=1.0), CALS(num_classes=5, margin=1.0)
    logits, labels = random_logits(), torch.tensor([0, -100, 2, 255, 4, 1])
    epoch(cals, logits, labels)
    kept = (labels >= 0) & (labels < 5)
    epoch(alone, logits[kept], labels[kept])
    torch.testing.assert_close(cals.score, alone.score)
    soft = CALS(num_classes=5, margin=1.0)
    soft.observe(logits, logits.softmax(1))
    soft.validation_ends(lambda tensor: tensor)
    torch.testing.assert_close(soft.score.double(), (logits.amax(1, True) - logits - 1).relu().mean(0))


def test_training_after_a_validation_epoch_in_inference_mode():
    cals = CALS(num_classes=5, margin=1.0)
    for scale in (1.0, 3.0):
        epoch(cals, random_logits(scale))
    logits = random_logits().requires_grad_()
    cals(logits).backward()
    assert bool(logits.grad.any())


def test_processes_of_different_size_agree_with_one():
    logits = [random_logits(scale, 9) for scale in (1.0, 3.0, 5.0)]
    whole = CALS(num_classes=5, margin=1.0, gamma=1.5)
    parts = [copy.deepcopy(whole), copy.deepcopy(whole)]
    for each in logits:
        epoch(whole, each)
        for part, rows in zip(parts, (each[:2], each[2:]), strict=True):
            part.observe(rows, torch.zeros(len(rows), dtype=torch.long))

        def close(part, mean):
            def total(tensor):
                mean([tensor])
                return 2 * tensor

            part.validation_ends(total)

        together(parts, [close, close])
        for part in parts:
            torch.testing.assert_close(part.score, whole.score)
            assert torch.equal(part.level, whole.level)
    assert bool(whole.level.any())


def test_the_state_continues():
    cals = CALS(num_classes=5, margin=1.0)
    for scale in (1.0, 3.0):
        epoch(cals, random_logits(scale))
    restored = CALS(num_classes=5, margin=1.0)
    restored.load_state_dict(cals.state_dict())
    for each in (cals, restored):
        epoch(each, random_logits(5.0))
    assert torch.equal(restored.class_weights, cals.class_weights)
    assert torch.equal(restored.score, cals.score)
