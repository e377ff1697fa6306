"""Disturbs training runs at random, and compares how they end with a run left alone.

    python -m tools.soak --minutes 30

A small run on the demo set is started again and again, and each time killed, stopped by one signal
or several, paused, denied memory, denied room for its files, or robbed of a loader process, until
it is through; then its weights, its log and its detections have to be those of an undisturbed run,
bit for bit. Ends with 1 if any differs. For Linux.
"""

from __future__ import annotations

import csv
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import train
from engine.checkpoint import load_checkpoint
from engine.config import OneLineParser
from kaist.demo import draw_demo
from kaist.files import InputError, run_script

FLAGS = "--epochs 6 --eval-every 2 --batch-size 2 --workers 2 --width 0.0625 --save-minutes 0.005"
FLAGS += " --device cpu --precision fp32 --name soak"
ACTS = ("kill", "signal", "signals", "pause", "no memory", "no disk", "kill a loader")
CLOCKS = ("seconds", "images_per_s")  # columns of log.csv that no run repeats


def start(root: Path, folder: Path) -> subprocess.Popen:
    """Start or go on with the run whose folder is made below `folder`."""
    command = [sys.executable, train.__file__, *FLAGS.split(), "--data-root", root, "--checkpoints", folder]
    with (folder / "output.txt").open("a") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment)


def result(folder: Path) -> dict[str, object]:
    """What has to be the same: a digest of each tensor of the weights, log.csv, detections.txt."""
    model = load_checkpoint(folder / "soak/last.pt")["model"]
    digests = {name: hashlib.sha256(x.numpy().tobytes()).hexdigest() for name, x in model.items()}
    with (folder / "soak/log.csv").open(encoding="utf-8") as file:
        log = [{k: v for k, v in row.items() if k not in CLOCKS} for row in csv.DictReader(file)]
    return {"weights": digests, "log": log, "detections": (folder / "soak/detections.txt").read_bytes()}


def disturb(process: subprocess.Popen, act: str, rng: random.Random) -> None:
    """Do one act to a running process, which ends after all of them but "pause"."""
    if act == "kill":
        process.kill()
    elif act in ("signal", "signals"):
        for _ in range(6 if act == "signals" else 1):
            process.send_signal(rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP)))
            time.sleep(0.01)
    elif act == "pause":
        process.send_signal(signal.SIGSTOP)
        time.sleep(rng.uniform(0, 2))
        process.send_signal(signal.SIGCONT)
    elif act in ("no memory", "no disk"):
        kind = resource.RLIMIT_AS if act == "no memory" else resource.RLIMIT_FSIZE
        held = Path(f"/proc/{process.pid}/statm").read_text().split()[0]
        limit = int(held) * resource.getpagesize() + 2**24 if act == "no memory" else 2**16
        resource.prlimit(process.pid, kind, (limit, limit))
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children:
            os.kill(int(rng.choice(children)), signal.SIGKILL)


def main() -> None:
    """Disturb runs for some minutes, print what was done and how it ended."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="at least (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="of acts and moments (%(default)s)")
    words = "where a run that ends otherwise is kept (%(default)s)"
    parser.add_argument("--out", type=Path, default=Path("soak-failures"), help=words)
    arguments = parser.parse_args()
    rng, counts = random.Random(arguments.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        root, whole = Path(temporary, "demo"), Path(temporary, "whole")
        draw_demo(root, train_frames=24, test_frames=12, progress=False)
        whole.mkdir()
        begun = time.monotonic()
        if start(root, whole).wait():
            raise InputError("the undisturbed run failed", "look why", file=whole / "output.txt")
        expected, length = result(whole), time.monotonic() - begun
        print(f"an undisturbed run takes {length:.0f} s", flush=True)
        end = time.monotonic() + 60 * arguments.minutes
        while time.monotonic() < end:
            folder = Path(temporary, f"run-{counts['runs']}")
            folder.mkdir()
            counts["runs"] += 1
            same = finish(root, folder, end, length, rng, counts) and result(folder) == expected
            if not same:
                counts["differ"] += 1
                shutil.copytree(folder, arguments.out / folder.name)
            shutil.rmtree(folder)
    acts = ", ".join(f"{counts[act]} {act}" for act in ACTS)
    print(f"{counts['runs']} runs, {counts['starts']} starts; disturbed by: {acts}")
    print(f"{counts['differ']} runs ended otherwise than the undisturbed one")
    sys.exit(bool(counts["differ"]))


def finish(
    root: Path, folder: Path, end: float, length: float, rng: random.Random, counts: Counter[str]
) -> bool:
    """Start a run until it is through, disturbed until the time `end`; False if it never is."""
    failed = 0
    while failed < 3:
        process = start(root, folder)
        counts["starts"] += 1
        act = None
        while process.poll() is None and time.monotonic() < end and act in (None, "pause"):
            with suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, length))
            if process.poll() is None:
                act = rng.choice(ACTS)
                with suppress(OSError):  # the process, or its loader, has just ended
                    disturb(process, act, rng)
                    counts[act] += 1
        if process.wait() == 0:
            return True
        failed += act is None  # of its own accord
    return False


if __name__ == "__main__":
    run_script(main)
