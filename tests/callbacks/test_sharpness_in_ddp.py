"""Sharpness in two processes: each evaluates its own samples, and both get what one process gets from all of them."""

import pytest
import torch

from lightning_robust.callbacks import SharpnessMonitor
from support.ddp_sharpness import RUNS
from support.modules import PlainModule, loader, trainer
from support.ranks import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    outputs = launch("-m", "support.ddp_sharpness", str(folder))
    # Lightning warns about values that are logged unreduced; PlainModule's own are named without a slash
    assert not any(f"self.log('{ours}/" in output for output in outputs for ours in ("train", "val"))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def of_the_monitor(metrics):
    return {key: value for key, value in metrics.items() if "/sharpness/" in key}


@pytest.mark.parametrize("name", RUNS)
def test_both_ranks_have_the_same_values(ranks, name):
    first, second = (of_the_monitor(rank[name]) for rank in ranks)
    assert first == second
    assert first


@pytest.mark.parametrize("name", ["all", "differences", "parts", "power"])
def test_values_are_those_of_one_process(ranks, name):
    run = trainer(SharpnessMonitor(**RUNS[name]))
    run.validate(PlainModule(), loader(), verbose=False)
    alone = {key: value.item() for key, value in run.callback_metrics.items()}
    assert of_the_monitor(ranks[0][name]) == pytest.approx(
        of_the_monitor(alone), rel=2e-2 if name == "differences" else 1e-4
    )


def test_training_goes_on_as_without(ranks):
    for rank in ranks:
        assert torch.equal(rank["weights with"], rank["weights without"])
    assert torch.equal(ranks[0]["weights with"], ranks[1]["weights with"])
    first, second = (of_the_monitor(rank["metrics with"]) for rank in ranks)
    assert first == second
    # BatchNorm statistics differ between the processes while training; the values do not
    assert {"val/sharpness/top_eigenvalue", "train/sharpness/top_eigenvalue"} <= set(first)


def test_a_refusal_reaches_both(ranks):
    assert all("`per_class` lists [9]" in rank["refusal"] for rank in ranks)
