"""The picture of rows that leave their topic's experts, from records and from nothing else."""

import json
from pathlib import Path

import numpy as np

from luffy.report.figures import draw_pictures
from luffy.report.locality import topics_figure
from luffy.report.runs import read_run

from .synthetic import make_run


def test_rows_away_by_layer_and_their_mean(tmp_path: Path) -> None:
    out = make_run(tmp_path / "run", 40)
    assert topics_figure(read_run(out)) is None
    assert "topics" not in {p.name for p in draw_pictures(read_run(out))}
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for r in records:
        away = [4 / r["step"], 2 / r["step"]]
        r["topics"] = {"rows_away": float(np.mean(away)), "blocks_touched": 1 + away[0], "busiest": 0.5}
        r["balance"] = 1.1
        if r["step"] % 10 == 0:
            r["topics_by_layer"] = [{"rows_away": x} for x in away]
    (out / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    run = read_run(out)
    assert "topics" in {p.name for p in draw_pictures(run)}
    figure = topics_figure(run)
    assert figure is not None
    rows, loads = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in rows.get_lines()}
    np.testing.assert_allclose(lines["layer 1"], [0.4, 0.2, 4 / 30, 0.1])
    np.testing.assert_allclose(lines["layer 2"], [0.2, 0.1, 2 / 30, 0.05])
    assert lines["mean"][-1] < lines["mean"][0] < lines["ranks it uses"][0]
    assert len(loads.get_lines()) == 2
