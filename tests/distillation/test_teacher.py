import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_robust.distillation import Teacher, fingerprint


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


class Returning(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.fc = form, nn.Linear(4, 3)

    def forward(self, x):
        return self.form(self.fc(x))


def test_answers_in_evaluation_mode_without_gradients():
    given = network()
    teacher, x = Teacher(given), torch.randn(5, 4, requires_grad=True)
    expected = copy.deepcopy(given).eval()(x)
    logits = teacher(x)
    torch.testing.assert_close(logits, expected)
    assert not logits.requires_grad
    assert not logits.is_inference()


def test_a_switch_to_training_mode_does_not_last():
    teacher, x = Teacher(network()), torch.randn(5, 4)
    before, logits = teacher.fingerprint, teacher(x)
    teacher.network.train()
    torch.testing.assert_close(teacher(x), logits)
    assert fingerprint(teacher.network) == before


def test_the_given_network_stays_as_it_is():
    given = network()
    given[0].weight.grad = torch.ones(8, 4)
    teacher = Teacher(given)
    assert all(module.training for module in given.modules())
    assert all(parameter.requires_grad for parameter in given.parameters())
    assert given[0].weight.grad is not None
    assert teacher.network[0].weight.grad is None
    with torch.no_grad():
        given[0].weight.zero_()
    assert teacher.network[0].weight.any()


def test_a_network_that_is_taken_over_is_frozen():
    given = network()
    assert Teacher(given, copy=False).network is given
    assert not any(parameter.requires_grad for parameter in given.parameters())


def test_gradients_can_flow_to_the_input_only():
    teacher, x = Teacher(network()), torch.randn(5, 4, requires_grad=True)
    teacher(x, input_grad=True).sum().backward()
    assert x.grad.any()
    assert all(parameter.grad is None for parameter in teacher.network.parameters())


def test_half_precision_answers_are_float32():
    teacher = Teacher(nn.Linear(4, 3)).to(dtype=torch.bfloat16)
    assert teacher(torch.randn(2, 4).bfloat16()).dtype == torch.float32
    assert Teacher(nn.Linear(4, 3)).to("cpu", torch.float64)(torch.randn(2, 4).double()).dtype == torch.float64


@pytest.mark.parametrize(
    "form",
    [lambda z: {"logits": z}, lambda z: SimpleNamespace(logits=z), lambda z: z],
    ids=["mapping", "object", "bare"],
)
def test_forms_of_output(form):
    assert Teacher(Returning(form), copy=False)(torch.randn(2, 4)).shape == (2, 3)


@pytest.mark.parametrize("form", [lambda z: (z, z), lambda z: {"out": z}, lambda z: z.sum(), lambda z: None])
def test_refuses_other_outputs(form):
    with pytest.raises(TypeError, match=r"Expected the teacher Returning to return logits \[B, C\]"):
        Teacher(Returning(form), copy=False)(torch.randn(2, 4))


def test_refuses_another_number_of_classes():
    with pytest.raises(ValueError, match=r"tutor a.pt was expected to have 10 classes but its logits have 3"):
        Teacher(nn.Linear(4, 3), name="tutor", source="a.pt", num_classes=10)(torch.randn(2, 4))


def test_fingerprint_sees_weights_buffers_names_and_types():
    base = fingerprint(network())
    assert fingerprint(network()) == base
    assert len(base) == 16
    assert int(base, 16) >= 0
    changed_weight, changed_buffer, renamed = network(), network(), nn.ModuleDict({"net": network()})
    with torch.no_grad():
        changed_weight[3].bias[0] += 1e-3
    changed_buffer[1].num_batches_tracked += 1
    others = [changed_weight, changed_buffer, renamed, network().double(), network(1)]
    assert len({base, *map(fingerprint, others)}) == 6


def test_fingerprint_sees_buffers_that_no_checkpoint_holds():
    prints = []
    for mean in (0.0, 0.5):
        module = nn.Linear(2, 2)
        nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)
        module.register_buffer("mean", torch.tensor(mean), persistent=False)
        prints.append(fingerprint(module))
    assert prints[0] != prints[1]


def test_the_fingerprint_is_of_the_weights_as_given():
    teacher = Teacher(network())
    before = teacher.fingerprint
    assert teacher.to(dtype=torch.bfloat16).fingerprint == before
    assert teacher.manifest() == {"source": "Sequential", "fingerprint": before, "dtype": "run"}


def test_is_no_module_and_can_be_pickled():
    teacher = Teacher(nn.Linear(4, 3))
    holder = nn.Module()
    holder.teacher = teacher
    assert not list(holder.parameters())
    assert pickle.loads(pickle.dumps(teacher)).fingerprint == teacher.fingerprint
    assert repr(teacher) == f"Teacher(name='teacher', source='Linear', fingerprint='{teacher.fingerprint}')"
