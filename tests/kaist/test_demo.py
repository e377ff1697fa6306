"""Drawing the sets: KAIST's layout, the same bytes from the same seed, resuming after an interruption."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kaist import demo as demo_data
from kaist.files import InputError

SCRIPT = [sys.executable, "-m", "kaist.demo"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set: one video of two frames in each test set, one frame in each training set."""
    place = tmp_path_factory.mktemp("demo") / "set"
    demo_data.draw_set(place, train_frames=6, test_frames=12, progress=False)
    return place


def _frames(root: Path, name: str) -> list[str]:
    return (root / "imageSets" / f"{name}.txt").read_text().split()


def _lines(root: Path, frame: str) -> list[list[str]]:
    header, *lines = (root / "annotations" / f"{frame}.txt").read_text().splitlines()
    assert header == "% bbGt version=3"
    return [line.split() for line in lines]


def _picture(root: Path, frame: str, kind: str) -> np.ndarray:
    video, name = frame.rsplit("/", 1)
    return np.array(Image.open(root / "images" / video / kind / f"{name}.jpg"))


def test_layout_is_kaists(root: Path) -> None:
    """Every listed frame has two 640x512 pictures and annotations, and there is nothing else."""
    train, test = _frames(root, "train-all"), _frames(root, "test-all")
    assert len(train) == 6 and len(test) == 12
    assert train[0] == "set00/V000/I00000"
    assert test[:2] == ["set06/V000/I00000", "set06/V000/I00019"]
    assert _frames(root, "test-day") + _frames(root, "test-night") == test == sorted(test)
    assert {frame[:5] for frame in _frames(root, "test-night")} == {"set09", "set10", "set11"}
    for frame in train + test:
        visible, lwir = _picture(root, frame, "visible"), _picture(root, frame, "lwir")
        assert visible.shape == lwir.shape == (512, 640, 3)
        assert visible.dtype == np.uint8 and np.ptp(lwir, axis=2).max() <= 2
    assert len(list(root.rglob("*.jpg"))) == 36 and len(list(root.rglob("I*.txt"))) == 18


def test_json_says_what_the_text_says(root: Path) -> None:
    """The test JSON holds the text files' boxes in list order; only plain persons count."""
    content = json.loads((root / "KAIST_annotation.json").read_text())
    assert [image["im_name"] for image in content["images"]] == _frames(root, "test-all")
    assert [image["id"] for image in content["images"]] == list(range(12))
    entries = content["annotations"]
    assert [entry["id"] for entry in entries] == list(range(1, len(entries) + 1))
    from_text = []
    for image_id, frame in enumerate(_frames(root, "test-all")):
        for label, *numbers in _lines(root, frame):
            x, y, w, h, occlusion, *rest = map(int, numbers)
            assert rest == [0] * 6
            from_text.append((image_id, [x, y, w, h], h, occlusion, int(label != "person"), label))
    names = {category["id"]: category["name"] for category in content["categories"]}
    keys = ("image_id", "bbox", "height", "occlusion", "ignore")
    found = [(*(entry[key] for key in keys), names[entry["category_id"]]) for entry in entries]
    assert found == from_text


def test_a_video_opens_with_people(root: Path) -> None:
    """The first frame of each test video is not empty."""
    first = [frame for frame in _frames(root, "test-all") if frame.endswith("I00000")]
    assert len(first) == 6 and all(_lines(root, frame) for frame in first)


def digest(place: Path) -> dict[str, str]:
    """Relative path -> hash of each file below a folder."""
    files = (path for path in sorted(place.rglob("*")) if path.is_file())
    return {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_bytes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of processes changes no byte; the seed does."""
    again, other = tmp_path / "again", tmp_path / "other"
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    demo_data.draw_set(again, train_frames=6, test_frames=12, progress=False)
    assert digest(again) == digest(root)
    _, render, _ = demo_data.plan_jobs(demo_data.DrawnSet(1, 6, 12))
    demo_data.draw_job(other, render, (6, 0, 2))  # all frames of set06's first video
    frame = "images/set06/V000/lwir/I00000.jpg"
    assert digest(other)[frame] != digest(root)[frame]


def test_never_overwrites(tmp_path: Path) -> None:
    """A file, or a folder with other files, is left unchanged, with a remedy."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for taken in ("mine", "file"):
        with pytest.raises(InputError, match="remove it or choose another"):
            demo_data.draw_set(tmp_path / taken)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine", "notes.txt"]


def test_impossible_sizes_are_refused(tmp_path: Path) -> None:
    for changes in ({"seed": -1}, {"train_frames": 5}):
        with pytest.raises(InputError, match="ask for 6 or more frames, and a seed from 0 up"):
            demo_data.draw_set(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_interrupted_drawing_is_resumed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The JSON is written last, and finished videos are not drawn again."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    place, sizes = tmp_path / "set", {"train_frames": 6, "test_frames": 12, "progress": False}
    shutil.copytree(root, place)
    (place / "KAIST_annotation.json").unlink()
    (place / "annotations/set06/V000/I00000.txt").unlink()  # of two frames of a video
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo_data, "write_lists", interrupt)
        demo_data.draw_set(place, **sizes)
    assert not (place / "KAIST_annotation.json").exists()
    (place / "annotations/set06/V000/I00000.txt").unlink()
    image = "images/set{}/V000/lwir/I00000.jpg"
    before = {name: (place / name).stat().st_mtime_ns for name in (image.format("06"), image.format("07"))}
    demo_data.draw_set(place, **sizes)
    assert digest(place) == digest(root)
    after = {name: (place / name).stat().st_mtime_ns for name in before}
    assert [after[name] > before[name] for name in before] == [True, False]


def test_what_is_written_stays_byte_for_byte(root: Path) -> None:
    """Annotations; images also depend on the version of the JPEG encoder."""
    texts = sorted((root / "annotations").rglob("*.txt"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in texts)).hexdigest()
    assert digest[:16] == "cdb499f053c66db4"


def test_only_the_repositorys_sets_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any working directory; a missing folder of the same name elsewhere is not drawn."""
    asked = []
    monkeypatch.setattr(demo_data, "draw_set", asked.append)
    monkeypatch.chdir(tmp_path)
    for place in (demo_data.DEMO_ROOT, demo_data.SHIFTED_ROOT, *demo_data.STREETS_ROOTS):
        own = Path(demo_data.__file__).parents[1] / place
        absent = not (own / "KAIST_annotation.json").exists()
        assert demo_data.open_root(own) == own and demo_data.open_root(os.path.relpath(own))
        assert asked == [own, Path(os.path.relpath(own))] * absent
        asked.clear()
        with pytest.raises(InputError, match="no such folder; .*data/demo for the demo set"):
            demo_data.open_root(place)


def test_a_set_is_chosen_by_its_folders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(
        demo_data, "write_lists", lambda root, ids, paired: drawn.append((len(ids), ids[1], paired))
    )
    monkeypatch.setattr(demo_data, "ProcessPoolExecutor", Idle)
    for place in (*demo_data.STREETS_ROOTS, demo_data.SHIFTED_ROOT, "any"):
        demo_data.draw_set(tmp_path / place, progress=False)
    streets, demo = (3840, "set00/V000/I00001"), (660, "set00/V000/I00019")
    assert drawn == [(*streets, False)] * 3 + [(*demo, True), (*demo, False)]


class Idle(contextlib.nullcontext):
    """An executor that does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__(self)

    def map(self, _: object, *jobs: tuple) -> tuple:
        return jobs[0]


def test_a_shifted_set_differs_only_in_visible_and_has_paired_boxes(root: Path, tmp_path: Path) -> None:
    """LWIR, lists and the test annotations are byte for byte the same; most people have two boxes."""
    place = tmp_path / demo_data.SHIFTED_ROOT.name
    demo_data.draw_set(place, train_frames=6, test_frames=12, progress=False)
    names = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    ours = {path.relative_to(place) for path in place.rglob("*") if path.is_file()}
    assert all("annotations_paired" in str(name) for name in ours - names)
    assert all(name.parts[0] == "annotations" for name in names - ours)
    same = {name for name in names & ours if (root / name).read_bytes() == (place / name).read_bytes()}
    assert all("visible" in name.parts for name in names & ours - same)
    assert len(names & ours - same) >= 12
    apart = []
    for frame in _frames(root, "train-all") + _frames(root, "test-all"):
        video, name = frame.rsplit("/", 1)
        files = [place / "annotations_paired" / video / kind / f"{name}.txt" for kind in ("visible", "lwir")]
        assert files[1].read_bytes() == (root / "annotations" / f"{frame}.txt").read_bytes()
        visible, lwir = ([line.split() for line in file.read_text().splitlines()[1:]] for file in files)
        if len(visible) == len(lwir):
            apart += [int(a[1]) - int(b[1]) for a, b in zip(visible, lwir, strict=True)]
    assert max(map(abs, apart)) < 40 and len(set(apart)) > 5


def test_script(tmp_path: Path) -> None:
    """The command draws a set, and refuses in one line to mix sets or to draw too few frames."""

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([*SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True)

    sizes = ("--train-frames", "6", "--test-frames", "6")
    assert run("--root", "set", *sizes).returncode == 0
    assert (tmp_path / "set" / "KAIST_annotation.json").is_file()
    other, few = run("--root", "set", *sizes[:3], "7"), run("--root", "few", "--test-frames", "5")
    again = run("--root", "set", *sizes)
    assert other.returncode == few.returncode == again.returncode == 2
    assert again.stderr.count("\n") == 1 and "complete already" in again.stderr
    assert other.stderr.count("\n") == 1 and "contains other files" in other.stderr
    assert "ask for 6 or more" in few.stderr
