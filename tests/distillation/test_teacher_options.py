"""What stands between a student's inputs and classes and its teacher's, and what a teacher does by itself."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.distillation import Teacher, TeacherSource
from lightning_robust.distillation.mapping import ClassMapping, InputTransform


class Seen(nn.Module):
    """Keeps its last input; the logits are channel means."""

    def __init__(self, classes=3):
        super().__init__()
        self.fc = nn.Linear(2, classes)

    def forward(self, x):
        self.x = x
        return self.fc(x.mean((2, 3)))


def images(size=4):
    return torch.rand(5, 2, size, size, generator=torch.Generator().manual_seed(0))


def test_images_are_normalised_for_the_teacher():
    network, x = Seen(), images()
    teacher = Teacher(network, mean=[0.2, 0.4], std=[0.5, 0.25], copy=False)
    normalised = torch.stack([(x[:, 0] - 0.2) / 0.5, (x[:, 1] - 0.4) / 0.25], 1)
    torch.testing.assert_close(teacher(x), network(normalised))
    torch.testing.assert_close(network.x, normalised)


def test_the_normalisation_has_the_type_that_the_network_was_given_in():
    teacher = Teacher(Seen().bfloat16(), mean=[0.2, 0.4], std=[0.5, 0.25], copy=False)
    assert teacher(images().bfloat16()).dtype == torch.float32
    assert teacher.network.x.dtype == torch.bfloat16


def test_images_are_resized_for_the_teacher():
    teacher, x = Teacher(Seen(), image_size=3, copy=False), images(6)
    teacher(x)
    torch.testing.assert_close(teacher.network.x, F.interpolate(x, (3, 3), mode="bilinear", antialias=True))
    assert Teacher(Seen(), image_size=6, copy=False)(x).shape == (5, 3)


def test_an_input_gradient_goes_through_the_transform():
    teacher = Teacher(Seen(), mean=[0.2, 0.4], std=[0.5, 0.25], image_size=3, temperature=2.0)
    x = images(6).requires_grad_()
    (gradient,) = torch.autograd.grad(teacher(x, input_grad=True)[:, 0].sum(), x)
    column = teacher.network.fc.weight[0] / torch.tensor([0.5, 0.25]) / 2  # of the mean over 9 pixels
    torch.testing.assert_close(gradient.sum((2, 3)), column.expand(5, 2))
    assert not teacher(x).requires_grad


def test_the_temperature_divides_the_logits():
    network, x = Seen(), images()
    torch.testing.assert_close(Teacher(network, temperature=4.0)(x), network(x).detach() / 4)


def test_classes_are_picked_and_united():
    network, x = Seen(classes=5), images()
    logits = Teacher(network)(x)
    torch.testing.assert_close(Teacher(network, classes=[4, 0])(x), logits[:, [4, 0]])
    united = Teacher(network, classes=[[1, 3], 4, [0, 2]])(x)
    p = logits.double().softmax(1)
    expected = torch.stack([p[:, 1] + p[:, 3], p[:, 4], p[:, 0] + p[:, 2]], 1)
    torch.testing.assert_close(united.double().softmax(1), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("classes", "missing"), [([0, 3], 3), ([[0, 1], [-1]], -1)])
def test_a_class_that_the_teacher_does_not_have(classes, missing):
    with pytest.raises(ValueError, match=f"`classes` names class {missing} of a teacher with 3; count from 0"):
        Teacher(Seen(), classes=classes)(images())


@pytest.mark.parametrize("classes", [[], [[0], []]])
def test_classes_of_nothing_are_refused(classes):
    with pytest.raises(ValueError, match="Expected `classes` to name at least one class of the teacher for each"):
        ClassMapping(classes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": [0.5]}, "Expected `mean` and `std` with one number per channel each"),
        ({"mean": [0.5], "std": [0.5, 0.5]}, "Expected `mean` and `std` with one number per channel each"),
        ({"mean": [0.5], "std": [0.0]}, r"Expected `std` to be > 0 but got \[0.0\]"),
        ({"image_size": 0}, "`image_size`"),
        ({"temperature": 0.0}, "Expected `temperature` to be .*> 0 but got 0.0"),
        ({"dtype": "half"}, "Expected `dtype` to be one of 'float32', 'bfloat16', 'float16' but got 'half'"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        Teacher(Seen(), **options)


def test_images_with_other_channels_than_the_normalisation_are_refused():
    message = r"Expected images with 1 channels, as `mean` and `std` of the teacher have, but got .*\(5, 2, 4, 4\)"
    with pytest.raises(ValueError, match=message):
        Teacher(Seen(), mean=[0.5], std=[0.5])(images())


def test_without_options_inputs_of_any_form_pass():
    x = torch.rand(2, 7)
    assert InputTransform()(x) is x


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_its_own_type_does_not_change_what_it_answers_in(dtype):
    network, x = Seen(), images()
    teacher = Teacher(network, dtype=dtype, mean=[0.2, 0.4], std=[0.5, 0.25])
    expected = Teacher(network, mean=[0.2, 0.4], std=[0.5, 0.25])(x)
    logits = teacher(x)
    assert logits.dtype == torch.float32
    assert teacher.network.x.dtype == teacher.network.fc.weight.dtype == getattr(torch, dtype)
    torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.02)
    assert not torch.equal(logits, expected)


def test_a_float32_teacher_ignores_the_precision_of_the_run():
    network, x = Seen(), images()
    expected = Teacher(network)(x)
    teacher = Teacher(network, dtype="float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher(x), expected)
        assert not torch.equal(Teacher(network)(x), expected)
    torch.testing.assert_close(teacher(x.bfloat16()), expected, rtol=0.01, atol=0.01)
    assert teacher.network.fc.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_follows_the_type_of_its_inputs(dtype):
    teacher = Teacher(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten()), mean=[0.2] * 2, std=[0.5] * 2)
    assert teacher(images().to(dtype)).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert {p.dtype for p in teacher.network.parameters()} == {dtype}
    assert teacher.network[1].num_batches_tracked.dtype == torch.int64


def test_a_teacher_that_a_run_has_rounded_is_refused_in_a_finer_one():
    teacher = Teacher(Seen(), name="clean teacher")
    teacher(images().double())
    exact = teacher(images())  # the weights came as float32
    teacher(images().bfloat16())
    teacher(images().bfloat16())
    message = (
        r"The clean teacher Seen was rounded to bfloat16 .* in float32 would not be its own; build it anew, or set"
    )
    with pytest.raises(ValueError, match=message):
        teacher(images())
    given = Seen()
    again = Teacher(given.to(torch.bfloat16))  # rounded by whoever gave it
    assert again(images()).dtype == torch.float32
    assert not torch.equal(again(images()), exact)


def test_a_network_without_weights_follows_too():
    class Sums(nn.Module):
        def forward(self, x):
            return x.sum((2, 3))

    teacher = Teacher(Sums(), mean=[0.0, 0.0], std=[1.0, 2.0])
    torch.testing.assert_close(teacher(images()), images().sum((2, 3)) / torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_answers_that_are_no_numbers_are_refused(value):
    network = Seen()
    with torch.no_grad():
        network.fc.bias[1] = value
    teacher = Teacher(network, name="clean teacher", source="a.pt")
    with pytest.raises(ValueError, match=r"The clean teacher a.pt answered with logits that are NaN or infinite; look"):
        teacher(images())


def test_a_later_answer_is_looked_at_as_well_on_the_cpu():
    teacher, x = Teacher(Seen()), images()
    teacher(x)
    with pytest.raises(ValueError, match="NaN or infinite"):
        teacher(x.index_fill(0, torch.tensor([2]), float("nan")))


def test_a_copy_is_the_same_teacher():
    teacher = Teacher(Seen())
    assert copy.deepcopy({"a": [teacher]})["a"][0] is teacher


def test_the_manifest_names_the_type():
    assert Teacher(Seen()).manifest()["dtype"] == "run"
    assert Teacher(Seen(), dtype="bfloat16").manifest()["dtype"] == "bfloat16"


def test_a_source_hands_every_option_on():
    network, x = Seen(), images(6)
    options = {"mean": [0.2, 0.4], "std": [0.5, 0.25], "image_size": 3, "dtype": "bfloat16", "temperature": 2.0}
    source = TeacherSource(network, **options, classes=[2, [0, 1]])
    assert torch.equal(source.build()(x), Teacher(network, **options, classes=[2, [0, 1]])(x))
    assert source.build("tutor").name == "tutor"


def test_options_of_a_teacher_are_its_own():
    teacher = Teacher(Seen())
    assert TeacherSource(teacher).build() is teacher
    with pytest.raises(ValueError, match="A Teacher has its options already; give them to it"):
        TeacherSource(teacher, temperature=2.0)
