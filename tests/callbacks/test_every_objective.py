"""Every objective of the library inside a Trainer."""

import copy

import pytest
import torch

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import AdversarialTraining, ObjectiveTraining, SharpnessAware
from lightning_robust.models import ImageClassifier
from lightning_robust.objectives import AdversarialCrossEntropy
from lightning_robust.sharpness import AWP
from support.modules import CHANNELS, CLASSES, PlainModule, loader, network, trainer, weights_of
from support.objectives import NAMES, build

# the images of these tests all have labels, which a semi-supervised objective says
pytestmark = pytest.mark.filterwarnings("ignore:No sample of epoch")


def objective(name):
    torch.manual_seed(1)
    return build(name, network(norm=True), CLASSES)


def fit(module, *callbacks):
    run = trainer(*callbacks, limit_train_batches=2, limit_val_batches=0, max_epochs=2)
    run.fit(module, loader())
    return run


class Same(torch.optim.SGD):
    """The optimizer of PlainModule."""

    def __init__(self, params):
        super().__init__(params, lr=0.1, momentum=0.9, weight_decay=5e-4)


@pytest.mark.parametrize("name", NAMES)
def test_in_an_image_classifier_and_around_any_module(name):
    plain = PlainModule()
    classifier = ImageClassifier(
        copy.deepcopy(plain.net), num_classes=CLASSES, in_chans=CHANNELS, objective=objective(name), optimizer=Same
    )
    before = weights_of(plain)
    logged = [fit(plain, ObjectiveTraining(objective(name))), fit(classifier)]
    assert not torch.equal(weights_of(plain), before)
    torch.testing.assert_close(weights_of(plain), torch.cat([p.detach().flatten() for p in classifier.parameters()]))
    first, second = (run.callback_metrics for run in logged)
    assert {name: second.get(name) for name in first if "/" in name} == first


@pytest.mark.parametrize("name", NAMES)
def test_under_adversarial_weight_perturbation(name):
    plain, perturbed = PlainModule(), PlainModule()
    fit(plain, ObjectiveTraining(objective(name)))
    fit(perturbed, ObjectiveTraining(objective(name)), SharpnessAware(AWP(gamma=0.05)))
    assert bool(weights_of(perturbed).isfinite().all())
    assert not torch.equal(weights_of(perturbed), weights_of(plain))


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_through_a_checkpoint(name, tmp_path):
    callback, other = ObjectiveTraining(objective(name)), ObjectiveTraining(objective(name))
    fit(PlainModule(), callback).save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"][callback.state_key]
    other.load_state_dict(state)
    ours, theirs = callback.objective.state_dict(), other.objective.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(str(value) == str(theirs[key]) for key, value in ours.items())


def test_adversarial_cross_entropy_is_adversarial_training():
    attack = PGD(eps=0.1, steps=2, random_start=False)
    ours, theirs = PlainModule(), PlainModule()
    fit(ours, ObjectiveTraining(AdversarialCrossEntropy(attack=attack)))
    fit(theirs, AdversarialTraining(attack))
    torch.testing.assert_close(weights_of(ours), weights_of(theirs))
