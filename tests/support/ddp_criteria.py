"""One rank of criteria whose state spans processes; `python -m support.ddp_criteria FOLDER`, see `launch`."""

import os

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_robust.losses import ALDRKL, ELR, PSKD, GroupDRO, OnlineLabelSmoothing, TruncatedGCE
from support.ranks import WORLD, as_rank

SAMPLES, CLASSES, FEATURES, EPOCHS, BATCH = 24, 4, 3, 2, 8
CRITERIA = {
    "group_dro": lambda: GroupDRO(num_groups=3, step_size=0.5),
    "elr": lambda: ELR(num_samples=SAMPLES),
    "pskd": lambda: PSKD(num_samples=SAMPLES),
    "aldr": lambda: ALDRKL(num_samples=SAMPLES),
    "truncated": lambda: TruncatedGCE(k=0.25, start_epoch=2, every=1, num_samples=SAMPLES),
    "online": lambda: OnlineLabelSmoothing(num_classes=CLASSES),
}


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, FEATURES, generator=generator)
    y = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    # the groups of one process differ from those of the other, and one of them is missing at times
    group = torch.arange(SAMPLES) // 4 % 3
    return x, y, group


def train(criterion, rank, world, wrap=lambda net: net, total=lambda tensor: tensor):
    """Weights, state and losses of a run in which each process has its share of every batch."""
    torch.manual_seed(1)
    net = nn.Linear(FEATURES, CLASSES)
    model = wrap(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    x, y, group = data()
    losses = []
    for epoch in range(EPOCHS):
        criterion.epoch_starts(epoch, EPOCHS)
        for begin in range(0, SAMPLES, BATCH):
            own = torch.arange(begin, begin + BATCH)[rank * BATCH // world : (rank + 1) * BATCH // world]
            context = {name: {"group": group, "index": torch.arange(SAMPLES)}[name][own] for name in criterion.needs}
            loss = criterion(model(x[own]), y[own], **context)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        criterion.synchronise(total)
        criterion.epoch_ends(epoch, total)
    return {"weights": dict(net.state_dict()), "state": dict(criterion.state_dict()), "losses": torch.stack(losses)}


def total(tensor):
    tensor = tensor.clone()
    distributed.all_reduce(tensor)
    return tensor


def main(folder):
    distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    found = {name: train(make(), rank, WORLD, DistributedDataParallel, total) for name, make in CRITERIA.items()}
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    as_rank(main, quiet=True)
