"""Attacks in two processes."""

import pytest
import torch

from lightning_robust.callbacks import RobustnessMonitor
from support.ddp_attacked import LIMIT, attack
from support.modules import PlainModule, loader, trainer
from support.ranks import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    outputs = launch("-m", "support.ddp_attacked", str(folder))
    # Lightning warns about values that are logged unreduced; PlainModule's own are named without a slash
    assert not any(f"self.log('{ours}/" in output for output in outputs for ours in ("train", "val"))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_monitor_counts_what_one_process_counts(ranks):
    (alone,) = trainer(RobustnessMonitor(attack(), max_samples=LIMIT)).validate(PlainModule(), loader(), verbose=False)
    for rank in ranks:
        for name in ("val/adv_acc", "val/adv_nll"):
            assert rank["logged"][name] == pytest.approx(alone[name], rel=1e-5)


@pytest.mark.parametrize("name", ["adversarial", "objective", "guard", "elle-a"])
def test_ranks_keep_the_same_weights_and_numbers(ranks, name):
    assert torch.equal(ranks[0][name], ranks[1][name])
    logged = [{key: value for key, value in rank[f"{name} metrics"].items() if "val_loss" not in key} for rank in ranks]
    own = {"train_acc", "train_loss"}  # the module logs these without reducing them
    assert all(logged[0][key] == logged[1][key] for key in set(logged[0]) - own)
    assert {"val/adv_acc"} <= set(logged[0]) or name != "adversarial"
    assert {"val/guard_robust_acc"} <= set(logged[0]) or name != "guard"


def test_the_state_of_an_objective_is_that_of_all_ranks(ranks):
    first, second = (rank["elle-a state"] for rank in ranks)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert int(first["count"]) == 6
    assert float(first["weight"]) > 0


def test_starts_differ_between_ranks(ranks):
    assert not torch.isclose(ranks[0]["perturbations"], ranks[1]["perturbations"]).any()
