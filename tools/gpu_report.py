"""All that is to be known of this project on a GPU, in one go: is it right, and how fast is it.

`python -m tools.benchmark --device cuda --report out/` runs this. Nothing is read from a network;
frames are drawn. A part is a generator of lines. The parts run one after the other, each in a process of
its own, because one that fails may lose the GPU's state. One that fails, or takes too long, leaves its last
line in the report, and the next goes on. What does not fit into the time is said to be left out.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
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
from tools.timing import HEADER, Line, Setting, Subprocess, at_least, at_most, time_in_turns
from tools.workloads import LIMITS, Step, plain_config, row_batch, row_config
from utils import choose_device, compile_model, detect_frames, detect_image, predict

MINUTES = 7.5  # that all parts take at most on a GPU, the last one aside
LONGEST = 150.0  # seconds that a part may take there; of the longest, compiling is most
CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


def allow_tf32(on: bool) -> None:
    """Whether products and convolutions in fp32 are TF32 ones from here on."""
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


# ------------------------------------------------------------------------------ is it right


def check_losses(setting: Setting) -> Iterator[Line]:
    """Loss terms in fp32 and the gradient in fp64 of one batch against the CPU's in fp64, row by row.

    In fp32 rounding decides on which side of zero some units of a ReLU are, and which negatives are mined:
    two CPU kernels' gradients are apart by a thousandth and more. In fp64 no such unit is left.
    """
    allow_tf32(False)
    torch.backends.cudnn.benchmark = False
    for row in setting.rows.split():
        config = row_config(row, width=setting.width)
        loss, gradient = loss_and_gradient(config, CPU, torch.float64)
        own_loss, gradient_fp32 = loss_and_gradient(config, setting.device, torch.float32)
        _, own_gradient = loss_and_gradient(config, setting.device, torch.float64)
        note = f"loss {loss[0]:.6f}, on the device {own_loss[0]:.6f}"
        yield at_most(f"row {row}: loss terms", distance(own_loss, loss), "of their length", 1e-4, note)
        note = f"in fp32 {distance(gradient_fp32, gradient):.1e}"
        yield at_most(f"row {row}: gradient", distance(own_gradient, gradient), "of its length", 1e-4, note)


def loss_and_gradient(config: Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss terms and gradient of a row's first batch, in float64 on the CPU; computed in `dtype`."""
    torch.manual_seed(0)
    how = {"device": device, "dtype": dtype, "memory_format": torch.channels_last}
    model, criterion = (part.to(**how) for part in workloads.row_network(config))
    batch = row_batch(config, 2).to(device)
    losses = criterion(model.train()(batch.images), batch.boxes.to(dtype), batch.labels, batch.masks)
    losses[0].backward()
    parameters = (*model.parameters(), *criterion.parameters())
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    return losses.detach().cpu().double(), gradient.cpu().double()


def check_captured(setting: Setting) -> Iterator[Line]:
    """Ten steps replayed from a CUDA graph against ten that are not: their losses."""
    for row in ("demo", "26"):
        config, runs = row_config(row, width=setting.width), []
        batches = [row_batch(config, n).to(setting.device) for n in (2, 2, 2, 2, 2, 3, 2, 2, 2, 2)]
        for mode in ("off", "graphs"):
            torch.manual_seed(0)
            step, losses = Step(config, setting.device, FP32, mode), []
            for i, batch in enumerate(batches):
                set_lr(step.optimizer, 1e-3 / (1 + i))
                losses.append(step(batch)[0].cpu())
            runs.append(torch.stack(losses))
        apart, note = distance(*runs), f"the last {runs[1][-1]:.6f}"
        yield at_most(f"row {row}: loss of ten steps", apart, "of its length", 1e-4, note)


def check_detections(setting: Setting) -> Iterator[Line]:
    """Decoding and NMS of the same predictions, and a network's detections in fp32, against the CPU's."""
    allow_tf32(False)
    both, priors = (CPU, setting.device), workloads.row_network(plain_config(width=0.01))[0].priors
    for mean in (-3.6, -8.94):
        predictions = (workloads.random_predictions(8, mean, device) for device in both)
        found = [detect(p, priors.to(p.loc.device), **LIMITS) for p in predictions]
        yield at_most(f"boxes that differ, {len(found[0][0][0])} an image", unequal_boxes(*found), "boxes", 0)
    config, (root, drawn) = row_config("40", width=setting.width), setting.demo()
    frames = [read_frame(root, frame.id, config.input_mode) for frame in drawn[:4]]
    scores = []
    for device in both:
        torch.manual_seed(0)
        model = workloads.row_network(config)[0].eval().to(device)
        found = (detect_image(model, frame, FP32, test_flip=True, **LIMITS) for frame in frames)
        scores.append(np.concatenate([own for _, own in found]))
    ours, theirs = scores
    yield at_most("a network's detections: more or fewer", abs(len(ours) - len(theirs)), "boxes", 0)
    if len(ours) == len(theirs):
        yield at_most("their scores", abs(ours - theirs).max(), "apart", 1e-4)


def check_resume(setting: Setting) -> Iterator[Line]:
    """Two runs of train.py with --deterministic, one of them ended by SIGTERM and started again."""
    whole, cut = train(setting, "whole"), setting.folder / "runs" / "cut"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(train_command(setting, "cut"), **quiet) as process:
        while process.poll() is None and not (cut / "log.csv").exists():
            time.sleep(0.01)
        process.terminate()
    ended = not (cut / "miss_rate.json").exists()
    yield Line("the run was ended after its first epoch", ended, "", "", "1", ended)
    unequal = unequal_weights(whole, train(setting, "cut"))
    yield at_most("tensors of weights that differ, bit for bit", unequal, "tensors", 0)
    if unequal:  # whose fault is it?
        again = unequal_weights(whole, train(setting, "again"))
        yield at_most("the same of two runs that nobody ended", again, "tensors", 0)


def check_torchrun(setting: Setting) -> Iterator[Line]:
    """train.py under torchrun with one process: the losses of the run without it."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    runs = train(setting, "whole"), train(setting, "torchrun", *launcher)
    whole, under = (load_checkpoint(run / "last.pt")["history"][-1]["loss"] for run in runs)
    yield at_most("loss apart after the last epoch", abs(whole / under - 1), "of it", 1e-6)


def train_command(setting: Setting, name: str, *launcher: str) -> list[str]:
    """How a run of train.py is started, and gone on with."""
    settings = {"data_root": setting.demo()[0], "checkpoints": setting.folder / "runs", "name": name}
    settings |= {"device": setting.device, "width": setting.width, "workers": min(2, setting.workers)}
    settings |= {"deterministic": True, "epochs": 12, "eval_every": 12}
    return [sys.executable, *launcher, str(ROOT / "train.py"), *as_flags(settings)]


def train(setting: Setting, name: str, *launcher: str) -> Path:
    """The folder of a run of train.py, which is finished if it is not.

    Raises:
        RuntimeError: it has failed; its last line.
    """
    folder = setting.folder / "runs" / name
    if not (folder / "miss_rate.json").exists():
        command = train_command(setting, name, *launcher)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"train.py ended with {done.returncode}: {done.stdout.splitlines()[-1]}")
    return folder


def unequal_weights(*runs: Path) -> int:
    """How many tensors of two runs' weights are not the same bit for bit."""
    ours, theirs = (load_checkpoint(run / "last.pt")["model"] for run in runs)
    return sum(not torch.equal(ours[name], theirs[name]) for name in ours)


def distance(a: Tensor, b: Tensor) -> float:
    """How far apart two vectors are, as a share of the second one's length."""
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def unequal_boxes(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> int:
    """How many boxes of two devices' images differ by more than rounding; one that is not there does."""
    boxes = [found.cpu() for found, _ in (*ours, *theirs)]
    a, b = pad_sequence(boxes, batch_first=True, padding_value=-1.0).chunk(2)
    return int(((a - b).abs().amax(2) > 1e-5).sum())


# ------------------------------------------------------------------------------ how fast is it


def speed_network(setting: Setting) -> Iterator[Line]:
    """Steps of row 26 without data: eager, compiled and with CUDA graphs; precisions; memory format."""
    config, n = row_config("26", width=setting.speed_width), setting.batch
    yield rate_line(setting, "bare convolutions, bf16", workloads.bare_step(setting, config, BF16), n)
    for mode in setting.modes:
        yield step_line(setting, f"row 26, bf16, COMPILE {mode}", Step(config, setting.device, BF16, mode), n)
    contiguous = Step(config, setting.device, BF16)
    contiguous.model.to(memory_format=torch.contiguous_format)
    yield step_line(setting, "row 26, bf16, eager, not channels_last", contiguous, n)
    for on, name in ((True, "tf32"), (False, "fp32")):
        allow_tf32(on)
        yield step_line(setting, f"row 26, {name}, eager", Step(config, setting.device, FP32), n)


def speed_rows(setting: Setting) -> Iterator[Line]:
    """Steps of the largest networks in bf16, of batches of their own size."""
    for row, aim in (("42", 400), ("41", 0), ("40", 0)):
        config = row_config(row, width=setting.speed_width)
        step, n = Step(config, setting.device, BF16, "graphs"), min(config.batch_size, setting.batch)
        yield step_line(setting, f"row {row}, bf16, COMPILE graphs", step, n, aim)


def speed_batches(setting: Setting) -> Iterator[Line]:
    """Eager steps of row 26 in bf16 by batch size, and the memory that they take against the plan."""
    config, step = row_config("26", width=setting.speed_width), None
    for n in setting.batches:
        step = None  # its memory is given back
        held = torch.cuda.memory_allocated() if setting.on_gpu else 0
        step = Step(config, setting.device, BF16)
        yield step_line(setting, "row 26, bf16, eager", step, n)
        if setting.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            step(row_batch(config, n).to(setting.device))
            taken = torch.cuda.max_memory_allocated() - held
            plan = plan_memory(step.model, step.criterion, config.optimizer, BF16)
            yield Line(f"memory, batch {n}", taken / 2**20, "MiB", f"planned {plan.total(n) / 2**20:.0f} MiB")


def speed_training(setting: Setting) -> Iterator[Line]:
    """Row 26 end to end from the cache, against its step without data."""
    config, n = row_config("26", width=setting.speed_width), setting.batch
    pairs = workloads.row_pairs(setting, config, cached=True, repeat=n)
    step = Step(config, setting.device, BF16, "graphs")
    loader = batch_loader(pairs, step.model, shuffle=True, batch_size=n, workers=setting.workers)
    batches = (batch.to(setting.device) for epoch in itertools.count() for batch in loader.epoch(epoch))
    alone = partial(step, next(batches))  # of the shapes that are recorded
    whole, bare = time_in_turns(setting, lambda: step(next(batches)), alone)
    what, note = f"row 26 end to end, batch {n}, bf16", f"{whole.spread}; then 3,000"
    yield at_least(what, n / whole.seconds, "images/s", 2000, note)
    yield at_most("its step with data", whole.seconds / bare.seconds, "of that without", 1.05)


def speed_image(setting: Setting) -> Iterator[Line]:
    """One pair, from its files to boxes."""
    for row in ("26", "40", "42"):
        config = row_config(row, width=setting.speed_width)
        [timing] = time_in_turns(setting, workloads.row_image(setting, config, BF16))
        yield Line(f"row {row}: one frame, files to boxes", 1e3 * timing.seconds, "ms", timing.spread)


def speed_evaluation(setting: Setting) -> Iterator[Line]:
    """The whole test list by row 26, images read from files."""
    config = row_config("26", width=setting.speed_width, augment=False)
    model = workloads.row_detector(config, setting.device)
    pairs = workloads.row_pairs(setting, config, cached=False, repeat=setting.frames)
    pairs.frames[setting.frames :] = []
    how = {"batch_size": min(64, len(pairs)), "workers": setting.workers}
    loader = batch_loader(pairs, model, shuffle=False, **how)
    images = next(iter(loader.epoch(0))).images.to(setting.device)
    for mode in dict.fromkeys((setting.modes[0], setting.modes[-1])):
        network = compile_model(model, mode)
        forward = torch.inference_mode()(partial(predict, network, images, BF16, False))
        yield rate_line(setting, f"forward pass, COMPILE {mode}", forward, len(images))
        detect_frames(network, loader, BF16, **LIMITS)  # workers start, kernels are chosen
        start = time.perf_counter()
        detect_frames(network, loader, BF16, **LIMITS)
        taken = time.perf_counter() - start
        yield at_most(f"{len(pairs)} frames, files to boxes, COMPILE {mode}", taken, "s", 3.0)


def rate_line(setting: Setting, what: str, function: Callable[[], object], n: int, aim: float = 0) -> Line:
    """The images a second of calls that work on n frames each."""
    [timing] = time_in_turns(setting, function)
    line = f"{what}, batch {n}", n / timing.seconds, "images/s"
    return at_least(*line, aim, timing.spread) if aim else Line(*line, timing.spread)


def step_line(setting: Setting, what: str, step: Step, n: int, aim: float = 0) -> Line:
    """The images a second of steps on one batch of n frames."""
    return rate_line(setting, what, partial(step, row_batch(step.config, n).to(setting.device)), n, aim)


# ------------------------------------------------------------------------------ the report

# What matters most comes first.
ORDER = (check_captured, check_losses, check_detections, speed_training, speed_network, speed_rows)
ORDER += (speed_evaluation, check_resume, speed_batches, speed_image, check_torchrun)
PARTS = {part.__name__.partition("_")[2]: part for part in ORDER}


def write_report(out: Path, setting: Setting, machine: str) -> None:
    """Run the parts and write `report.json` and `report.md`, anew after each; machine: one line on it."""
    begun, done = time.time(), {}
    make_folder(out)
    setting.demo()
    for name, part in run_parts(setting, list(PARTS), begun + 60 * MINUTES * setting.patience):
        done[name] = part
        report = {"machine": machine, "seconds": round(time.time() - begun), "parts": done}
        (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        (out / "report.md").write_text(as_page(report), encoding="utf-8")
        print(f"{name}: {part['error'] or str(len(part['lines'])) + ' lines'}, {part['seconds']:.0f} s")
    print(f"report: {out / 'report.md'}")


def run_parts(setting: Setting, names: list[str], deadline: float) -> Iterator[tuple[str, dict]]:
    """Each part's name and what came of it: lines, seconds, and the error that ended it, or "".

    deadline: the time() at which no further part begins.
    """
    begin = partial(Subprocess, part_lines, setting)
    following = begin(names[0])
    for name, after in zip(names, [*names[1:], None], strict=True):
        part, following = following, after and begin(after)  # which imports torch meanwhile
        start, lines, error = time.time(), [], "left out: the time was up"
        until = min(start + LONGEST * setting.patience, deadline)
        if until > start + 5:
            try:
                while line := part(max(0.0, until - time.time())):
                    lines.append(line._asdict())
                error = ""
            except (RuntimeError, TimeoutError) as problem:
                error = str(problem)
        part.end()
        yield name, {"lines": lines, "error": error, "seconds": time.time() - start}


def part_lines(setting: Setting, name: str) -> Callable[[], Line | None]:
    """A function that gives the part's next line, None after the last."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    choose_device(str(setting.device))
    return partial(next, PARTS[name](setting), None)


def as_page(report: dict) -> str:
    """The report as a page."""
    page = [f"# {report['machine']}", "", f"{report['seconds']} s in all.", ""]
    for name, part in report["parts"].items():
        page += [f"## {name}", "", PARTS[name].__doc__.splitlines()[0], ""]
        if part["lines"]:
            page += [HEADER, *(Line(**line).row() for line in part["lines"]), ""]
        page += [f"**Failed:** {part['error']}", ""] * bool(part["error"])
    return "\n".join(page)
