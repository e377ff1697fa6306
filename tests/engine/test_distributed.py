"""Two processes under torchrun against one: same losses, weights and miss rate."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train
from engine import loader
from engine.checkpoint import load_checkpoint
from engine.distributed import average_statistics, init_distributed
from engine.loader import EpochBatches
from kaist.files import InputError


def run_training(folder, root, processes, more):
    flags = [
        "--name",
        "custom",
        "--epochs",
        "2",
        "--batch-size",
        "4",
        "--workers",
        "0",
        "--width",
        "0.0625",
        "--eval-every",
        "2",
        "--no-batch-norm",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--seg-weight",
        "0.5",
        "--lr",
        "1e-4",
        "--optimizer",
        "sgd",
        "--ema-decay",
        "0.9",
    ]
    flags += ["--data-root", root, "--checkpoints", folder, *more]
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [train.__file__, *map(str, flags)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = list(csv.DictReader((folder / "custom" / "log.csv").open()))
    return load_checkpoint(folder / "custom" / "last.pt")["model"], log, done.stdout


@pytest.mark.parametrize("more", [[], ["--loader", "device", "--cache", "cache"]])
def test_two_processes_train_as_one(more, demo_root, tmp_path):
    one, log_one, said_one = run_training(tmp_path / "one", demo_root, 1, more)
    two, log_two, said_two = run_training(tmp_path / "two", demo_root, 2, more)
    for key, value in one.items():
        assert torch.allclose(value, two[key], atol=1e-5), key
    for a, b in zip(log_one, log_two, strict=True):
        for term in ("loss", "loc", "conf", "seg"):
            assert float(a[term]) == pytest.approx(float(b[term]), rel=1e-5)
    assert log_one[-1]["miss_rate"] == log_two[-1]["miss_rate"] != ""
    assert said_one.count("lowest miss rate") == said_two.count("lowest miss rate") == 1  # one writer
    assert sorted(p.name for p in Path(tmp_path / "two").iterdir()) == ["custom"]


def average_in_a_process(rank, folder):
    """What one of two processes makes of its own BatchNorm statistics."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, rank)
    model[1].running_mean.fill_(10.0 * rank)
    model[1].running_var.fill_(2.0 + rank)
    average_statistics(model)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_average_what_batch_norm_has_seen(tmp_path):
    """On CPUs each normalises by its own frames; a shared evaluation is of one network."""
    torch.multiprocessing.spawn(average_in_a_process, (str(tmp_path),), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for state in states:
        assert (state["1.running_mean"], state["1.running_var"]) == (5.0, 2.5)
    assert [state["1.weight"].item() for state in states] == [0, 1]  # weights are the optimiser's


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
