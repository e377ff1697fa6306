"""Sets of pairs other than KAIST: every layout and form of label gives the expected boxes."""

import json

import numpy as np
import pytest
from PIL import Image

from kaist.files import InputError
from kaist.images import load_image
from kaist.labels import ObjectRow, coco_content, read_json, read_labels, yolo_text
from kaist.pair_sets import find_lwir_range, kaist_ids, open_pairs
from tests import pair_trees
from tests.pair_trees import draw_own, write


def boxes(pairs, frame_id):
    """(label, ignored, xywh) of a frame's objects."""
    own = pairs.read(frame_id)
    rows = zip(own.labels, own.ignore.tolist(), own.boxes.round(3).tolist(), strict=True)
    return [(label, ignored, tuple(box)) for label, ignored, box in rows]


def refusal(*arguments):
    with pytest.raises(InputError) as caught:
        open_pairs(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_llvip(tmp_path):
    root = pair_trees.draw_llvip(tmp_path)
    train, test = (open_pairs("llvip", root, split) for split in ("train", "test"))
    assert train.frames == ("010001", "010002", "010003") and test.frames[0] == "020001"
    assert boxes(train, "010002") == [("person", False, (50, 60, 30, 90))]
    assert train.sizes["010001"] == (320, 256)
    assert train.images["010001"]["lwir"] == root / "infrared/train/010001.jpg"
    assert kaist_ids(test, "test")["020002"] == "set09/V000/I00001"


def test_flir_aligned(tmp_path):
    root = pair_trees.draw_flir(tmp_path)
    train, test = (open_pairs("flir", root, split) for split in ("train", "test"))
    assert train.frames == ("FLIR_00002", "FLIR_00003", "FLIR_00008")
    assert test.frames == ("FLIR_08863",)
    assert boxes(train, "FLIR_00003") == [("person", False, (101, 200, 40, 100))]  # cars are dropped
    assert test.images["FLIR_08863"]["lwir"].name == "FLIR_08863_PreviewData.jpeg"


def test_cvc14(tmp_path, capsys):
    root = pair_trees.draw_cvc14(tmp_path)
    train, test = (open_pairs("cvc14", root, split) for split in ("train", "test"))
    assert len(train.frames) == 5 and len(test.frames) == 6
    assert "1 of 6 frames lack a modality and are left out" in capsys.readouterr().out
    name = "Night/2014_05_01_13_01_05"
    assert boxes(test, name) == [("person", False, (190, 189.5, 40, 101))]  # centre (210, 240)
    assert test.sizes[name] == (640, 471)
    assert test.time_of_day(name) == "night" and test.time_of_day(test.frames[0]) == "day"
    assert kaist_ids(test, "test")[name] == "set09/V000/I00001"


def test_kaist_by_name(demo_root):
    pairs = open_pairs("kaist", demo_root, "test")
    assert len(pairs.frames) == 6 and all(i.startswith("set") for i in pairs.frames)
    assert set(kaist_ids(pairs, "test").values()) == set(pairs.frames)


@pytest.mark.parametrize("form", ["yolo", "voc", "coco"])
def test_a_custom_set_in_each_form(tmp_path, form):
    """All forms of labels give the same pairs; the form is guessed from the files."""
    pairs = open_pairs(str(draw_own(tmp_path, form)), None, "train")
    assert pairs.frames == ("000", "001", "002", "003")
    person, rider = boxes(pairs, "001")
    assert person == ("person", False, (25, 30, 20, 50))
    assert rider == ("rider", True, (80, 40, 16, 40))


def test_kaist_text_labels_of_a_custom_set(tmp_path):
    path = draw_own(tmp_path, "voc", labels="text")
    write(tmp_path / "text/000.txt", "% bbGt version=3\nperson 20 30 20 50 2 0 0 0 0 0 0\n")
    for i in (1, 2, 3):
        write(tmp_path / f"text/00{i}.txt", "% bbGt version=3\n")
    pairs = open_pairs(str(path), None, "train")
    assert boxes(pairs, "000") == [("person", False, (20, 30, 20, 50))]
    assert pairs.read("000").occlusion.tolist() == [2] and boxes(pairs, "003") == []


def test_a_list_may_have_ids_or_paths(tmp_path):
    path = draw_own(tmp_path, list="{split}.txt")
    write(tmp_path / "train.txt", "002\ncolour/train/000.png\n\nthermal/train/003\n")
    assert open_pairs(str(path), None, "train").frames == ("002", "000", "003")
    write(tmp_path / "train.txt", "000\n001.png\n000.png\n")
    assert "train.txt:3: 000.png is already in line 1" in refusal(str(path), None, "train")
    write(tmp_path / "train.txt", "000\n009\n")
    assert "train.txt:2: '009' is not a frame with both images" in refusal(str(path), None, "train")


def test_a_listed_frame_without_a_modality_is_refused_and_not_replaced_by_another(tmp_path):
    path = draw_own(tmp_path, n=1, visible="colour", lwir="thermal", labels="labels", list="list.txt")
    for frame in ("day/001", "night/001", "night/002"):
        pair_trees.draw_pair(tmp_path / f"colour/{frame}.png", tmp_path / f"thermal/{frame}.png", (160, 120))
        write(tmp_path / f"labels/{frame}.txt", "")
    (tmp_path / "thermal/night/001.png").unlink()
    for name in ("night/001", "001", "dusk/001", "colour/night/001.png"):
        write(tmp_path / "list.txt", f"night/002\n{name}\n")
        assert f"list.txt:2: '{name}' is not a frame with both images" in refusal(str(path), None, "train")
    for name in (
        "002",
        "./night/002.png",
        f"{tmp_path}/thermal/night/002",
        f"{tmp_path.name}/colour/night/002",
    ):
        write(tmp_path / "list.txt", f"{name}\nday/001\n")
        assert open_pairs(str(path), None, "train").frames == ("night/002", "day/001")


def test_a_list_of_image_paths_with_a_description_in_another_folder(tmp_path):
    for video in ("a", "b"):
        draw_own(tmp_path / "images" / video, n=1)
    names = {"visible": "colour", "lwir": "thermal", "labels": "labels"}
    content = {key: str(tmp_path / "images/*" / name / "train/*.*") for key, name in names.items()}
    content |= {"names": ["person", "rider", "dog"], "ignore": ["rider", "dog"], "list": "{split}.txt"}
    write(tmp_path / "own/pairs.json", json.dumps(content))
    lines = (f"{tmp_path}/images/{video}/colour/train/000.png\n" for video in ("b", "a"))
    write(tmp_path / "own/train.txt", "".join(lines))
    assert open_pairs(str(tmp_path / "own/pairs.json"), None, "train").frames == ("b/000", "a/000")


@pytest.mark.parametrize("form", ["yolo", "coco"])
def test_paths_are_relative_to_the_description_in_any_working_directory(tmp_path, monkeypatch, form):
    draw_own(tmp_path / "sets/mine", form, list="{split}.txt")
    write(tmp_path / "sets/mine/train.txt", "002\n000\n")
    for folder, name in (
        ("sets/mine", "pairs.json"),
        ("sets", "mine/pairs.json"),
        ("a/b", "../../sets/mine/pairs.json"),
    ):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        pairs = open_pairs(name, None, "train")
        assert pairs.frames == ("002", "000") and boxes(pairs, "000")[0][2] == (20, 30, 20, 50)
        assert load_image(pairs.images["002"]["lwir"], "lwir").size == (160, 120)


def test_only_yolo_frames_may_lack_a_label_file(tmp_path, capsys):
    path = draw_own(tmp_path / "yolo")
    (tmp_path / "yolo/labels/train/002.txt").unlink()
    assert boxes(open_pairs(str(path), None, "train"), "002") == []
    assert "1 of 4 frames have no label file" in capsys.readouterr().out
    path = draw_own(tmp_path / "voc", "voc")
    (tmp_path / "voc/labels/train/002.xml").unlink()
    assert "1 frames have no label file, 002 first" in refusal(str(path), None, "train")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"visibel": "colour"}, "'visibel' is not a key of a description; write visible"),
        ({"person": "person"}, "'person' is not a list of strings"),
        ({"person": ["person", "rider"]}, "pairs.json: 'rider' is in two of person, ignore, drop; keep"),
        ({"ignore": ["*"], "drop": ["*"]}, "pairs.json: '*' is in two of"),
        ({"splits": ["train"]}, "'splits' is not an object of strings"),
        ({"form": "voc"}, "form 'voc' is unknown"),
        ({"visible": "colours/{split}"}, "colours/train: no such folder"),
        ({"lwir": "thermal/{split}/*.tif"}, "no file matches"),
        ({"lwir": "thermal/{split}/0*.png"}, "has an LWIR partner"),
        ({"drop": []}, "labels/train/001.txt:3: class 'dog' is not in the description"),
        ({"names": ["person"]}, "labels/train/000.txt:2: class '1' has no name"),
    ],
)
def test_invalid_descriptions_are_reported(tmp_path, change, words):
    path = draw_own(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert words in refusal(str(path), None, "train")


def test_a_class_in_a_given_list_loses_its_default_role(tmp_path):
    """By default `ignore` has people, and `person` has person."""
    rows = [("person", (9, 9, 9, 40), 0), ("people", (50, 9, 30, 40), 0), ("cyclist", (90, 9, 9, 40), 0)]
    path = draw_own(tmp_path, "voc", n=1)
    write(tmp_path / "labels/train/000.xml", pair_trees.voc((160, 120), rows))
    places = {key: json.loads(path.read_text())[key] for key in ("visible", "lwir", "labels")}
    for roles, expected in (
        ({}, [("person", False), ("people", True), ("cyclist", True)]),
        ({"drop": ["people", "dog"]}, [("person", False), ("cyclist", True)]),
        ({"person": ["people"], "ignore": ["*"]}, [("person", True), ("person", False), ("cyclist", True)]),
        ({"drop": ["person"]}, [("people", True), ("cyclist", True)]),
    ):
        path.write_text(json.dumps(places | roles))
        assert [own[:2] for own in boxes(open_pairs(str(path), None, "train"), "000")] == expected


def test_no_description(tmp_path):
    assert "one of kaist, llvip, flir, cvc14" in refusal("lvip", None, "train")
    assert "needs its folder; set it with --data-root" in refusal("llvip", None, "train")
    write(tmp_path / "pairs.json", '{"visible": "a"}')
    assert "needs visible, lwir and labels" in refusal(str(tmp_path / "pairs.json"), None, "train")


def test_modalities_of_two_sizes(tmp_path):
    path = draw_own(tmp_path)
    Image.new("L", (80, 60)).save(tmp_path / "thermal/train/001.png")
    said = refusal(str(path), None, "train")
    assert "thermal/train/001.png: it is 80x60, its visible image 160x120; register and scale" in said


@pytest.mark.parametrize(
    ("name", "frame_id"),
    [("img", "''"), ("img1 ", "'1 '"), ("img1\x85", r"'1\x85'"), ("img1\udcff", r"'1\udcff'")],
)
def test_an_id_that_cannot_be_a_line_of_a_list_is_refused(tmp_path, name, frame_id):
    """It is empty, ends with a space or a line break, or is not UTF-8."""
    path = draw_own(tmp_path, n=1, visible="a/img*.png", lwir="b/img*.png", labels="c/img*.txt")
    write(tmp_path / f"c/{name}.txt", "0 0.5 0.5 0.1 0.4\n")
    pair_trees.draw_pair(tmp_path / f"a/{name}.png", tmp_path / f"b/{name}.png", (160, 120))
    said = refusal(str(path), None, "train")
    assert f"a/{name}.png: its frame id, {frame_id}, cannot be written to a list of frames; rename" in said


def test_two_files_of_one_frame(tmp_path):
    path = draw_own(tmp_path)
    Image.new("RGB", (160, 120)).save(tmp_path / "colour/train/001.jpg")
    assert "001.png: this file and" in refusal(str(path), None, "train")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 0.5 0.5 0.1", "4 columns where yolo has 5"),
        ("0 80 60 20 50", "are not fractions of the frame"),
        ("0 0.5 0.5 0 0.1", "is not a box of pixels with positive size"),
        ("0 0.5 x 0.1 0.1", "'x' is not a number"),
        ("man 0.5 0.5 0.1 0.1", "class 'man' has no name"),
    ],
)
def test_invalid_yolo_lines_are_reported(tmp_path, line, words):
    path = tmp_path / "a.txt"
    path.write_text(f"\n{line}\n")
    with pytest.raises(InputError, match=r"a\.txt:2: ") as caught:
        read_labels(path, "yolo", (160, 120))
    assert words in str(caught.value)


def test_the_line_of_an_invalid_voc_object_is_reported(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(pair_trees.voc((9, 9), [("person", (1, 2, 3, 4), 1), ("person", (5, 5, -2, 4), 0)]))
    with pytest.raises(InputError, match=r"a\.xml:3: box x=5 y=5 w=-2 h=4 is not a box"):
        read_labels(path, "xml", (9, 9))
    path.write_text(pair_trees.voc((9, 9), [("person", (1, 2, 3, 4), 1)]))
    assert read_labels(path, "xml", (9, 9))[0].ignore  # difficult


def test_an_invalid_coco_json_is_reported(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[]")
    with pytest.raises(InputError, match="not a COCO annotation JSON"):
        read_json(path, kaist=False)
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [{"id": 1, "name": "person"}]}
    crowd = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 1}
    plain = {**crowd, "iscrowd": 0}
    items = [crowd, {**crowd, "ignore": 0}, {**plain, "ignore": 1}, {**plain, "ignore": 0}, plain]
    path.write_text(json.dumps({**content, "annotations": items}))
    assert [row.ignore for row in read_json(path, kaist=False)["a.jpg"]] == [True, True, True, False, False]
    path.write_text(json.dumps({**content, "annotations": [{**crowd, "bbox": [1, 2, 0, 4]}]}))
    with pytest.raises(InputError, match="annotation 0 of the list: box"):
        read_json(path, kaist=False)
    path.write_text(json.dumps({**content, "images": content["images"] * 2, "annotations": []}))
    with pytest.raises(
        InputError, match="image 1 or file_name a.jpg occurs twice; give each image a unique id and name"
    ):
        read_json(path, kaist=False)
    path.write_text(json.dumps({**content, "annotations": [{**crowd, "image_id": 9}]}))
    with pytest.raises(
        InputError, match="annotation 0 has image_id 9, but no image has this id; correct its image_id"
    ):
        read_json(path, kaist=False)


def test_random_boxes_survive_writing_and_reading(tmp_path):
    """Exactly in COCO's format, and up to `YOLO_DECIMALS` in YOLO's."""
    rng = np.random.default_rng(7)
    for trial in range(20):
        size = tuple(rng.integers(200, 4000, 2).tolist())
        n = int(rng.integers(0, 12))
        corner, extent = rng.uniform(-0.2, 0.9, (n, 2)) * size, rng.uniform(0.001, 0.5, (n, 2)) * size
        labels = rng.choice(["person", "people", "dog"], n).tolist()
        rows = [
            ObjectRow(label, [*c, *e], int(rng.integers(3)), label != "person", i)
            for i, (label, c, e) in enumerate(zip(labels, corner, extent, strict=True))
        ]
        path = tmp_path / f"{trial}.json"
        path.write_text(json.dumps(coco_content([("a", size, rows)])))
        assert read_json(path, kaist=False)["a"] == rows
        path = path.with_suffix(".txt")
        names = ["person", "people", "dog"]
        path.write_text(yolo_text(rows, size, names))
        back = read_labels(path, "yolo", size, names)
        assert [row.label for row in back] == labels
        boxes = [np.reshape([row.box for row in some], (-1, 4)) for some in (back, rows)]
        np.testing.assert_allclose(*boxes, rtol=0, atol=1e-8 * max(size))


def test_lwir_of_16_bits_is_scaled_by_percentiles_of_the_training_frames(tmp_path):
    train = open_pairs(str(draw_own(tmp_path, deep=True)), None, "train")
    low, high = find_lwir_range(train)
    values = np.concatenate(
        [np.asarray(Image.open(train.images[i]["lwir"]))[::4, ::4].ravel() for i in train.frames]
    )
    np.testing.assert_allclose((low, high), np.percentile(values, (0.1, 99.9)))
    path = train.images["000"]["lwir"]
    view = np.asarray(load_image(path, "lwir", (low, high))).astype(float)
    expected = ((np.asarray(Image.open(path)).astype(float) - low) / (high - low) * 255).clip(0, 255)
    assert view.shape == (120, 160) and np.abs(view - expected).max() <= 0.51
    with pytest.raises(InputError, match="not an 8-bit image"):
        load_image(path, "lwir")
    with pytest.raises(InputError, match="an 8-bit image, but the training images have more bits"):
        load_image(train.images["000"]["visible"], "lwir", (low, high))


def test_lwir_of_8_bits_has_no_range(tmp_path):
    assert find_lwir_range(open_pairs(str(draw_own(tmp_path)), None, "train")) == (0, 0)
    path = draw_own(tmp_path / "mixed", deep=True)
    Image.new("L", (160, 120)).save(tmp_path / "mixed/thermal/train/001.png")
    with pytest.raises(InputError, match="both 8-bit images and images with more bits"):
        find_lwir_range(open_pairs(str(path), None, "train"))


def test_a_coco_json_of_another_computer_is_matched_by_file_names(tmp_path):
    path = draw_own(tmp_path, "coco")
    before = open_pairs(str(path), None, "train")
    content = json.loads((tmp_path / "labels/train.json").read_text())
    for image in content["images"]:
        image["file_name"] = f"/home/other/pictures/{image['file_name']}"
    (tmp_path / "labels/train.json").write_text(json.dumps(content))
    assert open_pairs(str(path), None, "train").objects == before.objects


def test_one_coco_json_for_both_splits(tmp_path):
    """Frames with equal names are distinguished by their folders, or else refused."""
    path = draw_own(tmp_path, "coco")
    content = json.loads((tmp_path / "labels/train.json").read_text())
    both = {**content, "images": [], "annotations": []}
    for s, split in enumerate(("train", "test")):
        for image in content["images"]:
            image_id = image["id"] + 10 * s
            name = f"colour/{split}/{image['file_name']}"
            both["images"].append({**image, "id": image_id, "file_name": name})
            item = {"image_id": image_id, "category_id": 1, "bbox": [10 + 50 * s, 20, 30, 40]}
            both["annotations"].append(item)
    path.write_text(json.dumps({**json.loads(path.read_text()), "labels": "labels/both.json"}))
    write(tmp_path / "labels/both.json", json.dumps(both))
    for s, split in enumerate(("train", "test")):
        pairs = open_pairs(str(path), None, split)
        assert boxes(pairs, "002") == [("person", False, (10 + 50 * s, 20, 30, 40))]
    of_test = {**both, "images": both["images"][4:], "annotations": both["annotations"][4:]}
    write(tmp_path / "labels/both.json", json.dumps(of_test))
    said = refusal(str(path), None, "train")
    assert "4 frames are not in this file, 000 first; write file_name relative to the description" in said
    for image in both["images"]:
        image["file_name"] = image["file_name"].removeprefix(f"colour/{'test/' * (image['id'] > 9)}")
    write(tmp_path / "labels/both.json", json.dumps(both))
    assert "train/000.png and 000.png are both frame 000" in refusal(str(path), None, "train")
