# SPDX-License-Identifier: Apache-2.0
"""The ends of the spectrum of a Hessian, from products with vectors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.checks import check_integer, check_positive
from lightning_robust.sharpness.surface import LossSurface

__all__ = ["Eigenvalues", "lanczos", "power_iteration"]


@dataclass(frozen=True)
class Eigenvalues:
    """Some eigenvalues of a Hessian.

    Attributes:
        values: the eigenvalues, ``[k]``, float64 on the CPU.
        vectors: unit eigenvectors, ``[k, n]``, on the device of the weights.
        residuals: ``|H v - value v|`` of each, ``[k]``: some eigenvalue is no further than this from the value.
        products: Hessian-vector products that were used.
        converged: whether the tolerance was reached within the allowed number of products.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    converged: bool


def lanczos(
    surface: LossSurface,
    *,
    top: int = 1,
    bottom: int = 0,
    tolerance: float = 1e-2,
    max_products: int = 100,
    seed: int = 0,
) -> Eigenvalues:
    r"""The algebraically largest and smallest eigenvalues, by the Lanczos method with full re-orthogonalisation.

    Finds the largest positive eigenvalue also where a negative one is larger in magnitude. It stops when the residual
    of every wanted eigenvalue is at most ``tolerance`` times the largest magnitude of the spectrum; the error of the
    value is about the square of that. An eigenvalue is found once, whatever its multiplicity.

    Cost: one Hessian-vector product per iteration, 10 to 30 of them as a rule, and one copy of the weights each.

    Args:
        surface: the loss.
        top: number of largest eigenvalues, returned first, in descending order.
        bottom: number of smallest eigenvalues, returned after them, in ascending order.
        tolerance: see above.
        max_products: largest number of Hessian-vector products.
        seed: seed of the start vector, which is the same on every device.

    Raises:
        ValueError: an argument out of range, or more eigenvalues than weights.

    References:
        Lanczos, An iteration method for the solution of the eigenvalue problem of linear differential and integral
        operators, 1950. For networks: Ghorbani et al., arXiv 1901.10159.

    Example:
        >>> from lightning_robust.sharpness import LossSurface, lanczos
        >>> w = torch.zeros(3, requires_grad=True)
        >>> scales = torch.tensor([-5.0, 1.0, 2.0])
        >>> found = lanczos(LossSurface(lambda: 0.5 * (scales * w**2).sum(), [w]), bottom=1)
        >>> [round(value, 3) for value in found.values.tolist()], found.products
        ([2.0, -5.0], 3)
    """
    for name, count in (("top", top), ("bottom", bottom)):
        check_integer(name, count, 0)
    check_integer("max_products", max_products, 1)
    check_positive("tolerance", tolerance)
    wanted = top + bottom
    if not 1 <= wanted <= surface.size:
        raise ValueError(f"Expected `top` + `bottom` to be from 1 to the {surface.size} weights but got {wanted}.")
    if max_products < wanted:
        raise ValueError(f"Expected `max_products` to be >= `top` + `bottom` = {wanted} but got {max_products}.")
    limit = min(max_products, surface.size)
    generator = torch.Generator().manual_seed(seed)
    basis: list[Tensor] = []
    diagonal: list[float] = []
    beside: list[float] = []  # the last entry couples to a vector that is not part of the basis yet
    with surface.products() as product:
        while True:
            if not basis or beside[-1] == 0.0:
                vector = _unit(_orthogonal(surface.random(generator), basis))
            basis.append(vector)
            image = product(vector)
            along = torch.dot(image, vector)
            rest = _orthogonal(image, basis)
            alpha, beta = surface.agreed(along, rest.norm())
            diagonal.append(alpha)
            spread = max(abs(value) for value in (*diagonal, *beside, beta))
            # below rounding the vectors span an invariant subspace, and all of its eigenvalues are exact
            beside.append(beta if beta > 10 * torch.finfo(surface.dtype).eps * spread else 0.0)
            values, combinations = _ritz(diagonal, beside)
            chosen = [*range(len(diagonal) - 1, len(diagonal) - 1 - top, -1), *range(bottom)]
            complete = len(diagonal) >= wanted
            residuals = beside[-1] * combinations[-1, chosen].abs() if complete else torch.tensor(torch.inf)
            converged = bool((residuals <= tolerance * values.abs().max()).all())
            if converged or len(diagonal) == limit:
                break
            if beside[-1]:
                vector = rest / beta
    vectors = torch.stack([_combined(basis, combinations[:, index]) for index in chosen])
    return Eigenvalues(values[chosen], vectors, residuals, len(diagonal), converged)


def power_iteration(
    surface: LossSurface, *, top: int = 1, tolerance: float = 1e-3, max_products: int = 100, seed: int = 0
) -> Eigenvalues:
    r"""The eigenvalues of largest magnitude, by power iteration with deflation.

    Stops when the value changes by at most ``tolerance`` times itself. That is no bound on the error: 1e-3 leaves some
    0.2 %, and two eigenvalues of nearly equal magnitude much more. A negative eigenvalue may come first. For the
    largest positive one, and for fewer products, use :func:`lanczos`; this one keeps two vectors in memory only.

    Cost: one Hessian-vector product per iteration.

    Args:
        surface: the loss.
        top: number of eigenvalues, in the order of their magnitude.
        tolerance: see above.
        max_products: largest number of Hessian-vector products for each of them.
        seed: seed of the start vectors.

    Raises:
        ValueError: an argument out of range, or more eigenvalues than weights.

    References:
        Yao et al., PyHessian, arXiv 1912.07145. Its code adds 1e-6 to norms, which lowers values by 2e-6 of
        themselves, and draws the start vector from the global generator.

    Example:
        >>> from lightning_robust.sharpness import LossSurface, power_iteration
        >>> w = torch.zeros(3, requires_grad=True)
        >>> scales = torch.tensor([-5.0, 1.0, 2.0])
        >>> found = power_iteration(LossSurface(lambda: 0.5 * (scales * w**2).sum(), [w]), top=2, tolerance=1e-6)
        >>> [round(value, 3) for value in found.values.tolist()]
        [-5.0, 2.0]
    """
    check_integer("top", top, 1)
    check_integer("max_products", max_products, 1)
    check_positive("tolerance", tolerance)
    if top > surface.size:
        raise ValueError(f"Expected `top` to be at most the {surface.size} weights but got {top}.")
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    values: list[float] = []
    residuals: list[Tensor] = []
    before = surface.products_used
    converged = True
    with surface.products() as product:
        for _ in range(top):
            image, value, settled = surface.random(generator), torch.inf, False
            for _ in range(max_products):
                vector = _unit(_orthogonal(image, found))
                image = product(vector)
                estimate, length = surface.agreed(torch.dot(image, vector), image.norm())
                settled = abs(estimate - value) <= tolerance * abs(estimate) or length == 0.0
                value = estimate
                if settled:
                    break
            converged = converged and settled
            found.append(vector)
            values.append(value)
            residuals.append((image - value * vector).norm().double().cpu())
    products = surface.products_used - before
    return Eigenvalues(
        torch.tensor(values, dtype=torch.float64), torch.stack(found), torch.stack(residuals), products, converged
    )


def _orthogonal(vector: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """The part of ``vector`` that is orthogonal to ``basis``; twice, because once leaves rounding behind."""
    vector = vector.clone()
    for _ in range(2):
        for other in basis:
            vector.addcmul_(other, torch.dot(other, vector), value=-1)
    return vector


def _unit(vector: Tensor) -> Tensor:
    unit: Tensor = vector / vector.norm()
    return unit


def _ritz(diagonal: list[float], beside: list[float]) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of the tridiagonal matrix."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    coupling = torch.tensor(beside[:-1], dtype=torch.float64)
    rows = torch.arange(len(coupling))
    matrix[rows + 1, rows] = matrix[rows, rows + 1] = coupling
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def _combined(basis: Sequence[Tensor], weights: Tensor) -> Tensor:
    total = torch.zeros_like(basis[0])
    for vector, weight in zip(basis, weights.tolist(), strict=True):
        total.add_(vector, alpha=weight)
    return _unit(total)
