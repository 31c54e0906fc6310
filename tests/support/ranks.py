"""Starting the same script in two processes that find each other."""

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import torch

WORLD = 2


def launch(*command, **options):
    """Run `python *command` as every rank of one gloo group; returns what each printed, fails if one failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(WORLD),
        "LOCAL_WORLD_SIZE": str(WORLD),
        "GROUP_RANK": "0",
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_RUN_ID": "test",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:  # one that waits for a partner that is gone would wait for ever
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(output[-3000:] for output in outputs)
    return outputs


def as_rank(main, *, quiet=False):
    """What a script does that :func:`launch` started: run `main(folder)` and leave together with the others."""
    if quiet:
        warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
    # a rank whose partner is gone may crash on its way out
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
