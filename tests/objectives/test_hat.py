"""HAT against its formula, and where its standard model may come from."""

import copy

import lightning as L
import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.distillation import Teacher, TeacherSource
from lightning_robust.models import ImageClassifier
from lightning_robust.objectives import HAT, hat_loss
from support.attacked import CountingNet, images

ATTACK = {"eps": 0.1, "steps": 2, "loss": "kl"}


@pytest.fixture
def net():
    return CountingNet().double().train()


@pytest.fixture
def standard():
    torch.manual_seed(5)
    return CountingNet().double()


def tiny():
    return ImageClassifier("resnet8_cifar", num_classes=4, mean=[0.5] * 3, std=[0.2] * 3)


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(7)
    classifier = tiny()
    trainer = L.Trainer(max_epochs=0, logger=False, enable_checkpointing=False, accelerator="cpu", barebones=False)
    trainer.strategy.connect(classifier)
    trainer.save_checkpoint(tmp_path / "standard.ckpt")
    return classifier.eval(), tmp_path / "standard.ckpt"


def test_loss_and_gradients():
    logits = [torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    y, helper = torch.randint(5, (6,)), torch.randint(5, (6,))
    clean, adv, helped = logits
    kl = (clean.softmax(1) * (clean.log_softmax(1) - adv.log_softmax(1))).sum(1).mean()
    for target in (y, torch.rand(6, 5, dtype=torch.float64).softmax(1)):
        loss, *parts = hat_loss(*logits, target, helper, 2.0, 0.25)
        expected = [F.cross_entropy(clean, target), kl, F.cross_entropy(helped, helper)]
        torch.testing.assert_close(parts, expected)
        whole = expected[0] + 2 * expected[1] + 0.25 * expected[2]
        torch.testing.assert_close(loss, whole)
        torch.testing.assert_close(
            torch.autograd.grad(loss, logits, retain_graph=True), torch.autograd.grad(whole, logits, retain_graph=True)
        )


@pytest.mark.parametrize(("forwards", "batches"), [("separate", [8, 8, 8]), ("joint", [24])])
def test_objective_is_the_formula(net, standard, forwards, batches):
    x, y = images(dtype=torch.float64)
    objective = HAT(standard, attack=PGD(**ATTACK), distance=3.0, forwards=forwards)
    prepared = objective.prepare(net, x, y)
    torch.testing.assert_close(prepared.extra["helper"], x + 3 * (prepared.x_adv - x))
    torch.testing.assert_close(prepared.extra["helper_logits"], standard.eval()(prepared.x_adv).detach())
    net.batches.clear()
    output = objective(net, prepared)
    assert net.batches == batches
    net.eval()  # one batch or three: the same
    output = objective(net, prepared)
    clean, adv, helped = (net(each) for each in (x, prepared.x_adv, prepared.extra["helper"]))
    torch.testing.assert_close(output.loss, hat_loss(clean, adv, helped, y, standard(prepared.x_adv).argmax(1))[0])
    torch.testing.assert_close(output.sample_losses.mean(), output.loss)
    torch.testing.assert_close(output.logits, clean)
    assert objective.passes(1) == objective.attack.passes + 3


def test_helper_examples_may_leave_the_pixels(net, standard):
    x, y = images(dtype=torch.float64)
    helper = HAT(standard, attack=PGD(**ATTACK)).prepare(net, x, y).extra["helper"]
    assert float(helper.min()) < 0
    assert float(helper.max()) > 1


def test_standard_model_is_a_copy_outside_the_module_tree(net, standard):
    x, y = images(dtype=torch.float64)
    standard.train()
    before = copy.deepcopy(standard.state_dict())
    objective = HAT(standard, attack=PGD(**ATTACK))
    objective(net, objective.prepare(net, x, y)).loss.backward()
    assert standard.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in standard.parameters())
    assert all(torch.equal(value, before[name]) for name, value in standard.state_dict().items())
    assert list(objective.parameters()) == list(objective.buffers()) == []
    assert set(objective.state_dict()) == {"_extra_state"}
    assert objective.state_dict()["_extra_state"] == {
        "standard model": objective.teachers.teacher("standard model").manifest()
    }


def test_checkpoint_of_an_image_classifier(checkpoint):
    classifier, path = checkpoint
    x, y = images()
    torch.manual_seed(1)
    model = tiny().eval()
    objective = HAT(str(path), attack=PGD(**ATTACK))
    prepared = objective.prepare(model, x, y)
    with torch.no_grad():
        assert torch.equal(prepared.extra["helper_logits"], classifier(prepared.x_adv))
    assert "standard.ckpt" in repr(objective)


def test_name_of_a_timm_model():
    x, y = images()
    objective = HAT(TeacherSource("timm:resnet8_cifar", num_classes=4), attack=PGD(**ATTACK))
    with pytest.warns(UserWarning, match=r"The standard model timm:resnet8_cifar has random weights"):
        prepared = objective.prepare(CountingNet(), x, y)
    assert prepared.extra["helper_logits"].shape == (8, 4)


def test_a_file_is_read_in_the_first_step_only(tmp_path):
    x, y = images()
    objective = HAT(str(tmp_path / "missing.ckpt"))
    net = CountingNet()
    with pytest.raises(FileNotFoundError, match=r"missing\.ckpt"):
        objective.prepare(net, x, y)
    assert net.batches == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_standard_model_follows_the_images(dtype):
    x, y = images(dtype=dtype)
    objective = HAT(CountingNet(), attack=PGD(**ATTACK))
    fingerprint = objective.teachers.teacher("standard model").fingerprint
    output = objective(CountingNet().to(dtype), objective.prepare(CountingNet().to(dtype), x, y))
    assert output.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool(output.loss.isfinite())
    assert objective.teachers.teacher("standard model").fingerprint == fingerprint


def test_another_standard_model_is_refused_when_training_goes_on(net, standard):
    x, y = images(dtype=torch.float64)
    objective, same, other = (HAT(model, attack=PGD(**ATTACK)) for model in (standard, standard, CountingNet()))
    for each in (same, other):
        each.load_state_dict(objective.state_dict())
    same.prepare(net, x, y)
    with pytest.raises(ValueError, match=r"with the standard model CountingNet .* resume with the same teacher"):
        other.prepare(net, x, y)
    waiting = HAT("somewhere.ckpt")  # says what it was told, as long as nothing was read
    assert waiting.state_dict()["_extra_state"] == {}
    waiting.load_state_dict(objective.state_dict())
    assert waiting.state_dict() == objective.state_dict()


def test_standard_model_with_other_classes_is_refused(net):
    x, y = images(dtype=torch.float64)
    objective = HAT(Teacher(CountingNet(classes=7)), attack=PGD(**ATTACK))
    prepared = objective.prepare(net, x, y)
    with pytest.raises(ValueError, match="standard model of HAT has 7 classes but the model has 4"):
        objective(net, prepared)


def test_published_defaults():
    objective = HAT(CountingNet())
    attack = objective.attack
    assert (attack.eps, attack.step_size, attack.steps) == (8 / 255, 2 / 255, 10)
    assert (attack.loss, attack.random_start, attack.mode) == ("kl", "normal", "eval")
    assert (objective.beta, objective.gamma, objective.distance) == (2.5, 0.5, 2.0)
    assert "standard model: 'CountingNet', beta=2.5, gamma=0.5, distance=2.0" in repr(objective)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1}, "Expected `beta`"),
        ({"gamma": -1}, "Expected `gamma`"),
        ({"distance": -1}, "Expected `distance`"),
        ({"forwards": "published"}, "Expected `forwards` to be one of 'separate', 'joint'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        HAT(CountingNet(), **options)
