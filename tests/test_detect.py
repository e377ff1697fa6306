"""detect.py: folders of images, image sizes, output files, and failures."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detect
import train
import utils
from engine.checkpoint import save_checkpoint
from kaist.annotations import Objects, read_image_list
from kaist.files import InputError
from kaist.miss_rate import load_ground_truth
from kaist.picture import IGNORED_COLOUR, boxes_overlap, draw_pair, draw_scores
from kaist.results import read_detections

PROJECT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of an untrained early-fusion network at epoch 1 of 2."""
    config = train.configure(["--width", "0.0625", "--epochs", "2"])
    arguments = train.model_arguments(config)
    model = train.make_network(**arguments)
    content = {"model_args": arguments, "config": vars(config), "model": model.state_dict(), "epoch": 1}
    path = tmp_path_factory.mktemp("checkpoint") / "untrained.pt"
    save_checkpoint(path, content)
    return path


@pytest.fixture
def found(monkeypatch):
    """The boxes and scores that the patched network returns for every frame; one box by default."""
    answer = {"boxes": np.array([[64.0, 128.0, 32.0, 64.0]]), "scores": np.array([0.9])}
    monkeypatch.setattr(utils, "detect_image", lambda *_, **__: (answer["boxes"].copy(), answer["scores"]))
    return answer


@pytest.fixture
def run(checkpoint, monkeypatch, tmp_path):
    """A function that runs detect.py in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, weights=checkpoint):
        monkeypatch.setattr(sys, "argv", ["detect.py", *map(str, arguments), "--checkpoint", str(weights)])
        detect.main()

    return run


def draw(path, size=(640, 512), mode="RGB"):
    """Write a grey image to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 99 if mode == "L" else (99, 99, 99)).save(path)
    return path


def draw_both(folder, name, lwir_name=None):
    draw(folder / "visible" / name)
    draw(folder / "lwir" / (lwir_name or name), mode="L")


def read_csv(folder="detections"):
    with Path(folder, "detections.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pictures(folder="detections"):
    return sorted(path.name for path in Path(folder).glob("*.png"))


def test_folders_are_searched_recursively_and_each_pair_is_used_once(run, found, tmp_path):
    draw_both(tmp_path / "data/set06/V000", "I00000.jpg")
    draw_both(tmp_path / "data/set06/V001", "I00000.png")
    draw_both(tmp_path / "data/deep/er/and", "a.jpg", "a.png")
    draw_both(tmp_path / "data/other", "b.TIF", "b.tiff")
    run("data")
    assert pictures() == ["a.png", "b.png", "set06_V000_I00000.png", "set06_V001_I00000.png"]
    assert {row["image"] for row in read_csv()} == {name[:-4] for name in pictures()}


def test_a_pair_with_any_file_names(run, found, tmp_path):
    run("--visible", draw(tmp_path / "photo.png"), "--lwir", draw(tmp_path / "hot.jpg", mode="L"))
    assert pictures() == ["photo.png"]
    with pytest.raises(InputError, match="must be used together"):
        run("--visible", tmp_path / "photo.png")


def test_picture_names_are_unique_without_case(run, found, tmp_path):
    for name in ("a-2.png", "a.jpg", "a.png", "A.tif"):
        draw_both(tmp_path / "x", name)
    run("x/visible")
    names = [name.casefold() for name in pictures()]
    assert len(set(names)) == 4 and len(read_csv()) == 4


def test_files_with_one_name_get_numbers():
    pairs = [{"visible": Path(f"{i}/visible/a.png")} for i in range(2_000)]
    names = detect.output_names(pairs)
    assert len(set(names)) == len(pairs) and names[:3] == ["a", "a-2", "a-3"]


@pytest.mark.parametrize(("size", "lwir_size"), [((1280, 256), (640, 512)), ((320, 1024), (33, 44))])
def test_boxes_are_in_pixels_of_the_image(run, found, tmp_path, capsys, size, lwir_size):
    draw(tmp_path / "v.png", size)
    draw(tmp_path / "l.png", lwir_size, "L")
    run("--visible", "v.png", "--lwir", "l.png")
    expected = np.array([64.0, 128.0, 32.0, 64.0]) * np.tile(np.array(size) / (640, 512), 2)
    [row] = read_csv()
    assert [float(row[key]) for key in "xywh"] == pytest.approx(expected.tolist())
    assert capsys.readouterr().out.count("of another size") == 1


def test_pairs_of_other_sets_must_have_one_size():
    views = {"visible": Image.new("RGB", (64, 48)), "lwir": Image.new("L", (32, 24))}
    with pytest.raises(InputError, match="a.png: its visible and LWIR images are 64x48 and 32x24; register"):
        detect.fit_views(views, {"lwir": Path("a.png")}, "pairs.json")
    views["lwir"] = Image.new("L", (64, 48))
    assert detect.fit_views(views, {"lwir": Path("a.png")}, "pairs.json") == views


def test_a_bad_image_gives_one_line_and_the_others_are_processed(run, found, tmp_path, capsys):
    for name in ("1.png", "2.png", "3.png"):
        draw_both(tmp_path / "x", name)
    (tmp_path / "x/visible/2.png").write_bytes(b"no image")
    draw(tmp_path / "x/visible/alone.png")
    draw(tmp_path / "x/loose.png")
    Image.fromarray(np.full((512, 640), 20_000, np.uint16)).save(tmp_path / "x/lwir/3.png")
    with pytest.raises(InputError, match="^4 images could not be used"):
        run("x")
    lines = capsys.readouterr().err.strip().splitlines()
    assert sorted(line.split(": ")[1] for line in lines if line.startswith("error")) == [
        *("x/loose.png", "x/lwir/3.png", "x/visible/2.png", "x/visible/alone.png")
    ]
    assert pictures() == ["1.png"] and len(read_csv()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png"], "none.png: no such image"),
        (["empty"], "empty: no image in this folder"),
        (["notes.txt"], "notes.txt: not an image"),
        (["lone.png"], "lone.png: the lwir image is missing.*--pair, or .*MODALITY_DROPOUT"),
        (["lone.png", "--json", "none/found.json"], "none: no such folder; create it first"),
        (["lone.png", "--sheet", "./.png"], "./.png does not end in .png or .jpg"),
        (["lone.png", "--min-score", "2"], "--min-score 2.0 is not a number from 0 to 1"),
        ([], "name images or folders"),
    ],
)
def test_bad_arguments_create_no_folder(run, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    draw(tmp_path / "lone.png")
    with pytest.raises(InputError, match=message):
        run(*arguments)
    assert not Path("detections").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system")
def test_a_pipe_or_a_missing_file_is_refused(run, tmp_path):
    draw(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in (("pipe.png", "it is a pipe"), ("none.png", "image not found")):
        with pytest.raises(InputError, match=f"{name}: {message}"):
            run("--visible", "a.png", "--lwir", name)
    assert not Path("detections").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_an_input_error(tmp_path):
    (tmp_path / "detections.csv").symlink_to("/dev/full")
    with pytest.raises(InputError, match="cannot write it"):
        detect.write_rows(tmp_path / "detections.csv", "a", np.ones((1, 4)), np.ones(1), first=True)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes only on Linux")
def test_file_names_that_are_not_utf_8_are_escaped(run, found, tmp_path):
    folder = tmp_path / "x/visible"
    draw_both(tmp_path / "x", "b,c.png")
    for modality in ("visible", "lwir"):
        os.link(tmp_path / f"x/{modality}/b,c.png", os.fsencode(tmp_path / f"x/{modality}/a") + b"\xff.png")
    run(folder)
    assert [row["image"] for row in read_csv()] == ["a\\udcff", "b,c"]


def test_detections_are_kept_after_an_interrupt(run, found, tmp_path, monkeypatch):
    for name in ("1.png", "2.png", "3.png"):
        draw_both(tmp_path / "x", name)
    calls = iter(range(9))

    def stop_at_third(*_, **__):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return found["boxes"].copy(), found["scores"]

    monkeypatch.setattr(utils, "detect_image", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        run("x")
    assert [row["image"] for row in read_csv()] == ["1", "2"]


def test_untrained_and_nonfinite_networks_give_warnings(run, found, tmp_path, capsys, checkpoint):
    draw_both(tmp_path / "x", "1.png")
    run("x")
    assert "epoch 1 of 2" in capsys.readouterr().out
    found["boxes"], found["scores"] = np.tile(found["boxes"], (200, 1)), np.full(200, 0.3)
    run("x")
    assert "200 detections at scores of 0.3 or more: this network is not trained" in capsys.readouterr().out
    content = torch.load(checkpoint)
    content["model"]["loc_heads.0.bias"][3] = torch.nan
    save_checkpoint(tmp_path / "nan.pt", content)
    run("x", weights="nan.pt")
    assert "warning: these weights are not finite (1 of " in capsys.readouterr().out


def test_a_run_is_found_by_name_and_drawings_are_noted(run, found, tmp_path, checkpoint, capsys):
    """`--checkpoint streets` is a run of this name if there is one, else the file streets.pt."""
    content = torch.load(checkpoint, weights_only=True)
    content["config"] |= {"data_root": "data/streets"}
    named = "--visible", draw(tmp_path / "a.png"), "--lwir", draw(tmp_path / "b.png", mode="L")
    for place in ("streets.pt", "streets/last.pt"):  # the run takes precedence over the file
        file = Path("checkpoints", place)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(file, content)
        run(*named, weights="streets")
        printed = capsys.readouterr().out.replace(f"{tmp_path}/", "")
        assert "trained on synthetic frames only" in printed and f"weights of {file}" in printed
    run(*named)
    assert "trained on synthetic frames only" not in capsys.readouterr().out


def test_input_images_are_not_overwritten(run, found, tmp_path):
    draw(tmp_path / "a.png"), draw(tmp_path / "b.png", mode="L")
    held = (tmp_path / "a.png").read_bytes()
    pair = ("--visible", "a.png", "--lwir", "b.png")
    for flags in (("--out", "."), ("--sheet", "b.png"), ("--json", "a.png")):
        with pytest.raises(InputError, match="would be overwritten; choose another place"):
            run(*pair, *flags)
    assert (tmp_path / "a.png").read_bytes() == held and len(list(tmp_path.iterdir())) == 2


def test_pictures_of_earlier_runs_are_skipped(tmp_path):
    mine, ours = draw(tmp_path / "visible/a.png"), draw(tmp_path / "detections/a.png")
    assert detect.list_images([tmp_path], [], tmp_path / "detections") == [mine]
    assert detect.list_images([ours.parent], [], ours.parent) == [ours]  # named by the user


def test_annotations_are_drawn(demo_root, run, found):
    run(demo_root / "images/set06/V000/visible/I00000.jpg")
    with Image.open(Path("detections", pictures()[0])) as with_annotations:
        colours = {colour for _, colour in with_annotations.getcolors(1 << 24)}
    assert (255, 255, 255) in colours and (0, 255, 0) in colours


def test_ignored_objects_and_people_have_different_colours():
    box = np.array([[100.0, 100, 50, 100], [300, 100, 50, 100]])
    objects = Objects(box, ("person", "cyclist"), np.zeros(2, np.int64), np.zeros(2, bool))
    grey = {"lwir": Image.new("L", (640, 512), 50)}
    picture = draw_pair(grey, np.empty((0, 4)), np.empty(0), objects)
    top = picture.size[1] - 512 - (picture.size[1] - 512) // 2
    band = picture.crop((0, top + 90, 640, top + 210))
    assert {(255, 255, 255), (255, 165, 0)} <= {colour for _, colour in band.getcolors(1 << 16)}
    assert IGNORED_COLOUR == "orange"


def test_score_labels_do_not_overlap():
    class Pen:
        labels = []

        def rectangle(self, box, fill):
            self.labels.append(box)

        def text(self, *_, **__):
            pass

    from PIL import ImageFont

    rng = np.random.default_rng(0)
    boxes = np.column_stack([rng.uniform(0, 600, 80), rng.uniform(0, 480, 80), rng.uniform(9, 99, (80, 2))])
    draw_scores(Pen(), boxes, rng.random(80), ImageFont.load_default(14), (640, 512))
    labels = Pen.labels
    assert len(labels) > 40
    assert not any(boxes_overlap(a, b) for i, a in enumerate(labels) for b in labels[:i])
    assert all(x >= 0 and y >= 0 and right <= 640 and bottom <= 512 for x, y, right, bottom in labels)


def test_flags_are_answered_without_torch(tmp_path):
    for name in ("torch", "torchvision"):
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    for arguments, code in ((["--help"], 0), (["--chekpoint", "x"], 2), (["nowhere.jpg"], 2)):
        done = subprocess.run(
            [sys.executable, PROJECT / "detect.py", *arguments],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code and "Traceback" not in done.stderr


# ------------------------------------------------------------------- other names, other outputs


def draw_drive(folder, numbers=(1, 2, 10)):
    """Write a sequence of pairs, drive/<n>_rgb.jpg and drive/<n>_ir.png."""
    for n in numbers:
        draw(folder / f"drive/{n}_rgb.jpg", (320, 256))
        draw(folder / f"drive/{n}_ir.png", (320, 256), "L")


def test_patterns_pair_files_by_the_text_of_the_stars(run, found, tmp_path, capsys):
    draw_drive(tmp_path)
    draw(tmp_path / "drive/7_rgb.jpg")
    with pytest.raises(InputError, match="^1 image could not be used"):
        run("--pair", "drive/*_rgb.jpg", "drive/*_ir.png")
    assert "drive/7_rgb.jpg: the lwir image is missing" in capsys.readouterr().err
    assert [row["image"] for row in read_csv()] == ["1_rgb", "2_rgb", "10_rgb"]


def test_two_folders_pair_files_by_stem(run, found, tmp_path):
    draw(tmp_path / "rgb/a.png")
    draw(tmp_path / "thermal/a.jpg", mode="L")
    run("--pair", "rgb", "thermal")
    assert pictures() == ["a.png"]
    for heat in ("heat", "heat/*", "thermal/a.jpg"):  # the last is a pattern that the shell has expanded
        with pytest.raises(InputError, match=f"{heat.removesuffix('/*')}: no such folder"):
            run("--pair", "rgb", heat)


def test_files_are_in_natural_order(run, found, tmp_path):
    for n in (10, 9, 1):
        draw_both(tmp_path / "x", f"frame{n}.png")
    run("x")
    assert [row["image"] for row in read_csv()] == ["frame1", "frame9", "frame10"]


def test_a_sheet_and_an_animation_contain_every_picture(run, found, tmp_path, capsys):
    draw_drive(tmp_path)
    outputs = ("--sheet", "detections/s.jpg", "--animation", "a.gif")
    run("--pair", "drive/*_rgb.jpg", "drive/*_ir.png", *outputs)
    with Image.open("a.gif") as film:
        assert film.n_frames == 3 and film.info["duration"] == 100
    with Image.open("detections/s.jpg") as sheet, Image.open("detections/1_rgb.png") as picture:
        assert sheet.width == 1920 and sheet.height == 2 * round(picture.height * 960 / picture.width)
    printed = capsys.readouterr().out
    assert "detections/s.jpg: 3 images" in printed and "a.gif: 3 images" in printed
    run("--pair", "drive/*_rgb.jpg", "drive/*_ir.png", "--animation", "a.webp")
    with Image.open("a.webp") as film:
        assert film.n_frames == 3
    with pytest.raises(InputError, match="--animation: a.mp4 does not end in .gif or .webp"):
        run("drive", "--animation", "a.mp4")


def test_eval_reads_the_coco_json_of_detect(run, found, demo_root):
    run(demo_root / "images/set06/V000/lwir", "--json", "found.json", "--min-score", "0.01")
    entries = json.loads(Path("found.json").read_text())
    assert entries[0] == {
        "image_id": "set06_V000_I00000",
        "category_id": 1,
        "bbox": [64.0, 128.0, 32.0, 64.0],
        "score": 0.9,
    }
    truth = load_ground_truth(demo_root, read_image_list(demo_root / "imageSets/test-all.txt"))
    detections = read_detections("found.json", truth.frames)
    assert [truth.frames[i].replace("/", "_") for i in detections.frame_idxs] == [
        e["image_id"] for e in entries
    ]
    assert detections.boxes.tolist() == [e["bbox"] for e in entries]


def test_show_opens_pictures_or_notes_that_there_is_no_viewer(run, found, tmp_path, monkeypatch, capsys):
    draw_drive(tmp_path)
    drive = ("--pair", "drive/*_rgb.jpg", "drive/*_ir.png", "--show")
    for can_show, names in ((True, ["1_rgb", "2_rgb", "10_rgb"]), (False, ["1_rgb"])):
        shown = []
        show = lambda _, title, can=can_show, titles=shown: titles.append(title) or can  # noqa: E731
        monkeypatch.setattr("PIL.ImageShow.show", show)
        run(*drive)
        assert shown == names
        assert ("no program that can show pictures" in capsys.readouterr().out) != can_show
