"""What an attack compares with in place of the model's own clean prediction."""

import pytest
import torch
from torch import nn

from lightning_robust.attacks import APGD, FAB, FGSM, PGD
from support.attacked import CountingNet, images


def models(dtype=torch.float64):
    torch.manual_seed(3)
    return [CountingNet().to(dtype).eval().requires_grad_(False) for _ in range(2)]


def attack(**options):
    return PGD(**{"eps": 0.1, "step_size": 0.03, "steps": 4, "loss": "kl", **options})


def divergence(model, other, x):
    q = other(x).log_softmax(1)
    return (q.exp() * (q - model(x).log_softmax(1))).sum()


def fixed(logits):
    return lambda x: logits


def test_logits_are_what_the_prediction_is_compared_with():
    model, other = models()
    x, y = images(dtype=torch.float64)
    start = x + 0.01
    found = attack()(model, x, y, start=start, against=other(x))
    # the divergence from fixed probabilities has the gradient of the cross entropy with them
    torch.testing.assert_close(found, attack(loss="ce")(model, x, other(x).softmax(1), start=start))
    own = attack()(model, x, y, start=start)
    assert not torch.equal(found, own)
    assert torch.equal(attack()(model, x, y, start=start, against=model(x)), own)


def test_a_network_is_asked_at_each_point_with_its_gradient():
    model, other = models()
    x, y = images(dtype=torch.float64)
    x_adv = x + 0.01
    for _ in range(4):
        point = x_adv.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(divergence(model, other, point), point)
        x_adv = torch.clamp(x + (x_adv + 0.03 * gradient.sign() - x).clamp(-0.1, 0.1), 0, 1)
    found = attack()(model, x, y, start=x + 0.01, against=other)
    torch.testing.assert_close(found, x_adv)
    assert not torch.equal(found, attack()(model, x, y, start=x + 0.01, against=other(x)))
    held = attack()(model, x, y, start=x + 0.01, against=lambda point: other(point).detach())
    assert not torch.equal(found, held)


def test_nothing_is_asked_of_the_model_about_the_clean_images():
    model, other = models()
    x, y = images(dtype=torch.float64)
    model.batches.clear()
    attack()(model, x, y, against=other)
    assert model.batches == [8] * 4
    assert other.batches == [8] * 4


@pytest.mark.parametrize("kind", ["logits", "network"])
@pytest.mark.parametrize(
    "options", [{"early_stop": True}, {"restarts": 2}, {"early_stop": True, "restarts": 2}], ids=str
)
def test_samples_keep_their_own_reference(kind, options):
    model, other = models()
    x, y = images(dtype=torch.float64)
    y = torch.where(torch.arange(8) % 2 == 0, model(x).argmax(1), y)
    against = other if kind == "network" else other(x)
    starts = {"random_start": "normal", **options}
    whole = attack(**starts)(model, x, y, against=against, indices=torch.arange(8))
    for row in range(8):
        one = against if kind == "network" else against[row : row + 1]
        part = slice(row, row + 1)
        alone = attack(**starts)(model, x[part], y[part], against=one, indices=torch.tensor([row]))
        torch.testing.assert_close(whole[part], alone)


@pytest.mark.parametrize("kind", ["logits", "network"])
def test_other_attacks_climb_too(kind):
    model, other = models()
    x, y = images(dtype=torch.float64)
    against = other if kind == "network" else other(x)
    found = APGD(eps=0.1, steps=5, loss="kl", early_stop=False, best_loss=True)(model, x, y, against=against)
    with torch.no_grad():
        start, end = (divergence(model, other if kind == "network" else fixed(against), point) for point in (x, found))
    assert end > start


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_network_gets_the_type_of_the_images(dtype):
    x, y = images(dtype=dtype)
    seen = []

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3 * 6 * 6, 4)

        def forward(self, images):
            seen.append(images.dtype)
            return self.linear(images.flatten(1).float())

    found = attack()(Half(), x, y, against=Half())
    assert found.dtype == dtype
    assert set(seen) == {dtype}


def test_works_in_inference_mode():
    model, other = models()
    x, y = images(dtype=torch.float64)
    expected = attack()(model, x, y, start=x + 0.01, against=other(x))
    with torch.inference_mode():
        assert torch.equal(attack()(model, x, y, start=x + 0.01, against=other(x)), expected)


def test_refusals():
    model, other = models()
    x, y = images(dtype=torch.float64)
    for other_attack in (attack(loss="ce"), FGSM(eps=0.1), FAB(eps=0.1, steps=1)):
        with pytest.raises(ValueError, match=r"`against` is what a loss like 'kl' compares with.* set 'kl'"):
            other_attack(model, x, y, against=other)
    with pytest.raises(ValueError, match=r"one value of `against` per image, \[8\]"):
        attack()(model, x, y, against=other(x)[:4])
    three = CountingNet(3).double()
    for against in (three, three(x)):
        with pytest.raises(ValueError, match=r"`against` .* has 3 classes but the model has 4; take"):
            attack()(model, x, y, against=against)
    with (
        attack().posed(model, x, y, against=other) as problem,
        pytest.raises(ValueError, match=r"judges logits apart from their images.* use PGD, or give fixed logits"),
    ):
        problem.losses(model(x))
