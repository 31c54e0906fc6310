import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.objectives import ADR, LTD, TRADES, AdversarialCrossEntropy, Running, adr_targets
from lightning_robust.schedules import Cosine, Linear
from support.attacked import CountingNet, images

EPS, STEPS, DECAY = 0.1, 5, 0.7


def alone(tensor):
    return tensor


def objective(**options):
    attack = PGD(eps=EPS, steps=2, mode="train")
    return ADR(objective=AdversarialCrossEntropy(attack=attack), decay=DECAY, **options)


def naive_targets(logits, labels, temperature, interpolation):
    rows = []
    for z, y in zip(logits, labels.tolist(), strict=True):
        q = (z / temperature).softmax(0)
        share = min(max(interpolation - float(q.max() - q[y]), 0.0), 1.0)
        rows.append(share * q + (1 - share) * F.one_hot(torch.tensor(y), len(z)).to(q))
    return torch.stack(rows)


@pytest.mark.parametrize("scale", [0.5, 5.0, 100.0])
@pytest.mark.parametrize("classes", [2, 7])
def test_targets_equal_a_loop(scale, classes):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(9, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (9,), generator=generator)
    found = adr_targets(logits, labels, 1.7, 0.8)
    torch.testing.assert_close(found, naive_targets(logits, labels, 1.7, 0.8), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.sum(1), torch.ones(9, dtype=torch.float64))
    assert torch.equal(found.argmax(1), labels)  # the true class stays on top
    soft = F.one_hot(labels, classes).double()
    assert torch.equal(adr_targets(logits, soft, 1.7, 0.8), found)


def test_targets_of_probabilities_and_of_one_image():
    q = torch.tensor([[0.25, 0.75]])
    found = adr_targets(q.log(), torch.tensor([[0.5, 0.5]]), 1.0, 1.0)
    torch.testing.assert_close(found, 0.75 * q + 0.25 * 0.5)
    assert adr_targets(torch.zeros(1, 3, dtype=torch.bfloat16), torch.tensor([2]), 2.0, 0.9).shape == (1, 3)


def test_a_loop_with_a_copy_that_follows_by_hand():
    """Targets from the schedule of the step, attack and loss with them in training mode, the average after the step."""
    torch.manual_seed(0)
    net = CountingNet().double().train()
    reference, average = copy.deepcopy(net), copy.deepcopy(net).eval()
    optimizers = [torch.optim.SGD(each.parameters(), 0.1, momentum=0.9) for each in (net, reference)]
    adr = objective(
        temperature=Cosine(start=2.5, end=1.0, denominator="T"),
        interpolation=Linear(start=0.2, end=0.9, denominator="T"),
    )
    attack = PGD(eps=EPS, steps=2, mode="train")
    for step in range(STEPS):
        x, y = images(dtype=torch.float64, seed=step)
        adr.running = Running(step=step, max_steps=STEPS)
        prepared = adr.prepare(net, x, y, generator=torch.Generator().manual_seed(step))
        temperature = 1.0 + 0.75 * (1 + torch.cos(torch.tensor(torch.pi * step / STEPS, dtype=torch.float64)))
        target = naive_targets(average(x).detach(), y, float(temperature), 0.2 + 0.7 * step / STEPS)
        torch.testing.assert_close(prepared.y, target, rtol=1e-9, atol=1e-12)
        x_adv = attack(reference, x, target, generator=torch.Generator().manual_seed(step))
        losses = [adr(net, prepared).loss, F.cross_entropy(reference(x_adv), target)]
        torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-12)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        adr.step_ends(net, alone)
        with torch.no_grad():
            for mine, theirs in zip(average.state_dict().values(), reference.state_dict().values(), strict=True):
                mine.copy_(DECAY * mine + (1 - DECAY) * theirs if mine.is_floating_point() else theirs)
        for mine, theirs in zip(adr.averaged().state_dict().values(), average.state_dict().values(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_the_average_is_nobodys_weight_and_in_evaluation_mode():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = CountingNet(dropout=0.5)
            self.objective = objective(temperature=2.0, interpolation=0.9)

        def forward(self, x):
            return self.net(x)

    holder = Holder().train()
    parameters = sum(parameter.numel() for parameter in holder.parameters())
    x, y = images()
    holder.objective.prepare(holder, x, y)
    holder.objective.step_ends(holder, alone)
    assert sum(parameter.numel() for parameter in holder.parameters()) == parameters
    averaged = holder.objective.averaged()
    assert not any(module.training for module in averaged.modules())
    assert isinstance(averaged.objective, nn.Identity)  # not copied
    assert {name for name, _ in averaged.named_parameters()} == {name for name, _ in holder.named_parameters()}
    copied = copy.deepcopy(holder)
    copied.objective.step_ends(copied, alone)  # has an average of its own
    assert copied.objective.average is not holder.objective.average


def test_state_continues_exactly(tmp_path):
    x, y = images()
    net = CountingNet()
    first = objective(temperature=2.0, interpolation=0.9)
    assert first.state_dict() == {"_extra_state": {}}
    first.prepare(net, x, y)
    with torch.no_grad():
        net.head.weight.add_(1.0)
    first.step_ends(net, alone)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = objective(temperature=2.0, interpolation=0.9)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.average is None
    assert second.state_dict()["_extra_state"].keys() == first.state_dict()["_extra_state"].keys()
    prepared = [each.prepare(net, x, y, generator=torch.Generator().manual_seed(0)) for each in (first, second)]
    assert torch.equal(prepared[0].y, prepared[1].y)
    for each in (first, second):
        each.step_ends(net, alone)
    for mine, theirs in zip(
        first.averaged().state_dict().values(), second.averaged().state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_the_average_of_a_checkpoint_is_given_to_a_network():
    x, y = images()
    net, fresh = CountingNet(), CountingNet()
    first, restored = (objective(temperature=2.0, interpolation=0.9) for _ in range(2))
    first.prepare(net, x, y)
    with torch.no_grad():
        net.head.weight.add_(1.0)
    first.step_ends(net, alone)
    restored.load_state_dict(first.state_dict())
    restored.copy_average_to(fresh)
    for mine, theirs in zip(fresh.state_dict().values(), first.averaged().state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    with pytest.raises(ValueError, match="average is of another network"):
        restored.copy_average_to(CountingNet(classes=6))
    with pytest.raises(RuntimeError, match="no moving average; train, or load"):
        ADR().copy_average_to(fresh)


def test_a_new_fit_begins_with_a_new_average():
    x, y = images()
    net = CountingNet().eval()
    adr = objective(temperature=2.0, interpolation=0.9)
    adr.prepare(net, x, y)
    with torch.no_grad():
        net.head.weight.add_(1.0)
    adr.ready()
    adr.prepare(net, x, y)
    assert torch.equal(adr.averaged().head.weight, net.head.weight)


def test_the_state_of_another_network_is_refused():
    x, y = images()
    adr, other = (objective(temperature=2.0, interpolation=0.9) for _ in range(2))
    adr.prepare(CountingNet(), x, y)
    other.load_state_dict(adr.state_dict())
    with pytest.raises(ValueError, match="saved average is of another network"):
        other.prepare(CountingNet(classes=6), x, y)


def test_defaults_are_the_published_ones():
    adr = ADR()
    assert adr.attack.mode == "train"
    assert (adr.attack.eps, adr.attack.step_size, adr.attack.steps) == (8 / 255, 2 / 255, 10)
    assert [adr.temperature.at(step, 100) for step in (0, 50)] == pytest.approx([2.5, 2.25])
    assert [adr.interpolation.at(step, 100) for step in (0, 50)] == pytest.approx([0.7, 0.825])
    assert adr.decay == 0.995
    assert adr.passes(1) == adr.objective.passes(1) + 1 / 3
    assert ADR(objective=TRADES()).attack.loss == "kl"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "`temperature` to be a finite number > 0"),
        ({"interpolation": 1.5}, r"`interpolation` to be in \[0.0, 1.0\]"),
        ({"decay": -0.1}, r"`decay` to be in \[0.0, 1.0\]"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ADR(**options)


def test_what_cannot_be_averaged_or_has_no_end_is_refused():
    x, y = images()
    net = CountingNet()
    with pytest.raises(RuntimeError, match="no moving average before the first batch"):
        ADR().averaged()
    with pytest.raises(ValueError, match="to be known for a cosine schedule but got -1"):
        ADR().prepare(net, x, y)
    with pytest.raises(TypeError, match=r"the model is a bare function; give the nn\.Module itself"):
        objective(temperature=2.0, interpolation=0.9).prepare(lambda images: net(images), x, y)
    adr = ADR()
    adr.step_ends(net, alone)  # nothing to follow yet
    assert adr.average is None
    nested = LTD(teacher=CountingNet(), objective=TRADES())
    assert nested.objective.attacks
