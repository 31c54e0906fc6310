"""Two processes write a teacher cache, and a student learns from it what it learns from the teacher."""

import pytest
import torch

from lightning_robust.distillation import TeacherCache
from support.ddp_teacher_cache import EPOCHS, SAMPLES, VARIANTS, teacher, views
from support.modules import Images
from support.ranks import WORLD, launch

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ddp_teacher_cache")]  # one launch serves all of them


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    launch("-m", "support.ddp_teacher_cache", str(folder))
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_an_odd_number_of_samples_is_written_by_two_processes(folder, ranks):
    wanted = teacher()(Images(SAMPLES).x)
    for rank in ranks:
        torch.testing.assert_close(rank["rows"], wanted)
    seeded = TeacherCache(folder / "seeded")
    shown = torch.stack([image for image, _ in map(views().__getitem__, range(SAMPLES * VARIANTS))])
    torch.testing.assert_close(seeded.logits(torch.arange(SAMPLES * VARIANTS)), teacher()(shown))
    assert sorted(path.name for path in (folder / "fixed").iterdir()) == ["logits.npy", "manifest.json"]


@pytest.mark.parametrize("kind", ["", " views"], ids=["fixed", "seeded"])
def test_shuffled_epochs_get_the_logits_of_the_live_teacher(ranks, kind):
    for rank in ranks:
        live, cached = rank["live" + kind], rank["cached" + kind]
        assert len(live["told"]) == len(cached["told"]) == EPOCHS * 5
        for wanted, found in zip(live["told"], cached["told"], strict=True):
            torch.testing.assert_close(found, wanted)
        for name, wanted in live["weights"].items():
            torch.testing.assert_close(cached["weights"][name], wanted)
            assert torch.equal(cached["weights"][name], ranks[0]["cached" + kind]["weights"][name])
    told = [torch.cat(rank["cached" + kind]["told"][:5]) for rank in ranks]
    assert not torch.equal(told[0], told[1])


def test_all_processes_refuse_together(folder, ranks):
    for rank in ranks:
        assert rank["again"].startswith("FileExistsError: There is a teacher cache")
        assert rank["part"].startswith("ValueError: 17 of 33 samples were not predicted")
    with pytest.raises(FileNotFoundError, match="not finished"):
        TeacherCache(folder / "short").manifest()
