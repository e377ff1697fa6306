"""The demo set's videos: statistics near KAIST's, boxes and occlusion that fit what is rendered."""

from __future__ import annotations

import numpy as np
import pytest

from kaist import render_demo, sprites


@pytest.fixture(scope="module")
def streets() -> list[tuple[int, list[tuple], list[tuple]]]:
    """Frames of a video of every set: (set, annotated objects, contrasts of unoccluded people)."""
    frames = []
    for set_id in range(12):
        rng = np.random.default_rng(set_id)
        street = render_demo.build_street(rng, night=set_id % 6 >= 3)
        empty, median = render_demo.EMPTY_AND_HEIGHT[set_id < 6]
        for groups in render_demo.simulate_groups(rng, street, np.zeros(8), empty, median):
            scene, marks, _ = render_demo.compose(street, groups, pan=0)
            contrasts = [_contrast(scene, mark) for mark in marks if _clear(mark)]
            frames.append((set_id, marks, contrasts))
    return frames


def _clear(mark: tuple) -> bool:
    label, (x, _, w, h), occlusion = mark
    return label == "person" and occlusion == 0 and h >= 45 and 2 * w < x < 640 - 3 * w


def _contrast(scene: np.ndarray, mark: tuple) -> tuple[float, float]:
    """Grey levels between someone's upper body and the area to its left: (visible, lwir)."""
    x, y, w, h = mark[1]
    body = scene[y : y + h // 2, x + w // 3 : x + 2 * w // 3].mean((0, 1))
    difference = body - scene[y : y + h // 2, x - w // 2 : x].mean((0, 1))
    return abs(difference[:3]).mean(), difference[3]


def test_statistics_are_near_kaists(streets: list[tuple]) -> None:
    """Sizes, shapes, places, occlusion, crowding and labels, in broad bands."""
    for train in (True, False):
        frames = [marks for set_id, marks, _ in streets if (set_id < 6) == train]
        labels = [mark[0] for marks in frames for mark in marks]
        people = [mark for marks in frames for mark in marks if mark[0] == "person"]
        counts = np.array([sum(mark[0] == "person" for mark in marks) for marks in frames])
        assert (0.03 if train else 0.25) < np.mean(counts == 0) < (0.25 if train else 0.50)
        assert 1 <= np.median(counts[counts > 0]) <= 3 and 5 <= counts.max() <= 11
        x, y, w, h = np.array([box for _, box, _ in people]).T
        occlusion = np.array([mark[2] for mark in people])
        assert 0.05 < np.mean(occlusion == 1) < 0.25 and 0.02 < np.mean(occlusion == 2) < 0.2
        plain = (occlusion == 0) & (x > 5) & (x + w < 635)
        assert 45 < np.median(h[plain]) < 90 and 120 < np.percentile(h[plain], 95) < 220
        assert 0.35 < np.median((w / h)[plain]) < 0.47
        assert 230 < np.percentile((y + h)[plain], 5) < np.percentile((y + h)[plain], 95) < 440
        assert set(labels) <= set(render_demo.GROUP_LABELS)
        assert 0.05 < 1 - len(people) / len(labels) < 0.3


def test_boxes_lie_inside_the_frame(streets: list[tuple]) -> None:
    """No box is empty or crosses the border; whole pixels."""
    boxes = np.array([mark[1] for _, marks, _ in streets for mark in marks])
    assert boxes.dtype.kind == "i" and boxes[:, :2].min() >= 0 and boxes[:, 2:].min() >= 1
    assert (boxes[:, 0] + boxes[:, 2]).max() <= 640 and (boxes[:, 1] + boxes[:, 3]).max() <= 512


@pytest.mark.parametrize("facing", [(1.0, 0.0), (0.0, -1.0)])
@pytest.mark.parametrize("kind", ["person", "cyclist"])
def test_box_is_tight_on_its_figure(kind: str, facing: tuple[float, float]) -> None:
    """The pixels that differ from the street without the figure are the box's, in LWIR."""
    rng = np.random.default_rng(3)
    street = render_demo.build_street(rng, night=True)
    street.props.clear()
    paints = {part: sprites.sample_paint(rng, part, True) for part in sprites.FIGURE_MATERIALS}
    figure = sprites.Figure(kind, 0.5, 14.0, *facing, 0.7, 1.7, 1.1, False, False, paints)
    without, *_ = render_demo.compose(street, [], pan=0)
    scene, [(label, (x, y, w, h), occlusion)], [visible] = render_demo.compose(street, [[figure]], pan=0)
    rows, columns = np.nonzero(abs(scene - without)[..., 3] > 8)
    assert (label, occlusion) == (kind, 0)
    assert np.allclose((x, y), (columns.min(), rows.min()), atol=1)
    assert np.allclose((x + w, y + h), (columns.max() + 1, rows.max() + 1), atol=1)
    assert visible[1:] == (y, w, h) and abs(visible[0] - x) < 20  # by the parallax
    shifted, [mark], [aside] = render_demo.compose(street, [[figure]], pan=0, visible_shift=7)
    assert mark[1] == (x, y, w, h) and aside == (visible[0] - 7, *visible[1:])
    assert np.array_equal(shifted[:, :-7, :3], scene[:, 7:, :3])  # the visible picture moves with it
    assert np.array_equal(shifted[..., 3], scene[..., 3])


def test_occlusion_grows_as_another_steps_in_front() -> None:
    """None alone, heavy right behind another, partial in between."""
    rng = np.random.default_rng(4)
    street = render_demo.build_street(rng, night=True)
    street.props.clear()
    paints = {part: sprites.sample_paint(rng, part, True) for part in sprites.FIGURE_MATERIALS}

    def stand(x: float, z: float) -> sprites.Figure:
        return sprites.Figure("person", x, z, 0.0, -1.0, 0.0, 1.7, 1.1, False, False, paints)

    found = []
    for aside in (2.0, 0.3, 0.05):
        marks = render_demo.compose(street, [[stand(0.0, 14.0)], [stand(aside, 13.0)]], pan=0)[1]
        found.append([mark[2] for mark in marks])
    assert found == [[0, 0], [1, 0], [2, 0]]


def test_people_are_warm_at_night_and_hard_to_see(streets: list[tuple]) -> None:
    """By night people stand out in LWIR, not in visible; by day in visible more than in LWIR."""
    by_day = [contrast for set_id, _, found in streets for contrast in found if set_id % 6 < 3]
    by_night = [contrast for set_id, _, found in streets for contrast in found if set_id % 6 >= 3]
    visible, lwir = np.array(by_night).T
    assert np.percentile(lwir, 10) > 20 and np.median(visible) < 20 < 40 < np.median(lwir)
    visible, lwir = np.array(by_day).T
    assert np.median(abs(lwir)) < 20 < 25 < np.median(visible)
