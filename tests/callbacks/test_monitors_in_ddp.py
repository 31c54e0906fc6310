"""Two processes: one table of margins, one set of features, the mean over all patterns."""

import csv
from collections import defaultdict

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.metrics import draw_pairs, logit_margin, oui
from support.ddp_monitors import BATCHES, EPOCHS, SAMPLES, VAL, shuffled
from support.feature_numbers import expected
from support.modules import Images, PlainModule
from support.ranks import WORLD, launch

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ddp_monitors")]  # one launch serves all of them


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    launch("-m", "support.ddp_monitors", str(folder))
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def loop():
    """One process with averaged gradients: margins, training features and patterns of the last epoch, the weights."""
    module, data = PlainModule(norm=False), Images(SAMPLES)
    optimizer, margins, rows, patterns = module.configure_optimizers(), defaultdict(list), [], []
    samplers = [shuffled(rank).sampler for rank in range(WORLD)]
    for epoch in range(EPOCHS):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        for step in zip(*(torch.tensor(list(sampler)).split(3) for sampler in samplers), strict=True):
            optimizer.zero_grad()
            for indices in step:
                x, y = data.x[indices], data.y[indices]
                features = module.net[:-1](x)
                z = module.net[-1](features)
                (F.cross_entropy(z, y) / WORLD).backward()
                if epoch > 0:
                    for index, margin in zip(indices.tolist(), logit_margin(z.detach(), y).tolist(), strict=True):
                        margins[index].append(margin)
                if epoch == EPOCHS - 1:
                    rows.append((features.detach(), z.detach(), y))
                    patterns.append(oui([module.net[0](x) > 0], draw_pairs(3)))
            optimizer.step()
    return module, margins, [torch.cat(part) for part in zip(*rows, strict=True)], torch.stack(patterns).mean()


def test_ranks_agree_and_a_resumed_run_continues_exactly(ranks):
    for run in ("whole", "resumed"):
        for name, value in ranks[0]["whole"]["table"].items():
            assert all(torch.equal(rank[run]["table"][name], value) for rank in ranks)
        for rank in ranks:
            own = {name: value for name, value in rank[run]["metrics"].items() if "/" in name}
            assert own == {name: ranks[0]["whole"]["metrics"][name] for name in own}
            assert len(own) == 25
            for name, value in ranks[0]["whole"]["weights"].items():
                assert torch.equal(rank[run]["weights"][name], value)


def test_one_table_of_margins(ranks, loop, folder):
    margins = loop[1]
    assert sorted(margins) == list(range(SAMPLES))
    table = ranks[1]["whole"]["table"]
    assert table["visits"].tolist() == [EPOCHS - 1] * SAMPLES
    areas = {index: sum(values) / len(values) for index, values in margins.items()}
    for run in ("whole", "resumed"):
        with (folder / run / "suspicious_samples.csv").open(newline="") as file:
            found = list(csv.DictReader(file))
        assert [int(row["index"]) for row in found] == sorted(areas, key=areas.get)
        for row in found:
            assert float(row["aum"]) == pytest.approx(areas[int(row["index"])], rel=1e-4, abs=1e-5)
            assert int(row["label"]) == Images(SAMPLES).y[int(row["index"])]


def test_features_and_patterns_are_those_of_all_samples(ranks, loop):
    module, _, (features, logits, labels), patterns = loop
    data, weight = Images(VAL, seed=1), module.net[-1].weight.detach()
    with torch.no_grad():
        seen = module.net[:-1](data.x)
        wanted = {"val": expected(seen, module.net[-1](seen), data.y, weight)}
    wanted["train"] = expected(features, logits, labels, weight)
    found = ranks[0]["whole"]["metrics"]
    for split, values in wanted.items():
        for name, value in values.items():
            assert found[f"{split}/{name}"] == pytest.approx(value.item(), rel=1e-3, abs=1e-5), (split, name)
    assert found["train/oui"] == pytest.approx(patterns.item(), rel=1e-5)
    assert len(labels) == WORLD * BATCHES * 3
