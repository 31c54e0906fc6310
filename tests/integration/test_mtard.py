"""MTARD in whole runs: precision, accumulation, sharpness-aware steps, restarts, processes."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_robust.callbacks import SharpnessAware
from lightning_robust.objectives import MTARD, balance_figure
from lightning_robust.sharpness import AWP, SAM
from support.ddp_mtard import BATCH, EPOCHS, SAMPLES, fit, mtard, teacher
from support.modules import loader, weights_of
from support.ranks import launch

STEPS = SAMPLES // BATCH  # of an epoch
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(scope="module")
def plain():
    """A run as it is meant to be, with BatchNorm."""
    return fit(norm=True)


def networks(objective):
    return [objective.teachers.teacher(name).network for name in objective.teachers]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.filterwarnings("ignore:.*bf16.*", "ignore:.*will run in.*")
def test_precisions(precision, plain):
    _, objective, trajectory, run = fit(precision=precision, norm=True)
    assert trajectory.shape == (EPOCHS * STEPS, 4)
    assert trajectory.dtype == torch.float64
    assert int(objective.loss_balance.steps) == EPOCHS * STEPS
    torch.testing.assert_close(trajectory[:, :2].sum(1), torch.ones(EPOCHS * STEPS, dtype=torch.float64))
    assert (trajectory[-1, :2] != 0.5).all()
    moves = trajectory[:, 2:].diff(dim=0, prepend=torch.ones(1, 2, dtype=torch.float64)).abs()
    assert ((moves < 1e-9) | ((moves - 0.05).abs() < 1e-9)).all()
    torch.testing.assert_close(trajectory[:, :2], plain[2][:, :2], rtol=0, atol=0.05)
    assert run.callback_metrics["train/loss"].isfinite()


def test_teachers_are_the_same_afterwards_and_nobody_else_holds_them(tmp_path, plain):
    module, objective, _, run = plain
    run.save_checkpoint(tmp_path / "end.ckpt")
    for network, options in zip(networks(objective), ((7, 8.0), (8, 2.0)), strict=True):
        expected = teacher(*options).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
        assert not any(part.training for part in network.modules())
    owned = {id(parameter) for network in networks(objective) for parameter in network.parameters()}
    assert not owned & {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    (entry,) = (value for key, value in saved["callbacks"].items() if key.startswith("ObjectiveTraining"))
    tensors = {name: value for name, value in entry["objective"].items() if isinstance(value, torch.Tensor)}
    assert sum(value.numel() for value in tensors.values()) == 7
    assert set(saved["state_dict"]) == set(module.state_dict())
    assert all(part.training for part in module.net.modules())


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [STEPS, STEPS + 2], ids=["between epochs", "within an epoch"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, plain, step):
    module, objective, trajectory, _ = plain
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=step, filename="at", save_top_k=1)
    fit(keep, norm=True, enable_checkpointing=True, max_steps=step, max_epochs=-1)
    resumed, again, rest, _ = fit(keep, norm=True, enable_checkpointing=True, ckpt_path=tmp_path / "at.ckpt")
    torch.testing.assert_close(rest[-1], trajectory[-1], **EXACT)
    torch.testing.assert_close(weights_of(resumed), weights_of(module), **EXACT)
    torch.testing.assert_close(again.loss_balance.initial, objective.loss_balance.initial, **EXACT)


def test_another_teacher_is_refused_when_training_goes_on(tmp_path, plain):
    plain[3].save_checkpoint(tmp_path / "end.ckpt")
    other = MTARD(teacher(7, 8.0), teacher(9, 2.0), attack=plain[1].attack)
    with pytest.raises(ValueError, match="robust teacher"):
        fit(objective=other, norm=True, ckpt_path=tmp_path / "end.ckpt", max_epochs=EPOCHS + 1)


@pytest.mark.parametrize(("choice", "state", "weights"), [("this-step", 5e-3, 5e-3), ("previous-step", 1e-6, 1e-6)])
def test_accumulation_is_the_large_batch(choice, state, weights):
    """Four batches of 4 against one of 16; the rates are 8 and 50 times those of the paper."""
    large, _, expected, _ = fit(objective=mtard(weights_from=choice), batches=loader(SAMPLES, 16))
    small, _, trajectory, _ = fit(
        objective=mtard(weights_from=choice), batches=loader(SAMPLES, 4), accumulate_grad_batches=4
    )
    torch.testing.assert_close(trajectory, expected, rtol=0, atol=state)
    torch.testing.assert_close(weights_of(small), weights_of(large), rtol=0, atol=weights)
    assert (expected[-1] - expected[0]).abs().max() > 0.01


@pytest.mark.parametrize("method", [SAM(rho=0.05), AWP()], ids=["sam", "awp"])
def test_the_state_moves_once_per_step_of_a_sharpness_aware_method(method, plain):
    _, objective, trajectory, _ = fit(SharpnessAware(method), norm=True)
    assert int(objective.loss_balance.steps) == len(trajectory) == EPOCHS * STEPS
    moves = trajectory[:, 2:].diff(dim=0, prepend=torch.ones(1, 2, dtype=torch.float64)).abs()
    assert float(moves.max()) == pytest.approx(0.05)
    if isinstance(method, SAM):  # which counts the pass at the weights themselves
        torch.testing.assert_close(trajectory[0], plain[2][0], **EXACT)
    assert not torch.equal(trajectory[-1], plain[2][-1])


def test_a_run_draws_its_balances(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(logger=logger, log_every_n_steps=1)
    figure = balance_figure(logger.log_dir)
    assert len([axes for axes in figure.axes if axes.get_visible()]) == 4
    assert figure.axes[0].lines[0].get_xdata().tolist() == [0, 1]


def test_objective_of_a_run_is_told_of_its_classes():
    wrong = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(9))
    wrong(torch.zeros(1, 2, 6, 6))
    objective = MTARD(teacher(7, 8.0), wrong, attack=mtard().attack)
    with pytest.raises(ValueError, match="robust teacher of MTARD has 9 classes but the model has 4"):
        fit(objective=objective)


def test_two_processes_with_half_batches_are_one_process(tmp_path):
    launch("-m", "support.ddp_mtard", tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, choice in (("plain", "this-step"), ("accumulated", "previous-step")):
        module, _, trajectory, run = fit(objective=mtard(weights_from=choice), batches=loader(SAMPLES, BATCH))
        first, second = (rank[name] for rank in ranks)
        assert torch.equal(first["trajectory"], second["trajectory"])
        assert torch.equal(first["weights"], second["weights"])
        torch.testing.assert_close(first["trajectory"], trajectory, rtol=0, atol=1e-6)
        torch.testing.assert_close(first["weights"], weights_of(module), rtol=0, atol=1e-5)
        if name == "accumulated":  # which logs once per batch
            continue
        for key in ("train/mtard_clean_loss", "train/mtard_robust_weight", "train/mtard_clean_temperature"):
            assert first["logged"][key] == pytest.approx(float(run.callback_metrics[key]), abs=1e-5)
