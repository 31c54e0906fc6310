# SPDX-License-Identifier: Apache-2.0
"""Two processes give the same bits as one."""

import pytest
import torch
import torch.multiprocessing as mp

from lightning_robust.metrics import TopLabelReliability
from support.calibration_process import data, worker


@pytest.mark.slow
def test_two_processes(tmp_path):
    mp.start_processes(worker, (str(tmp_path / "store"), str(tmp_path / "rank")), nprocs=2, start_method="spawn")
    whole = TopLabelReliability()
    whole.update(*data())
    for rank in (0, 1):
        table, own = torch.load(tmp_path / f"rank{rank}")
        for ours, expected in zip(table, whole.compute(), strict=True):
            assert torch.equal(ours, expected)
        assert own[:-1, 0].sum() == (100, 201)[rank]  # after compute each process keeps its own part
