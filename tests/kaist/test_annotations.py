"""KAIST's image lists and annotations in every form, and the messages for invalid ones."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from kaist.annotations import (
    image_path,
    open_annotations,
    open_test_annotations,
    read_image_list,
    scene,
    time_of_day,
)
from kaist.files import InputError
from kaist.labels import json_objects
from kaist.miss_rate import evaluate, load_ground_truth
from kaist.results import read_detections
from kaist.sources import find_kaist

FRAME = "set06/V001/I00019"
BBGT = """% bbGt version=3
person 10 20 30 60 0 0 0 0 0 0 0
people 100 120 80 70 1 0 0 0 0 0 0
person? 5 6 7 8 2 0 0 0 0 1 0
"""
XML = """<annotation>
  <object><name>person</name><bndbox><x>10</x><y>20</y><w>30</w><h>60</h></bndbox>
    <occlusion>0</occlusion></object>
  <object><name>people</name><bndbox><x>100</x><y>120</y><w>80</w><h>70</h></bndbox>
    <occlusion>1</occlusion></object>
</annotation>
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def make_json(path, annotations, frames=(FRAME,)):
    images = [{"id": i, "im_name": f, "height": 512, "width": 640} for i, f in enumerate(frames)]
    items = [
        {
            "id": i,
            "image_id": image,
            "category_id": 1,
            "bbox": box,
            "height": box[3],
            "occlusion": occlusion,
            "ignore": ignore,
        }
        for i, (image, box, occlusion, ignore) in enumerate(annotations)
    ]
    categories = [{"id": 0, "name": "__ignore__"}, {"id": 1, "name": "person"}]
    content = {"images": images, "annotations": items, "categories": categories}
    return write(path, json.dumps(content, indent=1))


def test_time_of_day_and_scene_follow_from_the_set():
    day = [n for n in range(12) if time_of_day(f"set{n:02d}/V000/I00000") == "day"]
    assert day == [0, 1, 2, 6, 7, 8]
    scenes = [scene(f"set{n:02d}/V000/I00000") for n in range(12)]
    assert scenes == ["campus", "road", "downtown"] * 4


def test_image_path():
    path = image_path(Path("root"), FRAME, "lwir")
    assert path == Path("root/images/set06/V001/lwir/I00019.jpg")


def test_image_list(tmp_path):
    path = write(tmp_path / "list.txt", f"\ufeff{FRAME}\r\n\r\nset00/V000/I00001\r\n")
    assert read_image_list(path) == [FRAME, "set00/V000/I00001"]


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        (f"{FRAME}\nset6/V1/I19\n", 2, "frame id"),
        (f"{FRAME}\n{FRAME}.jpg\n", 2, "frame id"),
        (f"{FRAME}\n\n{FRAME}\n", 3, "already"),
        ("set12/V000/I00000\n", 1, "frame id"),
        ("\n", None, "empty"),
    ],
)
def test_invalid_image_lists_are_reported(tmp_path, text, line, word):
    path = write(tmp_path / "list.txt", text)
    with pytest.raises(InputError, match=word) as error:
        read_image_list(path)
    assert f"{path}:{line}:" in str(error.value) if line else str(path) in str(error.value)


def test_a_missing_image_list_is_reported_with_the_existing_ones(tmp_path):
    write(tmp_path / "test-all-20.txt", FRAME)
    with pytest.raises(InputError, match="test-all-20.txt"):
        read_image_list(tmp_path / "test-all.txt")


def check_objects(objects, n):
    boxes = [[10, 20, 30, 60], [100, 120, 80, 70], [5, 6, 7, 8]]
    np.testing.assert_array_equal(objects.boxes, boxes[:n])
    assert objects.boxes.dtype == np.float64 and objects.boxes.shape == (n, 4)
    assert objects.labels == ("person", "people", "person?")[:n]
    assert objects.occlusion.tolist() == [0, 1, 2][:n] and objects.occlusion.dtype == np.int64


def test_every_form_is_found_below_a_root(tmp_path):
    name = f"{FRAME}.txt"
    write(tmp_path / "annotations_paired/set06/V001/lwir/I00019.txt", BBGT)
    visible = BBGT.replace("10 20", "9 9")
    write(tmp_path / "annotations_paired/set06/V001/visible/I00019.txt", visible)
    make_json(tmp_path / "KAIST_annotation.json", [(0, [10, 20, 30, 60], 0, 0)])
    assert open_annotations(tmp_path).form == "paired"
    write(tmp_path / f"annotations-xml-new/{FRAME}.xml", XML)
    assert open_annotations(tmp_path).form == "xml"
    write(tmp_path / f"annotations-xml-new-sanitized/{FRAME}.xml", XML)
    assert open_annotations(tmp_path).form == "xml-sanitized"
    write(tmp_path / "annotations" / name, BBGT)
    assert open_annotations(tmp_path).form == "bbgt"

    check_objects(open_annotations(tmp_path).read(FRAME), 3)
    assert open_annotations(tmp_path).read(FRAME).ignore.tolist() == [False, False, True]
    check_objects(open_annotations(tmp_path, "xml").read(FRAME), 2)
    check_objects(open_annotations(tmp_path, "xml-sanitized").read(FRAME), 2)
    check_objects(open_annotations(tmp_path, "paired").read(FRAME), 3)
    visible = open_annotations(tmp_path, "paired", "visible").read(FRAME)
    assert visible.boxes[0].tolist() == [9, 9, 30, 60]
    annotations = open_annotations(tmp_path, "json")
    assert annotations.frames == (FRAME,)
    assert annotations.path(FRAME) == str(tmp_path / "KAIST_annotation.json")
    check_objects(annotations.read(FRAME), 1)


def test_flat_names_and_single_folders(tmp_path):
    write(tmp_path / "dump" / f"{FRAME.replace('/', '_')}.txt", BBGT)
    annotations = open_annotations(tmp_path / "dump")
    assert annotations.form == "bbgt" and annotations.frames is None
    check_objects(annotations.read(FRAME), 3)
    write(tmp_path / "annotations-xml-new" / f"{FRAME}.xml", XML)
    check_objects(open_annotations(tmp_path / "annotations-xml-new").read(FRAME), 2)


def test_empty_frame(tmp_path):
    write(tmp_path / f"annotations/{FRAME}.txt", "% bbGt version=3\n")
    objects = open_annotations(tmp_path).read(FRAME)
    assert objects.boxes.shape == (0, 4) and objects.labels == () and len(objects.ignore) == 0


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("", 1, "header"),
        ("person 1 2 3 4 0 0 0 0 0 0 0\n", 1, "header"),
        ("% bbGt version=3\nperson 1 2 3\n", 2, "columns"),
        ("% bbGt version=3\n\nperson 1 x 3 4 0 0 0 0 0 0 0\n", 3, "'x'"),
        ("% bbGt version=3\nperson 1 2 nan 4 0 0 0 0 0 0 0\n", 2, "positive"),
        ("% bbGt version=3\nperson inf 2 3 4 0 0 0 0 0 0 0\n", 2, "box of pixels"),
        ("% bbGt version=3\nperson 1 2 0 4 0 0 0 0 0 0 0\n", 2, "positive"),
        ("% bbGt version=3\nperson 1 2 3 -4 0 0 0 0 0 0 0\n", 2, "positive"),
        ("% bbGt version=3\nperson 1 2 3 4 3 0 0 0 0 0 0\n", 2, "occlusion"),
    ],
)
def test_invalid_bbgt_is_reported(tmp_path, text, line, word):
    path = write(tmp_path / f"annotations/{FRAME}.txt", text)
    with pytest.raises(InputError, match=word) as error:
        open_annotations(tmp_path).read(FRAME)
    assert f"{path}:{line}: " in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("</object>", "", "broken XML"),
        ("<name>person</name>", "", "name"),
        ("<w>30</w>", "", "bndbox"),
        ("<w>30</w>", "<w></w>", "not a number"),
        ("<w>30</w>", "<w>-3</w>", "positive"),
        ("<occlusion>0", "<occlusion>7", "occlusion"),
    ],
)
def test_invalid_xml_is_reported(tmp_path, old, new, word):
    path = write(tmp_path / f"annotations-xml-new/{FRAME}.xml", XML.replace(old, new, 1))
    with pytest.raises(InputError, match=word) as error:
        open_annotations(tmp_path).read(FRAME)
    starts = [i for i, line in enumerate(XML.splitlines(), 1) if "<object>" in line]
    assert error.value.file == path and (error.value.line == starts[0] or word == "broken XML")


def test_the_line_of_the_second_object_is_reported(tmp_path):
    text = XML.replace("<h>70</h>", "<h>7_0</h>")
    write(tmp_path / f"annotations-xml-new/{FRAME}.xml", text)
    with pytest.raises(InputError, match=rf"{FRAME}.xml:4: '7_0' is not a number"):
        open_annotations(tmp_path).read(FRAME)


def test_an_xml_with_entities_is_refused_before_parsing(tmp_path):
    bomb = '<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx"><!ENTITY y "&x;&x;">]>\n' + XML
    write(tmp_path / f"annotations-xml-new/{FRAME}.xml", bomb)
    with pytest.raises(InputError, match=rf"{FRAME}.xml:1: XML with a DOCTYPE"):
        open_annotations(tmp_path).read(FRAME)
    write(
        tmp_path / f"annotations-xml-new/{FRAME}.xml",
        XML.replace("<annotation>", "<annotation><!-- <!DOCTYPE -->"),
    )
    check_objects(open_annotations(tmp_path).read(FRAME), 2)


def test_another_xml_is_refused(tmp_path):
    write(tmp_path / f"annotations-xml-new/{FRAME}.xml", "<html><body>404</body></html>")
    with pytest.raises(InputError, match=r"\.xml:1: <html> is not a KAIST annotation"):
        open_annotations(tmp_path).read(FRAME)


def test_a_roots_json_is_preferred_for_evaluation(tmp_path):
    write(tmp_path / f"annotations/{FRAME}.txt", "% bbGt version=3\n")
    make_json(tmp_path / "KAIST_annotation.json", [(0, [1, 2, 30, 40], 0, 0)])
    frames = open_annotations(tmp_path, "json").frames
    assert open_test_annotations(tmp_path, frames).form == "json"
    assert open_test_annotations(tmp_path, None).form == "json"
    assert open_test_annotations(tmp_path, ["set00/V000/I00001"]).form == "bbgt"


def test_invalid_json_is_reported(tmp_path):
    path = tmp_path / "a.json"
    for annotations, word in (
        ([(0, [1, 2, 3, 4], 0, 0), (0, [1, 2, -3, 4], 0, 0)], "annotation 1 .*positive"),
        ([(0, [1, 2, 3, 4], 5, 0)], "annotation 0 .*occlusion 5"),
        ([(7, [1, 2, 3, 4], 0, 0)], "7"),
        ([(0, [1, 2, 3, 4], 0, "0")], "annotation 0 .*ignore is '0', not 0, 1, true or false"),
        ([(0, [1, 2, 3, 4], 0, 0), (0, [1, 2, 3, 4], 0, None)], "annotation 1 .*ignore is None"),
    ):
        with pytest.raises(InputError, match=word):
            open_annotations(make_json(path, annotations))
    for frames in ((FRAME, FRAME), ("nonsense",)):
        with pytest.raises(InputError, match="im_name"):
            open_annotations(make_json(path, [], frames))
    for text, word in (('{"images": [}', "a.json:1: broken JSON"), ("[]", "not a KAIST")):
        with pytest.raises(InputError, match=word):
            open_annotations(write(path, text))


STRANGE = [None, "0", "", [], {}, float("nan"), 1e9, -1, 5, 0.5, 10**400]
SIDES = [None, "4", True, [], {}, float("nan"), 1e9, -1, 0, 10**400]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("category_id", [*STRANGE, 2]),
        ("bbox", [*STRANGE, [1, 2, 3], [1, 2, 3, 4, 5], *([1, 2, 3, side] for side in SIDES)]),
        ("occlusion", STRANGE),
        ("ignore", STRANGE),
    ],
)
def test_an_invalid_value_of_a_json_object_is_refused(key, values):
    item = {"category_id": 1, "bbox": [1, 2, 3, 4.5], "occlusion": 1, "ignore": True}
    content = {"images": [{"id": 0, "im_name": FRAME}], "annotations": [item | {"image_id": 0}] * 4}
    content["categories"] = [{"id": 1, "name": "person"}, {"id": 2, "name": 7}]
    [rows] = json_objects(content, "a.json", None).values()
    assert rows[3] == ("person", [1, 2, 3, 4.5], 1, True, 3)
    for value in values:
        content["annotations"][3] = item | {"image_id": 0, key: value}
        with pytest.raises(InputError, match="a.json: annotation 3 of the list"):
            json_objects(content, "a.json", None)


@pytest.mark.parametrize("form", ["bbgt", "flat", "xml", "paired", "json"])
def test_reading_many_frames_equals_reading_each(tmp_path, form):
    rng = np.random.default_rng(0)
    frames = [f"set0{i % 3}/V00{i % 2}/I{i:05d}" for i in range(12)]
    layout = {"paired": "{0}/lwir/{1}.txt", "xml": "{0}/{1}.xml", "flat": "{2}.txt"}.get(form, "{0}/{1}.txt")
    found = []
    for k, frame_id in enumerate(frames):
        rows = [rng.integers((1, 1, 9, 9, 0), (99, 99, 99, 99, 3)).tolist() for _ in range(rng.integers(4))]
        found += [(k, row[:4], row[4], int(row[0]) % 2) for row in rows]
        if form == "xml":
            text = "".join(
                f"<object><name>person</name><bndbox><x>{x}</x><y>{y}</y><w>{w}</w><h>{h}</h></bndbox>"
                f"<occlusion>{o}</occlusion></object>"
                for x, y, w, h, o in rows
            )
            text = f"<annotation>{text}</annotation>"
        else:
            lines = (f"person {x} {y} {w} {h} {o} 0 0 0 0 0 0\n" for x, y, w, h, o in rows)
            text = "% bbGt version=3\n" + "".join(lines)
        write(tmp_path / "set" / layout.format(*frame_id.rsplit("/", 1), frame_id.replace("/", "_")), text)
    source = tmp_path / "set"
    if form == "json":
        source = make_json(tmp_path / "a.json", rng.permutation(np.array(found, object)).tolist(), frames)
    annotations = open_annotations(source)
    assert annotations.form == ("bbgt" if form == "flat" else form)
    order = [frames[i] for i in rng.permutation(12)[:9]]
    objects, counts = annotations.read_all(order)
    alone = [annotations.read(frame_id) for frame_id in order]
    assert counts.tolist() == [len(o.boxes) for o in alone] and counts.dtype == np.int64
    assert objects.labels == sum((o.labels for o in alone), ())
    for part in ("boxes", "occlusion", "ignore"):
        expected = np.concatenate([getattr(o, part) for o in alone])
        np.testing.assert_array_equal(getattr(objects, part), expected)
        assert getattr(objects, part).dtype == expected.dtype
    boxes = sorted(box for k, box, *_ in found if frames[k] in order)
    assert sorted(objects.boxes.tolist()) == boxes


def test_a_nested_file_is_read_before_a_flat_one(tmp_path):
    write(tmp_path / f"{FRAME.replace('/', '_')}.txt", BBGT)
    annotations = open_annotations(tmp_path)
    check_objects(annotations.read(FRAME), 3)
    write(tmp_path / f"{FRAME}.txt", "% bbGt version=3\n")
    assert len(annotations.read(FRAME).boxes) == 0


def test_missing_annotations_are_reported(tmp_path):
    with pytest.raises(InputError, match="annotations-xml-new-sanitized.*KAIST_annotation.json"):
        open_annotations(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        open_annotations(tmp_path / "nowhere")
    write(tmp_path / f"annotations/{FRAME}.txt", BBGT)
    with pytest.raises(InputError, match="annotations-xml-new"):
        open_annotations(tmp_path, "xml")
    with pytest.raises(InputError, match="not a form of annotation"):
        open_annotations(tmp_path, "yaml")
    with pytest.raises(InputError, match="I00020.txt"):
        open_annotations(tmp_path).read("set06/V001/I00020")
    path = make_json(tmp_path / "a.json", [])
    with pytest.raises(InputError, match="set06/V001/I00020"):
        open_annotations(path).read("set06/V001/I00020")


def test_ground_truth_ignores_everything_except_persons(tmp_path):
    write(tmp_path / f"annotations/{FRAME}.txt", BBGT)
    truth = load_ground_truth(tmp_path, [FRAME])
    assert truth.ignore.tolist() == [False, True, True] and truth.frame_idxs.tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="--image-list"):
        load_ground_truth(tmp_path)


def test_forms_agree_on_real_files(reference):
    root = reference / "mini"
    frames = read_image_list(root / "imageSets" / "pairs.txt")
    text, xml = open_annotations(root), open_annotations(root, "xml")
    assert text.form == "bbgt"
    for frame_id in frames:
        ours, theirs = text.read(frame_id), xml.read(frame_id)
        np.testing.assert_array_equal(ours.boxes, theirs.boxes)
        np.testing.assert_array_equal(ours.occlusion, theirs.occlusion)
        assert ours.labels == theirs.labels


def test_text_annotations_of_the_test_set_give_the_same_numbers_as_the_json(reference, tmp_path):
    folder = reference / "annotations"
    with tarfile.open(folder / "test-all-20_improved_bbGt_txt.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    frames = read_image_list(reference / "imageSets" / "test-all-20.txt")
    expected = load_ground_truth(folder / "KAIST_annotation.json")
    truth = load_ground_truth(tmp_path / "annotations_KAIST_test_set", frames)
    assert truth.frames == expected.frames and expected.ignore.sum() == 864
    for field in ("frame_idxs", "boxes", "occlusion", "ignore"):
        np.testing.assert_array_equal(getattr(truth, field), getattr(expected, field))
    detections = read_detections(reference / "results" / "MBNet_result.txt", frames)
    ours, theirs = evaluate(truth, detections), evaluate(expected, detections)
    assert [r.miss_rate for r in ours.values()] == [r.miss_rate for r in theirs.values()]


def test_image_lists_of_the_benchmark(reference):
    counts = {"train-all-02": 25086, "test-all-20": 2252, "test-day-20": 1455, "test-night-20": 797}
    for name, count in counts.items():
        assert len(read_image_list(reference / "imageSets" / f"{name}.txt")) == count


@pytest.fixture
def full_kaist(demo_root, tmp_path):
    """A demo set with the file names of the full KAIST."""
    root = tmp_path / "full"
    shutil.copytree(demo_root, root)
    for old, new in (("train-all", "train-all-02"), ("test-all", "test-all-20")):
        (root / f"imageSets/{old}.txt").rename(root / f"imageSets/{new}.txt")
    return root


def test_a_full_kaist_is_found_from_its_root(full_kaist):
    parts = find_kaist(full_kaist)
    assert parts == {
        "data_root": str(full_kaist),
        "train_list": "imageSets/train-all-02.txt",
        "annotations": "bbgt",
        "test_list": "imageSets/test-all-20.txt",
        "test_annotations": "KAIST_annotation.json",
    }
    assert find_kaist(full_kaist, splits=["test"]).keys() == {"data_root", "test_list", "test_annotations"}


def test_the_form_that_annotates_every_frame_is_used(full_kaist):
    """annotations/ comes first, but does not have all training frames."""
    xml = full_kaist / "annotations-xml-new"
    for path in (full_kaist / "annotations").rglob("*.txt"):
        beside = xml / path.relative_to(full_kaist / "annotations").with_suffix(".xml")
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text("<annotation></annotation>")
    assert find_kaist(full_kaist)["annotations"] == "bbgt"
    next((full_kaist / "annotations/set03").rglob("*.txt")).unlink()
    assert find_kaist(full_kaist)["annotations"] == "xml"


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("images", "no images/"),
        ("imageSets/train-all-02.txt", "no imageSets/train-all-02.txt"),
        ("imageSets/test-all-20.txt", r"no imageSets/test-all-20.txt.* \(eval.py: --image-list\)"),
        ("KAIST_annotation.json", "no KAIST_annotation.json"),
        ("annotations/set03", r"all 12 frames to train on \(annotations/ 10, "),
    ],
)
def test_a_missing_part_of_a_full_kaist_is_reported(lost, named, full_kaist):
    (full_kaist / lost).rename(full_kaist / "lost")
    with pytest.raises(InputError, match=named):
        find_kaist(full_kaist)


def test_a_part_that_the_user_has_set_may_be_missing(full_kaist):
    (full_kaist / "imageSets/train-all-02.txt").rename(full_kaist / "mine.txt")
    (full_kaist / "KAIST_annotation.json").unlink()
    given = {"train_list": "mine.txt", "test_annotations": "bbgt"}
    parts = find_kaist(full_kaist, given)
    assert (parts["train_list"], parts["annotations"]) == ("mine.txt", "bbgt")
    assert "test_annotations" not in parts


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system")
def test_a_pipe_in_place_of_the_improved_annotations_is_reported(tmp_path, demo_root):
    """The other annotations of the root would give other numbers."""
    root = shutil.copytree(demo_root, tmp_path / "root", ignore=shutil.ignore_patterns("images", "*.json"))
    os.mkfifo(root / "KAIST_annotation.json")
    for source in (root, root / "KAIST_annotation.json"):
        with pytest.raises(InputError, match="a pipe or a device|no such folder or file"):
            open_test_annotations(source, ["set06/V000/I00000"])
