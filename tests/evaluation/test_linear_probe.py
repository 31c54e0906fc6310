"""The linear probe against scikit-learn, and the quarter turns."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lightning_robust.evaluation import linear_probe, quarter_turns


def task(count=300, classes=3, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = 2 * torch.randn(classes, 5, generator=torch.Generator().manual_seed(99))
    features = centres[labels] + noise * torch.randn(count, 5, generator=generator)
    return features * torch.tensor([1.0, 100.0, 0.01, 1.0, 5.0]) + 7, labels


def test_equals_sklearn_at_one_strength():
    (x, y), (x_test, y_test) = task(), task(seed=1)
    expected = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    expected.fit(x.double().numpy(), y.numpy())
    found = linear_probe(x, y, x_test, y_test, strengths=[0.1])
    assert found.accuracy == pytest.approx(expected.score(x_test.double().numpy(), y_test.numpy()))
    assert found.strength == 0.1
    assert found.converged


def test_the_strength_is_chosen_without_the_test_samples():
    (x, y), (x_test, y_test) = task(noise=3.0), task(seed=1, noise=3.0)
    found = linear_probe(x, y, x_test, y_test)
    shuffled = linear_probe(x, y, x_test, y_test.roll(1))
    assert (found.strength, found.validation_accuracy) == (shuffled.strength, shuffled.validation_accuracy)
    assert found.accuracy != shuffled.accuracy
    order = np.random.RandomState(0).permutation(300)
    held, stay = order[:60], order[60:]
    scores = {}
    for strength in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))
        scores[strength] = model.fit(x.double().numpy()[stay], y.numpy()[stay]).score(
            x.double().numpy()[held], y.numpy()[held]
        )
    assert found.validation_accuracy == pytest.approx(max(scores.values()))
    assert found.strength == next(strength for strength, score in scores.items() if score == max(scores.values()))


def test_useless_and_constant_features():
    y = torch.arange(100) % 2
    found = linear_probe(torch.zeros(100, 3), y, torch.zeros(50, 3), y[:50])
    assert found.accuracy == 0.5


def test_says_when_it_did_not_converge():
    x, y = task()
    assert not linear_probe(x, y, x, y, strengths=[100.0], max_iter=1).converged


def test_a_held_out_part_with_all_of_a_class():
    x = torch.tensor([[0.0], [1.0], [1.1]])
    assert linear_probe(x, torch.tensor([0, 1, 1]), x, torch.tensor([0, 1, 1]), val_fraction=0.5).accuracy > 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train_features": torch.rand(4)},
            r"train features \[N, D\] and labels \[N\] but got \[4\] and \[4\]",
        ),
        (
            {"test_labels": torch.zeros(3)},
            r"test features \[N, D\] and labels \[N\] but got \[4, 2\] and \[3\]",
        ),
        ({"test_features": torch.rand(4, 3)}, "Expected as many test as training features but got 3 for 2"),
        ({"train_labels": torch.zeros(4)}, "Expected training labels of at least two classes but all are the same"),
        ({"train_features": torch.full((4, 2), torch.nan)}, "Expected finite train features"),
        ({"strengths": []}, "Expected at least one candidate in `strengths`"),
        ({"strengths": [0.0]}, "Expected `strengths` to be a finite number > 0 but got 0.0"),
        ({"val_fraction": 1.0}, r"Expected `val_fraction` to be in \[0.01, 0.9\] but got 1.0"),
    ],
    ids=range(8),
)
def test_refused(change, message):
    labels = torch.tensor([0, 1, 0, 1])
    given = {"train_features": torch.rand(4, 2), "train_labels": labels}
    given |= {"test_features": torch.rand(4, 2), "test_labels": labels}
    with pytest.raises(ValueError, match=message):
        linear_probe(**{**given, **change})


def test_too_few_samples():
    with pytest.raises(ValueError, match="Expected at least two test samples but got 1"):
        linear_probe(torch.rand(4, 2), torch.arange(4), torch.rand(1, 2), torch.arange(1))


def test_quarter_turns():
    images = torch.rand(40, 3, 6, 6)
    turned, turns = quarter_turns(images, torch.arange(40))
    assert turns.bincount().tolist() == [10, 10, 10, 10]
    for image, result, turn in zip(images, turned, turns.tolist(), strict=True):
        assert torch.equal(result, torch.rot90(image, turn, (1, 2)))
    # whatever stands in the same batch
    part, same = quarter_turns(images[[7, 3]], torch.tensor([7, 3]))
    assert torch.equal(part, turned[[7, 3]])
    assert same.tolist() == turns[[7, 3]].tolist()
    assert len({tuple(turns[start : start + 4].tolist()) for start in range(0, 40, 4)}) > 3


def test_turns_need_squares():
    with pytest.raises(ValueError, match=r"Expected square images \[B, C, H, W\] but got \[1, 1, 2, 3\]"):
        quarter_turns(torch.rand(1, 1, 2, 3), torch.arange(1))
