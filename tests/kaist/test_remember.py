"""What is remembered of files is what reading them again would give, whatever happened to them."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from kaist import images, remember
from kaist.annotations import READERS, image_path, open_annotations, read_image_list
from kaist.files import InputError
from kaist.frames import load_frames
from kaist.images import check_images
from kaist.miss_rate import load_ground_truth

IDS = [f"set0{i % 3}/V00{i % 2}/I{i:05d}" for i in range(12)]
XML = (
    "<annotation>{}</annotation>",
    "<object><name>{}</name><bndbox><x>{}</x><y>{}</y><w>{}</w><h>{}</h></bndbox>"
    "<occlusion>{}</occlusion></object>",
)


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """A cache folder of the test's own, used for however few files."""
    monkeypatch.setattr(remember, "LEAST", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sds-ssd-kaist"


def age(path):
    """Give a file a past time of change, another one at each call."""
    age.seconds += 7
    os.utime(path, (age.seconds, age.seconds))


age.seconds = 10**9


def write(path, rng):
    """A file of 0 to 3 random objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        (
            rng.choice(["person", "people", "a person"][: 2 + (path.suffix == ".xml")]),
            *rng.integers(1, 99, 4),
            rng.integers(3),
        )
        for _ in range(rng.integers(4))
    ]
    if path.suffix == ".xml":
        path.write_text(XML[0].format("".join(XML[1].format(*row) for row in rows)))
    else:
        lines = [f"{' '.join(map(str, row))} 0 0 0 0 {rng.integers(2)} 0\n" for row in rows]
        path.write_text("% bbGt version=3\n" + "".join(lines))
    age(path)


def same(annotations):
    """Compare what `read_all` says, remembered or not, with each frame read by itself."""
    objects, counts = annotations.read_all(IDS)
    alone = [annotations.read(frame_id) for frame_id in IDS]
    assert counts.tolist() == [len(o.boxes) for o in alone]
    assert objects.labels == sum((o.labels for o in alone), ())
    for part in ("boxes", "occlusion", "ignore"):
        expected = np.concatenate([getattr(o, part) for o in alone])
        assert np.array_equal(getattr(objects, part), expected)
        assert getattr(objects, part).dtype == expected.dtype


@pytest.mark.parametrize("form", ["bbgt", "flat", "xml", "paired"])
def test_memory_is_never_stale(form, tmp_path, memory, monkeypatch):
    rng = np.random.default_rng(0)
    folder = tmp_path / "root"
    layout = {"bbgt": "{0}/{1}.txt", "flat": "{2}.txt", "xml": "{0}/{1}.xml", "paired": "{0}/lwir/{1}.txt"}[
        form
    ]
    paths = [folder / layout.format(*i.rsplit("/", 1), i.replace("/", "_")) for i in IDS]
    for path in paths:
        write(path, rng)
    form = "bbgt" if form == "flat" else form
    annotations = open_annotations(folder)
    assert annotations.form == form
    for _ in range(40):
        same(annotations)
        with monkeypatch.context() as blind:  # what comes now is remembered
            blind.setitem(READERS, form, None)
            annotations.read_all(IDS)
        [kept] = memory.iterdir()
        a, b = rng.choice(len(paths), 2, replace=False)
        change = rng.integers(4)
        if change == 0:  # other content
            write(paths[a], rng)
        elif change == 1:  # of the same size
            status, text = paths[a].stat(), paths[a].read_text()
            paths[a].write_text(text.replace("person", "people"))
            assert paths[a].stat().st_size == status.st_size
            age(paths[a])
        elif change == 2:  # two files change places
            spare = folder / "spare"
            paths[a].rename(spare), paths[b].rename(paths[a]), spare.rename(paths[b])
        else:  # a file is lost, and comes back
            text = paths[a].read_text()
            paths[a].unlink()
            with pytest.raises(InputError, match="annotation not found"):
                annotations.read_all(IDS)
            paths[a].write_text(text)
            age(paths[a])
        assert kept.exists()


def test_a_nested_file_that_appears_beside_a_flat_one_is_seen(tmp_path, memory):
    rng = np.random.default_rng(0)
    for frame_id in IDS:
        write(tmp_path / "root" / f"{frame_id.replace('/', '_')}.txt", rng)
    annotations = open_annotations(tmp_path / "root")
    same(annotations)
    write(tmp_path / "root" / f"{IDS[4]}.txt", rng)
    same(annotations)


def test_errors_and_fresh_files_are_not_remembered(tmp_path, memory):
    rng = np.random.default_rng(0)
    paths = [tmp_path / "root" / f"{frame_id}.txt" for frame_id in IDS]
    for path in paths:
        write(path, rng)
    annotations = open_annotations(tmp_path / "root")
    paths[3].write_text("% bbGt version=3\nperson 1 2 3\n")
    age(paths[3])
    for _ in range(2):
        with pytest.raises(InputError, match=r"I00003.txt:2: 4 columns"):
            annotations.read_all(IDS)
    write(paths[3], rng)
    os.utime(paths[3], (time.time(), time.time()))  # it may change again in the same instant
    annotations.read_all(IDS)
    assert not memory.exists()


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign", "pickle"])
def test_damaged_memory_is_redrawn(damage, tmp_path, memory):
    rng = np.random.default_rng(0)
    for frame_id in IDS:
        write(tmp_path / "root" / f"{frame_id}.txt", rng)
    annotations = open_annotations(tmp_path / "root")
    same(annotations)
    [kept] = memory.iterdir()
    whole = kept.read_bytes()
    if damage == "pickle":
        np.savez(kept, boxes=np.array([{}], dtype=object))
    else:
        middle = len(whole) // 3
        flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
        kept.write_bytes({"cut": whole[:-30], "flip": flipped, "foreign": b"no zip"}[damage])
    same(annotations)
    assert [p.name for p in memory.iterdir()] == [kept.name]
    with np.load(kept) as content:
        assert len(content["counts"]) == len(IDS)


def test_no_cache_folder_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(remember, "LEAST", 1)
    rng = np.random.default_rng(0)
    for frame_id in IDS:
        write(tmp_path / "root" / f"{frame_id}.txt", rng)
    annotations = open_annotations(tmp_path / "root")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    same(annotations)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    same(annotations)


def test_frames_and_people_are_the_same_from_memory(demo_root, tmp_path, memory, monkeypatch):
    root = shutil.copytree(demo_root, tmp_path / "set")
    for path in (root / "annotations").rglob("*.txt"):
        age(path)
    ids = read_image_list(root / "imageSets/train-all.txt")
    annotations = open_annotations(root)
    rules = {"min_height": 12, "margin": 5}
    frames = load_frames(ids, annotations, **rules)
    people = load_ground_truth(annotations, ids)
    monkeypatch.setitem(READERS, "bbgt", None)
    again = load_frames(ids, annotations, **rules)
    people_again = load_ground_truth(annotations, ids)
    for a, b in zip(frames, again, strict=True):
        assert a.id == b.id and np.array_equal(a.boxes_px, b.boxes_px)
        assert np.array_equal(a.labels, b.labels) and a.boxes_px.dtype == np.float32
    for part in ("frame", "boxes", "occlusion", "ignore"):
        assert np.array_equal(getattr(people, part), getattr(people_again, part))


def test_images_are_looked_at_again_when_one_changes(demo_root, tmp_path, memory, monkeypatch):
    root = shutil.copytree(demo_root, tmp_path / "set")
    ids = read_image_list(root / "imageSets/train-all.txt")
    for path in (root / "images").rglob("*.jpg"):
        age(path)
    check_images(root, ids, "early")
    with monkeypatch.context() as blind:
        blind.setattr(images, "open_image", None)
        check_images(root, ids, "early")
    path = image_path(root, ids[2], "lwir")
    path.write_bytes(path.read_bytes()[::-1])  # the same size
    age(path)
    with pytest.raises(InputError, match="unreadable image"):
        check_images(root, ids, "early")
    path.unlink()
    with pytest.raises(InputError, match="image not found"):
        check_images(root, ids, "early")
