"""Several teachers by name: when they are built, and what a checkpoint says about them."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from lightning_robust.distillation import Teacher, TeacherBank, TeacherSource
from lightning_robust.models import create_backbone


def network(seed=0, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, classes))


def two():
    return TeacherBank({"clean teacher": network(0), "robust teacher": TeacherSource(network(1), temperature=2.0)})


def test_teachers_answer_by_name():
    bank, x = two(), torch.rand(5, 4)
    torch.testing.assert_close(bank.ask("clean teacher", x), network(0).eval()(x).detach())
    torch.testing.assert_close(bank.ask("robust teacher", x), network(1).eval()(x).detach() / 2)
    assert list(bank) == ["clean teacher", "robust teacher"]
    assert len(bank) == 2
    assert not bank.needs_index
    assert bank.teacher("robust teacher").name == "robust teacher"


def test_an_input_gradient_can_be_asked_for():
    bank, x = two(), torch.rand(5, 4, requires_grad=True)
    assert not bank.ask("clean teacher", x).requires_grad
    bank.ask("clean teacher", x, input_grad=True).sum().backward()
    assert x.grad.any()


def test_a_network_is_copied_when_it_is_given():
    given = network()
    bank, x = TeacherBank({"teacher": given}), torch.rand(5, 4)
    expected = bank.ask("teacher", x)
    with torch.no_grad():
        given[0].weight.zero_()
    assert torch.equal(bank.ask("teacher", x), expected)
    assert given.training
    assert all(parameter.requires_grad for parameter in given.parameters())


def test_weights_belong_to_nobody_who_holds_the_bank():
    holder = nn.Module()
    holder.bank = two()
    assert not list(holder.parameters())
    assert not holder.state_dict()
    other = copy.deepcopy(holder)
    assert other.bank is not holder.bank
    assert other.bank.teacher("clean teacher") is holder.bank.teacher("clean teacher")


def save(path, seed=0):
    torch.manual_seed(seed)
    net = create_backbone("resnet8_cifar", num_classes=3, in_chans=1)
    torch.save(net.state_dict(), path)
    return net


def test_a_file_is_read_when_it_is_needed(tmp_path):
    path = tmp_path / "a.pt"
    bank = TeacherBank({"teacher": TeacherSource(path, backbone="resnet8_cifar")})  # it may not be there yet
    assert "a.pt" in repr(bank)
    assert bank.state_dict() == {}
    with pytest.raises(FileNotFoundError, match=r"There is no teacher file .*a.pt; train the teacher first"):
        bank.build()
    net, x = save(path), torch.rand(2, 1, 16, 16)
    bank.build(num_classes=3, in_chans=1)
    path.unlink()
    bank.build()
    torch.testing.assert_close(bank.ask("teacher", x), net.eval()(x).detach())


def test_a_teacher_is_asked_without_having_been_built(tmp_path):
    net, x = save(tmp_path / "a.pt"), torch.rand(2, 1, 16, 16)
    source = TeacherSource(str(tmp_path / "a.pt"), backbone="resnet8_cifar", num_classes=3, in_chans=1)
    torch.testing.assert_close(TeacherBank({"teacher": source}).ask("teacher", x), net.eval()(x).detach())


def test_the_state_goes_through_weights_only_files(tmp_path):
    state = two().state_dict()
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state
    assert state["clean teacher"] == {
        "source": "Sequential",
        "fingerprint": Teacher(network(0)).fingerprint,
        "dtype": "run",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = two()
        again.load_state_dict(state)
        again.build()
    assert again.state_dict() == state


def test_another_teacher_is_refused_until_the_state_is_forgotten():
    bank, x = two(), torch.rand(5, 4)
    robust = TeacherSource(network(1), temperature=2.0)
    other = TeacherBank({"clean teacher": network(5), "robust teacher": robust})
    other.load_state_dict(bank.state_dict())
    first, second = bank.teacher("clean teacher").fingerprint, Teacher(network(5)).fingerprint
    message = (
        rf"trained with the clean teacher Sequential \(fingerprint {first}\) but this run has Sequential \({second}\); "
        "resume with the same teacher"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            other.ask("clean teacher", x)
    with pytest.raises(ValueError, match=message):
        other.build()
    other.ask("robust teacher", x)
    other.forget()
    other.ask("clean teacher", x)


def test_a_loaded_state_is_saved_again_before_the_teachers_are_built():
    state = {"teacher": {"source": "a.pt", "fingerprint": "0" * 16, "dtype": "run"}}
    bank = TeacherBank({"teacher": "a.pt"})
    bank.load_state_dict(state)
    assert bank.state_dict() == state


def test_other_options_of_the_same_network_are_refused():
    options = {"temperature": 2.0, "classes": [2, [0, 1]]}
    first = TeacherBank({"teacher": TeacherSource(network(), **options)})
    assert first.state_dict()["teacher"]["options"] == "temperature=2, classes=[2, [0, 1]]"
    same = TeacherBank({"teacher": TeacherSource(network(), temperature=2, classes=(2, (0, 1)))})
    same.load_state_dict(first.state_dict())
    same.build()
    for bank, message in (
        (
            TeacherBank({"teacher": network()}),
            r"with temperature=2, classes=\[2, \[0, 1\]\] but this run has it with none",
        ),
        (
            TeacherBank({"teacher": TeacherSource(network(), mean=[0.5], std=[1])}),
            r"has it with mean=\[0.5\], std=\[1\]; set",
        ),
    ):
        bank.load_state_dict(first.state_dict())
        with pytest.raises(ValueError, match=message):
            bank.build()
    plain = TeacherBank({"teacher": network()})
    first.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="with no options but this run has it with temperature=2"):
        first.build()


def test_another_type_is_warned_about():
    bank = TeacherBank({"teacher": network()})
    other = TeacherBank({"teacher": TeacherSource(network(), dtype="bfloat16")})
    other.load_state_dict(bank.state_dict())
    with pytest.warns(UserWarning, match="trained with the teacher computing in run but this run has it in bfloat16"):
        other.build()


def test_what_is_no_teacher_is_refused():
    with pytest.raises(TypeError, match="Expected `clean teacher` to be a network"):
        TeacherBank({"clean teacher": 3})


def test_can_be_pickled():
    x = torch.rand(5, 4)
    assert torch.equal(pickle.loads(pickle.dumps(two())).ask("clean teacher", x), two().ask("clean teacher", x))
