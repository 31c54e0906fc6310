"""FSAM against explicit vectors and a mask from Python's own sorting; when the mask is renewed, and from what."""

import pytest
import torch
from torch import nn

from lightning_robust.schedules import Piecewise
from lightning_robust.sharpness import SAM, FisherSAM, ParameterSelection, Weights, sharp_backward, top_entries
from support.explicit import Problem, check_continued, identical, norm, plus, same, through_file

SCORED = ("first.weight", "layer_norm.weight", "last.weight")


def mask_of(gradient, keep_ratio, scored=SCORED):
    """Largest squares first, among equals in the order of the weights."""
    entries = [(-(float(g) ** 2), place, name) for name in scored for place, g in enumerate(gradient[name].flatten())]
    entries = [(score, order, name, place) for order, (score, place, name) in enumerate(entries)]
    masks = {name: torch.zeros(gradient[name].numel(), dtype=torch.bool) for name in scored}
    for _, _, name, place in sorted(entries)[: int(keep_ratio * len(entries))]:
        masks[name][place] = True
    return {name: mask.view_as(gradient[name]) for name, mask in masks.items()}


def masked(gradient, masks, rho, norm_eps=1e-7):
    length = norm(gradient)
    return {
        name: rho * value * masks.get(name, torch.ones_like(value)) / (length + norm_eps)
        for name, value in gradient.items()
    }


def memory(method):
    return {key.removeprefix("mask/"): value for key, value in method.state_dict().items()}


@pytest.mark.parametrize(("keep_ratio", "refresh_every"), [(0.1, 1), (0.3, 4), (0.77, 100)])
def test_steps_are_the_formula(keep_ratio, refresh_every):
    problem = Problem()
    method = FisherSAM(rho=0.2, keep_ratio=keep_ratio, refresh_every=refresh_every)
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1, momentum=0.9)
    for step in range(len(problem.batches)):
        weights = problem.weights
        gradient = problem.gradient(weights, step)
        if step % refresh_every == 0:
            masks = mask_of(gradient, keep_ratio)
        offsets = masked(gradient, masks, 0.2)
        assert norm(offsets) < 0.2
        optimizer.zero_grad()
        sharp_backward(problem.closure(step), method, optimizer, module=problem.net, step=step)
        same(problem.offsets(), offsets)
        same(problem.grads(), problem.gradient(plus(weights, offsets), step))
        assert identical(memory(method), masks)
        optimizer.step()


@pytest.mark.parametrize("keep_ratio", [0.0, 0.001, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("values", [7, 1000])
def test_top_entries_are_those_of_a_stable_sort(keep_ratio, values):
    scores = torch.randint(values, (40, 50)).float()  # many are equal
    expected = torch.zeros(2000, dtype=torch.bool)
    expected[scores.flatten().argsort(descending=True, stable=True)[: int(2000 * keep_ratio)]] = True
    found = top_entries(scores, keep_ratio)
    assert torch.equal(found, expected.view(40, 50))
    assert found.sum() == int(2000 * keep_ratio)


def test_top_entries_of_zeros_are_the_first():
    assert top_entries(torch.zeros(5), 0.4).tolist() == [True, True, False, False, False]
    assert top_entries(torch.tensor([0.0, -1.0, float("inf")]), 0.67).tolist() == [True, False, True]
    assert top_entries(torch.zeros(0), 0.5).shape == (0,)


def test_small_gradients_are_told_apart():
    """Squares of float16 gradients are zero in float16."""
    net = nn.Linear(4, 1, bias=False).half()
    method = FisherSAM(keep_ratio=0.5)
    small = torch.tensor([1e-5, 4e-5, 2e-5, 3e-5]).half()
    sharp_backward(lambda: (net.weight * small).sum(), method, net, step=0)
    assert memory(method)["weight"].tolist() == [[False, True, False, True]]


def test_parameters_that_are_not_scored_are_perturbed_whole():
    problem = Problem()
    method = FisherSAM(keep_ratio=0.0, rho=0.2)
    gradient = problem.gradient(problem.weights, 0)
    sharp_backward(problem.closure(0), method, problem.net, step=0)
    same(problem.offsets(), masked(gradient, {name: torch.zeros_like(gradient[name]) for name in SCORED}, 0.2))
    assert not any(mask.any() for mask in memory(method).values())
    assert tuple(memory(method)) == SCORED


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm])
def test_batchnorm_is_not_scored_whatever_its_name(kind):
    net = nn.Sequential(nn.Linear(2, 3), kind(3))
    method = FisherSAM()
    sharp_backward(lambda: sum(p.square().sum() for p in net.parameters()), method, net, step=0)
    assert list(memory(method)) == ["0.weight"]


def test_what_is_not_scored_can_be_chosen():
    problem = Problem()
    for unscored in ("layer", ["layer", "last"]):
        method = FisherSAM(unscored=unscored)
        sharp_backward(problem.closure(0), method, problem.net, step=0)
        texts = [unscored] if isinstance(unscored, str) else unscored
        names = [n for n in problem.weights if "batch_norm" not in n and not any(text in n for text in texts)]
        assert list(memory(method)) == names


def test_keeping_all_is_sam():
    ours, theirs = Problem(), Problem()
    sharp_backward(ours.closure(0), FisherSAM(rho=0.1, keep_ratio=1.0), ours.net, step=0)
    sharp_backward(theirs.closure(0), SAM(rho=0.1, norm_eps=1e-7), theirs.net)
    assert identical(ours.grads(), theirs.grads())


def test_groups_and_schedules_have_their_radius():
    problem = Problem()
    first = list(problem.net.first.parameters())
    rest = [p for p in problem.net.parameters() if all(p is not other for other in first)]
    optimizer = torch.optim.SGD([{"params": first, "rho": 0.7}, {"params": rest}], lr=0.1)
    gradient = problem.gradient(problem.weights, 0)
    method = FisherSAM(rho=Piecewise(values={0: 0.1, 10: 0.3}), keep_ratio=0.3)
    for step, rho in ((0, 0.1), (10, 0.3)):
        sharp_backward(problem.closure(0), method, optimizer, module=problem.net, step=step)
        # the order of the weights is that of the groups, and there are no equal scores
        small, large = (masked(gradient, mask_of(gradient, 0.3), each) for each in (rho, 0.7))
        same(problem.offsets(), {n: (large if n.startswith("first") else small)[n] for n in gradient})


def test_a_selection_comes_first():
    problem = Problem()
    method = FisherSAM(rho=0.2, keep_ratio=0.4)
    chosen = ["embed.weight", "first.weight"]
    gradient = problem.gradient(problem.weights, 0)
    own = {name: gradient[name] for name in chosen}
    expected = masked(own, mask_of(gradient, 0.4, ["first.weight"]), 0.2)
    perturb = ParameterSelection(include=["embed", "first.weight"])
    sharp_backward(problem.closure(0), method, problem.net, step=0, perturb=perturb)
    found = problem.offsets()
    same({name: found[name] for name in chosen}, expected)
    assert not any(value.any() for name, value in found.items() if name not in chosen)
    assert list(memory(method)) == ["first.weight"]


def test_batches_that_add_up_have_the_mask_of_the_first():
    problem = Problem()
    method = FisherSAM(rho=0.2, keep_ratio=0.3, refresh_every=2)
    for step in range(3):
        for index in (2 * step, 2 * step + 1):
            gradient = problem.gradient(problem.weights, index)
            if index in (0, 4):
                masks = mask_of(gradient, 0.3)
            sharp_backward(problem.closure(index), method, problem.net, step=step, accumulate=2)
            same(problem.offsets(), masked(gradient, masks, 0.2))


def test_a_weight_that_joins_later_renews_the_mask():
    problem = Problem()
    method = FisherSAM(keep_ratio=0.3)
    problem.net.last.requires_grad_(False)
    sharp_backward(problem.closure(0), method, problem.net, step=0)
    assert set(memory(method)) == {"first.weight", "layer_norm.weight"}
    problem.net.last.requires_grad_(True)
    sharp_backward(problem.closure(1), method, problem.net, step=1)
    assert identical(memory(method), mask_of(problem.gradient(problem.weights, 1), 0.3))


@pytest.mark.parametrize("factor", [0.0, float("nan"), float("inf")])
def test_unusable_gradients_keep_the_mask(factor):
    problem = Problem()
    method = FisherSAM(keep_ratio=0.3, refresh_every=2)
    sharp_backward(problem.closure(0, factor), method, problem.net, step=0)
    assert all(mask.all() for mask in memory(method).values())  # none so far: everything is perturbed
    sharp_backward(problem.closure(1), method, problem.net, step=2)
    masks = mask_of(problem.gradient(problem.weights, 1), 0.3)
    assert identical(memory(method), masks)
    problem.net.zero_grad()
    sharp_backward(problem.closure(2, factor), method, problem.net, step=4)
    assert identical(memory(method), masks)
    if factor == 0:
        assert identical(*problem.passes)
        assert not any(value.any() for value in problem.grads().values())
    else:
        assert not any(value.isfinite().all() for value in problem.grads().values())


def test_the_memory_survives_a_checkpoint():
    check_continued(lambda: FisherSAM(keep_ratio=0.2, refresh_every=5), first=1, steps=7)


def test_a_reset_forgets_the_step_too():
    problem = Problem()
    method = FisherSAM(keep_ratio=0.2)
    sharp_backward(problem.closure(0), method, problem.net, step=0)
    state = through_file(method.state_dict())
    method.reset()
    assert not method.state_dict()
    sharp_backward(problem.closure(1), method, problem.net, step=0)
    assert not identical(memory(method), {key.removeprefix("mask/"): value for key, value in state.items()})
    method.load_state_dict(state)
    sharp_backward(problem.closure(2), method, problem.net, step=0)
    assert identical(memory(method), mask_of(problem.gradient(problem.weights, 2), 0.2))


def test_a_mask_is_recalled_by_weight():
    problem = Problem()
    method = FisherSAM()
    sharp_backward(problem.closure(0), method, problem.net, step=0)
    weights = Weights.of(problem.net)
    found = dict(zip(weights.names, method.recall("mask", weights), strict=True))
    assert {name for name, mask in found.items() if mask is not None} == set(SCORED)
    assert sum(int(mask.sum()) for mask in found.values() if mask is not None) == int(0.1 * (20 + 5 + 15))


def test_what_cannot_be_scored_is_refused():
    problem = Problem()
    with pytest.raises(ValueError, match=r"names, which are not known; pass the module \(module=...\)"):
        sharp_backward(problem.closure(0), FisherSAM(), problem.net.parameters(), step=0)
    perturb = ParameterSelection(include="first.bias|embed")
    with pytest.raises(ValueError, match=r"scores none of the 2 parameters that are perturbed .*plain SAM"):
        sharp_backward(problem.closure(0), FisherSAM(), problem.net, step=0, perturb=perturb)
    with pytest.raises(ValueError, match=r"FisherSAM needs to know the step.*pass step="):
        sharp_backward(problem.closure(0), FisherSAM(), problem.net)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="Expected `rho` to be a finite number > 0 but got 0"):
        FisherSAM(rho=0)
    with pytest.raises(ValueError, match="Expected `norm_eps` to be a finite number > 0 but got 0"):
        FisherSAM(norm_eps=0)
    with pytest.raises(ValueError, match=r"Expected `keep_ratio` to be in \[0.0, 1.0\] but got 1.5"):
        FisherSAM(keep_ratio=1.5)
    with pytest.raises(ValueError, match=r"Expected `keep_ratio` to be in \[0.0, 1.0\] but got -1"):
        top_entries(torch.zeros(3), -1)
    with pytest.raises(ValueError, match="Expected `refresh_every` to be an integer >= 1 but got 0"):
        FisherSAM(refresh_every=0)


def test_sparse_gradients_are_refused():
    net = torch.nn.Embedding(4, 2, sparse=True)
    with pytest.raises(
        ValueError, match=r"FisherSAM needs dense gradients, but that of 'weight' is sparse; use Embedding"
    ):
        sharp_backward(lambda: net(torch.tensor([1])).sum(), FisherSAM(), net, step=0)
