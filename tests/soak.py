"""Disturbs training runs at random and compares their results with those of an undisturbed run.

    python -m tests.soak --minutes 30

A small run on the demo set is started and disturbed repeatedly until it finishes. A disturbance kills it,
stops it by one or more signals, pauses it, limits its memory or file sizes, or kills a loader process. The
run's weights, log and detections have to equal those of the undisturbed run bit for bit. The exit code is 1
if any run differs. Linux only.
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
DISTURBANCES = (*SIGNALS, "pause", "no memory", "no disk", "kill a loader")
MAX_WAIT = 30.0  # seconds until the next disturbance, however slow the machine is
TIME_COLUMNS = ("seconds", "images_per_s")  # columns of log.csv that differ from run to run


def start(root: Path, folder: Path) -> subprocess.Popen:
    """Start or resume the run in the folder `soak` of `folder`."""
    paths = ["--data-root", root, "--checkpoints", folder]
    folder.mkdir(exist_ok=True)
    with (folder / "output.txt").open("a") as output:
        command = [sys.executable, ROOT / "train.py", *FLAGS.split(), *paths]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment)


def result(folder: Path) -> dict[str, object]:
    """The parts of a run that have to repeat: bytes of the weights, log.csv and detections.txt."""
    from engine.checkpoint import load_checkpoint  # here, because torch takes seconds

    model = load_checkpoint(folder / "soak/last.pt")["model"]
    weights = {name: tensor.numpy().tobytes() for name, tensor in model.items()}
    with (folder / "soak/log.csv").open(encoding="utf-8") as file:
        log = [{k: v for k, v in row.items() if k not in TIME_COLUMNS} for row in csv.DictReader(file)]
    return {"weights": weights, "log": log, "detections": (folder / "soak/detections.txt").read_bytes()}


def disturb(process: subprocess.Popen, kind: str, rng: random.Random) -> None:
    """Disturb a running process. Most disturbances end it, some only at its next save."""
    if kind == "pause":
        process.send_signal(signal.SIGSTOP)
        time.sleep(rng.uniform(0, 2))
        process.send_signal(signal.SIGCONT)
    elif kind == "no memory":
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 2**24
        resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
    elif kind == "no disk":
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**16, 2**16))
    elif kind == "kill a loader":
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(rng.choice(children or [0x7FFFFFFF])), signal.SIGKILL)
    for name in SIGNALS.get(kind, ()):
        process.send_signal(getattr(signal, name))
        time.sleep(0.01)


def finish(root: Path, folder: Path, end: float, length: float, rng: random.Random, counts: Counter) -> bool:
    """Start a run until it finishes, and return whether it does; it is disturbed until the time `end`.

    length: seconds of the undisturbed run. counts: starts and disturbances, which are updated.
    """
    for _ in range(100):
        process, disturbed = start(root, folder), False
        counts["starts"] += 1
        while process.poll() is None and time.monotonic() < end:
            with suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, min(length, MAX_WAIT)))
            if process.poll() is None:
                least = min(counts[kind] for kind in DISTURBANCES)
                kind = rng.choice([kind for kind in DISTURBANCES if counts[kind] == least])
                with suppress(OSError):  # the process, or its loader, has just ended
                    disturb(process, kind, rng)
                    disturbed = True
                    counts[kind] += 1
        if process.wait() == 0:
            return True
        if not disturbed:
            return False
    return False


def main() -> None:
    """Disturb runs for some minutes, and print the number of disturbances and of runs that differ."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="shortest duration (default: %(default)g)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the disturbances (%(default)s)")
    description = "folder for copies of runs that differ (%(default)s)"
    parser.add_argument("--out", type=Path, default=Path("soak-failures"), help=description)
    arguments = parser.parse_args()
    rng, counts = random.Random(arguments.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        root, folder = Path(temporary, "demo"), Path(temporary, "undisturbed")
        draw_set(root, train_frames=24, test_frames=12, progress=False)
        started = time.monotonic()
        if start(root, folder).wait():
            output = (folder / "output.txt").read_text(encoding="utf-8").strip()
            raise InputError(f"the undisturbed run failed: {output.splitlines()[-1]}", "run train.py alone")
        expected, length = result(folder), time.monotonic() - started
        end = time.monotonic() + 60 * arguments.minutes
        while time.monotonic() < end:
            folder = Path(temporary, f"run-{counts['runs']}")
            counts["runs"] += 1
            if not (finish(root, folder, end, length, rng, counts) and result(folder) == expected):
                counts["differ"] += 1
                shutil.copytree(folder, arguments.out / folder.name, dirs_exist_ok=True)
            shutil.rmtree(folder)
    print(f"{counts['runs']} runs of {length:.0f} s in {counts['starts']} starts, disturbed by ", end="")
    print(", ".join(f"{kind}: {counts[kind]}" for kind in DISTURBANCES))
    print(f"{counts['differ']} runs differ from the undisturbed one")
    sys.exit(bool(counts["differ"]))


if __name__ == "__main__":
    run_script(main)
