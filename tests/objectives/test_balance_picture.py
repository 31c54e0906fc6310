"""The balances of a run as a picture."""

import pytest

from lightning_robust.objectives import balance_figure


def rows(kinds=("weight", "temperature", "loss", "entropy"), epochs=3):
    return [
        {"epoch": epoch, "step": 7 * epoch}
        | {f"train/mtard_{who}_{kind}": 0.1 * epoch for kind in kinds for who in ("clean", "robust")}
        for epoch in range(epochs)
    ]


@pytest.mark.parametrize(
    ("kinds", "panels"), [(("weight", "temperature", "loss", "entropy"), 4), (("weight", "loss"), 2)]
)
def test_picture_has_a_panel_for_each_quantity(kinds, panels):
    figure = balance_figure(rows(kinds), title="a run")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == panels
    assert [len(axes.lines) for axes in shown] == [2] * panels
    assert shown[0].lines[0].get_xdata().tolist() == [0, 1, 2]
    assert [text.get_text() for text in shown[0].texts] == ["clean", "robust"]


def test_picture_reads_the_file_of_a_run(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,step,train/mtard_clean_weight,val/acc\n0,3,0.5,\n0,3,,0.7\n1,7,0.25,\n", encoding="utf-8"
    )
    for source in (tmp_path, tmp_path / "metrics.csv", str(tmp_path)):
        (axes,) = (axes for axes in balance_figure(source).axes if axes.get_visible())
        assert axes.lines[0].get_xydata().tolist() == [[0.0, 0.5], [1.0, 0.25]]
    balance_figure(tmp_path).savefig(tmp_path / "balance.png")
    assert (tmp_path / "balance.png").stat().st_size > 1000


def test_picture_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected metrics like train/mtard_clean_weight but there are none"):
        balance_figure([{"epoch": 0, "train/loss": 1.0}])
    with pytest.raises(FileNotFoundError):
        balance_figure(tmp_path / "nothing.csv")
