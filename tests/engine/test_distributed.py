"""Two processes compared with one: same losses, weights and miss rate."""

import csv
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import train
from engine import loader
from engine.checkpoint import load_checkpoint
from engine.distributed import average_statistics, init_distributed
from engine.loader import EpochBatches
from kaist.annotations import read_image_list
from kaist.files import InputError
from kaist.results import read_detections

PROJECT = Path(train.__file__).parent


FLAGS = (
    "--name custom --epochs 2 --batch-size 4 --workers 0 --width 0.0625 --eval-every 2 --no-batch-norm "
    "--device cpu --precision fp32 --seg-weight 0.5 --lr 1e-4 --optimizer sgd --ema-decay 0.9"
).split()


def run_training(nursery, folder, root, ranks, more):
    """Weights, log.csv and output of a run, and the scores in each test frame, highest first."""
    said = nursery.run(*FLAGS, "--data-root", root, "--checkpoints", folder, *more, ranks=ranks)
    log = list(csv.DictReader((folder / "custom" / "log.csv").open()))
    frames = read_image_list(folder / "custom/detections.frames.txt")
    found = read_detections(folder / "custom/detections.txt", frames)
    scores = [found.scores[found.frame_idxs == i] for i in range(len(frames))]
    return load_checkpoint(folder / "custom" / "last.pt")["model"], log, said, scores


def test_two_processes_train_as_one(nursery, demo_root, tmp_path):
    """They share a cache. Of the last batch of five test frames, the second process has none."""
    (tmp_path / "five.txt").write_text("".join((demo_root / "imageSets/test-all.txt").open().readlines()[:5]))
    more = [*"--epochs 1 --eval-every 1 --test-list".split(), tmp_path / "five.txt"]
    one, log_one, said_one, scores_one = run_training(nursery, tmp_path / "one", demo_root, 1, more)
    more += ["--cache", tmp_path / "cache"]
    two, log_two, said_two, scores_two = run_training(nursery, tmp_path / "two", demo_root, 2, more)
    for key, value in one.items():
        assert torch.allclose(value, two[key], atol=1e-5), key
    for a, b in zip(log_one, log_two, strict=True):
        for term in ("loss", "loc", "conf", "seg"):
            assert float(a[term]) == pytest.approx(float(b[term]), rel=1e-5)
    assert log_one[-1]["miss_rate"] == log_two[-1]["miss_rate"] != ""
    assert len(scores_one) == len(scores_two) == 5
    for a, b in zip(scores_one, scores_two, strict=True):
        assert len(a) > 20 and np.allclose(a[:20], b[:20], atol=1e-4)  # scores of the same frame
    assert not np.allclose(scores_one[0][:20], scores_one[1][:20], atol=1e-4)
    assert said_one.count("lowest miss rate") == said_two.count("lowest miss rate") == 1
    assert "epoch" not in nursery.said.with_name("said1").read_text()  # only rank 0 prints
    assert sorted(p.name for p in Path(tmp_path / "two").iterdir()) == ["custom"]


ERROR = (
    "error: another process of this run has ended; see its error message; the same command resumes the run"
)


@pytest.mark.timing
@pytest.mark.parametrize(
    ("killed", "kill"), [(0, "open train-all 1"), (1, "open jpg 5"), (0, "open jpg 42"), (1, "open jpg 62")]
)
def test_the_other_process_reports_a_killed_one_in_one_line(nursery, demo_root, tmp_path, killed, kill):
    """Killed while reading lists, checking the 36 images, in the second step, and in the evaluation."""
    kills = [kill * (rank == killed) for rank in (0, 1)]
    nursery.start_ranks(kills, *FLAGS, "--data-root", demo_root, "--checkpoints", tmp_path)
    assert sorted(nursery.numbers()) == [-signal.SIGKILL, 2]
    said = nursery.said.with_name("said" + "1" * (killed == 0)).read_text()
    lines = [line.split("\r")[-1] for line in said.splitlines() if "error" in line or "File" in line]
    assert lines == [ERROR]


def average_in_a_process(rank, folder):
    """Run one of two processes: average BatchNorm statistics and save the state."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, rank)
    model[1].running_mean.fill_(10.0 * rank)
    model[1].running_var.fill_(2.0 + rank)
    average_statistics(model)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.timing
def test_processes_average_batch_norm_statistics(tmp_path):
    """On CPUs each process normalises by its own frames, but all evaluate the same network."""
    start = torch.multiprocessing.start_processes
    start(average_in_a_process, (str(tmp_path),), nprocs=2, start_method="fork")
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for state in states:
        assert (state["1.running_mean"], state["1.running_var"]) == (5.0, 2.5)
    assert [state["1.weight"].item() for state in states] == [0, 1]  # weights are not averaged


def test_a_batch_is_split_by_rank(monkeypatch):
    whole = list(EpochBatches(11, 4, seed=3))
    monkeypatch.setattr(loader, "world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(loader, "rank", lambda rank=rank: rank)
        parts.append(list(EpochBatches(11, 4, seed=3)))
    assert len(whole) == 2  # an incomplete batch is left out
    for batch, *shares in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(sum(shares, []))
        assert [len(share) for share in shares] == [2, 2]


def test_a_batch_that_cannot_be_split_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="BATCH_SIZE = 8 cannot be split among 3"):
        init_distributed(torch.device("cpu"), 8)
    with pytest.raises(InputError, match="DEVICE = mps; add --device cpu"):
        init_distributed(torch.device("mps"), 9)
