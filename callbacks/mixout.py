# SPDX-License-Identifier: Apache-2.0
"""Mixout for fine-tuning: in training, linear layers see a mixture of their weights and the initial ones."""

import os
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import override

from lightning_robust.callbacks._strategies import keeps_whole_weights
from lightning_robust.checks import check_choice, check_in_range, check_integer
from lightning_robust.regularization import NamePatterns, mixout
from lightning_robust.regularization.names import plain_name
from lightning_robust.training import ReplacedMethod, derive_seed

__all__ = ["Mixout"]


class Mixout(Callback):
    r"""Mixout: linear layers of any module train on mixtures of their weights and those that the fit began with.

    .. math:: \tilde w = \frac{M w + (1 - M)\,w_0 - p\,w_0}{1 - p}, \qquad M \sim \mathrm{Bernoulli}(1 - p)

    where :math:`w_0` are the weights at the start of the fit, pretrained ones as a rule (a resumed fit keeps them), and
    one entry of :math:`M` switches an input of the layer for all outputs. It draws the network to :math:`w_0` as
    dropout draws it to 0, and takes the place of dropout in fine-tuning: set that to 0.

    Acts inside of the forward of every ``nn.Linear`` in training mode, from ``on_train_batch_start`` to
    ``on_train_batch_end``. All passes over a batch see the same mask, those of a sharpness-aware method or of an
    attack, too; the next batch gets a new one. It is a function of the global seed, rank, epoch and batch index, so
    processes draw different masks, as for dropout, and a run continues exactly after a resume. Evaluation sees
    :math:`w`. Parameters, their names, optimizers and the state of the module are untouched: a checkpoint loads without
    this callback.

    Cost: some passes over the weights per forward pass, independent of the batch size; one copy of the weights in
    memory and in checkpoints.

    Args:
        p: Probability with which an input's weights are those of :math:`w_0`; about 0.7 to 0.9 in the paper.
        grad: Derivative: ``"reference"`` leaves out the factor :math:`1/(1-p)`, as the authors' code does; ``"true"``
            is that of the formula.
        exclude: Regular expressions, none of which may occur in the name of a layer: a new head, for example, which
            has no pretrained weights.
        seed: Seed of the masks; ``None`` takes the one of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range; at setup, for strategies that do not keep whole weights on one
            device; when the fit starts, if the module has no linear layers, or for a checkpoint of other layers.

    References:
        Lee et al., Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models, ICLR 2020,
        arXiv 1909.11299. As in the authors' code, biases are not mixed. Projections inside ``nn.MultiheadAttention``
        are not mixed, because it does not call its layers.

    Example:
        >>> import lightning as L
        >>> from lightning_robust.callbacks import Mixout
        >>> trainer = L.Trainer(callbacks=[Mixout(p=0.9)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        *,
        p: float = 0.7,
        grad: Literal["reference", "true"] = "reference",
        exclude: str | list[str] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_in_range("p", p, 0.0, 1.0)
        if p == 1:
            raise ValueError("Expected `p` to be below 1 but got 1: nothing would be trained.")
        check_choice("grad", grad, ("reference", "true"))
        if seed is not None:
            check_integer("seed", seed, 0)
        self.p = p
        self.grad: Literal["reference", "true"] = grad
        self.names = NamePatterns(exclude=exclude)
        self.seed = seed
        self._layers: dict[str, MixedLinear] = {}
        self._targets: dict[str, Tensor] = {}  # by name of the layer; from a checkpoint until the training starts
        self._base = ""

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"targets": self._targets}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._targets = dict(state_dict["targets"])

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._remove()
        if stage != "fit":
            return
        self._targets = {}
        if not keeps_whole_weights(trainer):
            raise ValueError(
                f"Mixout keeps a copy of whole weights, which {type(trainer.strategy).__name__} does not keep on one "
                'device; use strategy="ddp" or a single device.'
            )
        # read once: a callback may re-seed torch during the fit
        seed = os.environ.get("PL_GLOBAL_SEED", str(torch.initial_seed()))
        self._base = seed if self.seed is None else str(self.seed)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        chosen = self._choose(pl_module)
        if self._targets:
            self._refuse_others(chosen)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # not earlier: the weights of the checkpoint, or those of the first process, are in place now
        for name, layer in self._choose(pl_module).items():
            saved = self._targets.get(name)
            target = layer.weight.detach().clone() if saved is None else saved.to(layer.weight)
            self._targets[name] = target
            self._layers[name] = MixedLinear(layer, target, self.p, self.grad)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.p:
            return
        seed = derive_seed(self._base, trainer.global_rank, trainer.current_epoch, batch_idx, "mixout")
        generator = torch.Generator(pl_module.device).manual_seed(seed)
        sizes = [layer.target.shape[1] for layer in self._layers.values()]
        drawn = torch.rand(sum(sizes), generator=generator, device=pl_module.device) >= self.p
        for layer, keep in zip(self._layers.values(), torch.split(drawn, sizes), strict=True):
            layer.keep = keep

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for layer in self._layers.values():
            layer.keep = None

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._remove()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._remove()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._remove()
        # still in what is saved after the fit, but off the device, as the module is
        self._targets = {name: target.cpu() for name, target in self._targets.items()}

    def _choose(self, pl_module: L.LightningModule) -> dict[str, nn.Linear]:
        named = ((plain_name(name), layer) for name, layer in pl_module.named_modules())
        chosen = {
            name: layer
            for name, layer in named
            if isinstance(layer, nn.Linear)
            # others use their weight in another way, and nn.MultiheadAttention does not call its layer
            and type(layer).forward is nn.Linear.forward
            and not isinstance(layer, NonDynamicallyQuantizableLinear)
            and name in self.names
        }
        if not chosen:
            raise ValueError(
                f"Mixout found no nn.Linear in {type(pl_module).__name__} to work on (names: {self.names})."
            )
        return chosen

    def _refuse_others(self, chosen: dict[str, nn.Linear]) -> None:
        shapes = {name: layer.weight.shape for name, layer in chosen.items()}
        saved = {name: target.shape for name, target in self._targets.items()}
        if shapes != saved:
            name = next(name for name in {**shapes, **saved} if shapes.get(name) != saved.get(name))
            raise ValueError(
                f"The checkpoint holds Mixout's initial weights of other layers: {name!r} differs. Continue with the "
                "module and the `exclude` that it was made with."
            )

    def _remove(self) -> None:
        while self._layers:
            self._layers.popitem()[1].remove()


class MixedLinear(ReplacedMethod):
    """Stands in for the forward of a linear layer.

    Args:
        layer: The layer.
        target: The weights that its own are mixed with.
        p: See :class:`Mixout`.
        grad: See :class:`Mixout`.
    """

    def __init__(self, layer: nn.Linear, target: Tensor, p: float, grad: Literal["reference", "true"]) -> None:
        super().__init__(layer, "forward")
        self.layer = layer
        self.target = target
        self.p = p
        self.grad: Literal["reference", "true"] = grad
        self.keep: Tensor | None = None  # inputs of the running batch that use the layer's own weights

    @override
    def call(self, *args: Any, **kwargs: Any) -> Any:
        if self.keep is None or not self.layer.training:
            return self.inner(*args, **kwargs)
        return self._mixed(self.keep, *args, **kwargs)

    def _mixed(self, keep: Tensor, input: Tensor) -> Tensor:
        weight = mixout(self.layer.weight, self.target, keep, p=self.p, grad=self.grad)
        return F.linear(input, weight, self.layer.bias)
