"""SharpnessAware under Lightning's ModelParallelStrategy: fully_shard, on two processes and in one."""

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.callbacks import SharpnessAware
from lightning_robust.sharpness import ASAM, GAM, SAM
from support.modules import trainer
from support.ranks import WORLD

CASES = {
    "lightning sam": (SAM(rho=0.5), {}),
    "lightning asam": (ASAM(rho=0.5), {}),
    "lightning gam": (GAM(grad_rho=0.05), {}),
    "lightning accumulate": (SAM(rho=0.5), {"accumulate_grad_batches": 2}),
    "lightning clip": (SAM(rho=0.5), {"gradient_clip_val": 0.3}),
}


class Sharded(L.LightningModule):
    def __init__(self, sharded):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
        self.sharded = sharded

    def configure_model(self):
        if self.sharded:
            for part in (self.net[0], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(sharded, method, **options):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 6, generator=generator), torch.randint(3, (32,), generator=generator)
    rows = torch.arange(32).view(-1, 8)
    if sharded:
        rows = rows.chunk(WORLD, 1)[distributed.get_rank()]
    strategy = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1) if sharded else "auto"
    module = Sharded(sharded)
    run = trainer(
        SharpnessAware(method, sync_ascent=sharded),
        devices=WORLD if sharded else 1,
        strategy=strategy,
        max_epochs=2,
        use_distributed_sampler=False,
        **options,
    )
    run.fit(module, DataLoader(TensorDataset(x, y), batch_sampler=rows.tolist()))
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters()]
    return [p.detach().clone() for p in whole], run.callback_metrics["loss"]


def sharded_runs():
    return {name: fit(True, method, **options) for name, (method, options) in CASES.items()}


def whole_runs():
    return {name: fit(False, method, **options) for name, (method, options) in CASES.items()}
