"""Rules that hold for every attack: budget, edge cases, what is left alone, and what the result depends on."""

import inspect
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_robust import attacks
from lightning_robust.attacks import Attack
from lightning_robust.attacks.sequence import Ensemble
from support.attacked import CLASSES, CountingNet, differences, images, snapshot
from support.every_attack import BUDGETS, EVERY

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
COUNT = 8


def cases(condition=lambda case: True):
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=name) for name, case in EVERY.items() if condition(case)]
    )


@pytest.fixture
def net():
    return CountingNet(dropout=0.3)


def indices(count=COUNT):
    return 10 + torch.arange(count)


def classified(net, x):
    with torch.no_grad():
        return net.eval()(x).argmax(1)


def test_every_attack_is_here():
    def kinds(attack):
        members = [attack.attack] if hasattr(attack, "attack") else getattr(attack, "attacks", {}).values()
        return {type(attack)}.union(*map(kinds, members))

    exported = {getattr(attacks, name) for name in attacks.__all__}
    wanted = {each for each in exported if inspect.isclass(each) and issubclass(each, Attack)} - {Attack}
    assert wanted == set().union(*(kinds(case()) for case in EVERY.values()))


class TestBudget:
    @cases()
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_budget_and_bounds_hold_in_every_type(self, case, dtype, net):
        pixels, y = images(dtype=torch.float64)
        pixels[:3] = pixels[:3].round()  # black and white: every other step leads out of the bounds
        for mean, std in ((None, None), (MEAN, STD)):
            shift, scale = (
                torch.tensor(each or [value], dtype=torch.float64).view(1, -1, 1, 1)
                for each, value in ((mean, 0), (std, 1))
            )
            x, low, high = (((each - shift) / scale).to(dtype) for each in (pixels, 0.0, 1.0))
            attacked = case(mean=mean, std=std)(net.to(dtype), x, y, indices=indices())
            assert attacked.dtype == dtype
            assert attacked.shape == x.shape
            assert case.excess(x, attacked, scale) <= 1e-6
            assert bool(((attacked >= low) & (attacked <= high)).all())

    @cases()
    def test_it_fools_within_a_large_budget(self, case, net):
        """An attack that never moved would keep all other rules."""
        x, _ = images()
        y = classified(net, x)
        large = {norm: 6 * eps for norm, eps in BUDGETS.items()}
        options = {} if isinstance(case(), attacks.ForeignAttack) else {"eps": large}
        more = {"steps": 10} if case.steps is not None else {}
        attacked = case(**options, **more)(net, x, y)
        with torch.no_grad():
            margin = nn.functional.cross_entropy(net(attacked), y) - nn.functional.cross_entropy(net(x), y)
        assert float(margin) > 0.02

    @cases()
    def test_no_budget_leaves_the_images_as_they_are(self, case, net):
        x, y = images()
        assert torch.equal(case(eps=dict.fromkeys(BUDGETS, 0.0))(net, x, y), x)

    @cases(lambda case: case.steps is not None and case.least_steps == 0)
    def test_no_steps(self, case, net):
        x, y = images()
        attacked = case(steps=0)(net, x, y)
        assert case.excess(x, attacked) <= 1e-6
        assert 0 <= float(attacked.min()) <= float(attacked.max()) <= 1

    @cases(lambda case: case.steps is not None)
    def test_too_few_steps_are_refused(self, case):
        with pytest.raises(ValueError, match=f"`steps` to be an integer >= {case.least_steps} but got"):
            case(steps=case.least_steps - 1)

    @cases(lambda case: case.norms != ("linf",) or not isinstance(case(), attacks.ForeignAttack))
    @pytest.mark.parametrize("factor", [2, 255], ids=["[-1, 1]", "[0, 255]"])
    def test_other_bounds(self, case, factor, net):
        """The same images in other units get the same budget in those units."""
        x, _ = images()
        y = classified(net, x)
        low = -1.0 if factor == 2 else 0.0
        eps = {norm: factor * value for norm, value in BUDGETS.items()}
        attack = case(eps=eps, bounds=(low, low + factor))
        moved = x * factor + low
        attacked = attack(lambda z: net((z - low) / factor), moved, y)
        assert case.excess(moved, attacked, eps=eps) <= 1e-6
        assert low <= float(attacked.min()) <= float(attacked.max()) <= low + factor
        if "FAB" not in repr(attack) and "steps=1" not in repr(attack):  # which returns what fools only
            assert not torch.equal(attacked, moved)


class TestBatches:
    @cases()
    def test_an_empty_batch(self, case, net):
        x, y = images()
        attacked = case()(net, x[:0], y[:0], indices=indices(0))
        assert attacked.shape == (0, 3, 6, 6)
        assert attacked.dtype == x.dtype
        assert net.batches == []

    @cases()
    def test_a_batch_of_one(self, case, net):
        x, y = images()
        attacked = case()(net, x[:1], y[:1])
        assert attacked.shape == (1, 3, 6, 6)
        assert case.excess(x[:1], attacked) <= 1e-6

    @cases(lambda case: case.per_sample)
    def test_results_depend_neither_on_the_batch_nor_on_its_order(self, case):
        torch.manual_seed(0)
        net = CountingNet().double()
        x, _ = images(7, dtype=torch.float64)
        y = classified(net, x)
        y[2] = (y[2] + 1) % CLASSES  # misclassified already
        index = torch.tensor([5, 900, 3, 77, 12, 1, 8])
        attack = case()
        whole = attack(net, x, y, indices=index)
        for some in (torch.tensor([6, 2, 4, 0]), torch.tensor([3])):
            part = attack(net, x[some], y[some], indices=index[some])
            torch.testing.assert_close(part, whole[some], rtol=0, atol=1e-9)
        if case.draws:
            assert not torch.equal(attack(net, x, y, indices=index + 1), whole)

    @cases()
    def test_a_generator_or_the_seed_decides_what_is_drawn(self, case, net):
        x, _ = images()
        y = classified(net, x)
        first, again = (case()(net, x, y, generator=torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, again)
        attack = case()
        mine = attack(net, x, y)
        torch.manual_seed(99)
        torch.rand(5)
        twin = pickle.loads(pickle.dumps(attack))  # starts from the seed again
        assert torch.equal(twin(net, x, y), mine)
        assert repr(twin) == repr(attack)


class TestClasses:
    @cases()
    def test_few_classes_and_the_last_one(self, case):
        for classes in (2, 3):
            net = CountingNet(classes=classes)
            x, _ = images()
            for y in (torch.full((COUNT,), classes - 1), classified(net, x)):
                attacked = case()(net, x, y)
                assert bool(attacked.isfinite().all())
                assert case.excess(x, attacked) <= 1e-6

    @cases()
    def test_classes_as_integers_of_any_size(self, case, net):
        x, _ = images()
        y = classified(net, x)
        expected = case()(net, x, y, indices=indices())
        for kind in (torch.uint8, torch.int32):
            assert torch.equal(case()(net, x, y.to(kind), indices=indices()), expected)

    @cases(lambda case: case.targeted)
    def test_the_last_class_as_the_one_to_reach(self, case):
        for classes in (2, 3, CLASSES):
            net = CountingNet(classes=classes)
            x, _ = images()
            last = torch.full((COUNT,), classes - 1)
            attacked = case(targeted=True)(net, x, last, indices=indices())
            assert case.excess(x, attacked) <= 1e-6
            with torch.no_grad():
                before, after = net.eval()(x), net(attacked)
            reached = before.argmax(1) == last  # such images may stay as they are
            assert bool((after.argmax(1) == last)[reached].all())
            gained = after.softmax(1)[:, -1] - before.softmax(1)[:, -1]
            assert bool(reached.all()) or float(gained[~reached].max()) > 0

    @cases(lambda case: case.towards)
    def test_the_last_class_as_the_one_to_steer_to(self, case):
        for classes in (2, 3, CLASSES):
            net = CountingNet(classes=classes)
            x, _ = images()
            last = torch.full((COUNT,), classes - 1)
            attacked = case()(net, x, torch.zeros_like(last), towards=last, indices=indices())
            assert case.excess(x, attacked) <= 1e-6

    # of ensembles their members decide
    @cases(lambda case: not case.towards and not isinstance(case(), Ensemble | attacks.ScheduledAttack))
    def test_what_cannot_be_steered_says_so(self, case, net):
        x, y = images()
        with pytest.raises(ValueError, match=r"towards|steers"):
            case()(net, x, y, towards=(y + 1) % CLASSES)

    @cases()
    def test_images_that_are_misclassified_already(self, case, net):
        x, _ = images()
        y = (classified(net, x) + 1) % CLASSES
        attacked = case()(net, x, y, indices=indices())
        assert case.excess(x, attacked) <= 1e-6
        if case.keeps_wrong:
            assert torch.equal(attacked, x)


class TestSuccess:
    @cases(lambda case: case.keeps_what_fools)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    def test_a_point_that_fooled_the_model_is_returned(self, case, dtype, net):
        net.to(dtype)
        x, _ = images(4, dtype=dtype)
        y = classified(net, x)
        fooled = 0
        for image, label in zip(x.split(1), y.split(1), strict=True):
            seen = []

            def watched(z, label=label, seen=seen):
                logits = net(z)
                seen.append(bool((logits.argmax(1) != label).any()))
                return logits

            attacked = case(eps={norm: 4 * eps for norm, eps in BUDGETS.items()})(watched, image, label)
            fooled += any(seen)
            assert bool(classified(net, attacked) != label) == any(seen)
        assert fooled > 0


class TestWhatIsLeftAlone:
    @cases()
    def test_model_images_and_generators(self, case):
        self.leaves_all_alone(case())

    @cases(lambda case: case.modes)
    def test_in_train_mode_with_frozen_statistics_too(self, case):
        self.leaves_all_alone(case(mode="train-frozen-stats"))

    def leaves_all_alone(self, attack):
        net, x, y = used_net()
        x.requires_grad_()
        before, kept, states = snapshot(net), (x.detach().clone(), y.clone()), generators()
        attacked = attack(net, x, y)
        assert differences(net, before) == []
        assert generators() == states
        assert torch.equal(x, kept[0])
        assert torch.equal(y, kept[1])
        assert x.grad is None
        assert not attacked.requires_grad
        assert not attacked.is_inference()
        assert attacked.data_ptr() != x.data_ptr()

    @cases()
    def test_everything_is_put_back_when_the_model_fails(self, case):
        net, x, y = used_net()
        attack = case()
        attack(net, x, y, indices=indices())
        forwards = len(net.batches)
        before, states = snapshot(net), generators()
        for fatal in sorted({1, (forwards + 1) // 2, forwards}):
            net.batches.clear()

            def fail(module, inputs, fatal=fatal):
                if len(net.batches) == fatal:
                    raise KeyboardInterrupt

            hook = net.head.register_forward_pre_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                attack(net, x, y, indices=indices())
            hook.remove()
            assert differences(net, before) == []
            assert generators() == states

    @cases()
    def test_layers_draw_nothing_and_statistics_stay_in_evaluation_mode(self, case):
        net, x, y = used_net()
        seen = set()
        net.dropout.register_forward_hook(lambda module, inputs, output: seen.add(module.training))
        case()(net, x, y)
        assert seen == {False}


class TestSurroundings:
    @cases()
    def test_works_where_gradients_are_off(self, case, net):
        x, _ = images()
        y = classified(net, x)
        expected = case()(net, x, y, indices=indices())
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                own = images()[0], y.clone()  # made inside: inference tensors
                attacked = case()(net, *own, indices=indices())
                assert not torch.is_grad_enabled()
            assert torch.equal(attacked, expected)

    @cases()
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_works_under_autocast(self, case, dtype, net):
        x, _ = images()
        y = classified(net, x)
        for grad in (False, True) if dtype == torch.bfloat16 else (True,):
            with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=dtype):
                net(x)  # fills the cache of weight copies
                attacked = case()(net, x, y, indices=indices())
                # what the attack left in that cache must still lead to the weights
                loss = nn.functional.cross_entropy(net(attacked).float(), y)
            assert attacked.dtype == torch.float32
            assert case.excess(x, attacked) <= 1e-6
        loss.backward()
        assert all(parameter.grad is not None for parameter in net.parameters())


class TestRefusals:
    @cases()
    def test_logits_that_are_not_finite_are_an_error(self, case, net):
        x, _ = images()
        for value in (float("nan"), float("inf")):
            with torch.no_grad():
                net.head.bias[1] = value
            with pytest.raises(ValueError, match="NaN or infinite logits"):
                case()(net, x, torch.zeros(COUNT, dtype=torch.long))

    @cases(lambda case: not (isinstance(case(), attacks.FGSM) and not case.draws))  # which looks at clean images only
    def test_also_when_only_attacked_images_give_them(self, case, net):
        x, _ = images()
        y = classified(net, x)

        def breaks(z):
            logits = net(z)
            moved = torch.stack([(z[:, None] == x).flatten(2).all(2).any(1)], 1)
            return torch.where(moved, logits, float("nan"))

        with pytest.raises(ValueError, match="NaN or infinite logits"):
            case()(breaks, x, y)

    @cases()
    def test_images_that_are_none(self, case, net):
        x, y = images()
        with pytest.raises(ValueError, match="Expected pixels in"):
            case()(net, 2 * x - 1, y)
        with pytest.raises(ValueError, match="Expected pixels in"):
            case()(net, 255 * x, y)
        x[3, 0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match="Expected images without NaN"):
            case()(net, x, y)
        with pytest.raises(TypeError, match="Expected floating-point images"):
            case()(net, x.nan_to_num().byte(), y)

    @cases()
    def test_targets_that_are_none(self, case, net):
        x, y = images()
        for label in (-1, CLASSES):
            with pytest.raises(ValueError, match=r"Expected labels to be in \[0, 3\] for logits of 4 classes"):
                case()(net, x, torch.full_like(y, label))
        with pytest.raises(ValueError, match=r"Expected images \[B, ...\] with integer classes \[B\]"):
            case()(net, x, y[:-1])
        probabilities = nn.functional.one_hot(y, CLASSES).float()
        with pytest.raises(ValueError, match="rows add up to 1"):
            case()(net, x, probabilities * 2)
        if case.soft:
            assert case.excess(x, case()(net, x, probabilities)) <= 1e-6
        elif case.soft is False:
            with pytest.raises(ValueError, match=r"Expected integer classes \[B\]"):
                case()(net, x, probabilities)

    @cases(lambda case: case.gradients)
    def test_a_model_without_gradients(self, case, net):
        x, _ = images()
        y = classified(net, x)
        with pytest.raises(ValueError, match="No gradient reaches the images"):
            case()(lambda z: net(z).detach(), x, y)


def used_net():
    """In training mode, but for a layer that its user froze; with gradients of a step that is not taken yet."""
    torch.manual_seed(0)
    net = CountingNet(dropout=0.3)
    x, _ = images()
    y = classified(net, x)
    net.train()
    net.conv.eval()
    net.head.bias.requires_grad_(False)
    nn.functional.cross_entropy(net(x), y).backward()
    net.batches.clear()
    return net, x, y


def generators():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
