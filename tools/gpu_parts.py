"""What `tools/gpu_report.py` asks of a GPU: is it right, and how fast is it.

A part is a generator of `Line`s, so that what it has found stays where it fails later.
"""

from __future__ import annotations

import itertools
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from datasets import DeviceLoader, batch_loader
from engine.checkpoint import load_checkpoint
from engine.config import ROOT
from engine.loader import BatchLoader
from kaist.frame_cache import cache_frames
from kaist.images import read_frame
from ssd.boxes import detect
from ssd.memory_plan import plan_memory
from tools import workloads
from tools.workloads import LIMITS, Step, people_frames, row_batch, row_config, row_maps
from utils import compile_model, detect_frames, detect_image, predict

FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Scale:
    """How much is measured: `FULL` on a GPU, `TINY` to see on a CPU that all parts run.

    width: of the networks whose values are compared; speed_width: of those that are timed.
    rows: whose losses are compared.
    batch, batches: of the steps that are timed; drawn: training frames of the demo set.
    frames: of the test list; workers: of the loaders; seconds: that a measurement takes.
    modes: what COMPILE is compared at; compiled: at what the rest is measured.
    train: flags of train.py's runs; patience: times the seconds that a part may take.
    """

    width: float
    speed_width: float
    rows: tuple[str, ...]
    batch: int
    batches: tuple[int, ...]
    drawn: int
    frames: int
    workers: int
    seconds: float
    modes: tuple[str, ...]
    train: tuple[str, ...]
    compiled: str
    patience: float


EVERY_KIND = tuple("1 6 7 12 13 14 18 20 21 22 25 26 26b 27 28 29 31 32 33 35 36 38 39 40 41 42 demo".split())
FULL = Scale(
    *(0.25, 1.0, EVERY_KIND, 32, (8, 16, 64, 128, 256), 128, 2252, 8, 1.0),
    modes=("off", "on", "graphs"),
    train=("--epochs", "12", "--compile", "off", "--workers", "4"),
    compiled="on",
    patience=1.0,
)
TINY = Scale(
    *(0.03, 0.03, ("26", "29", "42"), 2, (1,), 8, 8, 0, 0.0),
    modes=("off",),
    train=("--epochs", "12", "--width", "0.03", "--workers", "0"),
    compiled="off",
    patience=50.0,
)


@dataclass(frozen=True)
class Setting:
    """What every part needs: the device, the scale, a folder with the demo set, and until when."""

    device: torch.device
    scale: Scale
    folder: Path
    deadline: float

    @property
    def root(self) -> Path:
        return self.folder / "demo"


class Line(NamedTuple):
    """A line of the report: what was measured, the value, its unit, the spread or a remark, and the aim.

    met: whether it is what it should be; None where nothing was asked for.
    """

    what: str
    value: float
    unit: str
    note: str = ""
    aim: str = ""
    met: bool | None = None


def at_least(what: str, value: float, unit: str, aim: float, note: str = "") -> Line:
    """A line whose value has to reach an aim."""
    return Line(what, value, unit, note, f">= {aim:g}", value >= aim)


def at_most(what: str, value: float, unit: str, aim: float, note: str = "") -> Line:
    """A line whose value may not exceed an aim."""
    return Line(what, value, unit, note, f"<= {aim:g}", value <= aim)


def seconds_a_call(setting: Setting, function: Callable[[], object]) -> tuple[float, str]:
    """Median seconds of a call in five blocks of calls, and the blocks' spread; the device is waited
    for at a block's end alone, as in training."""

    def block(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if setting.device.type == "cuda":
            torch.cuda.synchronize(setting.device)
        return (time.perf_counter() - start) / calls

    for _ in range(3):  # kernels are chosen, graphs captured
        once = block(1)
    calls = max(1, round(setting.scale.seconds / 5 / once))
    times = [block(calls) for _ in range(5)]
    low, median, high = min(times), statistics.median(times), max(times)
    return median, f"{100 * (low / median - 1):+.1f} to {100 * (high / median - 1):+.1f}% in time"


# ------------------------------------------------------------------------------ is it right


def check_losses(setting: Setting) -> Iterator[Line]:
    """Loss terms and gradient of one batch in fp32 against the CPU's, row by row."""
    with tf32(False):
        for row in setting.scale.rows:
            config, results = row_config(row, width=setting.scale.width), []
            for device in (torch.device("cpu"), setting.device):
                torch.manual_seed(0)
                step = Step(config, device, FP32)
                batch = row_batch(config, 2)
                losses = step.losses(batch.to(device))
                losses[0].backward()
                gradients = [p.grad for p in step.parameters]
                results.append((losses.detach().cpu(), torch.cat([g.flatten().cpu() for g in gradients])))
            (loss, gradient), (own_loss, own_gradient) = results
            note = f"loss {loss[0]:.6f}, on the device {own_loss[0]:.6f}"
            yield at_most(f"row {row}: loss terms", distance(own_loss, loss), "of their length", 1e-4, note)
            yield at_most(f"row {row}: gradient", distance(own_gradient, gradient), "of its length", 1e-4)


def check_loader(setting: Setting) -> Iterator[Line]:
    """Batches made on the device against the workers': boxes, labels and masks equal, pixels near."""
    config = row_config("demo", width=setting.scale.width, copy_paste=0.0)  # of one frame, as the device
    both = []
    for kind in ("workers", "device"):
        loader = row_loader(setting, config, kind, n=4)
        both.append([batch for epoch in range(2) for batch in loader.epoch(epoch)])
    unequal, grey = 0, []
    for a, b in zip(*both, strict=True):
        n = min(a.labels.shape[1], b.labels.shape[1])
        same = [(a.boxes[:, :n], b.boxes[:, :n]), (a.labels[:, :n], b.labels[:, :n])]
        same += zip(a.masks, b.masks, strict=True)
        unequal += sum(not torch.equal(x.cpu(), y.cpu()) for x, y in same)
        grey += (a.images.float().cpu() - b.images.float().cpu()).abs().flatten(1).mean(1).tolist()
    yield at_most("boxes, labels and masks that differ", unequal, "tensors", 0)
    yield at_most("mean difference of a sample's pixels", max(grey), "grey levels", 1)


def check_detections(setting: Setting) -> Iterator[Line]:
    """Decoding and NMS of the same predictions, and a network's detections in fp32, against the CPU's."""
    cpu = torch.device("cpu")
    priors = workloads.our_model(cpu, width=0.01).priors
    for mean in (-3.6, -8.94):
        found = []
        for device in (cpu, setting.device):
            predictions = workloads.random_predictions(8, mean, device)
            found.append(detect(predictions, priors.to(device), **LIMITS))
        yield at_most(f"boxes that differ, {len(found[0][0][0])} an image", unequal_boxes(*found), "boxes", 0)
    config = row_config("40", width=setting.scale.width)
    ids = [frame.id for frame in people_frames(setting.root)[:4]]
    frames = [read_frame(setting.root, frame_id, config.input_mode) for frame_id in ids]
    found = []
    with tf32(False):
        for device in (cpu, setting.device):
            torch.manual_seed(0)
            model = Step(config, device, FP32).model.eval()
            found.append([detect_image(model, frame, FP32, test_flip=True, **LIMITS) for frame in frames])
    scores = [torch.cat([torch.from_numpy(scores) for _, scores in images]) for images in found]
    yield at_most("a network's detections: numbers that differ", abs(len(scores[0]) - len(scores[1])), "", 0)
    if len(scores[0]) == len(scores[1]):
        yield at_most("their scores", (scores[0] - scores[1]).abs().max().item(), "apart", 1e-4)


def check_resume(setting: Setting) -> Iterator[Line]:
    """Two runs of train.py with --deterministic, one of them ended by SIGTERM and started again."""
    whole, _ = train(setting, "whole")
    cut, parts = train(setting, "cut", end_after=1)
    yield Line("starts of the run that was ended", parts, "", "", "> 1", parts > 1)
    a, b = (load_checkpoint(folder / "last.pt") for folder in (whole, cut))
    unequal = sum(not torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    yield at_most("tensors of weights that differ, bit for bit", unequal, f"of {len(a['model'])}", 0)
    if unequal:  # whose fault is it?
        again = load_checkpoint(train(setting, "again")[0] / "last.pt")
        unequal = sum(not torch.equal(a["model"][name], again["model"][name]) for name in a["model"])
        yield at_most("the same of two runs that nobody ended", unequal, f"of {len(a['model'])}", 0)


def check_torchrun(setting: Setting) -> Iterator[Line]:
    """train.py under torchrun with one process: the losses of the run without it."""
    whole, _ = train(setting, "whole")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    under, _ = train(setting, "torchrun", launcher)
    losses = [load_checkpoint(folder / "last.pt")["history"][-1]["loss"] for folder in (whole, under)]
    yield at_most("loss apart after the last epoch", abs(losses[0] / losses[1] - 1), "of it", 1e-6)


def train(setting: Setting, name: str, launcher: Sequence[str] = (), end_after: int = 0) -> tuple[Path, int]:
    """The folder of a finished run of train.py, and in how many starts it was made.

    Args:
        end_after: epochs after which the first start is ended by SIGTERM; 0: never.

    Raises:
        RuntimeError: a start has failed; its last line.
    """
    runs, starts, code = setting.folder / "runs", 0, -1
    command = [sys.executable, *launcher, str(ROOT / "train.py"), "--data-root", str(setting.root)]
    command += ["--checkpoints", str(runs), "--name", name, "--device", str(setting.device)]
    command += ["--deterministic", "--eval-every", "12", "--save-minutes", "0", *setting.scale.train]
    while code and not (runs / name / "miss_rate.json").exists():
        starts += 1
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            try:
                while starts == 1 and end_after and process.poll() is None:
                    log = runs / name / "log.csv"
                    if log.exists() and len(log.read_text().splitlines()) > end_after:
                        process.send_signal(signal.SIGTERM)
                        break
                    time.sleep(0.01)
                code = process.wait()
            finally:
                process.kill()
            output.seek(0)
            if code not in (0, 128 + signal.SIGTERM):
                raise RuntimeError(f"train.py ended with {code}: {output.read().splitlines()[-1]}")
    return runs / name, starts


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Within, products and convolutions in fp32 are TF32 ones, or not; after it they are."""

    def allow(on: bool) -> None:
        torch.set_float32_matmul_precision("high" if on else "highest")
        torch.backends.cudnn.allow_tf32 = on

    allow(on)
    try:
        yield
    finally:
        allow(True)


def distance(a: Tensor, b: Tensor) -> float:
    """How far apart two vectors are, as a share of the second one's length."""
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def unequal_boxes(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> int:
    """How many boxes of two devices' images differ by more than rounding."""
    n = 0
    for (a, _), (b, _) in zip(ours, theirs, strict=True):
        same = min(len(a), len(b))
        apart = (a[:same].cpu() - b[:same].cpu()).abs().amax(1) > 1e-5
        n += int(apart.sum()) + max(len(a), len(b)) - same
    return n


# ------------------------------------------------------------------------------ how fast is it


def speed_network(setting: Setting) -> Iterator[Line]:
    """Steps of row 26 without data: eager, compiled and with CUDA graphs; precisions; memory format."""
    config, n = row_config("26", width=setting.scale.speed_width), setting.scale.batch
    work, device = f"row 26, batch {n}", setting.device
    bare = workloads.bare_step(device, BF16, n, setting.scale.speed_width)
    seconds, note = seconds_a_call(setting, bare)
    yield Line("bare convolutions, 4 channels, bf16", n / seconds, "images/s", note)
    for mode in setting.scale.modes:
        yield rate_line(setting, f"{work}, bf16, COMPILE {mode}", Step(config, device, BF16, mode), n)
    contiguous = Step(config, device, BF16)
    contiguous.model.to(memory_format=torch.contiguous_format)
    yield rate_line(setting, f"{work}, bf16, eager, not channels_last", contiguous, n)
    for on, name in ((True, "tf32"), (False, "fp32")):
        with tf32(on):
            yield rate_line(setting, f"{work}, {name}, eager", Step(config, device, FP32), n)


def speed_rows(setting: Setting) -> Iterator[Line]:
    """Compiled steps of the largest networks in bf16."""
    for row, n, aim in (("42", 8, 400), ("41", 12, 0), ("40", 32, 0)):
        config = row_config(row, width=setting.scale.speed_width)
        n, mode = min(n, setting.scale.batch), setting.scale.compiled
        what = f"row {row}, batch {n}, bf16, COMPILE {mode}"
        line = rate_line(setting, what, Step(config, setting.device, BF16, mode), n)
        yield at_least(line.what, line.value, line.unit, aim, line.note) if aim else line


def speed_batches(setting: Setting) -> Iterator[Line]:
    """Eager steps of row 26 in bf16 by batch size, and the memory that they take against the plan."""
    config = row_config("26", width=setting.scale.speed_width)
    for n in setting.scale.batches:
        on_gpu, step = setting.device.type == "cuda", None
        held = torch.cuda.memory_allocated(setting.device) if on_gpu else 0
        step = Step(config, setting.device, BF16)
        yield rate_line(setting, f"row 26, batch {n}, bf16, eager", step, n)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(setting.device)
            step(row_batch(config, n).to(setting.device))
            taken = torch.cuda.max_memory_allocated(setting.device) - held
            plan = plan_memory(step.model, step.criterion, config.optimizer, BF16)
            yield Line(f"memory, batch {n}", taken / 2**20, "MiB", f"planned {plan.step(n) / 2**20:.0f} MiB")


def speed_training(setting: Setting) -> Iterator[Line]:
    """Row 26 end to end from the cache: batches made on the device, and by workers."""
    config, n = row_config("26", width=setting.scale.speed_width), setting.scale.batch
    n, mode = max(n, 2), setting.scale.compiled
    step = Step(config, setting.device, BF16, mode)
    batch = row_batch(config, n).to(setting.device)
    alone, _ = seconds_a_call(setting, lambda: step(batch))
    for kind in ("device", "workers"):
        loader = row_loader(setting, config, kind, n, repeat=n)
        batches = (batch for epoch in itertools.count() for batch in loader.epoch(epoch))
        seconds, note = seconds_a_call(setting, lambda b=batches: step(next(b).to(setting.device)))
        what = f"row 26 end to end, batch {n}, bf16, batches by {kind}"
        line = at_least(what, n / seconds, "images/s", 2000, f"{note}; then 3,000")
        yield line if kind == "device" else line._replace(aim="", met=None)
        if kind == "device":
            yield at_most("its step with data", seconds / alone, "of that without", 1.05)


def speed_image(setting: Setting) -> Iterator[Line]:
    """One pair, from its files to boxes."""
    for row in ("26", "40", "42"):
        config, frame = row_config(row, width=setting.scale.speed_width), people_frames(setting.root)[0]
        run = workloads.row_image(config, setting.device, BF16, setting.root, frame)
        seconds, note = seconds_a_call(setting, run)
        yield Line(f"row {row}: one frame, files to boxes", 1e3 * seconds, "ms", note)


def speed_evaluation(setting: Setting) -> Iterator[Line]:
    """The whole test list by row 26, images read from files."""
    config = row_config("26", width=setting.scale.speed_width, augment=False)
    model = workloads.row_detector(config, setting.device)
    frames = list(itertools.islice(itertools.cycle(people_frames(setting.root)), setting.scale.frames))
    pairs = workloads.row_pairs(setting.root, frames, config)
    sizes, on_gpu = row_maps(config), setting.device.type == "cuda"
    how = {"batch_size": min(64, len(frames)), "workers": setting.scale.workers, "pin_memory": on_gpu}
    loader = batch_loader(pairs, map_sizes=sizes, shuffle=False, **how)
    images = next(iter(loader.epoch(0))).images.to(setting.device)
    for mode in dict.fromkeys(("off", setting.scale.compiled)):
        network = compile_model(model, mode, setting.device)
        with torch.inference_mode():
            forward, note = seconds_a_call(setting, lambda n=network: predict(n, images, BF16, False))
        what = f"forward pass, batch {len(images)}, COMPILE {mode}"
        yield Line(what, len(images) / forward, "images/s", note)
        detect_frames(network, loader, BF16, **LIMITS)  # workers start, kernels are chosen
        start = time.perf_counter()
        detect_frames(network, loader, BF16, **LIMITS)
        taken = time.perf_counter() - start
        yield at_most(f"{len(frames)} frames, files to boxes, COMPILE {mode}", taken, "s", 3.0)


def rate_line(setting: Setting, what: str, step: Step, n: int) -> Line:
    """The images a second of steps on one batch of n frames."""
    batch = row_batch(step.config, n).to(setting.device)
    seconds, note = seconds_a_call(setting, lambda: step(batch))
    return Line(what, n / seconds, "images/s", note)


def row_loader(
    setting: Setting, config: Namespace, kind: str, n: int, repeat: int = 1
) -> BatchLoader | DeviceLoader:
    """A training loader from the cache, by "workers" or "device", of the drawn frames so many times over."""
    frames = people_frames(setting.root)
    cache = cache_frames(setting.folder / "cache", setting.root, [f.id for f in frames], config.input_mode)
    pairs = workloads.row_pairs(setting.root, frames * repeat, config, cache)
    settings = {"batch_size": n, "workers": setting.scale.workers, "map_sizes": row_maps(config)}
    if kind == "device":
        return DeviceLoader(pairs, device=setting.device, **settings)
    return batch_loader(pairs, shuffle=True, pin_memory=setting.device.type == "cuda", **settings)
