"""One of two processes that measure calibration together; spawned processes import it by this name."""

import torch
import torch.distributed as dist

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
