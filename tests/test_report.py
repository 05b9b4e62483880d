import json

import pytest

from minillm.report import plot, read_metrics


def run(folder, rows, tail=""):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
    return folder


def test_metrics_come_back_as_curves(tmp_path):
    rows = [{"step": 0, "eval_loss": 3.0}, {"step": 10, "loss": 2.5, "gone": None}, {"step": 20, "loss": 2.0}]
    curves = read_metrics(run(tmp_path / "a", rows, tail='{"step": 30, "lo'))  # killed in the middle of a line
    assert curves == {"eval_loss": ([0], [3.0]), "loss": ([10, 20], [2.5, 2.0])}
    with pytest.raises(ValueError, match=r"has no metrics.jsonl"):
        read_metrics(tmp_path)


def test_a_plot_is_a_picture(tmp_path):
    a = run(tmp_path / "a", [{"step": s, "loss": 3 - s / 10, "eval_loss": 3 - s / 11} for s in range(10)])
    b = run(tmp_path / "b", [{"step": s, "loss": 3 - s / 20, "objective/kl": s} for s in range(10)])
    path = plot([a, b], tmp_path / "x.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert plot([b], tmp_path / "y.svg", ["objective/kl"]).read_text(encoding="utf-8").count("objective/kl")
    with pytest.raises(ValueError, match="no run has 'lose'; there are eval_loss, loss, objective/kl"):
        plot([a, b], tmp_path / "x.png", ["lose"])
    with pytest.raises(ValueError, match="nothing to draw"):
        plot([run(tmp_path / "c", [{"step": 1, "length": 3}])], tmp_path / "x.png")
