"""One of two processes with calibration penalties and selective metrics; spawned processes import it by this name."""

import torch
import torch.distributed as dist

from lightning_robust.losses import MMCE, SoftECE
from lightning_robust.metrics import AURC

CRITERIA = {
    "mmce": MMCE(gather=True),
    "weighted": MMCE(gather=True, weighted=True),
    "soft_ece": SoftECE(gather=True),
}


def data(samples=12):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(samples, 6, generator=generator)
    labels = logits.argmax(1)
    labels[::3] = 0
    labels[5] = -100
    return logits, labels


def gathered(rank, store, result):
    """Gradients of one half of a batch, and the loss of a validation batch of another size than its neighbour's."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    logits, labels = data()
    half = slice(6 * rank, 6 * rank + 6)
    found = {}
    for name, criterion in CRITERIA.items():
        leaf = logits[half].clone().requires_grad_()
        loss = criterion(leaf, labels[half])
        loss.backward()
        with torch.no_grad():
            alone = criterion(logits[rank:], labels[rank:])
        found[name] = loss.detach(), leaf.grad, alone
    torch.save(found, f"{result}{rank}")
    dist.destroy_process_group()


def selective(rank, store, result):
    """A metric of which one process sees 3 and then 0 samples."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    logits, labels = data(41)
    found = []
    for split in (3, 0):
        metric = AURC()
        part = slice(0, split) if rank == 0 else slice(split, None)
        if len(labels[part]):
            for each in range(part.start, part.stop or 41, 10):
                batch = slice(each, min(each + 10, part.stop or 41))
                metric.update(logits[batch], labels[batch])
        found.append(metric.compute())
    torch.save(found, f"{result}{rank}")
    dist.destroy_process_group()
