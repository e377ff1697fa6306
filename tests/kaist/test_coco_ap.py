"""COCO's AP: cases by hand, and parity with pycocotools."""

import contextlib
import io

import numpy as np
import pytest

from kaist.coco_ap import coco_ap
from kaist.miss_rate import GroundTruth, load_ground_truth
from kaist.results import Detections, read_detections

NAMES = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")


def truth(n_frames, frame, boxes, ignore):
    frames = tuple(f"set06/V000/I{i:05}" for i in range(n_frames))
    order = np.argsort(frame, kind="stable")
    frame, boxes, ignore = (np.array(column)[order] for column in (frame, boxes, ignore))
    zeros = np.zeros(len(frame), np.int64)
    return GroundTruth(frames, frame, boxes.astype(float).reshape(-1, 4), zeros, ignore.astype(bool))


def found(frame, boxes, scores):
    boxes = np.array(boxes, float).reshape(-1, 4)
    return Detections(np.array(frame, np.int64), boxes, np.array(scores, float))


def by_pycocotools(people, detections):
    """The numbers of COCOeval."""
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    evaluator = pytest.importorskip("pycocotools.cocoeval")
    columns = zip(people.frame_idxs.tolist(), people.boxes.tolist(), people.ignore.tolist(), strict=True)
    annotations = [
        {"id": i, "image_id": f, "category_id": 1, "bbox": b, "area": b[2] * b[3], "iscrowd": int(crowd)}
        for i, (f, b, crowd) in enumerate(columns, 1)
    ]
    columns = (detections.frame_idxs.tolist(), detections.boxes.tolist(), detections.scores.tolist())
    results = [
        {"image_id": f, "category_id": 1, "bbox": b, "score": s} for f, b, s in zip(*columns, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        gt = coco.COCO()
        images = [{"id": i} for i in range(len(people.frames))]
        gt.dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1}]}
        gt.createIndex()
        done = evaluator.COCOeval(gt, gt.loadRes(results), "bbox")
        done.evaluate()
        done.accumulate()
        done.summarize()
    return {name: value for name, value in zip(NAMES, done.stats[:6].tolist(), strict=True)}


def check(people, detections):
    expected = by_pycocotools(people, detections)
    for name, value in coco_ap(people, detections).items():
        assert (np.isnan(value) and expected[name] == -1) or abs(value - expected[name]) <= 1e-12, name


def test_by_hand():
    """Two people; hit at IoU 1, false positive, hit at IoU 0.6: precision 1 up to recall 0.5, then 2/3."""
    people = truth(2, [0, 1], [[0, 0, 40, 100], [0, 0, 50, 100]], [False, False])
    boxes = [[0, 0, 40, 100], [300, 300, 40, 100], [0, 0, 50, 60]]
    values = coco_ap(people, found([0, 1, 1], boxes, [0.9, 0.8, 0.7]))
    assert values["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert values["AP75"] == pytest.approx(51 / 101)
    assert values["AP"] == pytest.approx((3 * values["AP50"] + 7 * values["AP75"]) / 10)
    assert values["AP medium"] == values["AP"] and np.isnan(values["AP small"])


def test_a_crowd_region_matches_any_number_and_a_person_one():
    people = truth(1, [0, 0], [[0, 0, 300, 300], [400, 0, 40, 100]], [True, False])
    inside = [[10 * i, 10, 40, 100] for i in range(5)]
    person = [400, 0, 40, 100]
    assert coco_ap(people, found([0] * 6, [*inside, person], [0.9] * 5 + [0.5]))["AP"] == pytest.approx(1)
    assert coco_ap(people, found([0, 0], [person, person], [0.9, 0.8]))["AP"] == pytest.approx(1)
    assert coco_ap(people, found([0] * 3, [[500, 300, 9, 9]] * 2 + [person], [0.9, 0.8, 0.5]))["AP"] < 0.34


@pytest.mark.parametrize("seed", range(25))
def test_random_cases_equal_pycocotools(seed):
    """Few coordinates and scores, so that there are ties; many sizes; more than 100 detections per frame."""
    rng = np.random.default_rng(seed)
    n_frames, n, m = 4, 600, 60
    boxes = rng.integers(0, 12, (m, 4)) * [20, 20, 14, 14] + [0, 0, 6, 6]
    people = truth(n_frames, rng.integers(0, n_frames, m), boxes, rng.random(m) < 0.2)
    copies = rng.integers(0, m, n)
    near = people.boxes[copies] + rng.integers(-2, 3, (n, 4)) * (rng.random((n, 1)) < 0.7)
    near[:, 2:] = near[:, 2:].clip(1)
    frame = np.where(rng.random(n) < 0.9, people.frame_idxs[copies], rng.integers(0, n_frames, n))
    check(people, found(frame, near, rng.integers(0, 40, n) / 40))


def test_no_people_or_no_detections():
    people = truth(2, [0], [[0, 0, 40, 100]], [False])
    assert coco_ap(people, found([], [], []))["AP"] == 0
    assert np.isnan(coco_ap(truth(2, [], [], []), found([0], [[0, 0, 9, 9]], [1]))["AP"])


@pytest.mark.parametrize("name", ["MLPD_result.txt", "MLPD_result.json", "MBNet_result.txt"])
def test_published_files_equal_pycocotools(reference, name):
    people = load_ground_truth(reference / "annotations/KAIST_annotation.json")
    detections = read_detections(reference / "results" / name, people.frames)
    check(people, detections)
