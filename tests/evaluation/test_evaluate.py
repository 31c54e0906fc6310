"""The evaluation against counts by hand, and what it leaves alone."""

import math

import pytest
import torch
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_robust.attacks import FGSM, PGD
from lightning_robust.evaluation import EvaluationResult, evaluate


@pytest.fixture
def model():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4)
    )


def batches(count, size=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, 2, 2, generator=generator)
    y = torch.randint(4, (count,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def joined(pairs):
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def test_clean_numbers_against_plain_formulas(model):
    data = batches(50)
    result = evaluate(model, data)
    x, y = joined(data)
    model.eval()
    with torch.no_grad():
        probabilities = model(x).double().softmax(1)
    correct = probabilities.argmax(1) == y
    one_hot = nn.functional.one_hot(y, 4)
    assert result.samples == 50
    assert result.accuracy == correct.double().mean().item()
    assert result.nll == pytest.approx(-probabilities[range(50), y].log().mean().item(), rel=1e-6)
    assert result.brier == pytest.approx((probabilities - one_hot).square().sum(1).mean().item(), rel=1e-6)
    reference = multiclass_calibration_error(probabilities.float(), y, 4, n_bins=15).item()
    assert result.ece == pytest.approx(reference, abs=1e-6)
    assert sum(result.bin_counts) == 50
    assert result.attack is None
    assert result.robust_accuracy is None
    assert result.temperature is None


def test_robust_means_right_both_clean_and_attacked(model):
    data = batches(40)
    attack = PGD(eps=0.1, steps=3)
    result = evaluate(model, data, attack=attack, seed=3)
    model.eval()
    generator = torch.Generator().manual_seed(3)
    robust = 0
    for x, y in data:
        x_adv = attack(model, x, y, generator=generator)
        robust += int(((model(x).argmax(1) == y) & (model(x_adv).argmax(1) == y)).sum())
    assert result.robust_accuracy == robust / 40
    assert result.attacked == 40
    assert result.attack == repr(attack)
    assert result.robust_accuracy <= result.accuracy


def test_the_temperature_comes_from_the_validation_samples(model):
    model[-1].weight.data.mul_(20)
    data, held_out = batches(60), batches(60, seed=5)
    result = evaluate(model, data, validation=held_out)
    x, y = joined(held_out)
    model.eval()
    with torch.no_grad():
        logits, test_logits = model(x).double(), model(joined(data)[0]).double()

    def loss(temperature, values=logits, labels=y):
        return nn.functional.cross_entropy(values / temperature, labels).item()

    assert result.temperature > 1
    assert loss(result.temperature) <= min(loss(result.temperature * 0.99), loss(result.temperature * 1.01))
    assert result.nll_scaled == pytest.approx(loss(result.temperature, test_logits, joined(data)[1]), rel=1e-5)
    assert result.nll_scaled < result.nll
    assert result.ece_scaled < result.ece
    assert not result.temperature_at_bound


def test_a_perfect_validation_split_is_reported_and_no_warning():
    model = nn.Sequential(nn.Flatten())
    right = [(torch.eye(4).reshape(4, 4, 1, 1), torch.arange(4))]
    assert evaluate(model, right, validation=right).temperature_at_bound


def test_only_the_first_samples_are_attacked(model):
    data = batches(30)
    attack = FGSM(eps=0.1, random_start=False)
    some = evaluate(model, data, attack=attack, max_attacked=10)
    assert some.attacked == 10
    assert some.samples == 30
    first = evaluate(model, [(x, y) for x, y in batches(30, size=10)][:1], attack=attack)
    assert some.robust_accuracy == first.robust_accuracy
    none = evaluate(model, data, attack=attack, max_attacked=0)
    assert (none.attack, none.robust_accuracy) == (None, None)


def test_batch_size_does_not_matter(model):
    attack = FGSM(eps=0.1, random_start=False)
    few, many = (evaluate(model, batches(30, size=size), validation=batches(20), attack=attack) for size in (4, 30))
    assert few.robust_accuracy == many.robust_accuracy
    assert few.ece == pytest.approx(many.ece, abs=1e-7)
    assert few.bin_counts == many.bin_counts


def test_the_model_is_left_as_it_was(model):
    model.train()
    model[3].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    evaluate(model, batches(20), validation=batches(10), attack=PGD(eps=0.1, steps=2))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_modes_are_restored_when_it_fails(model):
    with pytest.raises(IndexError):
        evaluate(model, [(torch.rand(2, 3, 2, 2),)])
    assert model.training


def test_other_batches_and_callables(model):
    class Wrapped:
        module = model

        def __call__(self, x):
            return model(x)

    seen = []
    mappings = [{"image": x, "label": y} for x, y in batches(20)]
    result = evaluate(Wrapped(), mappings, unpack=lambda batch: (batch["image"], batch["label"]), progress=seen.append)
    assert result.samples == sum(seen) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test": []}, "Expected `test` to have samples but got none"),
        ({"test": batches(5), "validation": []}, "Expected `validation` to have samples but got none"),
        ({"test": batches(5), "max_attacked": -1}, "Expected `max_attacked` to be an integer >= 0 but got -1"),
    ],
)
def test_refusals(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, **arguments)


def test_results_survive_json(model):
    import json

    result = evaluate(model, batches(20), validation=batches(10), attack=FGSM(eps=0.1))
    values = json.loads(json.dumps(result.to_dict()))
    assert EvaluationResult.from_dict({**values, "key of a later version": 1}) == result
    assert all(value is None or math.isfinite(value) for value in result.bin_accuracy)
