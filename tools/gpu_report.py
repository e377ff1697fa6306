"""All that is to be known of this project on a GPU, in one go: is it right, and how fast is it.

`python -m tools.benchmark --device cuda --report out/` runs this. Nothing is read from a network;
frames are drawn. The parts (tools/gpu_parts.py) run one after the other in a process beside this one.
One that fails, or takes too long, leaves its last line in the report, and the next goes on, in a new
process because the GPU's state may be lost. What does not fit into the time is said to be left out.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch._dynamo

from kaist.demo import draw_demo
from kaist.files import make_folder
from tools import gpu_parts
from tools.gpu_parts import Line, Scale, Setting
from utils import choose_device

# Name -> function, and the seconds that it may take. What matters most comes first.
PARTS: dict[str, tuple[Callable[[Setting], Iterator[Line]], float]] = {
    "losses": (gpu_parts.check_losses, 90),
    "loader": (gpu_parts.check_loader, 40),
    "detections": (gpu_parts.check_detections, 40),
    "training": (gpu_parts.speed_training, 100),
    "network": (gpu_parts.speed_network, 120),
    "evaluation": (gpu_parts.speed_evaluation, 80),
    "rows": (gpu_parts.speed_rows, 150),
    "resume": (gpu_parts.check_resume, 120),
    "batches": (gpu_parts.speed_batches, 60),
    "image": (gpu_parts.speed_image, 40),
    "torchrun": (gpu_parts.check_torchrun, 60),
}


def write_report(out: Path, device: torch.device, machine: str, budget: float, scale: Scale) -> None:
    """Run the parts and write `report.json` and `report.md`, anew after each of them.

    Args:
        machine: one line on it; budget: seconds for everything.
    """
    start, done = time.time(), {}
    make_folder(out)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(device, scale, Path(folder), start + budget)
        draw_demo(setting.root, train_frames=scale.drawn, test_frames=6, progress=False)
        for name, part in run_parts(setting, list(PARTS)):
            done[name] = part
            pages = {"machine": machine, "seconds": round(time.time() - start), "parts": done}
            (out / "report.json").write_text(json.dumps(pages, indent=1), encoding="utf-8")
            (out / "report.md").write_text(as_page(pages), encoding="utf-8")
            print(f"{name}: {part['error'] or str(len(part['lines'])) + ' lines'}, {part['seconds']:.0f} s")
    print(f"report: {out / 'report.md'}")


def run_parts(setting: Setting, names: list[str]) -> Iterator[tuple[str, dict]]:
    """Each part's name and what came of it: lines, seconds, and the error that ended it, or ""."""
    process, context = None, get_context("spawn")
    try:
        for name in names:
            limit = min(PARTS[name][1] * setting.scale.patience, setting.deadline - time.time())
            lines, error, start = [], "left out: the time was up", time.time()
            if limit > 5:
                if process is None:
                    pipe, theirs = context.Pipe()
                    process = context.Process(target=serve_parts, args=(theirs, setting))
                    process.start()
                    theirs.close()
                pipe.send(name)
                lines, error = receive(pipe, start + limit)
            if error and process:  # its GPU's state may be lost
                end(process)
                process = None
            yield name, {"lines": lines, "error": error, "seconds": time.time() - start}
    finally:
        if process:
            end(process)


def end(process: BaseProcess) -> None:
    """End a process and those that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may have no group of its own yet
    process.join()


def receive(pipe: Connection, until: float) -> tuple[list[dict], str]:
    """A part's lines and its error, or ""."""
    lines = []
    with suppress(EOFError, ConnectionError):
        while pipe.poll(max(0.0, until - time.time())):
            kind, content = pipe.recv()
            if kind == "line":
                lines.append(content)
            else:
                return lines, content
        return lines, "it took longer than it may"
    return lines, "its process died"


def serve_parts(pipe: Connection, setting: Setting) -> None:
    """Run the parts that are asked for, and send their lines as they come."""
    os.setsid()  # so that what it starts ends with it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    choose_device(str(setting.device))
    with suppress(EOFError):
        while True:
            name, error = pipe.recv(), ""
            torch._dynamo.reset()  # a part's graphs are its own
            try:
                for line in PARTS[name][0](setting):
                    pipe.send(("line", line._asdict()))
            except Exception as problem:  # whatever it is, the other parts can do without
                error = f"{type(problem).__name__}: {problem}".strip().splitlines()[0][:300]
            pipe.send(("end", error))


def as_page(report: dict) -> str:
    """The report as a page."""
    page = [f"# {report['machine']}", "", f"{report['seconds']} s in all.", ""]
    for name, part in report["parts"].items():
        page += [f"## {name}", "", PARTS[name][0].__doc__.splitlines()[0], ""]
        if part["lines"]:
            page += ["| what | value | unit | aim | | |", "|---|---|---|---|---|---|"]
        for line in map(Line._make, (line.values() for line in part["lines"])):
            verdict = {None: "", True: "met", False: "**missed**"}[line.met]
            cells = (line.what, f"{line.value:.4g}", line.unit, line.aim, verdict, line.note)
            page.append(f"| {' | '.join(cells)} |")
        page += [""] * bool(part["lines"]) + [f"**Failed:** {part['error']}", ""] * bool(part["error"])
    return "\n".join(page)
