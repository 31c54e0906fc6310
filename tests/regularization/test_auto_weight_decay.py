import pytest
import torch

from lightning_robust.regularization import AutoWeightDecay, WeightDecayStep


def run(values, **arguments):
    """Weight decays after epochs of (OUI, training loss), in units of the first."""
    controller = AutoWeightDecay(initial=1.0, **{"epochs": 20, **arguments})
    steps = [controller.step(epoch, oui=oui, training_loss=loss) for epoch, (oui, loss) in enumerate(values)]
    return [step.weight_decay for step in steps], [step.restart for step in steps]


F = 10**0.5  # 10^(10 / 20)


def test_waits_during_the_warm_up():
    decays, restarts = run([(0.7, 3.0), (0.75, 2.0), (0.8, 1.0), (0.8, 0.9)])
    assert decays == pytest.approx([1, 1, 1, F])  # epochs 0 to 2 are the tenth of the run, both ends included
    assert restarts == [False] * 4


@pytest.mark.parametrize("second", [0.91, 0.59])
def test_a_moving_oui_ends_the_warm_up(second):
    decays, _ = run([(0.7, 3.0), (second, 2.0)], ideal=0.65)
    assert decays == pytest.approx([1, F if second > 0.9 else 1 / F])


def test_raises_only_while_the_loss_falls():
    decays, _ = run([(0.8, 3.0), (0.8, 2.0), (0.8, 1.5), (0.9, 1.4), (0.9, 1.4), (0.9, 1.3), (0.64, 1.0)])
    assert decays == pytest.approx([1, 1, 1, F, F, F**2, F**2])


def test_lowers_by_more_each_time_and_accepts_less():
    low = [(0.56, 1.0)] * 3 + [(0.54, 1.0), (0.52, 1.0), (0.51, 1.0)]
    decays, _ = run(low)
    # limits 0.55, 0.525, 0.5: the last is above it
    assert decays == pytest.approx([1, 1, 1, 1 / F, 1 / F**3, 1 / F**3])


def test_the_last_epochs_lower_it_whatever_the_values_are():
    decays, _ = run([(0.6, 1.0)] * 20)
    assert decays == pytest.approx([1.0] * 18 + [F**-4, F**-8])
    decays, _ = run([(0.6, 1.0)] * 20, final_epochs=0)
    assert decays == [1.0] * 20


def test_a_low_oui_in_the_warm_up_restarts():
    controller = AutoWeightDecay(epochs=20, initial=1.0)
    assert controller.step(0, oui=0.5, training_loss=1.0) == WeightDecayStep(0.1, restart=True)
    assert controller.step(1, oui=0.7, training_loss=1.0) == WeightDecayStep(0.1, restart=False)
    # it counts from the new beginning: 0.7 is the first value
    assert controller.step(2, oui=0.85, training_loss=0.9) == WeightDecayStep(0.1, restart=False)
    assert controller.step(3, oui=0.5, training_loss=0.9) == WeightDecayStep(pytest.approx(0.1 / F), restart=False)
    assert run([(0.5, 1.0)], restart_below=0.4) == ([1.0], [False])
    assert run([(0.5, 1.0)], warmup_epochs=0, ideal=0.4) == ([1.0], [False])


def test_continues_from_its_state(tmp_path):
    values = [(0.7, 3.0), (0.72, 2.0), (0.95, 1.9), (0.95, 1.8), (0.5, 1.7), (0.5, 1.6)]
    expected, _ = run(values)
    controller = AutoWeightDecay(epochs=20, initial=1.0)
    for epoch, (oui, loss) in enumerate(values[:4]):
        controller.step(epoch, oui=oui, training_loss=loss)
    torch.save(controller.state_dict(), tmp_path / "state.pt")
    continued = AutoWeightDecay(epochs=20, initial=1.0)
    continued.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for epoch, (oui, loss) in enumerate(values[4:], 4):
        assert continued.step(epoch, oui=oui, training_loss=loss).weight_decay == expected[epoch]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "Expected `epochs` to be an integer >= 1 but got 0"),
        ({"initial": 0.0}, "Expected `initial` to be a finite number > 0 but got 0.0"),
        ({"ideal": 1.5}, r"Expected `ideal` to be in \[0.0, 1.0\] but got 1.5"),
        ({"restart_below": -1.0}, r"Expected `restart_below` to be in \[0.0, 1.0\] but got -1.0"),
        ({"warmup_epochs": -1}, "Expected `warmup_epochs` to be an integer >= 0 but got -1"),
        ({"final_epochs": -1}, "Expected `final_epochs` to be an integer >= 0 but got -1"),
    ],
    ids=["epochs", "initial", "ideal", "restart", "warmup", "final"],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoWeightDecay(**{"epochs": 20, **arguments})


def test_refuses_values_that_are_no_numbers():
    controller = AutoWeightDecay(epochs=20)
    with pytest.raises(ValueError, match=r"Expected `oui` to be in \[0.0, 1.0\] but got nan"):
        controller.step(0, oui=float("nan"), training_loss=1.0)
    with pytest.raises(ValueError, match="Expected `training_loss` to be a number but got nan"):
        controller.step(0, oui=0.5, training_loss=float("nan"))
    assert "epochs=20" in repr(controller)
