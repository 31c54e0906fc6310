"""The engine against attacks on one sample at a time, and against attacks that lie."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.attacks import PGD, AttackSequence, AutoAttack, ThreatUnion
from lightning_robust.evaluation import RobustnessEvaluator, build_report, evaluate_robustness, merge_shards
from lightning_robust.evaluation.plan import reseeded
from support.attacked import differences, snapshot
from support.robustness import CLASSES, Chain, Labelled, Lying, batches, model, strong, weak


@pytest.fixture(scope="module")
def data():
    return Labelled()


def evaluated(net, data, attacks, order=None, size=16, **options):
    evaluator = RobustnessEvaluator(net, attacks, **options)
    for x, y, indices in batches(data, size, order):
        evaluator.feed(x, y, indices)
    return merge_shards([evaluator.finish()])


def one_by_one(net, data, attack):
    """Which samples withstand an attack, each in a batch of its own."""
    net.eval()
    left = []
    for x, y, index in batches(data, 1):
        with torch.no_grad():
            right = bool(net(x).argmax(1) == y)
        x_adv = attack(net, x, y, indices=index)
        with torch.no_grad():
            left.append(right and bool(net(x_adv).argmax(1) == y))
    return torch.tensor(left)


def withstood(whole, chain=0):
    right = whole.columns["prediction"] == whole.columns["label"]
    return right & (whole.columns["broken"][:, chain] < 0)


@pytest.mark.parametrize("attack", [weak(), strong(early_stop=True), PGD(norm="l2", eps=0.3, steps=3)])
def test_flags_are_those_of_attacks_on_single_samples(data, attack):
    whole = evaluated(model(), data, attack, batch_size=7)
    expected = one_by_one(model(), data, attack)
    assert torch.equal(withstood(whole), expected)
    assert 0 < expected.sum() < len(data) - 9
    assert whole.columns["index"].tolist() == list(range(len(data)))


@pytest.mark.parametrize("mode", ["exact", "union"])
def test_batch_sizes_and_order_change_nothing(data, mode):
    attacks = {"chain": Chain(eps=0.03), "l2": PGD(norm="l2", eps=0.2, steps=3)}
    first = evaluated(model(), data, attacks, mode=mode)
    for size, batch_size, seed in [(1, 5, 0), (61, 61, 1), (10, 1, 2), (7, 100, 3), (64, 9, 4)]:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        other = evaluated(model(), data, attacks, order, size, batch_size=batch_size, mode=mode)
        assert all(torch.equal(first.columns[name], other.columns[name]) for name in first.columns if name != "digest")
        counts = [
            [(t.entered, t.broken, t.forwards, t.backwards, t.verifications) for t in each.tallies]
            for each in (first, other)
        ]
        assert counts[0] == counts[1]


def test_stages_see_full_batches_of_survivors(data):
    seen = []

    class Spy(PGD):
        def solve(self, problem, start=None):
            seen.append((self.steps, len(problem.x)))
            return super().solve(problem, start)

    class Two(PGD):
        def stages(self, num_classes):
            return {"first": Spy(eps=0.02, steps=1), "second": Spy(eps=0.03, steps=5)}

    evaluator = RobustnessEvaluator(model(), Two(eps=0.03), batch_size=8)
    for x, y, indices in batches(data, 5):
        evaluator.feed(x, y, indices)
        assert all(len(queue) < 8 for queue in evaluator.book.queues)
    whole = evaluator.finish()
    for steps, tally in zip((1, 5), whole.tallies, strict=True):
        sizes = [size for each, size in seen if each == steps]
        assert all(size == 8 for size in sizes[:-1])
        assert sum(sizes) == tally.entered
    assert whole.tallies[1].entered == whole.tallies[0].entered - whole.tallies[0].broken


def test_union_attacks_only_what_is_left_and_finds_the_same_union(data):
    attacks = {"weak": weak(eps=0.03), "l2": PGD(norm="l2", eps=0.3, steps=5)}
    exact, union = (build_report([evaluated(model(), data, attacks, mode=mode)]) for mode in ("exact", "union"))
    assert exact.robust_accuracy == union.robust_accuracy == union.attacks[1].robust_accuracy
    assert exact.attacks[0].robust_accuracy == union.attacks[0].robust_accuracy
    assert [each.exact for each in exact.attacks] == [True, True]
    assert [each.exact for each in union.attacks] == [True, False]
    assert exact.attacks[1].stages[0].entered == 52
    assert union.attacks[1].stages[0].entered == 52 - union.attacks[0].stages[0].broken
    for each, attack in zip(exact.attacks, attacks.values(), strict=True):
        assert each.robust_accuracy == one_by_one(model(), data, attack).double().mean()


def test_repeated_samples_count_once(data):
    evaluator = RobustnessEvaluator(model(), weak())
    for x, y, indices in batches(data):
        evaluator.feed(torch.cat([x, x[:3]]), torch.cat([y, y[:3]]), torch.cat([indices, indices[:3]]))
        evaluator.feed(x, y, indices)
    whole = merge_shards([evaluator.finish()])
    assert len(whole.columns["index"]) == len(data) == whole.clean.entered
    assert whole.tallies[0].entered == len(data) - 9


def test_passes_are_counted_in_samples(data):
    calls = []
    net = model()
    net.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    whole = evaluated(net, data, strong(early_stop=True))
    tally = whole.tallies[0]
    # the look at the first sample that tells the number of classes is not counted
    assert sum(calls) == 1 + whole.clean.forwards + tally.forwards + tally.verifications
    assert 0 < tally.backwards < tally.forwards
    assert tally.verifications == tally.entered + tally.broken  # and one per adversarial point, rounded to 8 bits


def test_a_lying_attack_is_caught(data):
    whole = evaluated(model(), data, Lying(eps=0.05, steps=2))
    (tally,) = whole.tallies
    assert tally.broken == 0
    assert tally.over_budget == tally.entered == 52
    assert tally.out_of_bounds > 0
    assert 0 < tally.rejected <= 52
    assert tally.max_size > 0.05


class Returns(PGD):
    """Returns what it is told to."""

    def __init__(self, change, eps=0.05):
        super().__init__(eps=eps)
        self.change = change

    def __call__(self, net, x, y, **_):
        return self.change(x)


def test_points_that_are_no_images_do_not_count(data):
    nothing = evaluated(model(), data, Returns(lambda x: torch.full_like(x, torch.nan))).tallies[0]
    assert (nothing.not_finite, nothing.broken, nothing.rejected) == (52, 0, 0)
    outside = evaluated(model(), data, Returns(lambda x: x + 1.02, eps=2.0)).tallies[0]
    assert (outside.out_of_bounds, outside.over_budget, outside.broken) == (52, 0, 0)
    assert outside.rejected > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :1], "Expected attacked images like the clean ones"),
        (lambda x: x.float(), "in torch.float64, but got .* in torch.float32"),
    ],
)
def test_points_of_another_kind_are_an_error(data, change, message):
    with pytest.raises(ValueError, match=message):
        evaluated(model(), data, Returns(change))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("eps", [0.0, 1e-4, 1 / 255, 8 / 255])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_honest_points_of_every_type_pass(dtype, eps, norm):
    data = Labelled(length=20, dtype=dtype)
    tally = evaluated(model(dtype=dtype), data, PGD(eps=eps, norm=norm, steps=2)).tallies[0]
    assert (tally.entered, tally.over_budget, tally.out_of_bounds, tally.not_finite) == (11, 0, 0, 0)


def test_normalised_images_are_the_same_images():
    data, mean, std = Labelled(), (0.4, 0.5), (0.2, 0.3)
    shape = (1, 2, 1, 1)
    shift, scale = (torch.tensor(each, dtype=torch.float64).view(shape) for each in (mean, std))

    class Undoes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model()

        def forward(self, x):
            return self.net(x * scale + shift)

    plain = build_report([evaluated(model(), data, strong())])
    data.x = (data.x - shift) / scale
    normalised = build_report([evaluated(Undoes(), data, strong(mean=mean, std=std))])
    assert normalised.robust_accuracy == pytest.approx(plain.robust_accuracy, abs=1 / 61)
    assert normalised.robust_accuracy_8bit == pytest.approx(plain.robust_accuracy_8bit, abs=1 / 61)
    stages = [report.attacks[0].stages[0] for report in (plain, normalised)]
    assert stages[0].max_size == pytest.approx(stages[1].max_size)
    assert stages[1].over_budget == stages[1].out_of_bounds == 0
    assert normalised.inputs["std"] == list(std)


def test_rounded_points_are_looked_at(data):
    # a change of less than half a level is rounded away where the images are files of 8 bits
    data_8bit = Labelled()
    data_8bit.x = (data_8bit.x * 255).round() / 255
    net = model()
    net.eval()
    with torch.no_grad():
        data_8bit.y = net(data_8bit.x).argmax(1)
    report = build_report([evaluated(model(), data_8bit, strong(eps=0.4 / 255))])
    assert report.robust_accuracy_8bit == report.robust_accuracy_8bit_inside == 1.0
    assert report.robust_accuracy < 1
    off = build_report([evaluated(model(), data, strong(), eight_bit=False)])
    assert off.robust_accuracy_8bit is None
    assert off.attacks[0].robust_accuracy_8bit is None


def test_rounding_is_compared_with_rounding_by_hand(data):
    report = build_report([evaluated(model(), data, weak())])
    net = model().eval()
    left = []
    for x, y, index in batches(data, 1):
        x_adv = weak()(net, x, y, indices=index)
        with torch.no_grad():
            fooled = bool(net(x_adv).argmax(1) != y)
            still = bool(net((x_adv * 255).round() / 255).argmax(1) != y)
            left.append(bool(net(x).argmax(1) == y) and not (fooled and still))
    assert report.robust_accuracy_8bit == sum(left) / len(left)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_crafting_is_verified_in_float32(dtype):
    data = Labelled(dtype=torch.float32)
    net = model(dtype=torch.float32)
    types = []
    net[-1].register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    whole = evaluated(net, data, strong(), craft_dtype=dtype)
    tally = whole.tallies[0]
    assert {torch.float32, getattr(torch, dtype)} == set(types)
    plain = evaluated(model(dtype=torch.float32), data, strong()).tallies[0]
    assert abs(tally.broken - plain.broken) <= 3
    assert tally.over_budget == tally.out_of_bounds == 0


def test_points_that_fool_in_low_precision_only_are_lost():
    class Coarse(nn.Module):
        """Decides by less than bfloat16 can tell."""

        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)
            with torch.no_grad():
                self.head.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0]]))
                self.head.bias.copy_(torch.tensor([0.0, 1e-4]))

        def forward(self, x):
            return self.head(x)

    x, y = torch.full((6, 4), 0.9), torch.ones(6, dtype=torch.long)
    evaluator = RobustnessEvaluator(Coarse(), PGD(eps=0.01, steps=2), craft_dtype="bfloat16")
    evaluator.feed(x, y, torch.arange(6))
    tally = evaluator.finish().tallies[0]
    assert (tally.broken, tally.lost) == (0, 6)


@pytest.mark.parametrize("label", [0, 1])
def test_nan_logits_are_an_error_and_never_robust(label):
    class Broken(nn.Module):
        def __init__(self, after):
            super().__init__()
            self.head, self.left = nn.Linear(4, 3), after

        def forward(self, x):
            self.left -= 1
            return self.head(x) * (torch.nan if self.left < 0 else 1.0)

    x, y = torch.rand(5, 4), torch.full((5,), label)
    for after in (0, 1, 2, 4):
        data = TensorDataset(x, y)
        with pytest.raises(ValueError, match="NaN or infinite logits"):
            evaluate_robustness(Broken(after), DataLoader(data), PGD(eps=0.1, steps=6), checks=None)


def test_nan_logits_on_the_way_of_an_attack_that_does_not_look(data):
    class Careless(PGD):
        def __call__(self, net, x, y, **_):
            net(x / 0)
            return x

    with pytest.raises(ValueError, match="NaN or infinite logits for a point of Careless"):
        evaluated(model(), data, Careless(eps=0.1))


@pytest.mark.parametrize("inference", [False, True])
def test_everything_is_left_alone(data, inference):
    net = model()
    net[1].eval()
    before = snapshot(net)
    state = torch.get_rng_state()
    with torch.inference_mode(inference):
        inside = Labelled()
        evaluated(net, inside, {"chain": Chain(eps=0.03), "weak": weak()})
    assert differences(net, before) == []
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_with_dropout_in_training_mode_is_evaluated_without(data):
    net = model().train()
    assert torch.equal(withstood(evaluated(net, data, weak())), withstood(evaluated(model().eval(), data, weak())))


def test_callables_and_seeds(data):
    net = model().eval()
    same = evaluated(lambda x: net(x), data, weak(seed=3))
    assert torch.equal(withstood(same), withstood(evaluated(model(), data, weak(), seed=3)))
    assert same.settings.model == "function"
    starts = [evaluated(model(), data, weak(steps=0, eps=0.3), seed=seed) for seed in (0, 1)]
    assert not torch.equal(withstood(starts[0]), withstood(starts[1]))


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_and_soft_labels(classes):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).double()
    x = torch.rand(9, 3, 2, 2, dtype=torch.float64)
    y = net(x).argmax(1)
    flags = []
    for labels in (y, nn.functional.one_hot(y, classes).double()):
        evaluator = RobustnessEvaluator(net, PGD(eps=0.05))
        evaluator.feed(x, labels, torch.arange(9))
        flags.append(withstood(merge_shards([evaluator.finish()])))
    assert torch.equal(*flags)


def test_nothing_to_evaluate():
    evaluator = RobustnessEvaluator(model(), weak())
    evaluator.feed(torch.rand(0, 2, 6, 6), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    evaluator.save()
    with pytest.raises(ValueError, match="Expected at least one sample to evaluate but got none"):
        merge_shards([evaluator.finish()])


def test_only_wrong_samples(data):
    wrong = Labelled(length=9)
    report = build_report([evaluated(model(), wrong, Chain(eps=0.1))])
    assert report.clean_accuracy == report.robust_accuracy == report.standard_error == 0
    assert [stage.entered for stage in report.attacks[0].stages] == [0, 0]


def test_ensembles_and_several_norms(data):
    union = ThreatUnion(attack=PGD(steps=4), budgets={"linf": 0.02, "l2": 0.15})
    report = build_report([evaluated(model(), data, {"union": union}, seed=2)])
    exact = {"linf": PGD(eps=0.02, steps=4), "l2": PGD(norm="l2", eps=0.15, steps=4)}
    parts = build_report([evaluated(model(), data, exact, seed=2)])
    (attack,) = report.attacks
    assert (attack.norm, attack.eps) == ("linf+l2", [0.02, 0.15])
    assert [stage.name for stage in attack.stages] == ["linf", "l2"]
    assert report.robust_accuracy == parts.robust_accuracy <= min(each.robust_accuracy for each in parts.attacks)
    assert attack.stages[1].broken > 0
    assert attack.stages[1].entered == attack.stages[0].entered - attack.stages[0].broken
    assert attack.stages[0].robust_accuracy == parts.attacks[0].robust_accuracy


def test_autoattack_is_not_stronger_than_its_stages_say(data):
    attack = AutoAttack(version="fast", eps=0.02, steps=5)
    report = build_report([evaluated(model(), data, attack)])
    (found,) = report.attacks
    assert [stage.name for stage in found.stages] == ["apgd-ce", "apgd-t"]
    assert any("3 targets in place of 9" in each for each in found.deviations)
    net = model().eval()
    x_adv = attack(net, data.x, data.y, indices=torch.arange(len(data)))
    with torch.no_grad():
        right = (net(data.x).argmax(1) == data.y) & (net(x_adv).argmax(1) == data.y)
    assert report.robust_accuracy == right.double().mean()


def test_seeds_of_ensembles():
    sequence = AttackSequence(attacks={"a": weak(), "b": ThreatUnion(attack=weak())})
    changed = reseeded(sequence, 7)
    assert [stage.seed for stage in changed.stages(4).values()] == [7] * 4
    assert [stage.seed for stage in sequence.stages(4).values()] == [0] * 4
    assert reseeded(AutoAttack(), 7).seed == 7
    with pytest.raises(ValueError, match="takes no seed; leave `seed` out"):
        reseeded(Nameless(eps=0.1), 7)


class Nameless(PGD):
    def __init__(self, eps):
        super().__init__(eps=eps)
        self.norm = None


@pytest.mark.parametrize(
    ("attacks", "options", "message"),
    [
        ({}, {}, "Expected at least one attack"),
        ({"a": weak(targeted=True)}, {}, "'a' is targeted"),
        (weak(mode="train"), {}, "'PGD' has mode='train'"),
        ({"a": weak(), "b": weak(bounds=(0.0, 2.0))}, {}, "The attacks disagree about the images"),
        (weak(), {"mode": "both"}, "Expected `mode` to be one of 'exact', 'union'"),
        (weak(), {"craft_dtype": "float32"}, "Expected `craft_dtype`"),
        (weak(), {"batch_size": 0}, "Expected `batch_size` to be an integer >= 1"),
        (weak(), {"seed": -1}, "Expected `seed`"),
        (weak(), {"rank": -1}, "Expected `rank`"),
        (weak(), {"keep": -1}, "Expected `keep`"),
        (weak(), {"save_every_s": -1.0}, "Expected `save_every_s`"),
    ],
)
def test_refused_arguments(attacks, options, message):
    with pytest.raises(ValueError, match=message):
        RobustnessEvaluator(model(), attacks, **options)


def test_refused_attacks(data):
    with pytest.raises(TypeError, match="Expected an Attack for 'a' but got str"):
        RobustnessEvaluator(model(), {"a": "pgd"})
    with pytest.raises(ValueError, match="does not say in which norm its budget is"):
        evaluated(model(), data, Nameless(eps=0.1))


@pytest.mark.parametrize(
    ("x", "y", "indices", "message"),
    [
        (torch.rand(2, 2, 6, 6) * 3, [0, 1], [0, 1], "Expected pixels in"),
        (torch.rand(2, 2, 6, 6), [0, CLASSES], [0, 1], "Expected labels to be in"),
        (torch.rand(2, 2, 6, 6), [-1, 0], [0, 1], "Expected labels to be in"),
        (torch.rand(2, 2, 6, 6), [0, 1], [0], "Expected one of `indices` per image"),
    ],
)
def test_refused_samples(x, y, indices, message):
    evaluator = RobustnessEvaluator(model(dtype=torch.float32), weak())
    with pytest.raises(ValueError, match=message):
        evaluator.feed(x, torch.tensor(y), torch.tensor(indices))


def test_refused_models():
    evaluator = RobustnessEvaluator(nn.Sequential(nn.Flatten(), nn.Linear(72, 1)), weak())
    with pytest.raises(ValueError, match="of two classes or more"):
        evaluator.feed(torch.rand(2, 2, 6, 6), torch.tensor([0, 0]), torch.arange(2))


def test_kept_samples_and_their_points(data):
    evaluator = RobustnessEvaluator(model(), {"weak": weak(), "chain": Chain(eps=0.03)}, keep=20, batch_size=6)
    for x, y, indices in batches(data, 8):
        evaluator.feed(x, y, indices)
    evaluator.finish()
    kept = evaluator.kept
    assert kept.samples.index.tolist() == list(range(20))
    net = model().eval()
    expected = data.x[:20].clone()
    right = net(data.x[:20]).argmax(1) == data.y[:20]
    # an attack on six samples at a time gives the same
    expected[right] = weak()(net, data.x[:20][right], data.y[:20][right], indices=torch.arange(20)[right])
    torch.testing.assert_close(kept.points("weak", evaluator.book.ledger), expected)
    assert kept.points("other", evaluator.book.ledger) is None
