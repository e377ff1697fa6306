"""The GPU report: is this project correct on the device, and how fast is it?

`python -m tools.benchmark --device cuda --report out/` runs this, on a drawn demo set. A part is a generator
of lines. The parts run one after the other, each in its own process, because an error can corrupt the state
of the GPU. The report has all lines of a part that fails or exceeds its time limit, and its error.
"""

import itertools
import json
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datasets import batch_loader
from engine.checkpoint import load_checkpoint
from engine.config import ROOT, as_flags
from engine.optim import set_lr
from kaist.files import make_folder
from kaist.images import read_frame
from ssd.boxes import detect
from ssd.memory_plan import plan_memory
from tools import workloads
from tools.timing import TABLE_HEADER, Line, Setting, Subprocess, at_least, at_most, time_in_turns, timer
from tools.workloads import NMS_SETTINGS, Step, plain_config, random_batch, row_config
from utils import choose_device, compile_model, detect_frames, detect_image, predict

MINUTES = 7.5  # time limit of all parts together, on a GPU
MAX_PART_SECONDS = 150.0  # time limit of a part, on a GPU; the longest part mostly compiles
CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


def allow_tf32(allowed: bool) -> None:
    """Set whether matrix products and convolutions in fp32 may use TF32."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


# ------------------------------------------------------------------------------ correctness


def check_losses(setting: Setting) -> Iterator[Line]:
    """Loss terms in fp32 and gradients in fp64 of one batch per row, compared with the CPU's in fp64.

    In fp32, rounding decides the sign of some ReLU inputs and which negatives are mined. The gradients of
    two CPU kernels then differ by a thousandth and more. In fp64 they do not.
    """
    allow_tf32(False)
    torch.backends.cudnn.benchmark = False
    for row in setting.loss_rows.split():
        config = row_config(row, width=setting.width)
        loss, gradient = loss_and_gradient(config, CPU, torch.float64)
        device_loss, fp32 = loss_and_gradient(config, setting.device, torch.float32)
        _, fp64 = loss_and_gradient(config, setting.device, torch.float64)
        note = f"loss {loss[0]:.6f}, on the device {device_loss[0]:.6f}"
        yield at_most(f"row {row}: loss terms", relative_error(device_loss, loss), "relative", 1e-4, note)
        note = f"in fp32 {relative_error(fp32, gradient):.1e}"
        yield at_most(f"row {row}: gradient", relative_error(fp64, gradient), "relative", 1e-4, note)


def loss_and_gradient(config: Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss terms (terms,) and gradient (parameters,) of a row's network for one batch, computed on `device`
    in `dtype`, returned in float64 on the CPU."""
    torch.manual_seed(0)
    kwargs = {"device": device, "dtype": dtype, "memory_format": torch.channels_last}
    model, criterion = (part.to(**kwargs) for part in workloads.row_network(config))
    batch = random_batch(model, 2).to(device)
    losses = criterion(model.train()(batch.images), batch.boxes.to(dtype), batch.labels, batch.masks)
    losses[0].backward()
    parameters = (*model.parameters(), *criterion.parameters())
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    return losses.detach().cpu().double(), gradient.cpu().double()


def check_captured(setting: Setting) -> Iterator[Line]:
    """The losses of ten steps replayed from a CUDA graph, compared with eager steps."""
    for row in ("demo", "26"):
        config, runs = row_config(row, width=setting.width), []
        for mode in ("off", "graphs"):
            torch.manual_seed(0)
            step, losses = Step(config, setting.device, FP32, mode), []
            for i, n in enumerate((2, 2, 2, 2, 2, 3, 2, 2, 2, 2)):
                set_lr(step.optimizer, 1e-3 / (1 + i))
                losses.append(step(random_batch(step.model, n).to(setting.device))[0].cpu())
            runs.append(torch.stack(losses))
        error, note = relative_error(*runs), f"the last {runs[1][-1]:.6f}"
        yield at_most(f"row {row}: loss of ten steps", error, "relative", 1e-4, note)


def check_detections(setting: Setting) -> Iterator[Line]:
    """Decoding and NMS of equal predictions, and a network's detections in fp32, compared with the CPU's."""
    allow_tf32(False)
    devices, priors = (CPU, setting.device), workloads.row_network(plain_config(width=0.01))[0].priors
    for mean in (-3.6, -8.94):
        predictions = (workloads.random_predictions(8, mean, device) for device in devices)
        results = [detect(p, priors.to(p.loc.device), **NMS_SETTINGS) for p in predictions]
        what = f"boxes that differ, {len(results[0][0][0])} an image"
        yield at_most(what, unequal_boxes(*results), "boxes", 0)
    config, (root, demo_frames) = row_config("40", width=setting.width), setting.demo()
    images = [read_frame(root, frame.id, config.input_mode) for frame in demo_frames[:4]]
    scores = []
    for device in devices:
        torch.manual_seed(0)
        model = workloads.row_network(config)[0].eval().to(device)
        results = (detect_image(model, image, FP32, test_flip=True, **NMS_SETTINGS) for image in images)
        scores.append(np.concatenate([image_scores for _, image_scores in results]))
    expected, actual = scores
    difference = abs(len(actual) - len(expected))
    yield at_most("a network's detections: difference in number", difference, "boxes", 0)
    if not difference:
        yield at_most("their scores: largest difference", abs(actual - expected).max(), "", 1e-4)


def check_resume(setting: Setting) -> Iterator[Line]:
    """A run of train.py with --deterministic, compared with one that is stopped by SIGTERM and resumed."""
    uninterrupted, stopped = train(setting, "whole"), setting.folder / "runs" / "cut"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(train_command(setting, "cut"), **quiet) as process:
        while process.poll() is None and not (stopped / "log.csv").exists():
            time.sleep(0.01)
        process.terminate()
    was_stopped = not (stopped / "miss_rate.json").exists()
    yield Line("the run was stopped after its first epoch", was_stopped, "", "", "1", was_stopped)
    unequal = unequal_weights(uninterrupted, train(setting, "cut"))
    yield at_most("weight tensors that differ in any bit", unequal, "tensors", 0)
    if unequal:  # do runs differ without an interruption too?
        unequal = unequal_weights(uninterrupted, train(setting, "again"))
        yield at_most("the same of two uninterrupted runs", unequal, "tensors", 0)


def check_torchrun(setting: Setting) -> Iterator[Line]:
    """The loss of train.py under torchrun with one process, compared with a run without torchrun."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    runs = train(setting, "whole"), train(setting, "torchrun", *launcher)
    expected, actual = (load_checkpoint(run / "last.pt")["history"][-1]["loss"] for run in runs)
    yield at_most("loss of the last epoch", abs(expected / actual - 1), "relative", 1e-6)


def train_command(setting: Setting, name: str, *launcher: str) -> list[str]:
    """The command that starts or resumes a run of train.py."""
    flags = {"data_root": setting.demo()[0], "checkpoints": setting.folder / "runs", "name": name}
    flags |= {"device": setting.device, "width": setting.width, "workers": min(2, setting.workers)}
    flags |= {"deterministic": True, "epochs": 12, "eval_every": 12}
    return [sys.executable, *launcher, str(ROOT / "train.py"), *as_flags(flags)]


def train(setting: Setting, name: str, *launcher: str) -> Path:
    """Run train.py, unless the run is finished, and return the run's folder. Raises RuntimeError with the
    last line of its output if it fails."""
    folder = setting.folder / "runs" / name
    if not (folder / "miss_rate.json").exists():
        command = train_command(setting, name, *launcher)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"train.py exited with {done.returncode}: {done.stdout.splitlines()[-1]}")
    return folder


def unequal_weights(*runs: Path) -> int:
    """The number of weight tensors in which two runs' last checkpoints differ."""
    a, b = (load_checkpoint(run / "last.pt")["model"] for run in runs)
    return sum(not torch.equal(a[name], b[name]) for name in a)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference of two vectors, divided by the norm of the second."""
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def unequal_boxes(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> int:
    """The number of boxes that differ by more than rounding, or that only one of two devices has; of each
    image boxes (n, 4) and scores (n,)."""
    boxes = [image_boxes.cpu() for image_boxes, _ in (*a, *b)]
    first, second = pad_sequence(boxes, batch_first=True, padding_value=-1.0).chunk(2)
    return int(((first - second).abs().amax(2) > 1e-5).sum())


# ------------------------------------------------------------------------------ speed


def speed_network(setting: Setting) -> Iterator[Line]:
    """Training steps of row 26 without data loading, by COMPILE, precision and memory format."""
    config, n = row_config("26", width=setting.speed_width), setting.batch
    yield rate_line(setting, "bare convolutions, bf16", workloads.bare_step(setting, config, BF16), n)
    for mode in setting.compile_modes:
        yield step_line(setting, f"row 26, bf16, COMPILE {mode}", Step(config, setting.device, BF16, mode), n)
    contiguous = Step(config, setting.device, BF16)
    contiguous.model.to(memory_format=torch.contiguous_format)
    yield step_line(setting, "row 26, bf16, eager, not channels_last", contiguous, n)
    for tf32, name in ((True, "tf32"), (False, "fp32")):
        allow_tf32(tf32)
        yield step_line(setting, f"row 26, {name}, eager", Step(config, setting.device, FP32), n)


def speed_rows(setting: Setting) -> Iterator[Line]:
    """Training steps of the largest networks in bf16, at their rows' batch sizes."""
    for row, aim in (("42", 400), ("41", 0), ("40", 0)):
        config = row_config(row, width=setting.speed_width)
        step, n = Step(config, setting.device, BF16, "graphs"), min(config.batch_size, setting.batch)
        yield step_line(setting, f"row {row}, bf16, COMPILE graphs", step, n, aim)


def speed_batches(setting: Setting) -> Iterator[Line]:
    """Eager steps of row 26 in bf16 by batch size: speed, and peak memory compared with the memory plan."""
    config, step = row_config("26", width=setting.speed_width), None
    for n in setting.batch_sizes:
        step = None  # frees its memory
        before = torch.cuda.memory_allocated() if setting.on_gpu else 0
        step = Step(config, setting.device, BF16)
        yield step_line(setting, "row 26, bf16, eager", step, n)
        if setting.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            step(random_batch(step.model, n).to(setting.device))
            added = torch.cuda.max_memory_allocated() - before
            plan = plan_memory(step.model, step.criterion, config.optimizer, BF16)
            yield Line(f"memory, batch {n}", added / 2**20, "MiB", f"planned {plan.total(n) / 2**20:.0f} MiB")


def speed_training(setting: Setting) -> Iterator[Line]:
    """Training of row 26 with batches loaded from the frame cache, compared with steps on one batch."""
    config, n = row_config("26", width=setting.speed_width), setting.batch
    step = Step(config, setting.device, BF16, "graphs")
    pairs = workloads.row_pairs(setting, config, step.model, cached=True, n_frames=100 * n)
    loader = batch_loader(pairs, step.model, shuffle=True, batch_size=n, workers=setting.workers)
    batches = (batch.to(setting.device) for epoch in itertools.count() for batch in loader.epoch(epoch))
    repeated = partial(step, next(batches))  # of the shapes that the graph is captured with
    # Not in turns: the loader would fill its queue during the steps without data.
    longer = replace(setting, seconds=5 * setting.seconds)
    [loaded] = time_in_turns(longer, timer(lambda: step(next(batches))))
    [bare] = time_in_turns(setting, timer(repeated))
    what, note = f"row 26 end to end, batch {n}, bf16", f"{loaded.spread}; next target 3,000"
    yield at_least(what, n / loaded.seconds, "images/s", 2000, note)
    yield at_most("step with data, relative to one without", loaded.seconds / bare.seconds, "ratio", 1.05)


def speed_image(setting: Setting) -> Iterator[Line]:
    """Detection in one pair, from its files to boxes."""
    for row in ("26", "40", "42"):
        config = row_config(row, width=setting.speed_width)
        [timing] = time_in_turns(setting, timer(workloads.row_image(setting, config, BF16)))
        yield Line(f"row {row}: one frame, files to boxes", 1e3 * timing.seconds, "ms", timing.spread)


def speed_evaluation(setting: Setting) -> Iterator[Line]:
    """Detection in as many frames as the test list has by row 26, with images read from files."""
    config = row_config("26", width=setting.speed_width, augment=False)
    model = workloads.row_detector(config, setting.device)
    pairs = workloads.row_pairs(setting, config, model, cached=False, n_frames=setting.test_frames)
    batch_size = min(64, len(pairs))
    loader = batch_loader(pairs, model, shuffle=False, batch_size=batch_size, workers=setting.workers)
    images = next(iter(loader.epoch(0))).images.to(setting.device)
    for mode in dict.fromkeys((setting.compile_modes[0], setting.compile_modes[-1])):
        network = compile_model(model, mode)
        forward = torch.inference_mode()(partial(predict, network, images, BF16, False))
        yield rate_line(setting, f"forward pass, COMPILE {mode}", forward, len(images))
        evaluation = timer(partial(detect_frames, network, loader, BF16, **NMS_SETTINGS))
        evaluation(1)  # workers start, kernels are chosen
        yield at_most(f"{len(pairs)} frames, files to boxes, COMPILE {mode}", evaluation(1), "s", 3.0)


def rate_line(setting: Setting, what: str, function: Callable[[], object], n: int, aim: float = 0) -> Line:
    """A line with the images per second of a function that processes n frames; aim 0: no target."""
    [timing] = time_in_turns(setting, timer(function))
    line = f"{what}, batch {n}", n / timing.seconds, "images/s"
    return at_least(*line, aim, timing.spread) if aim else Line(*line, timing.spread)


def step_line(setting: Setting, what: str, step: Step, n: int, aim: float = 0) -> Line:
    """A line with the images per second of a training step on the same batch of n frames."""
    batch = random_batch(step.model, n).to(setting.device)
    return rate_line(setting, what, partial(step, batch), n, aim)


# ------------------------------------------------------------------------------ report

# The most important parts run first.
ORDER = (check_captured, check_losses, check_detections, speed_training, speed_network, speed_rows)
ORDER += (speed_evaluation, check_resume, speed_batches, speed_image, check_torchrun)
PARTS = {part.__name__.partition("_")[2]: part for part in ORDER}


def write_report(out: Path, setting: Setting, machine: str) -> None:
    """Run the parts, and write `report.json` and `report.md` into `out` after each; machine: its description
    in one line."""
    start, done = time.time(), {}
    make_folder(out)
    setting.demo()
    for name, part in run_parts(setting, list(PARTS), start + 60 * MINUTES * setting.time_factor):
        done[name] = part
        report = {"machine": machine, "seconds": round(time.time() - start), "parts": done}
        (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        (out / "report.md").write_text(as_page(report), encoding="utf-8")
        print(f"{name}: {part['error'] or str(len(part['lines'])) + ' lines'}, {part['seconds']:.0f} s")
    print(f"report: {out / 'report.md'}")


def run_parts(setting: Setting, names: list[str], deadline: float) -> Iterator[tuple[str, dict]]:
    """Yield each part's name and result: its lines, its seconds, and the error that ended it, or "".

    No part starts or continues after the deadline, a value of time().
    """
    next_part = Subprocess(part_lines, setting, names[0])
    for name, next_name in itertools.pairwise([*names, None]):
        with next_part as part:
            if next_name:  # imports torch while this part runs
                next_part = Subprocess(part_lines, setting, next_name)
            start, lines, error = time.time(), [], "left out: the time was up"
            end = min(start + MAX_PART_SECONDS * setting.time_factor, deadline)
            if end > start + 5:
                try:
                    while line := part(seconds=max(0.0, end - time.time())):
                        lines.append(line._asdict())
                    error = ""
                except (RuntimeError, TimeoutError) as problem:
                    error = str(problem)
        yield name, {"lines": lines, "error": error, "seconds": time.time() - start}


def part_lines(setting: Setting, name: str) -> Callable[[], Line | None]:
    """A function that returns the next line of a part, and None after the last."""
    choose_device(str(setting.device), training=True)
    return partial(next, PARTS[name](setting), None)


def as_page(report: dict) -> str:
    """The report in Markdown."""
    page = [f"# {report['machine']}", "", f"{report['seconds']} s in all.", ""]
    for name, part in report["parts"].items():
        page += [f"## {name}", "", PARTS[name].__doc__.splitlines()[0], ""]
        if part["lines"]:
            page += [TABLE_HEADER, *(Line(**line).row() for line in part["lines"]), ""]
        page += [f"**Failed:** {part['error']}", ""] * bool(part["error"])
    return "\n".join(page)
