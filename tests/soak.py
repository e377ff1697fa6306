"""Disturbs training runs at random, and compares how they end with a run left alone.

    python -m tests.soak --minutes 30

A small run on the demo set is started again and again, and each time killed, stopped by one signal
or several, paused, denied memory, denied room for its files, or robbed of a loader process, until
it is through; then its weights, its log and its detections have to be those of an undisturbed run,
bit for bit. Ends with 1 if any differs. For Linux.
"""

import csv
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

from engine.config import ROOT, OneLineParser
from kaist.demo import draw_set
from kaist.files import InputError, run_script

FLAGS = "--epochs 6 --eval-every 2 --batch-size 2 --workers 2 --width 0.0625 --save-minutes 0.005"
FLAGS += " --device cpu --precision fp32 --name soak"
SIGNALS = {"kill": ["SIGKILL"], "stop": ["SIGTERM"], "signals": ["SIGINT", "SIGTERM", "SIGHUP"] * 2}
ACTS = (*SIGNALS, "pause", "no memory", "no disk", "kill a loader")
LONGEST_WAIT = 30.0  # seconds until the next act, however slow the machine is
CLOCKS = ("seconds", "images_per_s")  # columns of log.csv that no run repeats


def start(root: Path, folder: Path) -> subprocess.Popen:
    """Start or go on with the run whose folder is made below `folder`."""
    where = ["--data-root", root, "--checkpoints", folder]
    folder.mkdir(exist_ok=True)
    with (folder / "output.txt").open("a") as output:
        command = [sys.executable, ROOT / "train.py", *FLAGS.split(), *where]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment)


def result(folder: Path) -> dict[str, object]:
    """What has to be the same: the bytes of the weights, log.csv, detections.txt."""
    from engine.checkpoint import load_checkpoint  # here, because torch takes seconds

    model = load_checkpoint(folder / "soak/last.pt")["model"]
    weights = {name: tensor.numpy().tobytes() for name, tensor in model.items()}
    with (folder / "soak/log.csv").open(encoding="utf-8") as file:
        log = [{k: v for k, v in row.items() if k not in CLOCKS} for row in csv.DictReader(file)]
    return {"weights": weights, "log": log, "detections": (folder / "soak/detections.txt").read_bytes()}


def disturb(process: subprocess.Popen, act: str, rng: random.Random) -> None:
    """Do one act to a running process; it ends after most of them, at once or at its next save."""
    if act == "pause":
        process.send_signal(signal.SIGSTOP)
        time.sleep(rng.uniform(0, 2))
        process.send_signal(signal.SIGCONT)
    elif act == "no memory":
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + 2**24
        resource.prlimit(process.pid, resource.RLIMIT_AS, (most, most))
    elif act == "no disk":
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**16, 2**16))
    elif act == "kill a loader":
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(rng.choice(children or [0x7FFFFFFF])), signal.SIGKILL)
    for name in SIGNALS.get(act, ()):
        process.send_signal(getattr(signal, name))
        time.sleep(0.01)


def finish(root: Path, folder: Path, end: float, length: float, rng: random.Random, counts: Counter) -> bool:
    """Start a run until it is through, disturbed until the time `end`; False if it never is."""
    for _ in range(100):
        process, disturbed = start(root, folder), False
        counts["starts"] += 1
        while process.poll() is None and time.monotonic() < end:
            with suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, min(length, LONGEST_WAIT)))
            if process.poll() is None:
                least = min(counts[act] for act in ACTS)
                act = rng.choice([act for act in ACTS if counts[act] == least])
                with suppress(OSError):  # the process, or its loader, has just ended
                    disturb(process, act, rng)
                    disturbed = True
                    counts[act] += 1
        if process.wait() == 0:
            return True
        if not disturbed:
            return False
    return False


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
        root, folder = Path(temporary, "demo"), Path(temporary, "whole")
        draw_set(root, train_frames=24, test_frames=12, progress=False)
        begun = time.monotonic()
        if start(root, folder).wait():
            raise InputError("the undisturbed run failed", "look why", file=folder / "output.txt")
        expected, length = result(folder), time.monotonic() - begun
        end = time.monotonic() + 60 * arguments.minutes
        while time.monotonic() < end:
            folder = Path(temporary, f"run-{counts['runs']}")
            counts["runs"] += 1
            if not (finish(root, folder, end, length, rng, counts) and result(folder) == expected):
                counts["differ"] += 1
                shutil.copytree(folder, arguments.out / folder.name, dirs_exist_ok=True)
            shutil.rmtree(folder)
    print(f"{counts['runs']} runs of {length:.0f} s in {counts['starts']} starts, disturbed by ", end="")
    print(", ".join(f"{act}: {counts[act]}" for act in ACTS))
    print(f"{counts['differ']} runs ended otherwise than the undisturbed one")
    sys.exit(bool(counts["differ"]))


if __name__ == "__main__":
    run_script(main)
