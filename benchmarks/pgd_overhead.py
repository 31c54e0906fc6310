"""Cost of PGD against the least that its passes can cost: forward and input-backward, a signed step, two clamps.

The loops run in one process, alternating, on the same batch; the printed number is the median of the per-round ratios,
so that a busy machine disturbs both alike.

    python benchmarks/pgd_overhead.py --model resnet18 --batch-size 64 --repeats 15
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD


def minimal_loop(model: nn.Module, x: Tensor, y: Tensor, eps: float, step_size: float, steps: int) -> Tensor:
    """PGD with nothing around it: no checks, no modes, no generators."""
    x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        x_adv = torch.clamp(x_adv.detach() + step_size * gradient.sign(), min=x - eps, max=x + eps).clamp(0, 1)
    return x_adv


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Processor time on the CPU, which other programs disturb least; else time until the device is done."""
    if device.type == "cpu":
        begin = time.process_time()
        function()
        return time.process_time() - begin
    module = torch.get_device_module(device.type)
    module.synchronize()
    begin = time.perf_counter()
    function()
    module.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="resnet18", help="name of a timm model")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = timm.create_model(args.model, num_classes=10).to(device).eval()
    x = torch.rand(args.batch_size, 3, args.size, args.size, device=device)
    y = torch.randint(10, (args.batch_size,), device=device)
    eps, step_size = 8 / 255, 2 / 255
    attack = PGD(eps=eps, step_size=step_size, steps=args.steps)
    runs: dict[str, Callable[[], object]] = {
        "bare": lambda: minimal_loop(model, x, y, eps, step_size, args.steps),
        "pgd": lambda: attack(model, x, y),
    }
    for run in runs.values():  # warm up
        run()
    rounds = []
    for number in range(args.repeats):
        order = list(runs) if number % 2 else list(runs)[::-1]
        rounds.append({name: seconds(runs[name], device) for name in order})
    ratios = sorted(times["pgd"] / times["bare"] for times in rounds)
    middle = statistics.median(times["bare"] for times in rounds)
    print(
        f"{args.model} {args.size}x{args.size} batch {args.batch_size}, PGD-{args.steps} on {device}, "
        f"torch {torch.__version__}: bare loop {middle:.3f} s, PGD / bare loop {statistics.median(ratios):.3f} "
        f"(quartiles {ratios[len(ratios) // 4]:.3f} .. {ratios[3 * len(ratios) // 4]:.3f}, {len(ratios)} rounds)"
    )


if __name__ == "__main__":
    main()
