"""tools.convert: a round trip returns the same set, up to the rounding of the format."""

import csv
import json
import sys

import numpy as np
import pytest
from PIL import Image

from kaist.annotations import image_path, open_annotations, read_image_list
from kaist.files import InputError
from kaist.images import check_images, read_frame
from kaist.pair_sets import find_lwir_range, open_pairs
from tests import pair_trees
from tools import convert


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
    convert.main()


def assert_equal_sets(a, b, tolerance):
    """Check that two sets have the same frames and objects."""
    assert a.frames == b.frames
    for frame_id in a.frames:
        objects, others = a.read(frame_id), b.read(frame_id)
        np.testing.assert_allclose(objects.boxes, others.boxes, rtol=0, atol=tolerance)
        np.testing.assert_array_equal(objects.is_person, others.is_person)
        assert a.sizes[frame_id] == b.sizes[frame_id]


SETS = {
    "llvip": pair_trees.draw_llvip,
    "flir": pair_trees.draw_flir,
    "cvc14": pair_trees.draw_cvc14,
    "own": pair_trees.draw_own,
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(("form", "tolerance"), [("coco", 1e-12), ("yolo", 1e-5)])
def test_coco_and_yolo_and_back(tmp_path, monkeypatch, name, form, tolerance):
    drawn = SETS[name](tmp_path / "set")
    data, root = (drawn, None) if name == "own" else (name, drawn)
    where = [] if root is None else ["--data-root", root]
    run(monkeypatch, data, *where, "--to", form, "--out", tmp_path / "a")
    other = {"coco": "yolo", "yolo": "coco"}[form]
    run(monkeypatch, tmp_path / "a/pairs.json", "--to", other, "--out", tmp_path / "b")
    for split in ("train", "test"):
        before = open_pairs(str(data), root, split)
        assert_equal_sets(before, open_pairs(str(tmp_path / "a/pairs.json"), None, split), tolerance)
        after = open_pairs(str(tmp_path / "b/pairs.json"), None, split)
        assert_equal_sets(before, after, 1e-5)
        for frame_id in before.frames:
            for modality in ("visible", "lwir"):
                path = before.images[frame_id][modality]
                assert path.read_bytes() == after.images[frame_id][modality].read_bytes()


@pytest.mark.parametrize("form", ["coco", "yolo", "kaist"])
def test_kaist_and_back(demo_root, tmp_path, monkeypatch, form):
    """KAIST's layout, directly and through another format; frame ids stay the same."""
    run(monkeypatch, "kaist", "--data-root", demo_root, "--to", form, "--out", tmp_path / "a")
    data = ["kaist", "--data-root", tmp_path / "a"] if form == "kaist" else [tmp_path / "a/pairs.json"]
    run(monkeypatch, *data, "--to", "kaist", "--out", tmp_path / "b")
    for split in ("train", "test"):
        before, after = (open_pairs("kaist", root, split) for root in (demo_root, tmp_path / "b"))
        assert_equal_sets(before, after, 1e-5)
        for frame_id in before.frames:
            if form != "yolo":  # which has no occlusion
                np.testing.assert_array_equal(before.read(frame_id).occlusion, after.read(frame_id).occlusion)


def test_image_ids_of_a_written_json_follow_the_order_of_reading(tmp_path, monkeypatch):
    """Whatever the order of the list, so that the numbers in a result file mean the same frames."""
    path = pair_trees.draw_own(tmp_path / "set", list="list.txt")
    pair_trees.write(tmp_path / "set/list.txt", "002\n000\n003\n")
    run(monkeypatch, path, "--to", "coco", "--out", tmp_path / "out", "--split", "test")
    frames = open_pairs(str(tmp_path / "out/pairs.json"), None, "test").frames
    assert frames == ("000", "002", "003")
    images = json.loads((tmp_path / "out/annotations/test.json").read_text())["images"]
    names = {image["id"]: image["file_name"] for image in images}
    assert [names[i] for i in range(3)] == [f"{frame}.png" for frame in frames]


def test_frames_of_any_size_become_a_kaist_root(tmp_path, monkeypatch, capsys):
    """What train.py reads from it: scaled pixels, and boxes scaled alike."""
    path = pair_trees.draw_own(tmp_path / "a,b", "coco", size=(160, 120), deep=True)
    run(monkeypatch, path, "--to", "kaist", "--out", tmp_path / "out")
    output = capsys.readouterr().out
    assert "are scaled to 0 to 255, others are clipped" in output
    assert "train: 4 frames, 4 persons, 4 ignored objects" in output
    root = tmp_path / "out"
    ids = read_image_list(root / "imageSets/train-all.txt")
    assert ids == [f"set00/V000/I0000{i}" for i in range(4)]
    assert read_image_list(root / "imageSets/test-all.txt")[0] == "set06/V000/I00000"
    check_images(root, ids, "early")
    objects = open_annotations(root, "auto", "lwir").read(ids[1])
    factor = np.array([640 / 160, 512 / 120] * 2)
    np.testing.assert_allclose(objects.boxes, np.array([(25, 30, 20, 50), (80, 40, 16, 40)]) * factor)
    assert objects.is_person.tolist() == [True, False]
    frame = read_frame(root, ids[1], "early").astype(int)
    x, y, w, h = (objects.boxes[0]).round().astype(int)
    inside, beside = frame[y + 20 : y + h - 20, x + 20 : x + w - 20], frame[y + 20 : y + h - 20, :60]
    assert (inside.mean((0, 1)) > beside.mean((0, 1)) + 60).all()  # in both modalities
    names = list(csv.reader((root / "names.csv").open()))
    files = [f"{tmp_path}/a,b/{modality}/train/001.png" for modality in ("colour", "thermal")]
    assert names[2] == ["set00/V000/I00001", "train", *files]


def test_lwir_of_16_bits_is_scaled_by_the_training_frames_whatever_is_written(tmp_path, monkeypatch, capsys):
    path = pair_trees.draw_own(tmp_path / "set", deep=True)
    for i in range(4):
        test = tmp_path / f"set/thermal/test/00{i}.png"
        Image.fromarray(np.array(Image.open(test)) + np.uint16(3000)).save(test)
    low, high = find_lwir_range(open_pairs(str(path), None, "train"))
    for i, splits in enumerate((["test", "train"], ["test"], ["train"])):
        run(monkeypatch, path, "--to", "kaist", "--out", tmp_path / f"{i}", "--split", *splits)
        assert f"LWIR values {low:g} to {high:g} are scaled to 0 to 255" in capsys.readouterr().out


def test_a_set_of_8_bits_is_written_without_its_training_frames(tmp_path, monkeypatch):
    path = pair_trees.draw_own(tmp_path / "set", n=1)
    (tmp_path / "set/colour/train/000.png").unlink()
    run(monkeypatch, path, "--to", "kaist", "--out", tmp_path / "out", "--split", "test")
    assert read_image_list(tmp_path / "out/imageSets/test-all.txt") == ["set06/V000/I00000"]


def test_frames_of_kaists_size_are_not_encoded_again(tmp_path, monkeypatch):
    drawn = pair_trees.draw_flir(tmp_path / "set")
    run(monkeypatch, "flir", "--data-root", drawn, "--to", "kaist", "--out", tmp_path / "out")
    copy = image_path(tmp_path / "out", "set06/V000/I00000", "lwir")
    assert copy.read_bytes() == (drawn / "JPEGImages/FLIR_08863_PreviewData.jpeg").read_bytes()


def test_files_for_ultralytics(tmp_path, monkeypatch):
    path = pair_trees.draw_own(tmp_path / "set", "voc")
    run(monkeypatch, path, "--to", "yolo", "--out", tmp_path / "out", "--split", "train")
    text = (tmp_path / "out/data.yaml").read_text()
    assert text == 'path: .\ntrain: images/train\nnames: ["person", "rider"]\n'
    line = (tmp_path / "out/labels/train/000.txt").read_text().splitlines()[0]
    assert [float(v) for v in line.split()] == pytest.approx([0, 30 / 160, 55 / 120, 20 / 160, 50 / 120])


def test_bad_sets_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    path = pair_trees.draw_own(tmp_path / "set")
    with pytest.raises(InputError, match="this is not an empty folder"):
        run(monkeypatch, path, "--to", "coco", "--out", tmp_path / "set")
    content = json.loads(path.read_text())
    content |= {key: content[key].replace("{split}", "train") for key in ("visible", "lwir", "labels")}
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="4 frames are both in the training and the test set; separate them"):
        run(monkeypatch, path, "--to", "coco", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    Image.new("L", (8, 8)).save(tmp_path / "set/thermal/train/000.png")
    with pytest.raises(InputError, match="it is 8x8, its visible image 160x120"):
        run(monkeypatch, path, "--to", "kaist", "--out", tmp_path / "out", "--split", "train")
