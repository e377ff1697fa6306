"""The benchmark: it runs, and what it compares does the same work."""

import operator
import os
import platform
import signal
import sys
import threading
import time
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from kaist.files import InputError
from ssd.losses import MultiBoxLoss
from ssd.memory_plan import MemoryPlan
from tools import benchmark, timing, workloads
from tools.timing import PROCESS_STATUS, Setting, Subprocess, added_memory, at_least, at_most, make_timer
from tools.workloads import plain_config, row_config, row_network
from utils import tune_malloc

CPU = torch.device("cpu")
SMALL = {"seconds": 0.0, "batch": 2, "train_frames": 8}


@pytest.fixture(scope="module")
def setting(demo_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "demo").symlink_to(demo_root)
    return Setting(CPU, torch.float32, folder, **SMALL)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    benchmark.main()


def test_benchmarks_are_printed_as_a_table(monkeypatch, capsys):
    monkeypatch.delenv("KAIST_REFERENCE", raising=False)
    monkeypatch.setattr(timing, "MIN_TURNS", 1)
    monkeypatch.setattr(benchmark, "Subprocess", lambda make, *arguments: nullcontext(make(*arguments)))
    monkeypatch.setattr(benchmark, "Setting", lambda *where, **_: Setting(*where, **SMALL))
    run(monkeypatch, "--quick", "--only", "loss", "evaluation")
    machine, _, header, _, *rows = capsys.readouterr().out.splitlines()
    assert "float32" in machine or "bfloat16" in machine
    assert [row.split(",")[0] for row in rows] == ["| multibox loss and gradient"] * 2 + ["| evaluation"]
    assert all(header.count("|") == row.count("|") == 7 for row in rows)
    assert "times faster | >= 6" in rows[0] and " ms, usual SSD loss: " in rows[0]


def test_the_memory_plan_is_printed_as_a_table(monkeypatch, capsys):
    """The plans are made up here."""

    def plan(model, criterion, optimizer, precision):
        return MemoryPlan(weights=2**20, fixed=2**21, per_frame=2**24 * precision.itemsize)

    monkeypatch.setattr(benchmark, "plan_memory", plan)
    monkeypatch.setattr(benchmark, "EXPERIMENTS", ["demo"])
    run(monkeypatch, "--memory-plan")
    *_, bf16, fp32 = capsys.readouterr().out.splitlines()
    assert bf16.startswith("| demo | early, 300x300") and "bf16 | 1 MiB | 2 MiB | 32 MiB | 8 GB: " in bf16
    assert "fp32 | 1 MiB | 2 MiB | 64 MiB | 8 GB: " in fp32
    largest = [
        [int(part.split("GB: ")[1]) for part in row.strip("| ").split(", ")[-5:]] for row in (bf16, fp32)
    ]
    assert all(n_bf16 > n_fp32 > 0 for n_bf16, n_fp32 in zip(*largest, strict=True))
    assert largest[0] == sorted(largest[0])


def test_unknown_benchmarks_are_refused(monkeypatch):
    with pytest.raises(InputError, match="nonsense"):
        run(monkeypatch, "--only", "nonsense")


@pytest.mark.timing
def test_functions_are_timed_by_turns(setting):
    calls = []
    timers = (timing.timer(partial(calls.append, name)) for name in "ab")
    timings = timing.time_in_turns(setting, *timers)
    assert calls == ["a", "b"] * 4 and len(timings) == 2
    assert timings[0].seconds > 0 and timings[0].spread.endswith("% in time")


def test_lines_report_whether_the_target_is_met():
    assert at_least("w", 2000, "images/s", 2000).met and not at_least("w", 1999, "images/s", 2000).met
    assert at_most("w", 1e-4, "", 1e-4).met and not at_most("w", 2e-4, "", 1e-4).met
    assert not at_most("w", float("nan"), "", 1e-4).met
    assert (
        at_least("w", 2.0, "times faster", 2.5, "n").row()
        == "| w | 2 | times faster | >= 2.5 | **missed** | n |"
    )


@pytest.mark.timing
def test_a_subprocess_reports_errors_and_is_killed(tmp_path):
    with Subprocess(partial, os.listdir, tmp_path / "folder") as names:
        with pytest.raises(RuntimeError, match=f"FileNotFoundError: .*{tmp_path}/folder"):
            names()
        (tmp_path / "folder").mkdir()
        assert names() == []
    with Subprocess(partial, time.sleep) as sleep, pytest.raises(TimeoutError):
        sleep(60, seconds=0.0)
    with Subprocess(partial, os.kill) as kill:
        process = kill.pid.result()
        with pytest.raises(RuntimeError, match="terminated abruptly"):
            kill(process, signal.SIGKILL)


@pytest.mark.timing
def test_a_subprocess_times_its_function_itself():
    """Results are not sent to the parent: for tensors that takes longer than some functions do."""
    with Subprocess(make_timer, partial, threading.Lock) as timer:  # a lock cannot be pickled
        assert timer(3) > 0


def new_pages(n: int) -> int:
    """Allocate and free 96 MiB n times; return the smallest number of page faults."""
    import resource

    made = []
    for _ in range(n):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        [torch.zeros(24 * 2**20, dtype=torch.uint8) for _ in range(4)]
        made.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(made)


def untuned_and_tuned() -> tuple[int, int]:
    usual = new_pages(4)
    tune_malloc()
    return usual, new_pages(4)


@pytest.mark.timing
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tune_malloc is for glibc")
def test_freed_memory_is_kept(monkeypatch):
    # With a fixed threshold, glibc takes each block from the system and returns it. By default it raises
    # the threshold, and then it depends on a small block at the top of the heap, by chance, whether the
    # others are kept.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(128 * 1024))
    with Subprocess(partial, untuned_and_tuned) as pages:
        usual, kept = pages()
    # A small block between freed ones can cost a kept heap one more block, a few times at most.
    assert kept < usual / 10


@pytest.mark.timing
@pytest.mark.skipif(not PROCESS_STATUS.exists(), reason="only Linux reports a process's memory")
def test_added_memory_is_that_of_the_function():
    parents = torch.ones(600 * 2**20, dtype=torch.uint8)  # memory of the parent is not counted
    with Subprocess(added_memory, partial, operator.mul, b"x", 100 * 2**20) as add:
        assert 99 * 2**20 < add() < 200 * 2**20
    del parents


@pytest.mark.parametrize("name", ["26", "42"])
def test_rows_of_the_lab_book_detect(setting, name):
    boxes, scores = workloads.row_image(setting, row_config(name, width=0.03), torch.float32)()
    assert boxes.shape == (len(scores), 4)


@pytest.mark.parametrize("work", ["loss", "detect", "sample"])
def test_compared_functions_do_the_same_work(setting, work):
    """Ours and its peer run, and give equally many results."""
    for _, _, make, _, make_peer in (c for name, c in benchmark.comparisons(setting) if name == work):
        ours, peer = make(setting)(), make_peer(setting)()
        if work == "loss":
            assert [x.shape for x in ours] == [x.shape for x in peer]
        elif work == "detect":
            assert [len(boxes) for boxes, _ in ours] == [len(image["boxes"]) for image in peer]
            assert min(len(boxes) for boxes, _ in ours) > 0
        else:
            assert len(ours[0].images) == len(peer)


def test_usual_loss_equals_ours_where_no_two_persons_match_a_prior():
    priors = row_network(plain_config(width=0.01))[0].priors
    pair, one = [[0.11, 0.12, 0.31, 0.58], [0.6, 0.3, 0.83, 0.91]], [[0.4, 0.2, 0.51, 0.43], [0.0] * 4]
    boxes = torch.tensor([pair, one])
    labels = torch.tensor([[1, 1], [1, 0]])
    predictions = workloads.random_predictions(2, 0.0, CPU)
    ours = MultiBoxLoss(priors, loc_loss="smooth_l1", loc_reduction="sum")(predictions, boxes, labels)
    assert torch.allclose(sum(ours), workloads.usual_loss(priors, predictions, boxes, labels), rtol=1e-5)


def test_samples_of_the_recipe_have_the_format_of_ours(setting):
    torch.manual_seed(0)
    for image, boxes, masks in workloads.recipe_samples(setting)():
        assert image.shape == (4, 300, 300) and image.dtype == torch.uint8
        assert boxes.shape[::2] == (1, 4) and (boxes >= 0).all() and (boxes <= 1).all()
        assert [tuple(mask.shape) for mask in masks] == [(1, 38, 38), (1, 19, 19)]
