"""One of two processes that count negative flips together; spawned processes import it by this name."""

import torch
import torch.distributed as dist

from lightning_robust.metrics import NegativeFlipRate, RelativeNegativeFlipRate


def data():
    """Logits of a new and an earlier model, both right more often than not, and labels."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 5, (301,), generator=generator)
    hint = 2 * torch.nn.functional.one_hot(labels, 5)
    new, old = (hint + torch.randn(301, 5, generator=generator) for _ in range(2))
    return new, old, labels


def worker(rank, store, result):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    part = slice(0, 100) if rank == 0 else slice(100, None)
    values = []
    for metric in (NegativeFlipRate(), RelativeNegativeFlipRate()):
        metric.update(*(tensor[part] for tensor in data()))
        values.append(metric.compute())
    torch.save(torch.stack(values), f"{result}{rank}")
    dist.destroy_process_group()
