"""Golden vectors: discovery, one object per file, and the registry of adapters.

An adapter maps a recorded method to the public API: it reads inputs with `Golden.tensor`, calls what a user would
call, and hands every recorded result to `Golden.check`. Arrays that are deliberately not matched are named with a
reason in `Golden.skip`; an array that is neither read, checked nor skipped fails the case.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Adapter = Callable[["Golden"], None]
ADAPTERS: dict[tuple[str, str], Adapter] = {}


def adapter(family: str, *methods: str) -> Callable[[Adapter], Adapter]:
    def register(function: Adapter) -> Adapter:
        for method in methods:
            if (family, method) in ADAPTERS:
                raise ValueError(f"two adapters for {family}/{method}")
            ADAPTERS[family, method] = function
        return function

    return register


class Golden:
    def __init__(self, path: Path) -> None:
        with np.load(path) as archive:
            self.arrays = {name: archive[name] for name in archive.files if name != "meta"}
            self.meta: dict[str, Any] = json.loads(str(archive["meta"]))
        self.path = path
        self.hyper: dict[str, Any] = self.meta["hyper"]
        self.family, self.method = self.meta["family"], self.meta["method"]
        self.used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def tensor(self, name: str) -> Tensor:
        """An input, as a tensor of the recorded dtype."""
        self.used.add(name)
        return torch.from_numpy(np.array(self.arrays[name]))

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All arrays whose name starts with `prefix`, keyed by the rest of the name."""
        return {name[len(prefix) :]: self.tensor(name) for name in self.arrays if name.startswith(prefix)}

    def check(self, name: str, actual: Tensor | float, rtol: float = 1e-9, atol: float = 1e-12) -> None:
        """Compare a result with the recorded array `name`."""
        expected = self.tensor(name)
        actual = actual if isinstance(actual, Tensor) else torch.tensor(actual, dtype=torch.float64)
        actual = actual.detach().to(expected.dtype).reshape(expected.shape)
        torch.testing.assert_close(
            actual, expected, rtol=rtol, atol=atol, msg=lambda text: f"{self.path.stem}: {name}: {text}"
        )

    def check_finite(self, name: str, actual: Tensor, rtol: float = 1e-9, atol: float = 1e-12) -> None:
        """Compare where the recorded code gave a number; ours has to give one everywhere."""
        expected = self.tensor(name)
        given = expected.isfinite()
        assert bool(actual.isfinite().all()), f"{self.path.stem}: {name}: not finite"
        torch.testing.assert_close(
            actual.detach().reshape(expected.shape)[given],
            expected[given],
            rtol=rtol,
            atol=atol,
            check_dtype=False,
            msg=lambda text: f"{self.path.stem}: {name}: {text}",
        )

    def skip(self, *names: str, reason: str) -> None:
        """Arrays that are deliberately not matched."""
        if not reason:
            raise ValueError("a skipped array needs a reason")
        self.used.update(names)

    def unused(self) -> list[str]:
        return sorted(set(self.arrays) - self.used)


def discover(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.npz"))
