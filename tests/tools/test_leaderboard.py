"""The leaderboard's page on two detectors of the demo set."""

import sys

import numpy as np
import pytest

from kaist.annotations import read_image_list
from kaist.files import InputError
from kaist.miss_rate import evaluate, load_ground_truth
from kaist.report import differs, percent
from kaist.results import Detections, write_detections
from tools import leaderboard


def test_the_page_has_rates_intervals_and_differences(demo_root, tmp_path, monkeypatch):
    gt = load_ground_truth(demo_root, read_image_list(demo_root / "imageSets/test-all.txt"))
    rng = np.random.default_rng(0)
    good = Detections(gt.frame_idxs, gt.boxes, rng.random(len(gt.frame_idxs)))
    poor = Detections(gt.frame_idxs, gt.boxes + [15, 0, 0, 0], good.scores)
    for name, found in (("MLPD_result.txt", good), ("mine.json", poor)):
        write_detections(tmp_path / name, found, gt.frames)
    page, figure = tmp_path / "page.md", tmp_path / "figure.png"
    flags = [
        "--annotations",
        str(demo_root),
        "--resamples",
        "30",
        "--out",
        str(page),
        "--figure",
        str(figure),
    ]
    # The folder has frame lists too, which are not result files.
    monkeypatch.setattr(sys, "argv", ["leaderboard", str(tmp_path), *flags])
    leaderboard.main()
    text = page.read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    first = next(row for row in rows if row[0] == "MLPD")
    official = evaluate(gt, good)["Reasonable-all"].miss_rate
    assert first[1] == percent(official)
    assert [row[0] for row in rows if row[0] in ("MLPD", "mine")][:2] == ["MLPD", "mine"]
    assert any(row[0] == "MLPD" and row[1].startswith("[") and len(row) == 7 for row in rows)
    assert any(row[0] == "mine" and row[-1] in ("yes", "by frames only", "no") for row in rows)
    assert any(row[0] == "MLPD" and row[1] == "Kim et al., RA-L 2021" for row in rows)
    assert figure.stat().st_size > 10_000


def test_two_files_of_one_detector_are_refused(demo_root, tmp_path):
    gt = load_ground_truth(demo_root, read_image_list(demo_root / "imageSets/test-all.txt"))
    a, b, mine = tmp_path / "a", tmp_path / "b", tmp_path / "mine"
    for path in (a / "x.txt", b / "x.txt", mine / "CFR.txt"):
        path.parent.mkdir()
        path.write_text("1,100,100,40,100,0.9\n")
    for folders, name in (([a, b], "x"), ([mine], "CFR")):  # CFR is a published detector's
        with pytest.raises(InputError, match=f"another detector is called {name}; rename this file"):
            leaderboard.read_all(folders, gt, only_published=False)


@pytest.mark.parametrize(("samples", "significant"), [([0.1, 0.2, 0.3], True), ([-0.1, 0.2, 0.3], False)])
def test_a_difference_is_significant_where_the_interval_excludes_zero(samples, significant):
    assert differs(np.array(samples)) is significant


@pytest.mark.parametrize(
    "flags", [["--resamples", "0"], ["--resamples", "10000000"], ["--out", "none/x.md"], ["--nonsense", "1"]]
)
def test_bad_flags_are_refused_before_anything_is_read(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["leaderboard", "nowhere", "--annotations", "none.json", *flags])
    with pytest.raises(InputError, match="resamples|no such folder|nonsense"):
        leaderboard.main()
