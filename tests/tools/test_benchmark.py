"""The benchmark: its references agree with what they are held against, and its script runs."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from kaist.annotations import open_annotations, read_image_list
from kaist.frames import load_frames
from kaist.miss_rate import SETUPS, evaluate
from kaist.results import read_detections
from model import SSD300
from ssd.losses import MultiBoxLoss
from tools import benchmark
from tools.reference import best_priors, plain_miss_rates, plain_multibox_loss, v2_sample
from tools.workloads import (
    MODEL,
    Subprocess,
    added_memory,
    random_objects,
    random_predictions,
    random_result,
    with_malloc_tuning,
)


def run(*arguments):
    command = [sys.executable, "-m", "tools.benchmark", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_script_prints_a_table():
    done = run("--quick", "--only", "evaluation")
    assert done.returncode == 0, done.stderr
    machine, _, header, _, row = done.stdout.splitlines()
    assert "float32" in machine or "bfloat16" in machine
    assert header.count("|") == row.count("|") == 7 and "x faster" in row


def test_script_refuses_what_it_does_not_know():
    done = run("--only", "nonsense")
    assert done.returncode == 2 and "nonsense" in done.stderr and "Traceback" not in done.stderr


def test_rounds_go_in_turns():
    calls = []
    bench = benchmark.Bench(torch.device("cpu"), torch.float32, Path(), quick=True, seconds=0.0)
    times = benchmark.interleave(bench, lambda: calls.append("a"), lambda: calls.append("b"))
    assert calls == ["a", "b"] * 4 and len(times) == 2


def test_a_function_apart_has_its_own_process():
    counting = Subprocess(partial, os.getpid)
    assert counting() == counting() != os.getpid()


def test_a_function_apart_that_fails_is_not_waited_for(capfd):
    with pytest.raises((EOFError, OSError)):
        Subprocess(partial, os.listdir, "/no/such/folder")()
    assert "/no/such/folder" in capfd.readouterr().err


def new_pages(_: torch.device) -> Callable[[], int]:
    """A function that takes and frees 96 MiB, and counts the pages the system had to make."""
    import resource

    def count() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        [torch.zeros(24 * 2**20, dtype=torch.uint8) for _ in range(4)]
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    return count


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is asked to keep memory")
def test_freed_memory_is_kept(monkeypatch):
    # With its threshold fixed, glibc takes each block from the system and gives it back. Left to
    # itself it raises the threshold, and then a small block at the heap's top decides by chance
    # whether the others are kept.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(128 * 1024))
    cpu = torch.device("cpu")
    usual, kept = Subprocess(new_pages, cpu), Subprocess(with_malloc_tuning, new_pages, cpu)
    # A small block between freed ones can cost a kept heap one more block, a few times at most.
    assert min(kept() for _ in range(8)) < min(usual() for _ in range(8)) / 10


def takes(_: torch.device, megabytes: int) -> Callable[[], None]:
    """A function that takes so much memory, and gives it back."""

    def take() -> None:
        torch.ones(megabytes * 2**20, dtype=torch.uint8)

    return take


def test_added_memory_is_the_steps_own():
    held = torch.ones(600 * 2**20, dtype=torch.uint8)  # by the parent, of which it knows nothing
    add = Subprocess(added_memory, takes, torch.device("cpu"), 100)
    assert 99 * 2**20 < add() < 200 * 2**20
    del held


def test_rows_say_whether_the_target_is_met():
    assert benchmark.speedup_row("work", 2.0, 5.0, "plain", 2.5).passed
    assert not benchmark.speedup_row("work", 2.0, 4.9, "plain", 2.5).passed
    assert benchmark.ratio_row("work", "1", "2", 0.8, 0.8).passed
    assert str(benchmark.speedup_row("w", 2.0, 5.0, "p", 2.5)).endswith("| >= 2.5x | met |")


def test_training_is_timed_from_the_cache_to_the_weights(tmp_path):
    bench = benchmark.Bench(torch.device("cpu"), torch.float32, tmp_path, quick=True, seconds=0.0, rounds=1)
    rows = list(benchmark.training_rows(bench, n=2, width=0.01, n_frames=8, workers=0))
    assert "images/s" in rows[0].ours and "images/s" in rows[0].reference
    assert [row.work.split(" alone")[0] for row in rows[1:]] == ["data and augmentation", "losses", "update"]


@pytest.mark.parametrize("people", [0, 3, 60])
def test_plain_loss_agrees(people):
    cpu = torch.device("cpu")
    priors = SSD300(**(MODEL | {"width": 0.01})).priors
    predictions, objects = random_predictions(2, 0.0, cpu), random_objects(2, people, cpu)
    loss = MultiBoxLoss(priors, loc_loss="smooth_l1", loc_reduction="sum")
    ours = sum(loss(predictions, *objects))
    assert torch.isclose(plain_multibox_loss(predictions, *objects, priors), ours, rtol=1e-5)


def test_persons_that_want_one_prior_share_by_overlap():
    # Two persons want prior 0, the third prior 1, which the loser of prior 0 wants next and more.
    iou = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.8, 0.7, 0.0, 0.0], [0.0, 0.6, 0.5, 0.0]])
    assert best_priors(iou).tolist() == [0, 1, 2]


def test_plain_miss_rates_agree(tmp_path):
    people, path = random_result(tmp_path, 200)
    plain = plain_miss_rates(path, people, SETUPS)
    ours = evaluate(people, read_detections(path, people.frames))
    assert len({round(rate, 6) for rate in plain.values()}) > 3
    for name in SETUPS:
        assert np.isclose(ours[name].miss_rate, plain[name], rtol=0, atol=1e-12)


def test_recipe_gives_what_our_samples_hold(demo_root):
    ids = read_image_list(demo_root / "imageSets/train-all.txt")
    frames = load_frames(ids, open_annotations(demo_root), min_height=12, margin=5)
    torch.manual_seed(0)
    image, boxes, masks = v2_sample(demo_root)(frames[0])
    assert image.shape == (4, 300, 300) and image.dtype == torch.uint8
    assert boxes.shape[::2] == (1, 4) and (boxes >= 0).all() and (boxes <= 1).all()
    assert [tuple(mask.shape) for mask in masks] == [(1, 38, 38), (1, 19, 19)]
