"""The benchmark: its references agree with what they are held against, and its script runs."""

import operator
import os
import platform
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from kaist.annotations import open_annotations, read_image_list
from kaist.files import InputError
from kaist.frames import load_frames
from kaist.miss_rate import SETUPS, evaluate
from kaist.results import read_detections
from ssd.losses import MultiBoxLoss
from tools import benchmark
from tools.isolated import STATUS, Subprocess, added_memory
from tools.workloads import (
    our_model,
    plain_loss,
    plain_miss_rates,
    random_predictions,
    random_result,
    torchvision_sample,
)
from utils import tune_malloc


def test_the_script_prints_a_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--quick", "--only", "evaluation"])
    bench_evaluation = benchmark.bench_evaluation

    def short(bench):
        return bench_evaluation(replace(bench, seconds=0.0, rounds=1))

    monkeypatch.setattr(benchmark, "BENCHMARKS", {"evaluation": short})
    benchmark.main()
    machine, _, header, _, row = capsys.readouterr().out.splitlines()
    assert "float32" in machine or "bfloat16" in machine
    assert header.count("|") == row.count("|") == 7 and "x faster" in row


def test_script_refuses_what_it_does_not_know(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--only", "nonsense"])
    with pytest.raises(InputError, match="nonsense"):
        benchmark.parse_arguments()


def test_rounds_go_in_turns():
    calls = []
    bench = benchmark.Bench(torch.device("cpu"), torch.float32, Path(), quick=True, seconds=0.0)
    times = benchmark.interleave(bench, lambda: calls.append("a"), lambda: calls.append("b"))
    assert calls == ["a", "b"] * 4 and len(times) == 2


def test_a_subprocess_that_dies_is_not_waited_for(tmp_path, capfd):
    names = Subprocess(partial, os.listdir, tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    assert names() == []
    (tmp_path / "folder").rmdir()
    with pytest.raises((EOFError, ConnectionError)):
        names()
    assert f"{tmp_path}/folder" in capfd.readouterr().err


def new_pages(n: int) -> int:
    """Take and free 96 MiB n times; returns the fewest pages that the system had to make for it."""
    import resource

    made = []
    for _ in range(n):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        [torch.zeros(24 * 2**20, dtype=torch.uint8) for _ in range(4)]
        made.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(made)


def untuned_and_tuned() -> tuple[int, int]:
    usual = new_pages(8)
    tune_malloc()
    return usual, new_pages(8)


@pytest.mark.timing
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is asked to keep memory")
def test_freed_memory_is_kept(monkeypatch):
    # With its threshold fixed, glibc takes each block from the system and gives it back. Left to
    # itself it raises the threshold, and then a small block at the heap's top decides by chance
    # whether the others are kept.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(128 * 1024))
    usual, kept = Subprocess(partial, untuned_and_tuned)()
    # A small block between freed ones can cost a kept heap one more block, a few times at most.
    assert kept < usual / 10


@pytest.mark.timing
@pytest.mark.skipif(not STATUS.exists(), reason="Linux alone tells what a process holds")
def test_added_memory_is_the_functions_own():
    held = torch.ones(600 * 2**20, dtype=torch.uint8)  # by the parent, of which it knows nothing
    add = Subprocess(added_memory, partial, operator.mul, b"x", 100 * 2**20)
    assert 99 * 2**20 < add() < 200 * 2**20
    del held


def test_rows_say_whether_the_target_is_met():
    assert benchmark.speedup_row("w", 2.0, 5.0, 2.5).endswith(
        "| torchvision: 5 ms | 2.5x faster | >= 2.5x | met |"
    )
    assert benchmark.speedup_row("w", 2.0, 4.9, 2.5).endswith("| missed |")
    assert benchmark.ratio_row("w", "1", "2", 0.8, 0.8) == "| w | 1 | 2 | 0.8 of it | <= 0.8 | met |"


def test_training_is_timed_from_the_cache_to_the_weights(tmp_path):
    bench = benchmark.Bench(torch.device("cpu"), torch.float32, tmp_path, quick=True, seconds=0.0, rounds=1)
    first, *rows = benchmark.training_rows(bench, n=2, width=0.01, n_frames=8, workers=0)
    assert first.count("images/s") == 2
    assert [row.split(" alone")[0] for row in rows] == ["| data and augmentation", "| losses", "| update"]


@pytest.mark.parametrize("name", ["26", "42"])
def test_rows_of_the_lab_book_detect(tmp_path, name):
    bench = benchmark.Bench(torch.device("cpu"), torch.float32, tmp_path, quick=True, seconds=0.0, rounds=1)
    boxes, scores = benchmark.row_detector(bench, name, width=0.03)()
    assert boxes.shape == (len(scores), 4)


def test_plain_miss_rates_agree(tmp_path):
    path = tmp_path / "result.txt"
    people = random_result(path, 200)
    plain = plain_miss_rates(path, people, SETUPS)
    ours = evaluate(people, read_detections(path, people.frames))
    assert len({round(rate, 6) for rate in plain.values()}) > 3
    for name in SETUPS:
        assert np.isclose(ours[name].miss_rate, plain[name], rtol=0, atol=1e-12)


def test_plain_loss_is_ours_where_no_two_people_want_a_prior():
    priors = our_model(torch.device("cpu"), width=0.01).priors
    pair, one = [[0.11, 0.12, 0.31, 0.58], [0.6, 0.3, 0.83, 0.91]], [[0.4, 0.2, 0.51, 0.43], [0.0] * 4]
    boxes = torch.tensor([pair, one])
    labels = torch.tensor([[1, 1], [1, 0]])
    predictions = random_predictions(2, 0.0, torch.device("cpu"))
    ours = MultiBoxLoss(priors, loc_loss="smooth_l1", loc_reduction="sum")(predictions, boxes, labels)
    assert torch.allclose(sum(ours), plain_loss(predictions, boxes, labels, priors)(), rtol=1e-5)


def test_recipe_gives_what_our_samples_hold(demo_root):
    ids = read_image_list(demo_root / "imageSets/train-all.txt")
    frames = load_frames(ids, open_annotations(demo_root), min_height=12, margin=5)
    torch.manual_seed(0)
    image, boxes, masks = torchvision_sample(demo_root)(frames[0])
    assert image.shape == (4, 300, 300) and image.dtype == torch.uint8
    assert boxes.shape[::2] == (1, 4) and (boxes >= 0).all() and (boxes <= 1).all()
    assert [tuple(mask.shape) for mask in masks] == [(1, 38, 38), (1, 19, 19)]
