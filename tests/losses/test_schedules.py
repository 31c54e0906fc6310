import pickle

import pytest

from lightning_robust.losses import Constant, Linear, Schedule


def test_constant_needs_no_length():
    assert Constant(value=0.3).at(epoch=12, max_epochs=-1) == 0.3


@pytest.mark.parametrize(
    ("schedule", "epochs", "values"),
    [
        (Linear(start=0.1, end=0.2), 5, [0.1, 0.125, 0.15, 0.175, 0.2]),
        (Linear(start=0.1, end=0.2, denominator="T"), 4, [0.1, 0.125, 0.15, 0.175]),
        (Linear(start=1.0, end=0.0, epochs=3), 5, [1.0, 0.5, 0.0, 0.0, 0.0]),
        (Linear(start=1.0, end=0.0, denominator="T", epochs=2), 4, [1.0, 0.5, 0.0, 0.0]),
        (Linear(start=0.1, end=0.2), 1, [0.1]),
    ],
)
def test_linear(schedule, epochs, values):
    assert [schedule.at(epoch, epochs) for epoch in range(epochs)] == pytest.approx(values)


def test_the_published_deit_schedule_divides_by_299_in_any_run():
    schedule = Linear(start=0.1, end=0.2, epochs=300)
    assert schedule.at(150, max_epochs=-1) == schedule.at(150, max_epochs=100) == 0.1 + (0.2 - 0.1) * 150 / 299


def test_linear_refuses_a_run_of_unknown_length():
    with pytest.raises(ValueError, match=r"`max_epochs` to be known for a linear schedule but got -1; set"):
        Linear(start=0.1, end=0.2).at(0, max_epochs=-1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Constant(value=float("inf")), "`value` to be a finite number but got inf"),
        (lambda: Linear(start=float("nan"), end=1.0), "`start` to be a finite number but got nan"),
        (lambda: Linear(start=0.0, end=float("inf")), "`end` to be a finite number but got inf"),
        (lambda: Linear(start=0.0, end=1.0, denominator="N"), "`denominator` to be one of 'T-1', 'T' but got 'N'"),
        (lambda: Linear(start=0.0, end=1.0, epochs=0), "`epochs` to be an integer >= 1 but got 0"),
        (lambda: Linear(start=0.0, end=1.0).at(-1, 3), "`epoch` to be an integer >= 0 but got -1"),
        (lambda: Constant(value=1.0).at(-1, 3), "`epoch` to be an integer >= 0 but got -1"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_schedules_are_values():
    one, other = Linear(start=0.1, end=0.2), Linear(start=0.1, end=0.2)
    assert one == other
    assert hash(one) == hash(other)
    assert one != Linear(start=0.1, end=0.3)
    assert one != Constant(value=0.1)
    assert pickle.loads(pickle.dumps(one)) == one
    assert repr(one) == "Linear(start=0.1, end=0.2, denominator='T-1', epochs=None)"
    assert isinstance(one, Schedule)
