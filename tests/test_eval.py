"""eval.py: tables, pictures, output files, and bad flags."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch

import eval as eval_script
import train
from engine.checkpoint import save_checkpoint
from engine.curves import draw_curves as draw_run
from kaist.annotations import read_image_list
from kaist.error_sheet import order_across_videos
from kaist.files import InputError
from kaist.images import MEAN_COLOUR, black_out, read_frame
from kaist.miss_rate import GroundTruth, load_ground_truth
from kaist.report import draw_curves, measure_ties, print_scores, score
from kaist.results import Detections, read_detections

PROJECT = Path(__file__).parent.parent
DAY, NIGHT = "set06/V000/I00000", "set09/V000/I00000"
BOX = [100.0, 100.0, 40.0, 100.0]


def people(frames, n=1):
    """Frames with n people each, 100 pixels apart."""
    frame = np.repeat(np.arange(len(frames)), n)
    boxes = np.array([[x, 100.0, 40.0, 100.0] for x in 100.0 + 100 * np.arange(n)] * len(frames))
    zeros = np.zeros(len(frame), np.int64)
    return GroundTruth(tuple(frames), frame, boxes, zeros, zeros.astype(bool))


def detections(frame, boxes, scores):
    return Detections(
        np.array(frame, np.int64), np.array(boxes, float).reshape(-1, 4), np.array(scores, float)
    )


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved; their files have dummy content."""
    kept = []

    def keep(figure, path, **_):
        figure.canvas.draw()
        kept.append(figure)
        Path(path).write_bytes(b"picture")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return kept


@pytest.fixture
def save(tmp_path, demo_root):
    """A function that saves a checkpoint of an untrained network, at epoch 1 of 2 by default."""

    def save(*flags, epoch=1):
        flags = ["--width", "0.0625", "--epochs", "2", "--workers", "0", "--device", "cpu", *flags]
        config = train.configure(["--data-root", str(demo_root), *flags])
        arguments = train.model_arguments(config)
        model = train.make_network(**arguments).state_dict()
        path = tmp_path / "run" / "last.pt"
        path.parent.mkdir(exist_ok=True)
        content = {"model_args": arguments, "config": vars(config), "model": model, "epoch": epoch}
        save_checkpoint(path, content)
        return path

    return save


@pytest.fixture
def run(monkeypatch, tmp_path, undrawn):
    """A function that runs eval.py in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        eval_script.main()

    return run


# ------------------------------------------------------------------- tables


def test_the_table_has_counts_and_a_warning_for_few_people(capsys):
    frames = [f"set06/V000/I{i:05}" for i in range(30)] + [NIGHT]
    print_scores([score("x", people(frames, 2), detections([0], [BOX], [1.0]))])
    printed = capsys.readouterr().out
    assert "31 frames, 62 people count (60 day, 2 night)" in printed
    assert "warning: few people count, 2 (night)" in printed


def test_missing_occlusion_labels_are_noted(capsys):
    truth = people([DAY], 2)
    print_scores([score("x", truth, detections([0], [BOX], [1.0]))])
    assert (
        "nobody is labelled as occluded, so everyone of at least 55 pixels counts" in capsys.readouterr().out
    )
    truth = replace(truth, occlusion=np.array([0, 1]))
    print_scores([score("x", truth, detections([0], [BOX], [1.0]))])
    assert "occluded" not in capsys.readouterr().out


def test_a_setup_without_frames_is_in_no_table_and_no_curve(capsys, figures, tmp_path):
    scores = [score("x", people([NIGHT]), detections([0], [BOX], [1.0]))]
    print_scores(scores, all_setups=True)
    printed = capsys.readouterr().out
    assert "night" in printed and "Reasonable-day" not in printed and " day " not in printed.splitlines()[2]
    draw_curves(scores, tmp_path / "a.png")
    [panel] = figures[0].axes
    assert panel.get_title().startswith("night: x ") and "1 person" in panel.get_title()


def test_ties_that_change_the_miss_rate_are_noted():
    """Two boxes have the same score. In file order the true positive is first; reversed, it is second."""
    truth = people([DAY, NIGHT])
    good, bad = BOX, [300.0, 100.0, 40.0, 100.0]
    found = detections([0, 0, 1], [good, bad, good], [0.9, 0.9, 0.8])
    share, reverse = measure_ties(truth, found)
    reordered = detections([0, 0, 1], [bad, good, good], [0.9, 0.9, 0.8])
    rates = [score("x", truth, d).official["Reasonable-all"].miss_rate for d in (found, reordered)]
    assert share == 0.5 and reverse == pytest.approx(rates[1]) and rates[0] < rates[1]
    assert any("50.0% of the frames have equal scores" in note for note in score("x", truth, found).notes)
    alone = detections([0, 0, 1], [good, bad, good], [0.9, 0.85, 0.8])
    assert measure_ties(truth, alone)[0] == 0
    assert not any("equal" in note for note in score("x", truth, alone).notes)


def test_a_file_without_low_scores_is_noted():
    truth = people([DAY, NIGHT])
    for least, told in ((0.3, True), (0.1, False)):
        notes = score("x", truth, detections([0, 1], [BOX, BOX], [0.9, least])).notes
        assert any("no score is below" in note for note in notes) is told


# ------------------------------------------------------------------- pictures


def test_curves_end_level_at_the_right_border(figures, tmp_path):
    """200 false positives per frame exceed the last FPPI shown; the line never turns back."""
    truth = people([DAY, NIGHT], 2)
    false = np.tile([400.0, 300, 40, 100], (200, 1))
    found = detections(np.repeat([0, 1], 200), np.vstack([false, false]), np.linspace(1, 0.1, 400))
    draw_curves([score("a", truth, found), score("b", truth, found)], tmp_path / "a.png")
    assert len(figures[0].axes) == 3
    for panel in figures[0].axes:
        for line in panel.lines:
            x = line.get_xdata()
            assert (np.diff(x) >= 0).all() and x.max() <= 10
        axes_box, legend_box = panel.get_window_extent(), panel.get_legend().get_window_extent()
        assert legend_box.y1 <= axes_box.y0  # outside of the curves


def test_curves_of_a_run_have_markers_and_integer_epochs(figures, tmp_path):
    row = {"epoch": 1.0, "loss": 3.0, "loc": 1.0, "conf": 2.0, "seg": 0.1, "lr": 1e-3}
    rates = {"miss_rate": 0.5, "miss_rate_day": 0.6, "miss_rate_night": 0.4, "recall": 0.9, "iou_map1": 0.2}
    for log in ([row], [row | rates], [row | {"epoch": e} | rates for e in (1.0, 2.0, 3.0)]):
        draw_run(log, "mine", tmp_path / "a.png")
    for figure in figures:
        assert "mine" in figure.get_suptitle() and len(figure.axes) == 4
        for panel in figure.axes:
            assert panel.get_title()
            assert all(line.get_marker() == "o" for line in panel.lines)
            assert all(tick == int(tick) for tick in panel.get_xticks())
    assert "best miss rate 50.00% (epoch 1)" in figures[1].get_suptitle()
    assert [len(panel.lines) for panel in figures[0].axes] == [4, 0, 0, 1]
    assert [len(panel.lines) for panel in figures[1].axes] == [4, 3, 2, 1]


def test_the_error_sheet_alternates_between_videos():
    frames = [f"set06/V000/I{i:05}" for i in range(5)] + ["set06/V001/I00000", NIGHT]
    order = order_across_videos(people(frames), np.arange(7), np.array([0, 1, 2, 3, 5, 4, 6]))
    assert order.tolist() == [0, 1, 5, 6, 2, 3, 4]


# ------------------------------------------------------------------- a checkpoint


def test_the_network_sees_only_the_subset(run, save, capsys):
    path = save(epoch=2)
    run("--checkpoint", path, "--subset", "night", "--json", "n.json")
    printed = capsys.readouterr().out
    assert "3 frames" in printed and "(0 day" in printed and "numbers: n.json" in printed
    assert "rows of frames" not in printed
    frames = path.with_name("detections-night.frames.txt").read_text().split()
    assert len(frames) == 3 and all(frame.startswith(("set09", "set10", "set11")) for frame in frames)
    assert path.with_name("miss_rate-night.png").exists()
    [content] = json.loads(Path("n.json").read_text()).values()
    assert content["official"]["Reasonable-all"]["n_frames"] == 3


def test_files_of_an_unfinished_run_have_the_epoch_in_their_names(run, save, capsys):
    path = save(epoch=1)
    run("--checkpoint", path)
    assert "epoch 1 of 2" in capsys.readouterr().out
    assert sorted(p.name for p in path.parent.iterdir()) == [
        *("detections-epoch1.frames.txt", "detections-epoch1.txt", "last.pt", "miss_rate-epoch1.png")
    ]


def test_files_of_best_pt_have_its_name(run, save):
    path = save(epoch=2)
    run("--checkpoint", path.rename(path.with_name("best.pt")))
    assert path.with_name("detections-best.txt").exists() and not path.with_name("detections.txt").exists()


def test_a_read_only_folder_still_gives_a_table(run, save, capsys, monkeypatch):
    path = save(epoch=2)
    monkeypatch.setattr(os, "access", lambda *_: False)
    run("--checkpoint", path)
    printed = capsys.readouterr().out
    assert "\nrun " in printed and "is read-only" in printed
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]
    run("--checkpoint", path, "--out", "curves.png")
    assert Path("curves.png").exists()


def test_folders_of_the_repository_are_found_from_another_folder(run, save, tmp_path, monkeypatch, capsys):
    path = save("--data-root", "data", epoch=2)
    monkeypatch.setattr("engine.config.ROOT", tmp_path)
    (tmp_path / "data").symlink_to(path.parent)  # not a KAIST root; its path is in the error
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(InputError, match=str(tmp_path / "data")):
        run("--checkpoint", path)


# ------------------------------------------------------------------- blackouts


@pytest.mark.parametrize(
    ("blackout", "dark", "light"),
    [
        ("sides-a", {"visible": (9, 600), "lwir": (9, 10)}, {"visible": (9, 10), "lwir": (9, 600)}),
        ("sides-b", {"visible": (9, 10), "lwir": (9, 600)}, {"visible": (9, 600), "lwir": (9, 10)}),
        ("surroundings", {"lwir": (95, 320)}, {"visible": (95, 320), "lwir": (96, 320)}),
        ("surroundings", {"lwir": (200, 520)}, {"lwir": (200, 519)}),
    ],
)
def test_blackouts_by_hand(blackout, dark, light):
    frame = np.full((512, 640, 4), 7, np.uint8)
    out = black_out(frame, blackout, MEAN_COLOUR)
    channels = {"visible": slice(3), "lwir": slice(3, 4)}
    for modality, (y, x) in dark.items():
        assert (out[y, x, channels[modality]] == MEAN_COLOUR[channels[modality]]).all()
    for modality, (y, x) in light.items():
        assert (out[y, x, channels[modality]] == 7).all()
    assert (frame == 7).all()


def test_blackouts_of_a_network(run, save, demo_root, capsys):
    frame_id = read_image_list(demo_root / "imageSets/test-all.txt")[0]
    whole, half = (read_frame(demo_root, frame_id, "early", b) for b in ("", "sides-a"))
    assert (whole[:, :320, :3] == half[:, :320, :3]).all() and (half[:, 320:, 0] == MEAN_COLOUR[0]).all()
    path = save("--input-mode", "early", epoch=2)
    texts = {}
    for name in ("visible", "sides-a", "surroundings"):
        run("--checkpoint", path, "--blackout", name)
        texts[name] = path.with_name(f"detections-without-{name}.txt").read_text()
    run("--checkpoint", path, "--without", "visible")
    assert path.with_name("detections-without-visible.txt").read_text() == texts["visible"]
    assert len(set(texts.values())) == 3
    assert "was not trained to work without sides-a" in capsys.readouterr().out
    with pytest.raises(InputError, match="has a single modality"):
        run("--checkpoint", save("--input-mode", "lwir"), "--blackout", "sides-b")
    with pytest.raises(InputError, match="not allowed with"):
        run("--without", "lwir", "--blackout", "sides-b")


# ------------------------------------------------------------------- result files


def test_result_files_need_numpy_alone(tmp_path):
    """Without torch, Pillow, matplotlib and tqdm there is a table, and a note instead of the picture."""
    block = tmp_path / "block"
    block.mkdir()
    for name in ("torch", "torchvision", "PIL", "matplotlib", "tqdm"):
        (block / f"{name}.py").write_text(f"raise ModuleNotFoundError('none', name={name!r})")
    folder = tmp_path / "annotations/set06/V000"
    folder.mkdir(parents=True)
    (folder / "I00000.txt").write_text("% bbGt version=3\nperson 100 100 40 100 0 0 0 0 0 0 0\n")
    (tmp_path / "list.txt").write_text(f"{DAY}\n")
    (tmp_path / "a.txt").write_text("1,100,100,40,100,0.9\n")
    command = [sys.executable, PROJECT / "eval.py", "--detections", "a.txt", "--annotations", "."]
    done = subprocess.run(
        [*command, "--image-list", "list.txt", "--json", "n.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(block)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "note: no picture was drawn: matplotlib is not installed" in done.stdout
    assert "1 person counts" in done.stdout
    ap = "AP 100.00, AP50 100.00, AP75 100.00, AP small –, AP medium 100.00, AP large –"
    assert f"COCO (%) a: {ap}" in done.stdout
    assert json.loads((tmp_path / "n.json").read_text())["a"]["coco"]["AP small"] is None


def test_result_files_get_unique_names(run, tmp_path, capsys, demo_root):
    frames = read_image_list(demo_root / "imageSets/test-all.txt")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "detections.txt").write_text("1,100,100,40,100,0.9\n")
        (tmp_path / folder / "detections.frames.txt").write_text("\n".join(frames))
    run("--detections", "a/detections.txt", "b/detections.txt", "--annotations", demo_root)
    printed = capsys.readouterr().out
    assert "\na_detections " in printed and "\nb_detections " in printed
    truth = load_ground_truth(demo_root, frames)
    assert len(read_detections(tmp_path / "a/detections.txt", truth.frames).scores) == 1


@pytest.fixture
def result(demo_root, tmp_path):
    """A result file for the demo set, with its .frames.txt file."""
    path, frames = tmp_path / "mine.txt", read_image_list(demo_root / "imageSets/test-all.txt")
    path.write_text("1,100,100,40,100,0.9\n")
    path.with_suffix(".frames.txt").write_text("\n".join(frames))
    return path


def test_input_files_are_not_overwritten(run, result, demo_root):
    copy = result.with_name("people.json")
    copy.write_bytes((demo_root / "KAIST_annotation.json").read_bytes())
    held = {path: path.read_bytes() for path in (result, result.with_suffix(".frames.txt"), copy)}
    for path in held:
        with pytest.raises(InputError, match="would be overwritten; choose another place"):
            run("--detections", result, "--annotations", copy, "--json", path)
    for name in ("", "."):
        with pytest.raises(InputError, match="is not a file name"):
            run("--detections", result, "--annotations", copy, "--json", name)
    assert all(path.read_bytes() == content for path, content in held.items())


def test_frame_lists_among_the_result_files_are_ignored(run, result, demo_root, capsys):
    run("--detections", *sorted(result.parent.glob("*.txt")), "--annotations", demo_root)
    assert "note: ignored 1 lists of frames (.frames.txt)" in capsys.readouterr().out
    with pytest.raises(InputError, match="mine.frames.txt: a list of frames, .*; name the result file"):
        run("--detections", result.with_suffix(".frames.txt"), "--annotations", demo_root)


def test_flags_without_effect_are_refused(run, result):
    with pytest.raises(InputError, match="--compare takes no --subset"):
        run("--compare", "a", "b", "--by-video", "--subset", "night")
    with pytest.raises(InputError, match="--data takes no --image-list, --annotations or --kaist"):
        run("--detections", result, "--data", "pairs.json", "--image-list", "list.txt")
    with pytest.raises(InputError, match="--data takes no --image-list, --annotations or --kaist"):
        run("--detections", result, "--data", "pairs.json", "--kaist", "root")


def test_data_root_dot_gives_other_file_names_than_the_runs_own(run, save, demo_root, monkeypatch):
    path = save(epoch=2)
    monkeypatch.chdir(demo_root)
    run("--checkpoint", path, "--data-root", ".")
    assert not path.with_name("detections.txt").exists()
    assert path.with_name(f"detections-{demo_root.name}.txt").exists()


def test_a_compiled_network_gives_the_same_detections(run, save, monkeypatch):
    """With the eager backend, because compiling kernels takes minutes."""
    compiled, compile_by = [], torch.compile

    def trace(model, **_):
        compiled.append(model)
        return compile_by(model, backend="eager", dynamic=False)

    monkeypatch.setattr(torch, "compile", trace)
    path, scores = save("--no-test-flip"), []
    for choice in ("off", "on"):
        run("--checkpoint", path, "--compile", choice)
        [result] = path.parent.glob("detections*[0-9t].txt")
        scores.append(np.sort(np.loadtxt(result, delimiter=",", ndmin=2)[:, 5]))
        result.unlink()
    assert len(compiled) == 1
    np.testing.assert_allclose(*scores, atol=1e-3)
