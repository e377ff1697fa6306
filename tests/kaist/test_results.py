"""Reading and writing result files, reports, and eval.py on result files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval as eval_script
from kaist.annotations import image_path
from kaist.files import InputError
from kaist.miss_rate import evaluate, load_ground_truth
from kaist.report import as_dict, draw_curves, headline, print_scores, report, score
from kaist.results import (
    Detections,
    frames_path,
    parse_decimals,
    parse_text,
    read_detections,
    write_detections,
)

PROJECT = Path(__file__).parents[2]
FRAMES = ("set06/V000/I00000", "set06/V000/I00001", "set09/V000/I00000", "set09/V000/I00001")
BOX = [100, 100, 40, 100]


@pytest.fixture
def annotations(tmp_path):
    """Four frames with a person each."""
    images = [{"id": i, "im_name": f, "height": 512, "width": 640} for i, f in enumerate(FRAMES)]
    items = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": BOX, "height": 100, "occlusion": 0, "ignore": 0}
        for i in range(4)
    ]
    path = tmp_path / "KAIST_annotation.json"
    categories = [{"id": 1, "name": "person"}]
    path.write_text(json.dumps({"images": images, "annotations": items, "categories": categories}))
    return path


def read(path, text, frames=FRAMES):
    path.write_text(text)
    return read_detections(path, frames)


def entry(image=0, box=BOX, value=0.5, category=1):
    return {"image_id": image, "category_id": category, "bbox": box, "score": value}


def run_eval(folder, *arguments, code=0):
    """Run eval.py in a folder where torch cannot be imported; returns stdout or stderr."""
    block = folder / "block" / "torch.py"
    block.parent.mkdir(exist_ok=True)
    block.write_text("raise ImportError('torch is not installed')")
    done = subprocess.run(
        [sys.executable, PROJECT / "eval.py", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(block.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if code else done.stdout


def run_main(monkeypatch, *arguments):
    """Run eval.py in this process and folder."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    eval_script.main()


# ------------------------------------------------------------------- reading


def test_text_ids_count_from_one_and_json_ids_from_zero(tmp_path):
    text = read(tmp_path / "a.txt", "4,100,100,40,100,0.5\r\n1,1.5,2,3,4,1e-3\r\n\n")
    content = [entry(3), entry(0, [1.5, 2, 3, 4], 1e-3)]
    from_json = read(tmp_path / "a.json", json.dumps(content))
    for found in (text, from_json):
        assert found.frame_idxs.tolist() == [3, 0] and found.scores.tolist() == [0.5, 1e-3]
        assert found.boxes.tolist() == [BOX, [1.5, 2, 3, 4]]
    np.testing.assert_array_equal(text.boxes, from_json.boxes)


def test_other_categories_are_counted(tmp_path):
    content = [entry(category=0, box=[0, 0, 0, 0]), entry(category=1.0), entry(category=3)]
    found = read(tmp_path / "a.json", json.dumps(content))
    assert len(found.scores) == 1 and found.other_categories == 2


def test_a_file_without_rows_is_valid(tmp_path):
    for name, text in (("a.txt", ""), ("b.txt", " \n"), ("a.json", "[]")):
        found = read(tmp_path / name, text)
        assert found.boxes.shape == (0, 4) and len(found.frame_idxs) == len(found.scores) == 0


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("0,1,2,3,4,0.5", "1 to 4"),
        ("5,1,2,3,4,0.5", "1 to 4"),
        ("1.5,1,2,3,4,0.5", "1 to 4"),
        ("1,1,2,-3,4,0.5", "negative"),
        ("1,1,2,3,-1,0.5", "negative"),
        ("1,1,2,3,4,nan", "finite"),
        ("1,inf,2,3,4,1", "finite"),
        ("1,1,2,3,4", "is not image_id"),
        ("", "is not image_id"),
        ("1,1,2,3,4,0.5,6", "is not image_id"),
        ("1,1,2,3,4,x", "is not image_id"),
        ("1 1 2 3 4 0.5", "is not image_id"),
        ("1_0,1,2,3,4,0.5", "is not image_id"),
    ],
)
def test_bad_text_is_named(tmp_path, line, word):
    good = "2,1,2,3,4,0.5"
    with pytest.raises(InputError, match=word) as error:
        read(tmp_path / "a.txt", f"{good}\n{good}\n{line}\n{good}\n")
    assert f"{tmp_path / 'a.txt'}:3: " in str(error.value)


@pytest.mark.parametrize("seed", range(6))
def test_numbers_are_what_float_reads(tmp_path, seed):
    """Numbers equal float()'s to the last bit, in the fast path and in the slow one; bad lines are named."""
    rng = np.random.default_rng(seed)
    forms = ["{:.0f}", "{:.1f}", "{:.4f}", "{:.8f}", "-{:.3f}", "{:.12f}", "{:.15f}", "{:.3e}", "{:06.2f}"]
    strange = [
        "",
        "-",
        ".",
        "1.2.3",
        "1-2",
        "--1",
        "1..2",
        "5.",
        ".5",
        "-.5",
        "0x1",
        "1_0",
        "١",
        "+3",
        "nan",
        " 7 ",
    ]
    at_once = good = bad = 0
    for trial in range(120):
        some = [["{:.0f}"], *[rng.choice(forms[1:5], 3)] * 5] if trial % 2 else [rng.choice(forms, 3)] * 6
        rows = [
            [rng.choice(own).format(rng.uniform(0, 700)) for own in some] for _ in range(rng.integers(1, 9))
        ]
        if trial % 3 == 0:
            rows[rng.integers(len(rows))][rng.integers(6)] = rng.choice(strange)
        lines = [",".join(row) for row in rows]
        try:
            expected = np.array([[plain_float(value) for value in row] for row in rows])
        except ValueError:
            bad += 1
            with pytest.raises(InputError, match=r"a.txt:\d+: .* is not image_id,x,y,w,h,score"):
                parse_text("\n".join(lines), tmp_path / "a.txt")
            continue
        found = parse_text("\n".join(lines) + "\n", tmp_path / "a.txt")[0]
        np.testing.assert_array_equal(found, expected)
        good += 1
        at_once += parse_decimals(("\n".join(lines) + "\n").encode()) is not None
    assert good > at_once > 30 and bad > 10


def plain_float(text):
    """float(), which rejects here what only Python accepts as a number."""
    if not text.isascii() or "_" in text:
        raise ValueError
    return float(text)


def test_commas_and_lines_are_not_mistaken_for_each_other(tmp_path):
    for text in ("1,2,3\n4,5,6\n", "1,2,3,4,5\n6\n", "1,2,3,4,5,6,1,2,3,4,5,6\n"):
        with pytest.raises(InputError, match="a.txt:1: .* is not image_id"):
            read(tmp_path / "a.txt", text)


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (entry(4), "0 to 3"),
        (entry(-1), "0 to 3"),
        (entry(0.5), "0 to 3"),
        (entry(box=[1, 2, -1, 4]), "negative"),
        (entry(value=float("nan")), "finite"),
        (entry(value=None), "not a detection"),
        (entry(box=[1, 2, 3]), "not a detection"),
        (entry(box="1234"), "not a detection"),
        (entry(category="1"), "not a detection"),
        (entry(category=None), "not a detection"),
        (entry(value="0.5"), "not a detection"),
        (entry(box=[1, 2, 3, 4, 5]), "not a detection"),
        (entry(value="high"), "not a detection"),
        ({"image_id": 0}, "not a detection"),
        (7, "not a detection"),
        (entry(FRAMES[0]), "not a detection"),
    ],
)
def test_bad_json_entry_is_named(tmp_path, bad, word):
    content = ",\n".join(map(json.dumps, [entry(category=0), entry(1), bad, entry(2)]))
    with pytest.raises(InputError, match=word) as error:
        read(tmp_path / "a.json", f"[\n{content}\n]")
    assert f"{tmp_path / 'a.json'}:4: " in str(error.value)


def test_json_booleans_are_not_numbers(tmp_path):
    with pytest.raises(InputError, match="a.json:1: .* is not a detection"):
        read(tmp_path / "a.json", json.dumps([entry(value=True)]))


def test_files_of_different_lists_are_not_mixed(tmp_path, annotations, monkeypatch):
    """A file without a companion counts along the annotation JSON, not along another file's companion."""
    for name, frames in (("a.txt", FRAMES[2:]), ("b.txt", FRAMES)):
        (tmp_path / name).write_text("1,100,100,40,100,0.9\n")
        if frames != FRAMES:
            frames_path(tmp_path / name).write_text("\n".join(frames) + "\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="have different lists of frames"):
        run_main(monkeypatch, "--detections", "a.txt", "b.txt", "--annotations", annotations)


def test_boxes_without_area_are_false_positives_as_in_bbgt(tmp_path):
    found = read(tmp_path / "a.txt", "1,10,20,0,40,0.9\n1,10,20,30,0,0.8\n")
    assert found.boxes[:, 2:].tolist() == [[0, 40], [30, 0]]


def test_bad_files_are_named(tmp_path):
    for text, word in (
        ("{}", ":1: the JSON is not a list"),
        ("[\n1,\n", ":3: broken JSON"),
        ("", "broken JSON"),
    ):
        with pytest.raises(InputError, match=word):
            read(tmp_path / "a.json", text)
    with pytest.raises(InputError, match="not found"):
        read_detections(tmp_path / "none.txt", FRAMES)
    (tmp_path / "a.txt").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(InputError, match="not a text file"):
        read_detections(tmp_path / "a.txt", FRAMES)


# ------------------------------------------------------------------- writing


def test_json_ids_may_be_names(tmp_path):
    """Frame ids as in image lists, or as detect.py writes them."""
    rows = [{**entry(0), "image_id": name} for name in (FRAMES[1], FRAMES[0].replace("/", "_"))]
    found = read(tmp_path / "a.json", json.dumps(rows))
    assert found.frame_idxs.tolist() == [1, 0] and found.id_format == "its image ids are frame ids"
    assert "numbers from 0" in read(tmp_path / "b.json", json.dumps([entry(0)])).id_format
    for wrong in ("set11/V009/I99999", 1, None):
        text = ",\n".join(map(json.dumps, [*rows, {**entry(0), "image_id": wrong}]))
        with pytest.raises(InputError, match=f"a.json:3: image_id '{wrong}' is not in the list of frames"):
            read(tmp_path / "a.json", f"[{text}]")


@pytest.mark.parametrize("name", ["run.txt", "run.json"])
def test_what_is_written_reads_back_exactly(tmp_path, name):
    rng = np.random.default_rng(0)
    boxes = rng.uniform(1, 300, (50, 4)).astype(np.float32)
    scores = (rng.random(50) ** 9).astype(np.float32)
    detections = Detections(rng.integers(0, 4, 50), boxes, scores)
    write_detections(tmp_path / name, detections, FRAMES)
    found = read_detections(tmp_path / name, FRAMES)
    np.testing.assert_array_equal(found.frame_idxs, detections.frame_idxs)
    np.testing.assert_array_equal(found.boxes.astype(np.float32), boxes)
    np.testing.assert_array_equal(found.scores.astype(np.float32), scores)
    assert frames_path(tmp_path / name).read_text().split() == list(FRAMES)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "run.frames.txt"])


def test_companion_says_what_ids_mean(tmp_path):
    order = [FRAMES[2], FRAMES[0], "set00/V000/I00000", FRAMES[1], FRAMES[3]]
    detections = Detections(np.arange(5), np.array([BOX] * 5, float), np.arange(5) / 5)
    write_detections(tmp_path / "a.txt", detections, order)
    found = read_detections(tmp_path / "a.txt", FRAMES)
    assert found.frame_idxs.tolist() == [2, 0, 1, 3] and found.other_frames == 1
    with pytest.raises(InputError, match="set11/V000/I00000"):
        read_detections(tmp_path / "a.txt", ["set11/V000/I00000"])


def test_unwritable_place_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        write_detections(
            tmp_path / "none" / "a.txt", Detections(np.zeros(0, int), np.zeros((0, 4)), np.zeros(0)), FRAMES
        )


# ------------------------------------------------------------------- reports


def perfect(n=4, shift=0.0):
    return Detections(np.arange(n), np.array([BOX] * n, float) + [shift, 0, 0, 0], np.linspace(0.9, 0.6, n))


def test_notes_on_unusual_results(annotations, capsys):
    truth = load_ground_truth(annotations)
    some = score("some", truth, perfect(1))
    assert any("not count 3 of 4 people: it gives 0.00, and 75.00 is" in note for note in some.notes)
    none = Detections(np.zeros(0, int), np.zeros((0, 4)), np.zeros(0), other_categories=2)
    nothing = score("nothing", truth, none, resamples=20)
    assert any("contains no detections" in note for note in nothing.notes)
    assert any("2 rows of other categories" in note for note in nothing.notes)
    print_scores([some, nothing], all_setups=True)
    out = capsys.readouterr().out
    assert "75.00" in out and "100.00" in out and "warning: some: " in out and "–" in out
    assert json.dumps(as_dict([some, nothing]), allow_nan=False)


def test_report_writes_the_run(annotations, tmp_path, capsys):
    truth = load_ground_truth(annotations)
    numbers = report("mine", truth, perfect(2), tmp_path)
    assert numbers["official"]["Reasonable-all"]["miss_rate"] == pytest.approx(0.5)
    assert "mine" in capsys.readouterr().out
    assert read_detections(tmp_path / "detections.txt", FRAMES).frame_idxs.tolist() == [0, 1]
    assert json.loads((tmp_path / "miss_rate.json").read_text())["mine"] == numbers
    assert headline(evaluate(truth, perfect(2))).keys() == {
        "miss_rate",
        "miss_rate_day",
        "miss_rate_night",
        "recall",
    }
    with Image.open(tmp_path / "miss_rate.png") as image:
        assert image.size[0] > 1000


def test_curves_survive_empty_results(annotations, tmp_path):
    truth = load_ground_truth(annotations)
    none = Detections(np.zeros(0, int), np.zeros((0, 4)), np.zeros(0))
    draw_curves([score("none", truth, none), score("all", truth, perfect())], tmp_path / "c.svg")
    assert (tmp_path / "c.svg").stat().st_size > 1000


# ------------------------------------------------------------------- the script


def test_script_without_torch(annotations, tmp_path):
    write_detections(tmp_path / "good.txt", perfect(), FRAMES)
    write_detections(tmp_path / "poor.json", perfect(2, shift=8), FRAMES)
    for k, name in enumerate(("good.txt", "poor.json")):
        frames_path(tmp_path / name).unlink(missing_ok=k > 0)
    out = run_eval(
        tmp_path,
        "--detections",
        "poor.json",
        "good.txt",
        "--annotations",
        annotations,
        "--all-setups",
        "--bootstrap",
        50,
        "--json",
        "numbers.json",
    )
    lines = [line.split() for line in out.splitlines()]
    names = [line[0] for line in lines if line and line[0] in ("good", "poor")]
    assert names[:2] == ["good", "poor"]
    assert "poor minus good" in out and "95%" in out and "Scale=near" in out
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    curve = numbers["good"]["official"]["Reasonable-all"]["curve"]
    assert len(curve["fppi"]) == len(curve["detection_rate"]) == len(curve["score"]) > 0
    assert numbers["poor"]["official"]["Reasonable-all"]["miss_rate"] == pytest.approx(0.5)
    assert numbers["poor"]["leaderboard"]["Reasonable-all"]["n_positive"] == 2
    assert len(numbers["good"]["official"]["Scale=far"]["interval_95"]) == 2
    assert (tmp_path / "miss_rate.png").is_file()


def test_script_takes_lists_and_subsets(annotations, tmp_path, monkeypatch, capsys, undrawn):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "night.txt").write_text("\n".join(FRAMES[2:]))
    (tmp_path / "night-result.txt").write_text("1,100,100,40,100,0.9\n")
    run_main(
        monkeypatch,
        "--detections",
        "night-result.txt",
        "--annotations",
        annotations,
        "--image-list",
        "night.txt",
    )
    out = capsys.readouterr().out
    assert re.search(r"night-result +50\.00 +50\.00 +50\.00 +0\.00", out) and "day" not in out.splitlines()[3]
    (tmp_path / "all.txt").write_text("3,100,100,40,100,0.9\n1,100,100,40,100,0.8\n")
    for subset in ("night", "night.txt"):
        run_main(monkeypatch, "--detections", "all.txt", "--annotations", annotations, "--subset", subset)
        out = capsys.readouterr().out
        assert re.search(r"all +50\.00 +50\.00", out) and "left out" not in out


def test_script_takes_names_that_are_not_utf_8(annotations, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9 \xe6\x97\xa5")
    folder.mkdir()
    path = folder / os.fsdecode(b"r\xe9sultat.txt")
    path.write_text("1,100,100,40,100,0.9\n")
    arguments = ("--detections", path, "--annotations", annotations, "--json", "n.json", "--out", "c.png")
    assert "r\\udce9sultat " in run_eval(folder, *arguments)
    assert list(json.loads((folder / "n.json").read_text())) == ["r\\udce9sultat"]
    assert (folder / "c.png").stat().st_size > 1000


def test_script_pictures_errors(annotations, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for frame_id in FRAMES[:3]:
        for modality in ("visible", "lwir"):
            path = image_path(tmp_path / "root", frame_id, modality)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (512, 640, 3), np.uint8)).save(path)
    (tmp_path / "a.txt").write_text("1,300,100,40,100,0.9\n2,100,100,40,100,0.8\n")
    common = ("--detections", "a.txt", "--annotations", annotations, "--show-errors", 4)
    run_main(monkeypatch, *common, "--data-root", "root")
    assert "2 of 10 images are missing" in capsys.readouterr().out
    with Image.open(tmp_path / "errors.png") as image:
        assert image.size[0] > 1000 and image.size[1] > 300
        assert (255, 0, 0) in [colour for _, colour in image.convert("RGB").getcolors(1 << 24)]
    with pytest.raises(InputError, match="all images are missing"):
        run_main(monkeypatch, *common, "--data-root", "nowhere")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--detections", "none.txt"], "none.txt"),
        (["--detections", "bad.txt"], "bad.txt:2: "),
        (["--detections", "good.txt", "--image-list", "no-list.txt"], "no-list.txt"),
        (["--detections", "good.txt", "--subset", "road"], "road"),
        (["--detections", "good.txt", "good.txt"], "twice"),
        (["--detections", "good.txt", "--out", "curves.doc"], "curves.doc"),
        (["--detections", "good.txt", "--out", "none/curves.png"], "no such folder"),
        (["--detections", "good.txt", "--show-errors", "3"], "--data-root"),
        (["--detections", "good.txt", "--bootstrap", "-1"], "--bootstrap"),
        (["--detections", "good.txt", "--bogus"], "--bogus"),
    ],
)
def test_script_names_what_is_wrong(annotations, tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.txt").write_text("1,100,100,40,100,0.9\n")
    (tmp_path / "bad.txt").write_text("1,100,100,40,100,0.9\n1,2\n")
    with pytest.raises(InputError, match=re.escape(word)):
        run_main(monkeypatch, *arguments, "--annotations", annotations)


def test_script_fails_in_one_line(annotations, tmp_path):
    (tmp_path / "bad.txt").write_text("1,100,100,40,100,0.9\n1,2\n")
    error = run_eval(tmp_path, "--detections", "bad.txt", "--annotations", annotations, code=2)
    assert error.startswith("error: bad.txt:2: ") and len(error.splitlines()) == 1


def test_script_on_real_files(reference, tmp_path):
    results = reference / "results"
    files = [
        results / name for name in ("MLPD_result.txt", "MLPD_result.json", "URP2024_prediction_example.json")
    ]
    annotations = reference / "annotations" / "KAIST_annotation.json"
    out = run_eval(tmp_path, "--detections", *files, "--annotations", annotations, "--json", "n.json")
    assert "not count 103 of 1455 people: it gives 27.33, and 32.65 is right" in out
    assert re.search(r"MLPD_result.txt +7\.58 +7\.95 +6\.95 +96\.70 +7\.58 +7\.96 +6\.95", out)
    numbers = json.loads((tmp_path / "n.json").read_text())
    references = json.loads((results / "reference.json").read_text())
    for name in numbers:  # others' are in test_miss_rate
        expected = references[name]
        for setup, official in expected["official"]["setups"].items():
            ours = numbers[name]["official"][setup]
            assert ours["miss_rate"] == pytest.approx(official["miss_rate"], rel=0, abs=1e-12)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system")
def test_a_pipe_in_place_of_the_companion_is_refused(tmp_path):
    """Without it the ids could mean other frames."""
    (tmp_path / "x.txt").write_text("1,1,2,3,4,0.5\n")
    os.mkfifo(tmp_path / "x.frames.txt")
    with pytest.raises(InputError, match="x.frames.txt: it is a pipe"):
        read_detections(tmp_path / "x.txt", ["set06/V000/I00000"])
