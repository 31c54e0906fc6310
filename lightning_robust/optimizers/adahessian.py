# SPDX-License-Identifier: Apache-2.0
"""AdaHessian: Adam with the diagonal of the Hessian in place of the squared gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_robust.checks import check_in_range, check_integer, check_non_negative
from lightning_robust.optimizers.base import ExactOptimizer
from lightning_robust.optimizers.hessian import hessian_diagonal, rademacher
from lightning_robust.sharpness import average_over_processes

__all__ = ["AdaHessian"]

Probe = Callable[[list[Tensor]], Sequence[Tensor]]


class AdaHessian(ExactOptimizer):
    r"""Adam that divides by the curvature of the loss instead of the size of its gradient.

    .. math::
        D = \tfrac1n \textstyle\sum_j z_j \odot H z_j, \qquad
        m \leftarrow \beta_1 m + (1-\beta_1)\, g, \qquad v \leftarrow \beta_2 v + (1-\beta_2)\, D^2, \\
        w \leftarrow (1 - \eta\lambda)\, w - \eta\, \frac{m / (1-\beta_1^t)}{(v / (1-\beta_2^t))^{k/2} + \epsilon}

    with random signs :math:`z_j`. :math:`|D|` is averaged over each convolution kernel, that is over the dimensions
    after the second of any tensor that has more than two: the authors' classification code does so for 4 dimensions and
    fails for 3. Set the group option ``average_conv_kernel=False`` for other tensors of this form, such as a position
    embedding ``[1, N, D]``.

    Needs gradients with a graph, ``loss.backward(create_graph=True)``, in steps in which :attr:`needs_graph` is true;
    it drops the graph afterwards. In Lightning use manual optimization and ``self.manual_backward(loss,
    create_graph=True)``. It cannot be combined with :class:`~lightning_robust.callbacks.SharpnessAware`, whose losses
    deliver finished gradients, nor with a ``GradScaler``, which scales the graph: train in bfloat16 or float32.

    In several processes gradients *and* Hessian are averaged here, because DDP's own reduction fails on gradients with
    a graph. All processes draw the same signs, so the average is the estimate for the joint batch. Keep DDP from
    reducing: ``with ddp.no_sync():`` around forward and backward; in Lightning call
    ``loss.backward(create_graph=True)`` itself, or ``manual_backward`` in ``with
    self.trainer.strategy.block_backward_sync():``. Every trainable parameter takes part, with zeros where it has no
    gradient. ``sync=False`` is for processes that train by themselves.

    Where the estimate happens to be near zero, the step is up to ``lr / eps`` times the momentum, as published.

    Cost: the time of about 4 passes in a step that estimates (measured on a ResNet-18), 1 to 2 more for each further
    sample, 1 pass in the other steps of ``update_each``; the memory of the doubled graph.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the averages of gradient and curvature.
        eps: added to the denominator.
        weight_decay: shrinks the weights apart from the gradient.
        hessian_power: ``k``; between 0 (momentum SGD) and 1.
        n_samples: random vectors per estimate.
        update_each: estimate in every n-th step and use the last estimate in between; those steps need no graph.
        average_conv_kernel: average over convolution kernels; an option of groups, too.
        seed: of the random signs, which use no other generator and do not depend on the process.
        sync: average over processes when ``torch.distributed`` is initialised.
        probe: makes the random vectors instead: called with parameters, returns one tensor of their shapes each.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: in a step, for gradients without graph, sparse gradients or a ``GradScaler``.

    References:
        Yao et al., AdaHessian: An Adaptive Second Order Optimizer for Machine Learning, arXiv 2006.00719. Their code
        synchronises nothing under DDP. davda54's version is ``AdaHessian(lr=0.1, eps=1e-8, average_conv_kernel=False)``
        with other signs.

    Example:
        >>> from lightning_robust.optimizers import AdaHessian
        >>> weight = torch.nn.Parameter(torch.tensor([4.0, 1.0]))
        >>> optimizer = AdaHessian([weight], lr=1.0, eps=0.0)
        >>> gradients = torch.autograd.grad((weight**2 * torch.tensor([1.0, 50.0])).sum(), [weight], create_graph=True)
        >>> weight.grad = gradients[0]
        >>> optimizer.step()
        >>> weight.data.abs() < 1e-5  # Newton's step, however steep
        tensor([True, True])
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
        n_samples: int = 1,
        update_each: int = 1,
        average_conv_kernel: bool = True,
        seed: int = 2147483647,
        sync: bool = True,
        probe: Probe | None = None,
    ) -> None:
        check_non_negative("lr", lr)
        check_non_negative("eps", eps)
        check_non_negative("weight_decay", weight_decay)
        check_in_range("hessian_power", hessian_power, 0.0, 1.0)
        check_integer("n_samples", n_samples, 1)
        check_integer("update_each", update_each, 1)
        check_integer("seed", seed, 0)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Expected `betas` to be in [0, 1) but got {betas!r}.")
        self.n_samples = n_samples
        self.update_each = update_each
        self.seed = seed
        self.sync = sync
        self.probe = probe
        # a GradScaler that finds this hands over its findings instead of hiding that it is there
        self._step_supports_amp_scaling = True
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
            "average_conv_kernel": average_conv_kernel,
            # the state of the random signs; saved with the groups
            "draws": 0,
        }
        super().__init__(params, defaults)

    @property
    def needs_graph(self) -> bool:
        """Whether the next step estimates the Hessian, so that its gradients need a graph."""
        return any(self._is_due(each) for group in self.param_groups for each in group["params"] if each.requires_grad)

    @override
    def update(self) -> None:
        if vars(self).pop("found_inf", None) is not None:
            raise RuntimeError(
                "AdaHessian cannot be used with a GradScaler: unscaling reaches the gradients but not their graph, so "
                'the Hessian would be scaled. Use bfloat16 ("bf16-mixed") or float32.'
            )
        world = torch.distributed.get_world_size() if self.sync and _in_processes() else 1
        groups = [(group, self.with_gradient(group)) for group in self.param_groups]
        if world > 1:  # processes may differ in what took part, and must reduce the same tensors
            groups = [(group, [each for each in group["params"] if each.requires_grad]) for group, _ in groups]
        parameters = [parameter for _, members in groups for parameter in members]
        gradients = {each: torch.zeros_like(each) if each.grad is None else each.grad for each in parameters}
        due = [parameter for parameter in parameters if self._is_due(parameter)]
        hessian = self._estimate(due, [gradients[each] for each in due]) if due else []
        values = {each: gradient.detach() for each, gradient in gradients.items()}
        if world > 1:
            # the caller's gradients stay those of this process
            values = {each: value.clone() for each, value in values.items()}
            average_over_processes([*values.values(), *hessian])
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.requires_grad:
                parameter.grad = parameter.grad.detach()  # graph and parameter hold each other
        curvature = dict(zip(due, hessian, strict=True))
        for group, members in groups:
            if members:
                self._step(group, members, [values[each] for each in members], curvature)

    def _is_due(self, parameter: Tensor) -> bool:
        state = self.state.get(parameter, {})
        return "hessian" not in state or state["step"] % self.update_each == 0

    def _estimate(self, parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        probes: list[Sequence[Tensor]] = []
        first = self.param_groups[0]
        for _ in range(self.n_samples):
            if self.probe is not None:
                probes.append(self.probe(parameters))
            else:
                probes.append(rademacher(parameters, self.seed, first["draws"]))
                first["draws"] += 1
        return hessian_diagonal(gradients, parameters, probes)

    def _step(
        self, group: dict[str, Any], members: list[Tensor], gradients: list[Tensor], curvature: dict[Tensor, Tensor]
    ) -> None:
        first, second = group["betas"]
        for parameter in members:
            state = self.state[parameter]
            if parameter in curvature:
                state["hessian"] = curvature[parameter].abs()
                if group["average_conv_kernel"] and parameter.ndim > 2:
                    dimensions = list(range(2, parameter.ndim))
                    state["hessian"] = state["hessian"].mean(dimensions, keepdim=True)
            if "step" not in state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_hessian_diag_sq"] = torch.zeros_like(state["hessian"])
            state["step"] += 1
        states = [self.state[parameter] for parameter in members]
        momenta = [state["exp_avg"] for state in states]
        squares = [state["exp_hessian_diag_sq"] for state in states]
        estimates = [state["hessian"] for state in states]
        torch._foreach_mul_(momenta, first)
        torch._foreach_add_(momenta, gradients, alpha=1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, estimates, estimates, 1 - second)
        denominators = torch._foreach_div(squares, [1 - second ** state["step"] for state in states])
        torch._foreach_pow_(denominators, group["hessian_power"] / 2)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
        sizes = [-group["lr"] / (1 - first ** state["step"]) for state in states]
        torch._foreach_addcdiv_(members, momenta, denominators, sizes)
        if self.update_each == 1:  # no later step will use them
            for state in states:
                del state["hessian"]

    def __getstate__(self) -> dict[str, Any]:
        own = ("n_samples", "update_each", "seed", "sync", "probe", "_step_supports_amp_scaling")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}


def _in_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
