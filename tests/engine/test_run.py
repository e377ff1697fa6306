"""Runs survive kills at any moment, damaged files, full disks and dead workers."""

import csv
import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import datasets
import train
import utils
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.config import pick
from engine.run import Run, load_resumable
from kaist.files import InputError
from kaist.frames import FRAME_KEYS, split_frames
from kaist.sources import TRAIN_SET_KEYS, open_training
from ssd.augment import Augmentation
from tests.nursery import wait_for

PROJECT = Path(train.__file__).parent
QUICK = (
    "--checkpoints checkpoints --name custom --batch-size 2 --workers 0 --width 0.0625 --device cpu "
    "--precision fp32 --eval-every 1"
).split()
# When a run is killed: when it opens or renames a file of this name for the nth time ("later": counted
# after its first checkpoint). "half" truncates the file first, as an interrupted write would.
KILLS = [
    *("open config.json 1", "rename config.json 1 half", "open set00 1", "rename last.pt 1 half"),
    *("later set03 1", "rename last.pt 2 half", "later set06 1", "rename best.pt 1 half"),
    *("rename last.pt 3", "later set00 1", "rename last.pt 4 half", "later set06 2"),
    "rename detections.txt 1",
]


@pytest.fixture(scope="module")
def data(demo_root, tmp_path_factory):
    """Flags for a run of three short steps per epoch."""
    short = tmp_path_factory.mktemp("lists") / "short.txt"
    short.write_text("".join((demo_root / "imageSets/train-all.txt").open().readlines()[::2]))
    return ["--data-root", str(demo_root), "--train-list", str(short), *QUICK]


@pytest.fixture(scope="module")
def finished(nursery, data, tmp_path_factory):
    """The folder of a run of two epochs."""
    root = tmp_path_factory.mktemp("finished")
    nursery.run(*data, "--epochs", "2", "--checkpoints", root)
    return root / "custom"


def rows_of(folder):
    """log.csv without the columns that depend on time."""
    rows = list(csv.DictReader((folder / "log.csv").open()))
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in rows]


def assert_same(a, b):
    """Assert that all numbers in nested containers are equal, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        assert_same(list(a.values()), list(b.values()))
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


# ------------------------------------------------------------------------------ kills


@pytest.mark.timing
def test_a_run_killed_many_times_gives_the_same_results(nursery, data, tmp_path):
    flags = [*data, *"--epochs 5 --eval-every 2 --no-test-flip".split()]
    flags += ["--save-minutes", "1e-6"]  # a checkpoint after every step
    whole, killed = tmp_path / "whole/custom", tmp_path / "killed/custom"
    nursery.run(*flags, "--checkpoints", whole.parent, "--save-minutes", "0")
    unfinished = 0
    for kill in KILLS:
        nursery.start(*flags, "--checkpoints", killed.parent, kill=kill)
        assert nursery.end() == -signal.SIGKILL, f"the run ended before: {kill}"
        unfinished += any(killed.glob(".*.tmp"))
        if (killed / "last.pt").exists():
            load_checkpoint(killed / "last.pt")
    assert unfinished >= sum("half" in kill for kill in KILLS)
    nursery.run(*flags, "--checkpoints", killed.parent)

    assert rows_of(killed) == rows_of(whole) and len(rows_of(whole)) == 5
    for name in ("last.pt", "best.pt"):
        ours, theirs = load_checkpoint(killed / name), load_checkpoint(whole / name)
        for part in ("model", "optimizer", "epoch", "step", "sums"):
            if part in theirs:
                assert_same(ours[part], theirs[part])
    assert (killed / "detections.txt").read_text() == (whole / "detections.txt").read_text()
    assert not any(killed.glob(".*.tmp")) and os.listdir(killed.parent) == ["custom"]


def test_no_layer_samples_random_numbers():
    """So a checkpoint does not need the state of the random generator."""
    config = train.configure(["--width", "0.0625"])
    model = train.make_network(**train.model_arguments(config)).train()
    before = torch.get_rng_state()
    model(torch.zeros(2, 4, 300, 300, dtype=torch.uint8))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_that_fails_in_the_middle_is_not_saved(data, tmp_path, monkeypatch, undrawn):
    monkeypatch.setattr(sys, "argv", ["train.py", *data, "--epochs", "2", "--checkpoints", str(tmp_path)])
    step, steps = torch.optim.Adam.step, []

    def fail(self, *arguments):
        steps.append(1)
        step(self, *arguments)
        if len(steps) == 5:
            raise MemoryError

    monkeypatch.setattr(torch.optim.Adam, "step", fail)
    with pytest.raises(MemoryError):
        train.main()
    last = load_checkpoint(tmp_path / "custom/last.pt")
    assert (last["epoch"], last["step"]) == (1, 0)


def test_a_later_second_ctrl_c_does_not_wait(data, tmp_path):
    config = train.configure([*data, "--checkpoints", str(tmp_path)])
    run = Run(config, "custom", train.model_arguments(config))
    for _ in range(2):  # in quick succession: the step is completed first
        run.request_stop(signal.SIGINT, None)
    run.stop_time -= 4
    with pytest.raises(KeyboardInterrupt):
        run.request_stop(signal.SIGINT, None)


def test_previous_is_kept_without_hard_links_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    path, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for epoch in (1, 2, 3):
        content = {"config": {}, "model_args": {}, "model": {}, "epoch": epoch}
        save_checkpoint(path, content, previous=previous)
    assert [load_checkpoint(file)["epoch"] for file in (path, previous)] == [3, 2]


def test_ignored_signals_stay_ignored(data, tmp_path, monkeypatch):
    """Such as SIGHUP under nohup: closing the terminal does not stop the run."""
    config = train.configure([*data, "--checkpoints", str(tmp_path)])
    run = Run(config, "custom", train.model_arguments(config))
    monkeypatch.setattr(Run, "start", lambda self: None)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with run:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == run.request_stop
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.timing
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_many_signals_at_once_save_one_checkpoint_and_stop_the_run(nursery, data, tmp_path, number):
    flags = [*data, "--epochs", "50", "--checkpoints", tmp_path]
    child = nursery.start(*flags)
    wait_for(lambda: nursery.says("1/3"))
    for _ in range(6):
        os.kill(child, number)
        time.sleep(0.01)
    assert nursery.end() == 128 + number
    said = nursery.said.read_text()
    assert said.count("saved; the same command resumes from epoch") == 1 and "Traceback" not in said
    epoch, step = re.search(r"from epoch (\d+), step (\d+)", said.split("saved;")[1]).groups()
    kept = load_checkpoint(tmp_path / "custom/last.pt")
    assert (kept["epoch"] + 1, kept["step"] + 1) == (int(epoch), int(step)) != (1, 1)


@pytest.mark.timing
def test_a_run_stopped_in_an_evaluation_resumes_to_the_same_numbers(
    nursery, data, finished, tmp_path, monkeypatch, undrawn
):
    monkeypatch.setattr(sys, "argv", ["train.py", *data, "--epochs", "2", "--checkpoints", str(tmp_path)])
    add_step, predict = train.Run.add_step, utils.predict
    steps = []

    def ask_to_stop(*arguments, **keywords):
        if len(steps) == 3:  # in the evaluation after the first epoch
            signal.raise_signal(signal.SIGTERM)
        return predict(*arguments, **keywords)

    monkeypatch.setattr(train.Run, "add_step", lambda *a: steps.append(1) or add_step(*a))
    monkeypatch.setattr(utils, "predict", ask_to_stop)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the nursery, because rounding depends on it
    try:
        with pytest.raises(SystemExit) as end:
            train.main()
    finally:
        torch.set_num_threads(threads)
    assert end.value.code == 128 + signal.SIGTERM
    kept = load_checkpoint(tmp_path / "custom/last.pt")
    assert (kept["epoch"], kept["step"]) == (0, 3)
    nursery.run(*data, "--epochs", "2", "--checkpoints", tmp_path)
    assert_same(
        load_checkpoint(tmp_path / "custom/last.pt")["model"], load_checkpoint(finished / "last.pt")["model"]
    )
    assert rows_of(tmp_path / "custom") == rows_of(finished)


def test_a_run_without_its_config_is_reported_and_not_touched(nursery, data, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "custom")
    (folder / "config.json").unlink()
    before = (folder / "last.pt").read_bytes()
    said = nursery.run(*data, "--epochs", "1", "--checkpoints", tmp_path)
    assert f"{folder} has no config.json" in said and (tmp_path / "custom-2/last.pt").exists()
    assert (folder / "last.pt").read_bytes() == before


@pytest.mark.timing
def test_a_second_process_is_refused_until_the_first_has_ended(nursery, data, tmp_path, monkeypatch):
    flags = [*data, "--epochs", "400", "--checkpoints", str(tmp_path)]
    child = nursery.start(*flags)
    wait_for(lambda: (tmp_path / "custom/last.pt").exists())
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(InputError, match=rf"custom: another process .*pid {child} on .* since 20"):
        train.main()
    os.kill(child, signal.SIGTERM)  # the first one saves
    assert nursery.end() == 128 + signal.SIGTERM
    assert nursery.says("saved; the same command resumes from epoch 1")
    child = nursery.start(*flags)
    wait_for(lambda: nursery.says("from epoch 1, step") or nursery.says("error"))
    os.kill(child, signal.SIGKILL)
    assert nursery.end() == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["custom"]


# ------------------------------------------------------------------------------ files


CONTENT = {"model_args": {}, "config": {}, "model": {"weight": torch.arange(8.0)}}


def test_any_flipped_bit_of_a_checkpoint_is_found(tmp_path):
    path = tmp_path / "x.pt"
    save_checkpoint(path, CONTENT)
    assert torch.equal(torch.load(path)["model"]["weight"], torch.arange(8.0))  # torch.load can read it
    content, rng = path.read_bytes(), random.Random(0)
    found = 0
    places = range(0, len(content), 3)
    for place in places:
        byte = content[place]
        damaged = content[:place] + bytes([byte ^ 1 << rng.randrange(8)]) + content[place + 1 :]
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except InputError:
            found += 1
        else:  # in a date or another unused field of the archive
            assert torch.equal(loaded["model"]["weight"], torch.arange(8.0))
            assert loaded["config"] == CONTENT["config"] and loaded.keys() == {"format", *CONTENT}
    assert found > len(places) / 2
    for length in [0, 1, *rng.sample(range(len(content)), 100), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="not a readable checkpoint"):
            load_checkpoint(path)


def test_a_damaged_checkpoint_is_named_and_previous_is_used(nursery, data, finished, tmp_path):
    flags = [*data, "--epochs", "2", "--checkpoints", tmp_path]
    folder = shutil.copytree(finished, tmp_path / "custom")
    last, previous = folder / "last.pt", folder / "previous.pt"
    assert load_checkpoint(previous)["epoch"] == 1
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    with pytest.raises(InputError, match="last.pt: .*checksum.*; use .*previous"):
        load_checkpoint(last)
    said = nursery.run(*flags)
    assert f"warning: {last}: not a readable checkpoint" in said
    assert f"resuming from {previous}" in said and "from epoch 2, step 1" in said
    assert_same(load_checkpoint(last)["model"], load_checkpoint(finished / "last.pt")["model"])
    assert rows_of(folder) == rows_of(finished)
    assert (folder / "damaged.pt").read_bytes() == content


def test_a_full_disk_keeps_the_old_checkpoint_and_reports_the_size_needed(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, CONTENT)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    big = {**CONTENT, "model": {"weight": torch.zeros(3_000_000)}}
    with pytest.raises(
        InputError,
        match=r"last.pt: the disk is full: it needs 12.0 MB or more, "
        r"\d+.\d MB are free; free some",
    ):
        save_checkpoint(path, big, previous=tmp_path / "previous.pt")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.pt"]


def test_a_run_on_a_full_disk_stops_and_resumes_with_free_space(nursery, data, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        flags = [*data, "--epochs", "1", "--checkpoints", tmp_path]
        filler = tmp_path / "filler"
        filler.write_bytes(bytes(3_200_000))  # space for one checkpoint, not for two
        nursery.start(*flags)
        assert nursery.end() == 2, nursery.said.read_text()
        assert nursery.says("last.pt: the disk is full")
        for path in (tmp_path / "custom").glob("*.pt"):
            load_checkpoint(path)
        filler.unlink()
        assert "from epoch 1, step 1" in nursery.run(*flags)
        assert (tmp_path / "custom/miss_rate.json").exists()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


PROGRESS = {"epoch": 1, "step": 2, "sums": [3.0], "seconds": 0.5, "skipped": 0}
PROGRESS["history"] = [{"epoch": 1, "loss": 2.0, "lr": 0.1, "seconds": 9, "miss_rate": float("nan")}]
ROW = PROGRESS["history"][0]


@pytest.mark.parametrize(
    "changes",
    [
        *({"epoch": value} for value in (None, -1, 0, 3, 1.0, 10**30, "x", torch.ones(2), [1])),
        *({"step": value} for value in (None, -1, 0, 2.5, float("nan"), "x", {})),
        *({"sums": value} for value in (None, [], ["x"], [float("nan")], {"a": 1}, "x", torch.ones(2))),
        *({"seconds": value} for value in (None, float("nan"), "x", [])),
        *({"skipped": value} for value in (None, -1, 2.5)),
        *({"history": value} for value in (None, [], [1], ["x"], [{}], [{1: 2}], [ROW | {"loss": "x"}])),
        *({"history": value} for value in ({"a": 1}, [ROW, ROW], [ROW | {"lr": torch.ones(2)}])),
    ],
)
def test_a_checkpoint_with_invalid_progress_is_not_resumed(changes, tmp_path, capsys):
    path = tmp_path / "last.pt"
    save_checkpoint(path, CONTENT | PROGRESS)
    assert load_resumable(path, epochs=2)["epoch"] == 1
    save_checkpoint(path, CONTENT | PROGRESS | changes)
    assert load_resumable(path, epochs=2) is None
    said = capsys.readouterr().out
    assert said.startswith(f"warning: {path}: ") and said.count("\n") == 1


# ------------------------------------------------------------------------------ processes


def children(pid):
    return [int(i) for i in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    """Whether a process is running: neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")


@pytest.mark.timing
@needs_proc
@pytest.mark.parametrize(
    ("hit", "code", "words"),
    [
        ("worker", 2, "error: a loader process died (DataLoader worker"),
        ("group", 130, "interrupted"),
        ("main", -signal.SIGKILL, ""),
    ],
)
def test_workers_end_with_their_run_and_a_dead_worker_is_reported(nursery, data, tmp_path, hit, code, words):
    flags = [*data, "--epochs", "400", "--workers", "1", "--checkpoints", str(tmp_path)]
    child = nursery.start(*flags)
    wait_for(lambda: nursery.says("1/3"))
    [worker] = children(child)
    os.kill(worker, signal.SIGINT)  # workers ignore SIGINT
    log = tmp_path / "custom/log.csv"
    wait_for(log.exists)
    assert alive(worker)
    if hit == "worker":
        os.kill(worker, signal.SIGKILL)
    elif hit == "group":
        os.killpg(child, signal.SIGINT)
    else:
        os.kill(child, signal.SIGKILL)
    assert nursery.end() == code, nursery.said.read_text()
    said = nursery.said.read_text()
    assert words in said and "Traceback" not in said
    assert ("saved; the same command resumes" in said) == (hit != "main")
    wait_for(lambda: not alive(worker))


def loader_of(config):
    """The loader of training batches that train.py makes from a configuration."""
    _, ids, annotations = open_training(**pick(config, *TRAIN_SET_KEYS))
    frames, _ = split_frames(ids, annotations, **pick(config, *FRAME_KEYS))
    model = train.make_network(**train.model_arguments(config))
    options = Augmentation(**pick(config, *datasets.AUGMENTATION_KEYS))
    keywords = {**datasets.input_kwargs(model), **pick(config, *datasets.DATASET_KEYS)}
    pairs = datasets.KaistPairs(Path(config.data_root), frames, augmentation=options, **keywords)
    return datasets.training_loader(pairs, model, **pick(config, *datasets.TRAIN_LOADER_KEYS))


@pytest.mark.timing
def test_spawned_workers_give_the_same_batches(data, demo_root):
    def batches(*flags):
        config = train.configure([*data, *flags])
        loader = loader_of(config)
        return [(b.images, b.boxes, b.labels, b.masks, b.frame_ids) for b in loader.epoch(3)]

    spawned = batches("--workers", "1", "--start-method", "spawn", "--out-of-range", "ignore")
    assert_same(list(map(list, spawned)), list(map(list, batches("--out-of-range", "ignore"))))


@pytest.mark.timing
def test_too_little_shared_memory_is_reported(data, monkeypatch):
    def full(*_):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # forked workers have it too
    config = train.configure([*data, "--workers", "1", "--start-method", "fork"])
    loader = loader_of(config)
    with pytest.raises(InputError, match="too little shared memory.*--shm-size"):
        list(loader.epoch(0))


@pytest.mark.timing
def test_ctrl_c_while_torch_is_imported_leaves_no_traceback(tmp_path):
    command = [sys.executable, "-X", "importtime", str(PROJECT / "train.py")]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        said = ""
        for line in process.stderr:
            said += line
            if " torch." in line:
                process.send_signal(signal.SIGINT)
                break
        said += process.stderr.read()
    assert process.returncode == -signal.SIGINT and "Traceback" not in said


# ------------------------------------------------------------------------------ numbers


def test_the_same_command_gives_the_same_numbers(nursery, data, finished, tmp_path):
    """On a CPU, with and without --deterministic."""
    nursery.run(*data, "--epochs", "2", "--deterministic", "--checkpoints", tmp_path)
    again = tmp_path / "custom"
    assert_same(*(load_checkpoint(folder / "last.pt")["model"] for folder in (finished, again)))
    assert rows_of(again) == rows_of(finished)
