"""tools.check_data: every kind of fault is found with its name and place, and nothing else."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kaist.annotations import image_path, open_annotations, read_image_list
from kaist.files import InputError
from tests import pair_trees
from tools import check_data
from tools.faults import FAULTS, to_fault

LINE = "person 100 200 30 80 0 0 0 0 0 0 0\n"
HEADER = "% bbGt version=3\n"
SIZE, HUGE = bytes.fromhex("02000280"), bytes.fromhex("75307530")  # 512x640, 30000x30000


@pytest.fixture
def root(demo_root, tmp_path):
    """A demo set with every form of annotation."""
    root = shutil.copytree(demo_root, tmp_path / "kaist-8-bit")
    bbgt = open_annotations(root)
    for name in ("train-all", "test-all"):
        for frame_id in read_image_list(root / f"imageSets/{name}.txt"):
            video, frame = frame_id.rsplit("/", 1)
            for modality in ("visible", "lwir"):
                path = root / "annotations_paired" / video / modality / f"{frame}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(bbgt.path(frame_id), path)
            objects = bbgt.read(frame_id)
            path = root / "annotations-xml-new" / f"{frame_id}.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(xml(frame_id, zip(objects.labels, objects.boxes, strict=True)))
    return root


def xml(frame_id, rows, width=640):
    items = (
        f"<object><name>{label}</name><bndbox><x>{x}</x><y>{y}</y><w>{w}</w><h>{h}</h></bndbox></object>"
        for label, (x, y, w, h) in rows
    )
    return (
        f"<annotation><filename>{frame_id}</filename><size><width>{width}</width><height>512"
        "</height></size>\n" + "\n".join(items) + "</annotation>"
    )


def run(monkeypatch, *arguments):
    """Run the check as `python -m tools.check_data` does; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["check_data.py", *map(str, arguments)])
    try:
        return check_data.main()
    except SystemExit as end:
        return end.code


def test_a_clean_set_has_no_fault(root, tmp_path, monkeypatch, capsys):
    out = tmp_path / "faults.csv"
    out.write_text("fault,file,line,problem\n")  # the result of an earlier check
    train = read_image_list(root / "imageSets/train-all.txt")
    (root / "imageSets/train-half.txt").write_text("\n".join(train[:6]))  # a subset of train-all
    assert run(monkeypatch, root, "--out", out) == 0
    output = capsys.readouterr().out
    assert "18 frames of 5 lists, visible and lwir; annotations bbgt, xml, paired, KAIST_ann" in output
    assert "no fault found" in output and not out.exists()


def plant(root):
    """Plant every kind of fault; return (name, file below the root, line) of each."""
    train = read_image_list(root / "imageSets/train-all.txt")
    test = read_image_list(root / "imageSets/test-all.txt")
    planted = []

    def add(name, path, line=0):
        planted.append((name, str(path.relative_to(root)), line))

    # images
    visible, lwir = ([image_path(root, f, m) for f in train] for m in ("visible", "lwir"))
    visible[0].unlink()
    add("missing-visible", visible[0])
    lwir[1].unlink()
    add("missing-lwir", lwir[1])
    add("misnamed-image", visible[2].rename(visible[2].with_suffix(".bmp")))
    lwir[3].unlink()
    lwir[3].symlink_to("nowhere.jpg")
    add("broken-link", lwir[3])
    visible[4].unlink()
    visible[4].mkdir()
    add("unreadable-file", visible[4])
    lwir[5].write_bytes(b"")
    add("empty-file", lwir[5])
    visible[6].write_bytes(b"no image")
    add("not-an-image", visible[6])
    lwir[7].write_bytes(lwir[7].read_bytes()[:-500])
    add("broken-image", lwir[7])
    Image.open(visible[8]).resize((320, 256)).save(visible[8])
    add("wrong-size", visible[8])
    lwir[9].write_bytes(lwir[9].read_bytes().replace(SIZE, HUGE, 1))
    add("huge-image", lwir[9])
    Image.new("RGB", (640, 512)).save(visible[10])
    add("constant-image", visible[10])
    Image.open(visible[11]).convert("L").save(visible[11])
    add("grey-visible", visible[11])
    visible, lwir = ([image_path(root, f, m) for f in test] for m in ("visible", "lwir"))
    grey = np.asarray(Image.open(lwir[5]).convert("L"), dtype=np.uint16)
    Image.fromarray(257 * grey).save(lwir[5], "PNG")
    add("16-bit-image", lwir[5])
    Image.open(visible[0]).rotate(180).save(lwir[0])
    add("coloured-lwir", lwir[0])
    visible[1].rename(root / "kept")
    lwir[1].rename(visible[1])
    (root / "kept").rename(lwir[1])
    add("swapped-modalities", lwir[1])
    shutil.copy(visible[2], lwir[2])
    add("same-image", lwir[2])
    for source, copy in ((visible[3], visible[4]), (lwir[3], lwir[4])):
        shutil.copy(source, copy)
        add("copied-image", copy)

    # text, XML and paired annotations
    bbgt = [root / "annotations" / f"{frame_id}.txt" for frame_id in train]
    bbgt[0].unlink()
    add("missing-annotation", bbgt[0])
    for path, name, line, text in (
        (bbgt[1], "not-text", 0, b"\xff\xfe\x00"),
        (bbgt[2], "bad-header", 1, LINE + LINE),
        (bbgt[3], "too-few-columns", 2, HEADER + "person 100 200 30 80\n" + LINE),
        (bbgt[4], "not-a-number", 3, HEADER + LINE + LINE.replace("30", "3O")),
        (bbgt[5], "no-area", 2, HEADER + LINE.replace("30", "0")),
        (bbgt[6], "outside-frame", 2, HEADER + LINE.replace("100", "640")),
        (
            bbgt[7],
            "leaves-frame",
            4,
            HEADER + LINE.replace(" ", "?a ", 1) + "\n" + LINE.replace("100", "630"),
        ),
        (bbgt[8], "odd-box", 2, HEADER + LINE.replace("30", "500")),
        (bbgt[9], "repeated-box", 3, HEADER + LINE + LINE.replace("person", "people")),
        (bbgt[10], "unknown-label", 2, HEADER + LINE.replace("person", "persom")),
        (bbgt[11], "unknown-occlusion", 2, HEADER + LINE.replace("80 0", "80 3")),
    ):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        add(name, path, line)
    person = [("person", (100, 200, 30, 80))]
    for i, name, line, text in (
        (0, "broken-xml", 2, xml(train[0], person)[:-3]),
        (1, "incomplete-object", 2, xml(train[1], person).replace("<x>100</x>", "")),
        (2, "contradicting-file", 0, xml(train[3], person)),
        (3, "contradicting-file", 0, xml(train[3], person, width=320)),
        (4, "broken-xml", 1, "<!DOCTYPE x>" + xml(train[4], person)),
        (5, "unknown-label", 3, xml(train[5], [*person, ("dog", (10, 200, 30, 80))])),
    ):
        path = root / "annotations-xml-new" / f"{train[i]}.xml"
        path.write_text(text)
        add(name, path, line)
    for i, text in ((0, HEADER), (1, HEADER + LINE.replace("person", "cyclist"))):
        paths = [paired_path(root, train[i], modality) for modality in ("visible", "lwir")]
        paths[0].write_text(HEADER + LINE)
        paths[1].write_text(text)
        add("unpaired-objects", paths[1])

    # JSON and lists
    path = root / "KAIST_annotation.json"
    content = json.loads(path.read_text())
    items, images = content["annotations"], content["images"]
    items[1]["id"] = items[0]["id"]
    del items[2]["occlusion"]
    items.append({**items[3], "id": 999, "image_id": 999})
    items[4]["ignore"] = "0"
    images[5]["width"] = 320
    images.append({**images[4], "id": 99})
    path.write_text(json.dumps(content))
    for name in (
        "json-repeated-id",
        "incomplete-object",
        "incomplete-object",
        "json-unknown-image",
        "contradicting-file",
        "json-repeated-id",
    ):
        add(name, path)
    path = root / "annotations/KAIST_annotation.json"
    path.write_text("[" * 100_000)
    add("broken-json", path)
    path = root / "imageSets/train-all.txt"
    path.write_text("\n".join([*train, "set00/V000/I00000.jpg", train[0], "set00/V000/I99999"]))
    for name, line in (("list-bad-id", 13), ("list-repeated-id", 14), ("unknown-frame", 15)):
        add(name, path, line)
    path = root / "imageSets/test-all.txt"
    path.write_text("\n".join([*test, train[0]]))
    add("list-overlap", path, 7)
    (root / "imageSets/empty.txt").write_text("\n\n")
    add("list-empty", root / "imageSets/empty.txt")
    return planted


def paired_path(root, frame_id, modality):
    video, frame = frame_id.rsplit("/", 1)
    return root / "annotations_paired" / video / modality / f"{frame}.txt"


def test_every_kind_of_fault_is_found_and_nothing_else(root, tmp_path):
    planted = plant(root)
    assert {name for name, *_ in planted} == FAULTS.keys()
    lists = [f"--list=imageSets/{name}.txt" for name in ("train-all", "test-all", "empty")]
    command = [sys.executable, "-m", "tools.check_data", root, *lists]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    with (tmp_path / "faults.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [(row["fault"], str(Path(row["file"]).relative_to(root)), int(row["line"])) for row in rows]
    assert sorted(found) == sorted(planted)
    for name, file, line in planted:  # the table shows them too
        assert any(
            name in row and f"{file}:{line}".removesuffix(":0") in row for row in done.stdout.splitlines()
        )


def test_a_file_name_does_not_change_the_kind_of_fault():
    error = InputError(
        "image 1 or file_name class a.jpg occurs twice", "give each a unique id", file="a.json"
    )
    assert to_fault(error).name == "json-repeated-id"


def test_only_the_images_and_annotations_of_a_training_are_needed(root, tmp_path, monkeypatch, capsys):
    for path in (root / "images").rglob("visible/*.jpg"):
        path.unlink()
    shutil.rmtree(root / "annotations-xml-new/set03")
    flags = (root, "--list", "imageSets/train-all.txt", "--out", tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("mine")
    assert run(monkeypatch, *flags, "--input-mode", "lwir", "--annotations", "bbgt") == 0
    assert (tmp_path / "x.csv").read_text() == "mine"
    capsys.readouterr()
    assert run(monkeypatch, *flags, "--input-mode", "lwir") == 1
    assert capsys.readouterr().out.count("missing-annotation") == 2  # of set03, in the XML form
    assert run(monkeypatch, *flags) == 1
    output = capsys.readouterr().out
    assert output.count("missing-visible") == 6 and "… and 7 more" in output
    assert output.endswith("12 of 12 visible images are missing: --input-mode lwir needs none\n")


def test_training_lists_may_share_frames_but_not_with_test_lists(tmp_path):
    for name in ("train-all", "train-half", "test-all"):
        (tmp_path / f"{name}.txt").write_text("set00/V000/I00000\n")
    for disjoint, overlaps in ((False, ["test-all"]), (True, ["train-half", "test-all"])):
        frames, found = {}, []
        for name in ("train-all", "train-half", "test-all"):
            found += check_data.check_list(tmp_path / f"{name}.txt", frames, disjoint)
        assert [(fault.name, fault.file.stem) for fault in found] == [("list-overlap", x) for x in overlaps]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere", "--list", "x.txt"], "nowhere: no such folder"),
        (["{root}", "--list", "x.txt"], "x.txt: image list not found"),
        (["{root}/images"], "images/imageSets: no image lists here"),
        (
            ["{root}", "--list", "imageSets/test-all.txt", "--annotations", "xml-sanitized"],
            "looked for annotations-xml-new-sanitized",
        ),
        (["{root}", "--list", "imageSets/test-all.txt", "--out", "none/x.csv"], "none: no such folder"),
    ],
)
def test_bad_arguments_are_refused(demo_root, monkeypatch, flags, message):
    flags = [flag.format(root=demo_root) for flag in flags]
    monkeypatch.setattr(sys, "argv", ["check_data.py", *flags])
    with pytest.raises(InputError, match=message):
        check_data.main()


@pytest.mark.parametrize(
    ("names", "mode", "frames"), [(["pairs"], "early", 8), (["lwir-train", "lwir-test"], "lwir", 134)]
)
def test_real_frames_have_no_fault(reference, tmp_path, monkeypatch, capsys, names, mode, frames):
    lists = [part for name in names for part in ("--list", f"imageSets/{name}.txt")]
    out = tmp_path / "faults.csv"
    code = run(monkeypatch, reference / "mini", *lists, "--input-mode", mode, "--out", out)
    assert code == 0 and f"{frames} frames" in capsys.readouterr().out


def test_help_explains_every_fault(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    output = capsys.readouterr().out
    assert all(name in output and words in output for name, (words, _) in FAULTS.items())
    assert check_data.__doc__.strip() in output


# ------------------------------------------------------------------------------ other sets of pairs


def check_pairs(path, tmp_path, monkeypatch, *flags):
    """(exit code, {(fault, file's name)}) of a set of pairs."""
    out = tmp_path / "found.csv"
    monkeypatch.setattr(sys, "argv", ["check_data", str(path), "--out", str(out), *map(str, flags)])
    code = check_data.main()
    rows = list(csv.reader(out.open())) if out.exists() else []
    return code, {(row[0], Path(row[1]).name) for row in rows[1:]}


@pytest.mark.parametrize("form", ["yolo", "voc", "coco"])
def test_a_sound_set_of_pairs_has_no_fault(tmp_path, monkeypatch, capsys, form):
    path = pair_trees.draw_own(tmp_path / "set", form, deep=form == "voc")
    assert check_pairs(path, tmp_path, monkeypatch) == (0, set())
    assert "8 frames, visible and lwir" in capsys.readouterr().out


def test_a_set_without_a_valid_image_is_reported(tmp_path, monkeypatch, capsys):
    path = pair_trees.draw_own(tmp_path / "set", n=1)
    for split in ("train", "test"):
        Image.new("L", (20, 10)).save(tmp_path / "set/thermal" / split / "000.png")
    assert check_pairs(path, tmp_path, monkeypatch) == (1, {("wrong-size", "000.png")})
    assert "note: " not in capsys.readouterr().out


def test_a_set_whose_visible_images_are_all_grey_gets_a_note(tmp_path, monkeypatch, capsys):
    root = pair_trees.draw_cvc14(tmp_path / "set")
    assert check_pairs("cvc14", tmp_path, monkeypatch, "--data-root", root) == (0, set())
    assert "note: all visible images are grey" in capsys.readouterr().out


def test_faults_of_boxes_in_a_set_of_pairs_have_a_line_or_number(tmp_path, monkeypatch):
    for form, place in (("voc", "002.xml:2"), ("coco", "train.json:0")):
        root = tmp_path / form
        path = pair_trees.draw_own(root, form)
        text = pair_trees.voc((160, 120), [("person", (150, 20, 40, 90), 0)])
        if form == "voc":
            (root / "labels/train/002.xml").write_text(text)
        else:
            content = json.loads((root / "labels/train.json").read_text())
            content["annotations"][3]["bbox"] = [150, 20, 40, 90]
            (root / "labels/train.json").write_text(json.dumps(content))
        check_pairs(path, tmp_path, monkeypatch)
        [row] = list(csv.reader((tmp_path / "found.csv").open()))[1:]
        assert (row[0], f"{Path(row[1]).name}:{row[2]}") == ("leaves-frame", place)
        assert row[3].startswith("person x=150" if form == "voc" else "annotation 3: ")


def test_faults_of_16_bit_images(tmp_path, monkeypatch):
    """Each is reported once, and the check continues."""
    root = tmp_path / "set"
    path = pair_trees.draw_own(root, "voc", deep=True)
    broken = root / "thermal/train/001.png"
    broken.write_bytes(broken.read_bytes()[:-2000])
    (root / "labels/test/003.xml").unlink()
    code, found = check_pairs(path, tmp_path, monkeypatch)
    assert code == 1 and found == {("broken-image", "001.png"), ("missing-annotation", "test")}
    assert len((tmp_path / "found.csv").read_text().splitlines()) == 3
    Image.fromarray(np.arange(160 * 120, dtype=np.uint8).reshape(120, 160)).save(
        root / "thermal/train/002.png"
    )
    _, found = check_pairs(path, tmp_path, monkeypatch)
    assert found - {("missing-annotation", "test")} == {
        ("broken-image", "001.png"),
        ("16-bit-image", "pairs.json"),
        ("16-bit-image", "002.png"),
    }


def test_faults_of_a_set_of_pairs(tmp_path, monkeypatch):
    """All are reported at once, each with its name and file."""
    root = tmp_path / "set"
    path = pair_trees.draw_own(root, "voc", n=8)
    thermal, labels = root / "thermal/train", root / "labels/train"
    Image.new("L", (80, 60)).save(thermal / "000.png")
    Image.new("L", (160, 120), 90).save(thermal / "001.png")
    (thermal / "002.png").write_bytes((thermal / "003.png").read_bytes())
    (labels / "004.xml").write_text(pair_trees.voc((160, 120), [("cat", (1, 1, 20, 50), 0)]))
    (labels / "005.xml").write_text(pair_trees.voc((160, 120), [("person", (150, 20, 40, 90), 0)]))
    (labels / "006.xml").write_text(pair_trees.voc((160, 120), [("person", (10, 20, 20, 0), 0)]))
    (root / "labels/test/003.xml").unlink()
    code, found = check_pairs(path, tmp_path, monkeypatch)
    assert code == 1
    assert found == {
        ("wrong-size", "000.png"),
        ("constant-image", "001.png"),
        ("copied-image", "003.png"),
        ("unknown-label", "004.xml"),
        ("leaves-frame", "005.xml"),
        ("no-area", "006.xml"),
        ("missing-annotation", "test"),
    }
