# SPDX-License-Identifier: Apache-2.0
"""Two processes give the same bits as one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_robust.metrics import TopLabelReliability


def data():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(301, 6, generator=generator), torch.randint(0, 6, (301,), generator=generator)


def worker(rank, store, result):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    logits, labels = data()
    part = slice(0, 100) if rank == 0 else slice(100, None)
    metric = TopLabelReliability()
    metric.update(logits[part], labels[part])
    table = metric.compute()
    torch.save((tuple(table), metric.sums), f"{result}{rank}")
    dist.destroy_process_group()


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
