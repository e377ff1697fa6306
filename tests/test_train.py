"""Training runs: the three commands, resuming, and failures."""

import io
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import detect
import eval as eval_script
import train
from engine.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from engine.run import Run
from kaist import files
from kaist.files import InputError
from model import build_model
from utils import open_network

PROJECT = Path(train.__file__).parent
QUICK = (
    "--checkpoints checkpoints --name custom --batch-size 4 --workers 0 --width 0.0625 --device cpu "
    "--precision fp32 --epochs 2 --eval-every 1"
).split()


@pytest.fixture
def start(demo_root, tmp_path, monkeypatch, undrawn):
    """A function that runs train.main() with some flags in a new folder."""
    monkeypatch.chdir(tmp_path)

    def start(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", "--data-root", str(demo_root), *QUICK, *flags])
        train.main()

    return start


def run_script(name, *arguments, cwd):
    command = [sys.executable, str(PROJECT / name), *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


def test_the_three_commands(demo_root, tmp_path, monkeypatch, capsys):
    """eval.py and detect.py run in this process; other tests start them as subprocesses."""
    done = run_script("train.py", "--data-root", demo_root, *QUICK, "--epochs", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    bars = [line for line in re.split("[\r\n]", done.stderr) if "left, " in line]
    assert bars and all(re.search(r" left, \d+ img/s, loss \d", bar) and len(bar) <= 80 for bar in bars)
    assert "epoch 1/1: loss" in done.stdout and "next: python eval.py" in done.stdout
    folder = tmp_path / "checkpoints" / "custom"
    assert {p.name for p in folder.iterdir()} >= {
        "config.json",
        "log.csv",
        "last.pt",
        "best.pt",
        "detections.txt",
        "curves.png",
        "miss_rate.png",
    }
    header, *rows = (folder / "log.csv").read_text().splitlines()
    columns = header.split(",")
    assert columns[:7] == ["epoch", "loss", "loc", "conf", "seg", "seg_map1", "seg_map2"]
    assert {"lr", "images_per_s", "seconds", "miss_rate", "ap_map1", "ap_map2"} <= set(columns)
    assert len(rows) == 1

    table = [line for line in done.stdout.splitlines() if line.startswith("custom")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    eval_script.main()
    numbers = [line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.count(".") >= 8]
    assert numbers == [table[-1].split()[1:]]  # the same table as training printed

    image = demo_root / "images/set06/V000/visible/I00000.jpg"
    detect_main(monkeypatch, image, "--min-score", "0.01")
    assert "score" in capsys.readouterr().out
    assert (tmp_path / "detections/set06_V000_I00000.png").stat().st_size > 10_000


def test_an_interrupted_run_resumes_to_the_same_weights(start, monkeypatch):
    """Those of the network, their moving average, and those of the loss."""
    flags = ("--ema-decay", "0.9", "--seg-maps", "uncertainty")
    start("--checkpoints", "whole", *flags)
    add_step, steps = Run.add_step, []

    def interrupt(self, *arguments):
        steps.append(1)
        if len(steps) == 4:  # during the first step of the second epoch, of three steps
            signal.raise_signal(signal.SIGINT)
        add_step(self, *arguments)

    monkeypatch.setattr(Run, "add_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        start("--checkpoints", "halves", *flags)
    half = load_checkpoint(Path("halves/custom/last.pt"))
    assert (half["epoch"], half["step"]) == (1, 1)
    known = Path("halves/custom/config.json")  # with a constant of older versions
    known.write_text(json.dumps(json.loads(known.read_text()) | {"loader": "auto"}))
    start("--checkpoints", "halves", *flags)
    whole, halves = (load_checkpoint(Path(f"{n}/custom/last.pt")) for n in ("whole", "halves"))
    parts = ("model", "raw_model")  # moving average and raw weights
    assert whole["criterion"].keys() == halves["criterion"].keys() != set()
    for part in (*parts, "criterion"):
        assert all(torch.equal(value, halves[part][key]) for key, value in whole[part].items())
    assert not torch.equal(*(whole[part]["loc_heads.0.weight"] for part in parts))
    assert len(halves["history"]) == 2
    for a, b in zip(whole["history"], halves["history"], strict=True):
        assert a["loss"] == b["loss"] and a["miss_rate"] == b["miss_rate"]
    assert not Path("halves/custom-2").exists()


def test_every_part_with_a_state_is_saved_and_needed_to_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Namespace(checkpoints="runs", epochs=2, batch_size=1, seed=0)

    def new_run(**more):
        layer = torch.nn.Linear(1, 1)
        optimizer = torch.optim.Adam(layer.parameters())
        run = Run(config, "x", {})
        parts = {"model": layer, "optimizer": optimizer, "criterion": torch.nn.L1Loss()}
        run.restore({**parts, **more})
        return run

    run = new_run(ema=torch.nn.Linear(1, 1))
    run.terms = ("loss", "loc", "conf", "seg")
    run.start()
    run.add_step(torch.ones(4), 1.0)
    rates = ("miss_rate", "miss_rate_day", "miss_rate_night", "recall")
    run.end_epoch(dict.fromkeys(rates, 0.5))
    run.unlock()
    again = new_run(ema=torch.nn.Linear(1, 1))
    assert again.folder == run.folder and again.epoch == 1
    assert torch.equal(again.parts["ema"].weight, run.parts["ema"].weight)
    best = load_checkpoint(Path("runs/x/best.pt"))
    assert {"model", "criterion", "ema"} <= best.keys() and "optimizer" not in best
    with pytest.raises(InputError, match="last.pt: it does not hold the state of 'teacher'"):
        new_run(teacher=torch.nn.Linear(1, 1))


def test_compile_on_compiles_both_networks(start, monkeypatch):
    """The one that trains and the one that is evaluated."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    start("--epochs", "1", "--compile", "on")
    assert len(compiled) == 2
    assert load_checkpoint(Path("checkpoints/custom/last.pt"))["epoch"] == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no more"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),  # cuDNN
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_an_out_of_memory_error_names_what_to_lower(start, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(train.Criterion, "forward", full)
    with pytest.raises(InputError, match=r"BATCH_SIZE = \d+ does not fit .*; lower BATCH_SIZE"):
        start()
    last = load_checkpoint(Path("checkpoints/custom/last.pt"))
    assert (last["epoch"], last["step"]) == (0, 0)


def test_a_finished_or_other_run_is_never_overwritten(start, capsys):
    start("--epochs", "1")
    before = Path("checkpoints/custom/last.pt").read_bytes()
    start("--epochs", "1")
    printed = capsys.readouterr().out
    assert "checkpoints/custom is finished; starting a new run" in printed
    assert "run: checkpoints/custom-2, epoch 1 of 1" in printed
    start("--epochs", "1", "--lr", "1e-5")
    assert Path("checkpoints/custom/last.pt").read_bytes() == before
    assert Path("checkpoints/custom-2/last.pt").exists()
    assert Path("checkpoints/custom-3/last.pt").exists()


def test_a_nonfinite_loss_stops_the_run_and_saves_its_frames(start, monkeypatch):
    forward = train.Criterion.forward
    monkeypatch.setattr(train.Criterion, "forward", lambda *a: forward(*a) * float("nan"))
    with pytest.raises(InputError, match="not a finite number"):
        start()
    [evidence] = Path("checkpoints/custom").glob("nonfinite-*.json")
    content = json.loads(evidence.read_text())
    assert len(content["frames"]) == 4 and content["losses"]["conf"] == "nan"


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_skip_counts_and_skips_nonfinite_steps(start, monkeypatch, where):
    forward, calls = train.Criterion.forward, []

    def poison(*arguments):
        losses = forward(*arguments)
        calls.append(1)
        if len(calls) != 2:
            return losses
        if where == "gradient":  # the gradient of a square root at 0
            return losses + (0 * losses).sqrt()
        return losses * float("inf")

    monkeypatch.setattr(train.Criterion, "forward", poison)
    start("--on-nonfinite", "skip")
    state = load_checkpoint(Path("checkpoints/custom/last.pt"))
    assert all(value.isfinite().all() for value in state["model"].values())
    assert [row["skipped"] for row in state["history"]] == [1, 0]
    assert all(math.isfinite(row["loss"]) for row in state["history"])
    [evidence] = Path("checkpoints/custom").glob("nonfinite-*.json")
    assert json.loads(evidence.read_text())["step"] == 2


def test_skip_stops_after_too_many_nonfinite_steps(start, monkeypatch):
    forward = train.Criterion.forward
    monkeypatch.setattr(train.Criterion, "forward", lambda *a: forward(*a) * float("nan"))
    monkeypatch.setattr(train, "MAX_NONFINITE_STEPS", 2)
    with pytest.raises(InputError, match="step2-rank0.json.*not a finite number"):
        start("--on-nonfinite", "skip")


def test_a_too_high_learning_rate_leaves_finite_weights(start):
    with pytest.raises(InputError, match="lower LR"):
        start("--optimizer", "sgd", "--lr", "1e6", "--schedule", "constant", "--no-batch-norm")
    state = load_checkpoint(Path("checkpoints/custom/last.pt"))
    assert all(value.isfinite().all() for value in state["model"].values())


def test_held_out_videos_are_evaluated_and_the_test_list_is_reported(start, monkeypatch, demo_root, capsys):
    watched = []
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda p, d: watched.append(p) or evaluate(p, d))
    start("--epochs", "1", "--validation", "0.34")
    [people] = watched
    videos = sorted({frame[:10] for frame in people.frames})
    assert len(people.frames) == 4 and videos[0] < "set03" < videos[1] < "set06"  # one of day, one of night
    frames = Path("checkpoints/custom/detections.frames.txt").read_text().split()
    assert frames == (demo_root / "imageSets/test-all.txt").read_text().split()
    assert "the best epoch is chosen on held-out videos: set0" in capsys.readouterr().out
    Path("one.txt").write_text("set00/V000/I00000\nset00/V000/I00019\n")
    with pytest.raises(InputError, match="VALIDATION = 0.5 holds out whole videos"):
        start("--validation", "0.5", "--train-list", "one.txt")


def test_the_best_epoch_on_held_out_videos_is_reported(start, monkeypatch, demo_root):
    rates = iter([0.1, 0.9])
    headline, detect_frames, used = train.headline, train.detect_frames, []
    monkeypatch.setattr(train, "headline", lambda results: headline(results) | {"miss_rate": next(rates)})

    def note(model, *rest, **settings):
        used.append({key: value.clone() for key, value in model.state_dict().items()})
        return detect_frames(model, *rest, **settings)

    monkeypatch.setattr(train, "detect_frames", note)
    start("--epochs", "2", "--eval-every", "1", "--validation", "0.34")
    best, last = (
        load_checkpoint(Path("checkpoints/custom") / f"{name}.pt")["model"] for name in ("best", "last")
    )
    first, second, reported = used
    assert all(torch.equal(reported[key], best[key]) for key in best)
    assert all(torch.equal(first[key], best[key]) and torch.equal(second[key], last[key]) for key in best)
    assert any(not torch.equal(best[key], last[key]) for key in best)


def test_a_run_with_damaged_checkpoints_is_not_overwritten(start, capsys):
    start("--epochs", "1")
    paths = [Path("checkpoints/custom") / name for name in ("last.pt", "previous.pt")]
    for path in paths:
        path.write_bytes(path.read_bytes()[:5000])
    Path("checkpoints/custom/miss_rate.json").unlink()  # as if the run were unfinished
    start("--epochs", "1")
    printed = capsys.readouterr().out
    assert all(f"warning: {path}: not a readable" in printed for path in paths)
    assert all(path.stat().st_size == 5000 for path in paths)
    assert Path("checkpoints/custom-2/miss_rate.json").exists()


def test_a_run_killed_before_its_report_writes_it_when_resumed(start, capsys):
    start("--epochs", "1")
    weights = Path("checkpoints/custom/last.pt").read_bytes()
    Path("checkpoints/custom/miss_rate.json").unlink()
    start("--epochs", "1")
    assert Path("checkpoints/custom/miss_rate.json").exists()
    before, after = torch.load(io.BytesIO(weights)), load_checkpoint("checkpoints/custom/last.pt")
    assert all(torch.equal(before["model"][key], after["model"][key]) for key in after["model"])


def test_an_evaluation_on_other_data_keeps_the_runs_own(start, monkeypatch, demo_root):
    start("--epochs", "1")
    folder = Path("checkpoints/custom")
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".txt", ".png")}
    day = demo_root / "imageSets/test-day.txt"
    monkeypatch.setattr(sys, "argv", ["eval.py", "--image-list", str(day)])
    eval_script.main()
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    assert (folder / "detections-test-day.txt").exists()
    assert (folder / "miss_rate-test-day.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-root", "nowhere"], "nowhere: no such folder.*DATA_ROOT"),
        (["--train-list", "imageSets/none.txt"], "none.txt: image list not found.*train-all.txt"),
        (["--annotations", "xml"], "looked for annotations-xml-new"),
        (["--device", "cuda:77"], "DEVICE = 'cuda:77'"),
        (["--min-height", "500"], "has a person to train on"),
    ],
)
def test_bad_input_is_refused_before_training(start, flags, message):
    with pytest.raises(InputError, match=message):
        start(*flags)
    assert not Path("checkpoints").exists()


def test_bad_input_gives_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    done = run_script("train.py", "--experiment", "99", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    monkeypatch.chdir(tmp_path)
    for script, arguments in ((eval_script, ["--checkpoint", "none.pt"]), (detect, ["none.jpg"])):
        monkeypatch.setattr(sys, "argv", ["a script", *arguments])
        with pytest.raises(SystemExit) as end:
            files.run_script(script.main)
        printed = capsys.readouterr().err
        assert end.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1


def test_foreign_checkpoints_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    for content in (b"", b"nonsense"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="x.pt: not a readable checkpoint"):
            load_checkpoint(path)
    torch.save({"model": {}}, path)
    with pytest.raises(InputError, match="not a checkpoint of this project"):
        load_checkpoint(path)
    torch.save(torch.nn.Linear(1, 1), path)  # a pickled object
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_checkpoint(path)
    with pytest.raises(InputError, match="checkpoint not found"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(InputError, match="no run with a checkpoint"):
        newest_checkpoint(tmp_path)


def test_a_newer_unfinished_run_is_named(tmp_path, capsys):
    for name, moment in (("done", 1000), ("begun", 2000)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text('{"epochs": 1}')
        (folder / "last.pt").touch()
        os.utime(folder / "last.pt", (moment, moment))
    (tmp_path / "done/log.csv").write_text("epoch\n1\n")
    (tmp_path / "done/miss_rate.json").touch()
    assert newest_checkpoint(tmp_path) == tmp_path / "done/last.pt"
    assert f"note: {tmp_path / 'begun'} is newer, but not finished" in capsys.readouterr().out
    os.utime(tmp_path / "done/last.pt", (3000, 3000))
    assert newest_checkpoint(tmp_path) == tmp_path / "done/last.pt"
    assert not capsys.readouterr().out


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of an untrained early-fusion network."""
    config = train.configure(["--width", "0.0625"])
    model = train.make_network(**train.model_arguments(config))
    path = tmp_path / "untrained.pt"
    save_checkpoint(
        path,
        {"model_args": train.model_arguments(config), "config": vars(config), "model": model.state_dict()},
    )
    return path


def test_rebuilding_a_checkpoint_downloads_nothing(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", pytest.fail)
    content = load_checkpoint(checkpoint)
    model = build_model(content)
    assert torch.equal(model.state_dict()["to_conv4_3.0.weight"], content["model"]["to_conv4_3.0.weight"])


@contextmanager
def more_memory(most):
    """Limit the address space to what this process uses plus some bytes."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux has /proc/self/statm")
@pytest.mark.parametrize(
    "change",
    [
        *({"width": width} for width in (40.0, 1e9, "x", float("nan"))),
        *({"size": size} for size in ((10_000, 10_000), (100_000, 300), (0, 0), "ab")),
        *({"infusion": infusion} for infusion in ([1] * 10**6, 8, [2] * 6)),
        *({"pixel_mean": [0.5]}, {"width": torch.zeros(2)}),
        *({"prior_set": "../x"}, {"input_mode": None}, {"network": "x"}, {"more": 1}),
    ],
)
def test_a_checkpoint_with_wrong_model_args_takes_no_memory(checkpoint, change):
    content = load_checkpoint(checkpoint)
    content["model_args"] |= change
    save_checkpoint(checkpoint, content)
    with more_memory(2**30), pytest.raises(InputError):
        open_network(checkpoint, torch.device("cpu"))


def test_weights_and_epochs_of_wrong_types_are_refused(checkpoint):
    content = load_checkpoint(checkpoint)
    key = "conv4_3_norm.scale"
    scale = content["model"][key]
    for changed in (
        {"epoch": "x"},
        *({"model": {**content["model"], key: value}} for value in (1, None, scale.to_sparse(), scale + 0j)),
        *({"model": {**content["model"], key: value}} for value in (scale.to("meta"), scale[:, None])),
        {"model": {1: scale}},
        {"model": {}},
    ):
        torch.save({**content, **changed}, checkpoint)
        with pytest.raises(InputError, match="not a checkpoint of this project|do not fit"):
            open_network(checkpoint, torch.device("cpu"))


def detect_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["detect.py", *map(str, arguments)])
    detect.main()


def test_detect_takes_a_folder_of_either_modality(checkpoint, demo_root, tmp_path, monkeypatch):
    for modality in ("visible", "lwir"):
        out = tmp_path / modality
        detect_main(
            monkeypatch, demo_root / f"images/set06/V000/{modality}", "--checkpoint", checkpoint, "--out", out
        )
        images = sorted((demo_root / "images/set06/V000" / modality).iterdir())
        assert len(list(out.glob("*.png"))) == len(images)
        assert (out / "detections.csv").read_text().startswith("image,x,y,w,h,score")
