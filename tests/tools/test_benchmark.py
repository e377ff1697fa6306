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
from ssd.boxes import detect
from tools import benchmark
from tools.reference import plain_detect, plain_miss_rates, recipe_sample
from tools.timing import Apart
from tools.workloads import (
    MODEL,
    added_memory,
    draw_annotations,
    keeping,
    random_predictions,
    synthetic_result,
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
    counting = Apart(partial, os.getpid)
    assert counting() == counting() != os.getpid()


def test_a_function_apart_that_fails_is_not_waited_for(capfd):
    with pytest.raises((EOFError, OSError)):
        Apart(partial, os.listdir, "/no/such/folder")()
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
def test_freed_memory_is_kept():
    cpu = torch.device("cpu")
    usual, kept = Apart(new_pages, cpu), Apart(keeping, cpu, new_pages)
    for count in (usual, kept):
        count(), count()
    assert kept() < usual() / 10


def takes(_: torch.device, megabytes: int) -> Callable[[], None]:
    """A function that takes so much memory, and gives it back."""

    def take() -> None:
        torch.ones(megabytes * 2**20, dtype=torch.uint8)

    return take


def test_added_memory_is_the_steps_own():
    held = torch.ones(600 * 2**20, dtype=torch.uint8)  # by the parent, of which it knows nothing
    add = Apart(added_memory, torch.device("cpu"), takes, 100)
    assert 99 * 2**20 < add() < 200 * 2**20
    del held


def test_rows_say_whether_the_target_is_met():
    assert benchmark.faster("work", 2.0, 5.0, "plain", 2.5).met
    assert not benchmark.faster("work", 2.0, 4.9, "plain", 2.5).met
    assert benchmark.share("work", "1", "2", 0.8, 0.8).met
    assert str(benchmark.faster("w", 2.0, 5.0, "p", 2.5)).endswith("| >= 2.5x | met |")


def test_training_is_timed_from_the_cache_to_the_weights(tmp_path):
    bench = benchmark.Bench(torch.device("cpu"), torch.float32, tmp_path, quick=True, seconds=0.0, rounds=1)
    rows = list(benchmark.training_rows(bench, n=2, width=0.01, n_frames=8, workers=0))
    assert "images/s" in rows[0].ours and "images/s" in rows[0].reference
    assert [row.work.split(" alone")[0] for row in rows[1:]] == ["data and augmentation", "losses", "update"]


@pytest.mark.parametrize("mean", [-3.6, -8.94, -30.0])
def test_plain_detection_agrees(mean):
    priors = SSD300(**(MODEL | {"width": 0.01})).priors
    limits = {"min_score": 0.05, "nms_iou": 0.45, "max_boxes": 50}
    predictions = random_predictions(1, mean, torch.device("cpu"))
    [(boxes, scores)] = detect(predictions, priors, **limits)
    [(plain_boxes, plain_scores)] = plain_detect(predictions, priors, **limits)
    assert torch.equal(boxes, plain_boxes) and torch.equal(scores, plain_scores)


def test_plain_miss_rates_agree(tmp_path):
    people, path = synthetic_result(tmp_path, 200)
    plain = plain_miss_rates(path, people, SETUPS)
    ours = evaluate(people, read_detections(path, people.frames))
    assert len({round(rate, 6) for rate in plain.values()}) > 3
    for name in SETUPS:
        assert np.isclose(ours[name].miss_rate, plain[name], rtol=0, atol=1e-12)


def test_recipe_gives_what_our_samples_hold(demo_root):
    ids = read_image_list(demo_root / "imageSets/train-all.txt")
    frames = load_frames(ids, open_annotations(demo_root), min_height=12, margin=5)
    torch.manual_seed(0)
    image, boxes, masks = recipe_sample(demo_root)(frames[0])
    assert image.shape == (4, 300, 300) and image.dtype == torch.uint8
    assert boxes.shape[::2] == (1, 4) and (boxes >= 0).all() and (boxes <= 1).all()
    assert [tuple(mask.shape) for mask in masks] == [(1, 38, 38), (1, 19, 19)]


def test_drawn_annotations_are_read(tmp_path):
    ids = draw_annotations(tmp_path, 13)
    frames = load_frames(ids, open_annotations(tmp_path), min_height=12, margin=5)
    assert [len(frame.boxes_px) for frame in frames] == [i % 5 for i in range(13)]
