"""The miss rate: rules by hand, random cases against a slow reference implementation, real files."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from kaist.annotations import scene, time_of_day
from kaist.bootstrap import bootstrap, interval
from kaist.files import InputError
from kaist.miss_rate import (
    FPPI_POINTS,
    SETUPS,
    GroundTruth,
    Setup,
    allowed_false_positives,
    evaluate,
    find_id_shift,
    load_ground_truth,
    match_setups,
    select_frames,
)
from kaist.results import Detections, read_detections

ANYONE = {"anyone": Setup((1, np.inf), (0, 1, 2))}
RESULTS = (
    "MLPD_result.txt",
    "MLPD_result.json",
    "MBNet_result.txt",
    "MSDS-RCNN_result.txt",
    "URP2024_prediction_example.json",
)


def frame_ids(n, video="set06/V000"):
    return tuple(f"{video}/I{i:05d}" for i in range(n))


def make_people(*rows, frames=1):
    """Rows of (frame, x, y, w, h[, occlusion[, ignore]]), in the order of frames."""
    rows = [(*row, *(0, 0)[len(row) - 5 :]) for row in rows]
    table = np.array(rows, dtype=np.float64).reshape(-1, 7)
    return GroundTruth(
        frames if isinstance(frames, tuple) else frame_ids(frames),
        table[:, 0].astype(np.int64),
        table[:, 1:5],
        table[:, 5].astype(np.int64),
        table[:, 6] != 0,
    )


def make_detections(*rows):
    """Rows of (frame, x, y, w, h, score)."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return Detections(table[:, 0].astype(np.int64), table[:, 1:5], table[:, 5])


def outcomes(people, detections, setup=ANYONE["anyone"]):
    """Outcomes by descending score, and the detection that each box is matched with."""
    ((_, matching),) = match_setups(people, detections.sort_by_score(), {"it": setup})
    return matching.outcome.tolist(), matching.gt_match.tolist()


# ------------------------------------------------------------------- the slow version


def slow_evaluate(people, detections, setup, protocol="official"):
    """A reference written from the description of the protocol, with loops over images, boxes and pairs."""
    inside = {
        "all": lambda f: True,
        "day": lambda f: time_of_day(f) == "day",
        "night": lambda f: time_of_day(f) == "night",
    }[setup.subset]
    pool, n_positive, n_frames = [], 0, 0
    for index, frame_id in enumerate(people.frames):
        if not inside(frame_id):
            continue
        n_frames += 1
        truths = []
        for k in np.flatnonzero(people.frame_idxs == index).tolist():
            x, y, w, h = people.boxes[k].tolist()
            ignore = bool(people.ignore[k]) or not setup.heights[0] <= h <= setup.heights[1]
            ignore = ignore or int(people.occlusion[k]) not in setup.occlusion
            ignore = ignore or x < 5 or y < 5 or x + w > 635 or y + h > 507
            truths.append([x, y, w, h, ignore, False])
        truths.sort(key=lambda truth: truth[4])
        mine = [
            (detections.boxes[k].tolist(), float(detections.scores[k]))
            for k in np.flatnonzero(detections.frame_idxs == index).tolist()
        ]
        mine.sort(key=lambda item: -item[1])
        if mine or protocol == "official":
            n_positive += sum(not truth[4] for truth in truths)
        for (x, y, w, h), value in mine:
            best, kind, chosen = 0.5, 0, None
            for truth in truths:
                u, v, s, t, ignored, taken = truth
                if taken and not ignored:
                    continue
                if kind == 1 and ignored:
                    break
                width, height = min(x + w, u + s) - max(x, u), min(y + h, v + t) - max(y, v)
                shared = width * height if width > 0 and height > 0 else 0.0
                overlap = shared / (w * h) if ignored else shared / (w * h + s * t - shared)
                if overlap >= best:
                    best, kind, chosen = overlap, -1 if ignored else 1, truth
            if kind == 1:
                chosen[5] = True
            if kind >= 0:
                pool.append((value, kind == 1))
    pool.sort(key=lambda item: -item[0])
    if n_positive == 0:
        return float("nan"), float("nan"), [float("nan")] * 9
    rates = []
    for point in [10 ** (-2 + i / 4) for i in range(9)]:
        point = round(point, 4) if protocol == "leaderboard" else point
        rate = false = true = 0
        for _, hit in pool:
            true, false = true + hit, false + (not hit)
            if false / n_frames <= point:
                rate = true / n_positive
        rates.append(rate)
    with np.errstate(divide="ignore"):
        missed = [1 - rate if protocol == "leaderboard" else max(1e-10, 1 - rate) for rate in rates]
        rate = float(np.exp(np.mean(np.log(missed))))
    return rate, sum(hit for _, hit in pool) / n_positive, rates


def random_case(rng):
    """Crowded frames on a coarse grid, so that overlaps and scores are often equal."""
    n = int(rng.integers(1, 40))
    half = n // 2
    frames = frame_ids(half) + frame_ids(n - half, "set09/V001")
    count = int(rng.integers(0, 4 * n))
    frame = np.sort(rng.integers(0, n, count))
    corner = rng.integers(0, 12, (count, 2)) * (12, 10)
    size = np.stack([rng.integers(2, 5, count) * 12, rng.integers(3, 13, count) * 10], 1)
    people = GroundTruth(
        frames,
        frame,
        np.hstack([corner, size]).astype(np.float64),
        rng.choice([0, 0, 0, 1, 2], count),
        rng.random(count) < 0.2,
    )
    copies = rng.integers(0, count, int(rng.integers(0, 3 * count))) if count else np.zeros(0, int)
    near = people.boxes[copies] + rng.integers(-1, 2, (len(copies), 4)) * (6, 10, 6, 10)
    far = np.hstack([rng.integers(0, 500, (n, 2)), rng.integers(20, 100, (n, 2))])
    boxes = np.vstack([near, far]).astype(np.float64)
    frame = np.concatenate([people.frame_idxs[copies], rng.integers(0, n, n)])
    scores = rng.integers(0, 30, len(boxes)) / 30
    order = np.lexsort((-scores, frame))
    return people, Detections(frame[order], boxes[order], scores[order])


@pytest.mark.parametrize("seed", range(40))
def test_equals_slow_version_on_random_cases(seed):
    people, detections = random_case(np.random.default_rng(seed))
    for protocol in ("official", "leaderboard"):
        results = evaluate(people, detections, SETUPS, protocol)
        for name, setup in SETUPS.items():
            rate, recall, rates = slow_evaluate(people, detections, setup, protocol)
            np.testing.assert_allclose(results[name].miss_rate, rate, rtol=0, atol=1e-12)
            np.testing.assert_allclose(results[name].recall, recall, rtol=0, atol=1e-15)
            np.testing.assert_allclose(results[name].rates, rates, rtol=0, atol=1e-15)


@pytest.mark.parametrize("seed", range(10))
def test_a_shuffled_file_is_sorted_stably(seed):
    """Row order breaks ties, whatever order the file is in: as the slow version's stable sort does."""
    rng = np.random.default_rng(100 + seed)
    people, detections = random_case(rng)
    shuffled = reorder(detections, rng.permutation(len(detections.scores)))
    for protocol in ("official", "leaderboard"):
        results = evaluate(people, shuffled, SETUPS, protocol)
        for name, setup in SETUPS.items():
            rate, recall, rates = slow_evaluate(people, shuffled, setup, protocol)
            np.testing.assert_allclose(results[name].miss_rate, rate, rtol=0, atol=1e-12)
            np.testing.assert_allclose(results[name].recall, recall, rtol=0, atol=1e-15)
            np.testing.assert_allclose(results[name].rates, rates, rtol=0, atol=1e-15)


def reorder(detections, order):
    return Detections(detections.frame_idxs[order], detections.boxes[order], detections.scores[order])


# ------------------------------------------------------------------- matching, by hand


def test_overlap_of_exactly_half_matches_and_less_does_not():
    people = make_people((0, 100, 100, 40, 100))
    assert outcomes(people, make_detections((0, 100, 100, 40, 50, 0.9)))[0] == [1]  # 2000 / 4000
    assert outcomes(people, make_detections((0, 100, 100, 40, 49.9, 0.9)))[0] == [0]


def test_overlap_is_continuous():
    # with a pixel added to both sides it would be 11 x 11 / (2 x 11 x 16 - 121) > 0.5
    people = make_people((0, 100, 100, 10, 15))
    assert outcomes(people, make_detections((0, 100, 105.1, 10, 15, 0.9)))[0] == [0]
    assert outcomes(people, make_detections((0, 100, 105.0, 10, 15, 0.9)))[0] == [1]  # 100 / 200


def test_higher_score_is_matched_first():
    people = make_people((0, 100, 100, 40, 100))
    found, gt_match = outcomes(
        people, make_detections((0, 100, 100, 40, 100, 0.3), (0, 100, 110, 40, 100, 0.8))
    )
    assert found == [1, 0] and gt_match == [0]  # 0.8 first, although it fits worse


def test_of_equal_scores_the_earlier_row_is_matched_first():
    people = make_people((0, 100, 100, 40, 100))
    worse, better = (0, 100, 110, 40, 100, 0.8), (0, 100, 100, 40, 100, 0.8)
    for rows in ((worse, better), (better, worse)):
        ranked = make_detections(*rows).sort_by_score()
        assert ranked.boxes[:, 1].tolist() == [row[2] for row in rows]
        assert outcomes(people, make_detections(*rows))[0] == [1, 0]


def test_of_equal_scores_in_an_unordered_file_the_earlier_row_is_matched_first():
    """A row of a higher score further down changes nothing."""
    people = make_people((0, 100, 100, 40, 100), (0, 300, 100, 40, 100))
    exact, wrong, other = (0, 100, 100, 40, 100, 0.5), (0, 10, 100, 40, 100, 0.5), (0, 300, 100, 40, 100, 0.9)
    assert make_detections(wrong, exact, other).sort_by_score().boxes[:, 0].tolist() == [300, 10, 100]
    assert outcomes(people, make_detections(exact, wrong, other)) == ([1, 1, 0], [1, 0])
    result = evaluate(people, make_detections(exact, wrong, other))["Reasonable-all"]
    assert result.miss_rate == pytest.approx(1e-10)  # x, y, w and h would have decided for the wrong one


def test_pooled_ties_go_by_frame():
    ranked = make_detections((2, 0, 0, 9, 9, 0.5), (0, 0, 0, 9, 9, 0.5), (1, 0, 0, 9, 9, 0.5)).sort_by_score()
    assert ranked.frame_idxs.tolist() == [0, 1, 2]


def test_best_overlap_is_taken_and_of_equal_ones_the_later():
    detection = make_detections((0, 100, 100, 40, 100, 0.9))
    people = make_people((0, 100, 95, 40, 100), (0, 100, 110, 40, 100))
    assert outcomes(people, detection)[1] == [0, -1]
    people = make_people((0, 100, 90, 40, 100), (0, 100, 110, 40, 100))  # equal overlaps
    assert outcomes(people, detection)[1] == [-1, 0]


def test_a_taken_box_leaves_the_next_best_one_in_a_chain():
    # A matches P; B overlaps P most and matches Q; C overlaps Q most and matches R; D matches nothing
    people = make_people(*((0, 100, y, 40, 100) for y in (100, 120, 140)))
    detections = make_detections(
        (0, 100, 102, 40, 100, 0.9),
        (0, 100, 104, 40, 100, 0.8),
        (0, 100, 118, 40, 100, 0.7),
        (0, 100, 119, 40, 100, 0.6),
    )
    assert outcomes(people, detections) == ([1, 1, 1, 0], [0, 1, 2])


def test_ignored_object_matches_many_detections():
    people = make_people((0, 100, 100, 100, 200, 0, 1))
    inside = [(0, 100 + 10 * i, 120, 40, 100, 0.9 - i / 10) for i in range(4)]
    outside = (0, 175, 120, 60, 100, 0.1)  # 25 of its 60 columns inside
    assert outcomes(people, make_detections(*inside, outside))[0] == [-1] * 4 + [0]


def test_counting_object_comes_before_a_better_ignored_one():
    people = make_people((0, 100, 100, 60, 150, 0, 1), (0, 100, 100, 40, 150))
    found, gt_match = outcomes(
        people, make_detections((0, 100, 100, 45, 150, 0.9), (0, 100, 100, 45, 150, 0.8))
    )
    assert found == [1, -1] and gt_match == [-1, 0]  # the second one is ignored


def test_borders_are_inclusive():
    def counts(x, y, w, h):
        result = evaluate(make_people((0, x, y, w, h)), make_detections())["Reasonable-all"]
        return result.n_positive

    assert counts(5, 5, 630, 502) == 1
    assert counts(4.99, 5, 100, 200) == counts(5, 4.99, 100, 200) == 0
    assert counts(535, 5, 100.01, 200) == counts(5, 307, 100, 200.01) == 0


def test_heights_and_occlusion_are_inclusive():
    heights = (0.5, 1, 45, 45.5, 54.9, 55, 115, 115.5)
    people = make_people(*((0, 100, 100, 20, h) for h in heights))
    counted = {k: r.n_positive for k, r in evaluate(people, make_detections()).items()}
    assert counted["Reasonable-all"] == counted["Reasonable-day"] == 3
    assert counted["Scale=near"] == 2 and counted["Scale=medium"] == 5 and counted["Scale=far"] == 2
    assert counted["Occ=none"] == 7 and counted["Occ=partial"] == counted["Occ=heavy"] == 0
    people = make_people(*((0, 100, 100, 20, 60, level) for level in (0, 0, 1, 2)))
    counted = {k: r.n_positive for k, r in evaluate(people, make_detections()).items()}
    assert counted["Reasonable-all"] == 3
    assert [counted[f"Occ={level}"] for level in ("none", "partial", "heavy")] == [2, 1, 1]


def test_detections_are_not_filtered_by_height():
    people = make_people((0, 100, 100, 40, 56))
    assert outcomes(people, make_detections((0, 100, 100, 40, 40, 0.9)), SETUPS["Reasonable-all"])[0] == [1]


def test_detection_without_area_is_a_false_positive():
    assert outcomes(make_people((0, 9, 9, 9, 9)), make_detections((0, 9, 9, 0, 9, 1)))[0] == [0]


# ------------------------------------------------------------------- curves, by hand


def test_curve_by_hand():
    # two people in 10 frames; in order of score: hit, false, hit
    people = make_people((0, 100, 100, 40, 100), (1, 100, 100, 40, 100), frames=10)
    result = evaluate(
        people,
        make_detections((0, 100, 100, 40, 100, 0.9), (5, 1, 1, 40, 100, 0.8), (1, 100, 100, 40, 100, 0.7)),
    )["Reasonable-all"]
    assert result.fppi.tolist() == [0, 0.1, 0.1]
    assert result.detection_rate.tolist() == [0.5, 0.5, 1]
    assert result.rates.tolist() == [0.5] * 4 + [1.0] * 5  # FPPI 0.1 is the fifth point
    expected = np.exp((4 * np.log(0.5) + 5 * np.log(1e-10)) / 9)
    assert result.miss_rate == pytest.approx(expected, rel=1e-14)
    assert result.recall == 1 and result.n_positive == 2 and result.n_frames == 10


def test_first_detection_false_with_few_frames_gives_rate_zero():
    people = make_people((0, 100, 100, 40, 100), frames=2)
    result = evaluate(people, make_detections((1, 9, 9, 40, 90, 0.9), (0, 100, 100, 40, 100, 0.8)))[
        "Reasonable-all"
    ]
    assert result.rates.tolist() == [0] * 7 + [1, 1]  # 1 / 2 is reached at the point 0.562
    assert result.miss_rate == pytest.approx(1e-10 ** (2 / 9), rel=1e-12)


def test_without_detections_everybody_is_missed():
    result = evaluate(make_people((0, 100, 100, 40, 100)), make_detections())["Reasonable-all"]
    assert result.miss_rate == 1 and result.recall == 0 and result.rates.tolist() == [0] * 9
    assert len(result.fppi) == 0


def test_without_people_there_is_no_rate():
    detections = make_detections((0, 100, 100, 40, 100, 0.9))
    for people in (make_people(), make_people((0, 100, 100, 40, 100, 0, 1))):
        result = evaluate(people, detections)["Reasonable-all"]
        assert np.isnan([result.miss_rate, result.recall, *result.rates]).all()
        assert result.n_positive == 0 and len(result.hits) == (len(people.boxes) == 0)
        low, high = interval(bootstrap(people, detections, resamples=5)["Reasonable-all"])
        assert np.isnan(low) and np.isnan(high)
    night = evaluate(people, detections)["Reasonable-night"]
    assert night.n_frames == 0 and np.isnan(night.miss_rate)


def test_all_found_without_false_positives():
    people = make_people((0, 100, 100, 40, 100))
    detections = make_detections((0, 100, 100, 40, 100, 0.9))
    assert evaluate(people, detections)["Reasonable-all"].miss_rate == pytest.approx(1e-10)
    assert evaluate(people, detections, protocol="leaderboard")["Reasonable-all"].miss_rate == 0


def test_leaderboard_drops_frames_without_detections_and_rounds_points():
    people = make_people(*((i, 100, 100, 40, 100) for i in range(3)), frames=3)
    detections = make_detections((0, 100, 100, 40, 100, 0.9))
    official = evaluate(people, detections)["Reasonable-all"]
    script = evaluate(people, detections, protocol="leaderboard")["Reasonable-all"]
    assert official.n_positive == 3 and official.miss_rate == pytest.approx(2 / 3)
    assert script.n_positive == 1 and script.miss_rate == 0 and script.n_frames == 3
    assert script.points.tolist() == [0.01, 0.0178, 0.0316, 0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0]
    with pytest.raises(InputError, match="protocol"):
        evaluate(people, detections, protocol="matlab")


def test_allowed_false_positives_is_the_largest_number_not_above():
    for n in (1, 2, 3, 7, 10, 99, 100, 101, 797, 1455, 2252, 10_000):
        allowed = allowed_false_positives(n, FPPI_POINTS)
        assert (allowed / n <= FPPI_POINTS).all() and ((allowed + 1) / n > FPPI_POINTS).all()


def test_subsets_go_by_set_number_not_by_position():
    frames = ("set11/V000/I00001", "set06/V000/I00001", "set09/V000/I00001", "set07/V000/I00001")
    people = make_people(*((i, 100, 100, 40, 100) for i in range(4)), frames=frames)
    assert people.in_subset("day").tolist() == [False, True, False, True]
    assert people.in_subset("campus").tolist() == [False, True, True, False]
    results = evaluate(people, make_detections((1, 100, 100, 40, 100, 0.9)))
    assert results["Reasonable-day"].miss_rate == pytest.approx(0.5)
    assert results["Reasonable-night"].miss_rate == 1
    few, found = select_frames(
        people, make_detections((1, 1, 1, 9, 9, 0.5), (3, 1, 1, 9, 9, 0.6)), [frames[3], frames[0]]
    )
    assert few.frame_idxs.tolist() == [0, 1] and found.frame_idxs.tolist() == [0] and found.other_frames == 1
    with pytest.raises(InputError, match="set00/V000/I00000"):
        select_frames(people, found, ["set00/V000/I00000"])


def test_selection_equals_subset_setups():
    people, detections = random_case(np.random.default_rng(5))
    night = [frame_id for frame_id in people.frames if time_of_day(frame_id) == "night"]
    alone = evaluate(*select_frames(people, detections, night))["Reasonable-all"]
    assert alone.miss_rate == evaluate(people, detections)["Reasonable-night"].miss_rate
    assert {scene(frame_id) for frame_id in people.frames} == {"campus"}


def test_nonfinite_detections_are_refused():
    with pytest.raises(ValueError, match="finite"):
        make_detections((0, 1, 1, 9, 9, np.nan))


def test_id_shift_sees_a_wrong_base():
    rng = np.random.default_rng(0)
    rows = [(i, *rng.uniform(10, 400, 2), 40, 100) for i in range(60)]
    people = make_people(*rows, frames=61)
    right = make_detections(*((*row, 0.5) for row in rows))
    assert find_id_shift(people, right) == 0
    assert find_id_shift(people, replace(right, frame_idxs=right.frame_idxs + 1)) == -1
    assert find_id_shift(people, make_detections()) == 0


# ------------------------------------------------------------------- confidence


def slow_resample(people, detections, setup, picks):
    """The miss rate of a list of frames with repetitions, as a data set with copied frames."""
    rows, boxes = [], []
    for new, old in enumerate(picks):
        rows += [
            (new, *people.boxes[k], people.occlusion[k], people.ignore[k])
            for k in np.flatnonzero(people.frame_idxs == old)
        ]
        boxes += [
            (new, *detections.boxes[k], detections.scores[k])
            for k in np.flatnonzero(detections.frame_idxs == old)
        ]
    copied = make_people(*rows, frames=len(picks))
    return evaluate(copied, make_detections(*boxes), {"it": setup})["it"].miss_rate


def test_a_single_video_gives_no_interval():
    people, found = random_case(np.random.default_rng(11))
    one = replace(people, frames=tuple(f"set06/V000/I{i:05}" for i in range(len(people.frames))))
    assert not np.isnan(bootstrap(one, found, resamples=5)["Reasonable-all"]).all()
    assert np.isnan(bootstrap(one, found, resamples=5, by_video=True)["Reasonable-all"]).all()


@pytest.mark.parametrize("by_video", [False, True])
def test_bootstrap_equals_evaluating_the_resampled_frames(by_video):
    people, detections = random_case(np.random.default_rng(11))
    # no ties across frames, because copying frames would change their order
    scores = detections.scores + np.random.default_rng(0).uniform(0, 1e-3, len(detections.scores))
    detections = replace(detections, scores=scores)
    setup = {"anyone": Setup((1, np.inf), (0, 1))}
    samples = bootstrap(people, detections, setup, resamples=25, seed=3, by_video=by_video)
    videos = np.array([frame_id.rsplit("/", 1)[0] for frame_id in people.frames])
    units = np.unique(videos, return_inverse=True)[1] if by_video else np.arange(len(videos))
    draws = np.random.default_rng(3).integers(0, units.max() + 1, (25, units.max() + 1))
    for sample, draw in zip(samples["anyone"], draws, strict=True):
        picks = np.concatenate([np.flatnonzero(units == unit) for unit in draw])
        expected = slow_resample(people, detections, setup["anyone"], picks)
        np.testing.assert_allclose(sample, expected, rtol=0, atol=1e-12)


def test_bootstrap_is_repeatable_and_surrounds_the_rate():
    people, detections = random_case(np.random.default_rng(11))
    first, second = (bootstrap(people, detections, ANYONE, resamples=400)["anyone"] for _ in "ab")
    np.testing.assert_array_equal(first, second)
    low, high = interval(first)
    assert low < evaluate(people, detections, ANYONE)["anyone"].miss_rate < high


# ------------------------------------------------------------------- real files


@pytest.fixture(scope="module")
def real_people(reference):
    return load_ground_truth(reference / "annotations" / "KAIST_annotation.json")


@pytest.mark.parametrize("name", RESULTS)
def test_equals_the_official_tools(reference, real_people, name):
    expected = json.loads((reference / "results" / "reference.json").read_text())[name]
    detections = read_detections(reference / "results" / name, real_people.frames)
    # Ties keep the order of their rows; all else may stand anywhere.
    ties = np.unique(np.stack([detections.frame_idxs, detections.scores]), axis=1, return_inverse=True)[1]
    places = np.random.default_rng(0).permutation(ties.max() + 1)
    orders = [
        np.arange(len(ties)),
        np.argsort(places[ties], kind="stable"),
        np.argsort(-ties, kind="stable"),
        np.argsort(-detections.scores, kind="stable"),
    ]
    for order in orders:
        reordered = reorder(detections, order)
        official = evaluate(real_people, reordered)
        assert official.keys() == expected["official"]["setups"].keys()
        for setup, numbers in expected["official"]["setups"].items():
            result = official[setup]
            assert result.n_positive == numbers["n_positive"]
            assert result.miss_rate == pytest.approx(numbers["miss_rate"], rel=0, abs=1e-12)
            assert result.recall == pytest.approx(numbers["recall"], rel=0, abs=1e-12)
            rates = numbers["detection_rate_at_reference_fppi"]
            np.testing.assert_allclose(result.rates, rates, rtol=0, atol=1e-12)
        script = evaluate(real_people, reordered, protocol="leaderboard")
        for subset, numbers in expected["leaderboard_script"]["setups"].items():
            result = script[f"Reasonable-{subset}"]
            assert result.n_positive == numbers["n_positive"]
            assert result.miss_rate == pytest.approx(numbers["miss_rate"], rel=0, abs=1e-12)
            assert result.recall == pytest.approx(numbers["recall"], rel=0, abs=1e-12)


def test_equals_slow_version_on_a_real_file(reference, real_people):
    detections = read_detections(reference / "results" / "MSDS-RCNN_result.txt", real_people.frames)
    frames = real_people.frames[:150] + real_people.frames[-150:]
    people, few = select_frames(real_people, detections, frames)
    results = evaluate(people, few)
    for name in ("Reasonable-all", "Occ=none", "Scale=far"):
        rate, recall, rates = slow_evaluate(people, few, SETUPS[name])
        assert results[name].miss_rate == pytest.approx(rate, rel=0, abs=1e-12)
        assert results[name].rates.tolist() == rates and results[name].recall == recall


def test_real_subsets_are_the_first_and_last_frames(real_people):
    day = real_people.in_subset("day")
    assert day[:1455].all() and not day[1455:].any() and len(day) == 2252


def test_one_perfect_box_scores_zero_on_the_leaderboard(reference, real_people):
    alone = np.bincount(real_people.frame_idxs)[real_people.frame_idxs] == 1
    k = int(np.flatnonzero(alone & ~real_people.ignore & (real_people.boxes[:, 3] > 60))[0])
    box = make_detections((real_people.frame_idxs[k], *real_people.boxes[k], 0.9))
    assert evaluate(real_people, box, protocol="leaderboard")["Reasonable-all"].miss_rate == 0
    assert evaluate(real_people, box)["Reasonable-all"].miss_rate > 0.99


def test_memory_grows_with_the_detections_not_their_square(reference, real_people):
    detections = read_detections(reference / "results" / "MLPD_result.txt", real_people.frames)
    rng = np.random.default_rng(0)
    peaks = []
    for times in (2, 20):
        boxes = np.tile(detections.boxes, (times, 1))
        boxes += rng.uniform(-1, 1, boxes.shape)
        many = Detections(np.tile(detections.frame_idxs, times), boxes, rng.random(len(boxes)))
        tracemalloc.start()
        evaluate(real_people, many)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 15 * peaks[0]
