"""State that spans processes, in two real ones against the same batches in one."""

import pytest
import torch

from support.ddp_criteria import CRITERIA, train
from support.ranks import WORLD, launch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch("-m", "support.ddp_criteria", str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CRITERIA)
def test_two_processes_learn_what_one_learns(ranks, name):
    alone = train(CRITERIA[name](), rank=0, world=1)
    for found in ranks:
        for part in ("weights", "state"):
            assert found[name][part].keys() == alone[part].keys()
            for key, value in alone[part].items():
                torch.testing.assert_close(found[name][part][key], value, rtol=1e-4, atol=1e-6)
    losses = torch.stack([found[name]["losses"] for found in ranks])
    torch.testing.assert_close(losses.mean(0), alone["losses"], rtol=1e-4, atol=1e-6)


def test_each_process_reports_the_loss_of_the_whole_batch_under_group_dro(ranks):
    assert torch.equal(ranks[0]["group_dro"]["losses"], ranks[1]["group_dro"]["losses"])
