import pickle
import random
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_robust.distillation import Teacher, TeacherSource, build_teacher
from lightning_robust.losses import CrossEntropy
from lightning_robust.models import ImageClassifier

BACKBONE = "test_vit"  # one of timm's own small test networks


def backbone(num_classes: int = 7, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(BACKBONE, num_classes=num_classes)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


def prefixed(module: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in module.state_dict().items()}


def save(content: object, path: Path) -> str:
    torch.save(content, path)
    return str(path)


def save_safely(content: dict[str, torch.Tensor], path: Path) -> str:
    save_file(content, path.with_suffix(".safetensors"))
    return str(path.with_suffix(".safetensors"))


WAYS = {
    "state_dict": lambda net, path: save(net.state_dict(), path / "a.pt"),
    "safetensors": lambda net, path: save_safely(net.state_dict(), path / "a"),
    "container": lambda net, path: save({"model": net.state_dict(), "epoch": 3}, path / "a.pth"),
    "lightning": lambda net, path: save(
        {"state_dict": prefixed(net, "model.net.") | {"criterion.weight": torch.ones(7)}, "epoch": 1}, path / "a.ckpt"
    ),
    "ddp": lambda net, path: save(prefixed(net, "module."), path / "a.bin"),
    "no_suffix": lambda net, path: save(net.state_dict(), path / "weights"),
}


@pytest.mark.parametrize("way", WAYS)
def test_files_with_a_backbone(tmp_path, way):
    net = backbone()
    source = WAYS[way](net, tmp_path)
    teacher = build_teacher(source, backbone=BACKBONE, num_classes=7)
    torch.testing.assert_close(teacher(images()), net.eval()(images()).detach())
    assert teacher.source == source
    assert build_teacher(Path(source), backbone=BACKBONE, num_classes=7).fingerprint == teacher.fingerprint


def test_a_timm_name_with_random_weights_is_pointed_out():
    with pytest.warns(UserWarning, match=f"The teacher timm:{BACKBONE} has random weights"):
        teacher = build_teacher(f"timm:{BACKBONE}", num_classes=5, in_chans=1)
    assert teacher(torch.randn(2, 1, 160, 160)).shape == (2, 5)


def test_a_plain_timm_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / BACKBONE).mkdir()  # a folder of that name is no file with weights
    with pytest.warns(UserWarning, match="random weights"):
        assert build_teacher(BACKBONE, num_classes=5).num_classes == 5


def test_networks_and_teachers():
    net = nn.Linear(4, 3)
    teacher = build_teacher(net, num_classes=3, name="tutor")
    assert isinstance(teacher, Teacher)
    assert teacher.network is not net
    assert (teacher.name, teacher.num_classes) == ("tutor", 3)
    assert build_teacher(teacher) is teacher


def test_the_random_generators_are_left_alone(tmp_path):
    source = save(backbone().state_dict(), tmp_path / "a.pt")
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    build_teacher(source, backbone=BACKBONE, num_classes=7)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()


@pytest.mark.parametrize("source", ["no/such/file", "teacher.ckpt", Path("teacher")])
def test_refuses_a_missing_file(source):
    with pytest.raises(FileNotFoundError, match=f"There is no teacher file {source}; train the teacher first"):
        build_teacher(source, backbone=BACKBONE)


def test_refuses_an_unknown_name_with_near_ones():
    with pytest.raises(ValueError, match=r"There is no timm model 'resnet81'; did you mean .*resnet18"):
        build_teacher("timm:resnet81")


def test_refuses_an_unknown_backbone(tmp_path):
    with pytest.raises(ValueError, match=r"There is no timm model 'qqqqqq'; see timm.list_models\(\)"):
        build_teacher(save(backbone().state_dict(), tmp_path / "a.pt"), backbone="qqqqqq")


def test_refuses_a_file_without_its_architecture(tmp_path):
    with pytest.raises(ValueError, match=r"a.pt does not say which network it holds; set `backbone`"):
        build_teacher(save(backbone().state_dict(), tmp_path / "a.pt"))


def test_refuses_another_number_of_classes(tmp_path):
    source = save(backbone().state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt has 7 classes but 10 were expected; set `num_classes` to 7"):
        build_teacher(source, backbone=BACKBONE, num_classes=10)
    with pytest.raises(ValueError, match="has 7 classes but 1000 were expected"):
        build_teacher(source, backbone=BACKBONE)


def test_refuses_another_architecture(tmp_path):
    source = save(backbone().state_dict(), tmp_path / "a.pt")
    with pytest.raises(
        ValueError, match=r"does not fit ResNet: it lacks conv1\S*, \S+, \S+ and \d+ more; also holds \S+, \S+, \S+ and"
    ):
        build_teacher(source, backbone="resnet18", num_classes=7)


def test_refuses_other_shapes(tmp_path):
    source = save(backbone().state_dict(), tmp_path / "a.pt")
    message = (
        r"has other shapes: patch_embed.proj.weight \[64, 3, 16, 16\] instead of \[64, 1, 16, 16\]\. Set `backbone`"
    )
    with pytest.raises(ValueError, match=message):
        build_teacher(source, backbone=BACKBONE, num_classes=7, in_chans=1)


def test_two_copies_in_one_file_need_a_choice(tmp_path):
    nets = {"net.": backbone(seed=0), "ema.": backbone(seed=1)}
    content = {name: value for prefix, net in nets.items() for name, value in prefixed(net, prefix).items()}
    source = save({"state_dict": content}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="holds this network 2 times, under 'net' and 'ema'; choose with `prefix`"):
        build_teacher(source, backbone=BACKBONE, num_classes=7)
    for prefix in ("ema", "ema."):
        teacher = build_teacher(source, backbone=BACKBONE, num_classes=7, prefix=prefix)
        assert teacher.fingerprint == Teacher(nets["ema."]).fingerprint


def classifier(backbone: object = "resnet8_cifar", **kwargs) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(
        backbone, num_classes=7, in_chans=1, mean=[0.4], std=[0.2], criterion=CrossEntropy(weight=[1.0] * 7), **kwargs
    )


def lightning_checkpoint(module: L.LightningModule, path: Path) -> str:
    run = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    run.strategy.connect(module)
    run.save_checkpoint(path)
    return str(path)


@pytest.mark.parametrize("options", [{}, {"channels_last": True, "backbone_options": {"drop_rate": 0.1}}])
def test_a_checkpoint_of_ours_knows_its_architecture_and_normalisation(tmp_path, options):
    module, x = classifier(**options), torch.rand(2, 1, 16, 16)
    source = lightning_checkpoint(module, tmp_path / "a.ckpt")
    teacher = build_teacher(source)
    torch.testing.assert_close(teacher(x), module.eval()(x).detach())
    assert build_teacher(source, backbone="resnet8_cifar", num_classes=7, in_chans=1).source == source


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"num_classes": 10},
            "was trained with `num_classes` = 7 but 10 was asked for; take another teacher, or leave out",
        ),
        ({"in_chans": 3}, "was trained with `in_chans` = 1 but 3 was asked for"),
        ({"backbone": "resnet18"}, "was trained with `backbone` = 'resnet8_cifar' but 'resnet18' was asked for"),
    ],
)
def test_refuses_to_contradict_a_checkpoint_of_ours(tmp_path, asked, message):
    source = lightning_checkpoint(classifier(), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message):
        build_teacher(source, **asked)


def test_a_checkpoint_of_ours_with_a_network_of_ones_own(tmp_path):
    net = timm.create_model("resnet8_cifar", num_classes=7, in_chans=1)
    module = classifier(net)
    source = lightning_checkpoint(module, tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=r"made with the network <CifarResNet>, which it does not hold; set `backbone`"
    ):
        build_teacher(source)
    x = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(build_teacher(source, backbone="resnet8_cifar")(x), module.eval()(x).detach())


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save({"state_dict": {}, "trap": Trap()}, path),
        lambda path: path.write_bytes(pickle.dumps(Trap(), protocol=2)),
        lambda path: path.write_text("not weights"),
        lambda path: path.write_bytes(b""),
    ],
    ids=["trap", "pickle", "text", "empty"],
)
def test_refuses_what_only_code_could_read(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt cannot be read as weights without running code; save it with"):
        build_teacher("a.pt", backbone=BACKBONE)
    assert not (tmp_path / "executed").exists()


def test_refuses_a_broken_safetensors_file(tmp_path):
    (tmp_path / "a.safetensors").write_text("not weights")
    with pytest.raises(ValueError, match=r"a.safetensors is no safetensors file \("):
        build_teacher(str(tmp_path / "a.safetensors"), backbone=BACKBONE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "lr": 0.1}, "holds no weights, only epoch, lr; save"),
        ({}, "holds no weights, only nothing; save"),
        ([torch.zeros(2)], "holds a list, not weights; save"),
    ],
)
def test_refuses_a_file_without_weights(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        build_teacher(save(content, tmp_path / "a.pt"), backbone=BACKBONE)


@pytest.mark.parametrize(
    ("source", "asked", "message"),
    [
        (nn.Linear(4, 3), {"backbone": BACKBONE}, "is a network already, so `backbone` would be ignored; leave it out"),
        (nn.Linear(4, 3), {"in_chans": 1}, "is a network already, so `in_chans` would be ignored"),
        (Teacher(nn.Linear(4, 3)), {"num_classes": 7}, "is a network already, so `num_classes` would be ignored"),
        ("a.pt", {"backbone": BACKBONE, "pretrained": True}, "is a file, so `pretrained` would be ignored"),
        (f"timm:{BACKBONE}", {"prefix": "net"}, "is a timm model, so `prefix` would be ignored"),
    ],
    ids=["module-backbone", "module-channels", "teacher-classes", "file-pretrained", "timm-prefix"],
)
def test_refuses_options_that_nothing_would_read(source, asked, message):
    with pytest.raises(ValueError, match=f"The tutor {message}"):
        build_teacher(source, **asked, name="tutor")
    with pytest.raises(ValueError, match=f"The tutor {message}"):
        TeacherSource(source, **asked).build("tutor")


def test_refuses_other_objects():
    with pytest.raises(TypeError, match=r"Expected `tutor` to be a network, a Teacher, a path or .* but got int"):
        build_teacher(3, name="tutor")


def test_a_lightning_module_is_a_network():
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3)

        def forward(self, x):
            return self.net(x)

    assert build_teacher(Module())(torch.zeros(2, 4)).shape == (2, 3)
