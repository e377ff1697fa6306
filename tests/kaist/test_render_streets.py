"""The streets set: reproducible bytes, annotations that fit the images, ranges as in docs/streets.md."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from kaist import demo
from kaist.files import InputError
from kaist.render_streets import FrameRenderer, World, render_frame

NUMBERS = {"train_frames": 6, "test_frames": 6, "progress": False}


def digests(root: Path) -> dict[str, str]:
    """Relative path -> hash of each file below root."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 12 frames, drawn in one process."""
    place = tmp_path_factory.mktemp("drawn") / "streets"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        demo.draw_set(place, **NUMBERS)
    return place


def test_bytes_depend_only_on_the_seed_not_on_processes_or_interruptions(root, tmp_path, capsys, monkeypatch):
    half = tmp_path / "streets"
    for set_id, number in ((0, 0), (7, 0)):
        demo.draw_job(half, partial(render_frame, World(), 20), (set_id, number))
    (half / "recipe.txt").write_text((root / "recipe.txt").read_text())
    kept = half / "images/set00/V000/lwir/I00000.jpg"
    before = kept.stat().st_mtime_ns
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    demo.draw_set(half, **NUMBERS | {"progress": True})
    output = capsys.readouterr().out
    assert "rendering 10 frames" in output and "about an hour" in output
    assert digests(half) == digests(root)
    assert kept.stat().st_mtime_ns == before, "a finished frame is not drawn again"


def test_lists_name_the_frames_of_the_set(root):
    train = (root / "imageSets/train-all.txt").read_text().split()
    assert len(train) == 6 and (root / "imageSets/train-quarter.txt").read_text().split() == train[::4]
    content = json.loads((root / "KAIST_annotation.json").read_text())
    assert [image["im_name"] for image in content["images"]] == [
        f"set{k:02}/V000/I00000" for k in range(6, 12)
    ]
    for frame_id in train:
        video, name = frame_id.rsplit("/", 1)
        assert (root / "images" / video / "lwir" / f"{name}.jpg").is_file()
        assert (root / "annotations" / f"{frame_id}.txt").read_text().startswith("% bbGt version=3\n")


def test_a_place_with_other_files_is_left_alone(root, tmp_path):
    other = tmp_path / "streets"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    without_haze = shutil.copytree(root, tmp_path / "streets-without-haze")
    for place in (other, without_haze):
        before = digests(place)
        with pytest.raises(InputError, match="contains other files"):
            demo.draw_set(place, **NUMBERS)
        assert digests(place) == before
    with pytest.raises(InputError, match="contains other files"):
        demo.draw_set(other / "mine.txt", **NUMBERS)


class FixedLayout(FrameRenderer):
    """Renders the given people and no decoys."""

    places: tuple = ()

    def layout(self):
        return list(self.places)


@pytest.mark.parametrize(("seed", "x"), [(0, -6.2), (1, 0.4), (2, 3.0)])
def test_a_box_is_around_its_person(seed, x):
    """It encloses the LWIR pixels that differ from the empty street, with an annotator's margin."""
    empty, full = FixedLayout(seed, 0, 0, World()), FixedLayout(seed, 0, 0, World())
    full.places = ((14.0, "person", x),)
    (without, none), (scene, marks) = empty.compose(), full.compose()
    assert not none and len(marks) == 1
    label, (left, top, w, h), occlusion = marks[0]
    assert (label, occlusion) == ("person", 0)
    rows, columns = np.nonzero(abs(scene - without)[..., 3] > 2)
    tight = np.array((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    outward = (tight - (left, top, left + w, top + h)) * (1, 1, -1, -1)
    assert (outward >= -2).all() and (outward <= 2 + 0.06 * h + 0.1 * h * (tight % 640 == 0)).all()
    assert left >= 0 and left + w <= 640


def test_occlusion_is_annotated():
    """A person right behind another is ignored, partly behind is occluded, and beside is not."""
    found = []
    for aside in (0.0, 0.25, 0.8):
        renderer = FixedLayout(1, 0, 0, World())
        renderer.places = ((14.0, "person", aside), (13.0, "person", 0.0))
        found.append([(label, occlusion) for label, _, occlusion in renderer.compose()[1]])
    front = ("person", 0)
    assert found == [[("person?", 2), front], [("person", 1), front], [("person", 0), front]]


def test_statistics_are_in_the_stated_ranges():
    """LWIR grey levels, heights, positions of feet and shapes in 24 frames, as in docs/streets.md."""
    marks, means, deviations, counts = [], [], [], []
    for number in range(4):
        for set_id in range(6):
            renderer = FrameRenderer(3, set_id, number, World())
            scene, own = renderer.compose()
            visible, lwir = renderer.expose(scene)
            assert visible.shape == (512, 640, 3) and lwir.shape == (512, 640)
            assert visible.dtype == lwir.dtype == np.uint8
            means.append(lwir.mean())
            deviations.append(lwir.std())
            counts.append(len(own))
            marks += own
    assert min(means) > 8 and max(means) < 80 and 25 < np.median(means) < 50
    assert min(deviations) > 3 and max(deviations) < 35 and 9 < np.median(deviations) < 24
    assert {mark[0] for mark in marks} <= {"person", "person?", "cyclist"}
    x, y, w, h = np.array([box for label, box, hidden in marks if label == "person" and not hidden]).T
    inside = (x > 5) & (x + w < 635) & (y + h < 507)
    assert h.min() > 25 and 50 < np.median(h) < 110
    assert 0.33 < np.median((w / h)[inside]) < 0.5
    feet = (y + h - 1.06 * h)[inside]
    assert 195 < np.median(feet) < 225 and feet.std() < 25
    boxes = np.array([mark[1] for mark in marks])
    assert boxes.min() >= 0 and (boxes[:, 0] + boxes[:, 2]).max() <= 640
    assert (boxes[:, 1] + boxes[:, 3]).max() <= 512
    assert 2 < np.mean(counts) < 9


def test_worlds_differ_in_training_and_share_their_test_list():
    """Without crowds there are fewer people; the test frames of all sets are the same."""
    few, many = (
        sum(kind != "" for number in range(200) for _, kind, _ in renderer(number).layout())
        for renderer in (lambda n, w=w: FrameRenderer(0, 0, n, w) for w in (World(False), World()))
    )
    assert 1.4 * few < many
    plain, full = (FrameRenderer(0, 9, 0, w).compose() for w in (World(False, False), World()))
    assert np.array_equal(plain[0], full[0]) and plain[1] == full[1]


def test_only_streets_sets_have_a_note():
    assert "on synthetic frames only" in demo.streets_note("/somewhere/data/streets")
    assert demo.streets_note("data/streets-without-haze")
    assert not demo.streets_note("/mine/streets") and not demo.streets_note("streets")
    assert not demo.streets_note("data/demo") and not demo.streets_note("/data/kaist")
