"""How fast this project is on this machine, against the plain way of doing the same.

    python -m tools.benchmark --quick                 # under three minutes on two cores
    python -m tools.benchmark --only loss detect      # some rows
    python -m tools.benchmark --device cuda           # the rows of a GPU
    python -m tools.benchmark --rows                  # detection by every row of the lab book

A row is two functions that do the same work, run in turns; the table shows the medians. The
references are torchvision's SSD300 and augmentation, and a metric that loops over the frames.
"""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.ops import box_convert

from datasets import Collate, DeviceLoader
from engine.config import OneLineParser, model_arguments, resolve_row
from engine.experiments import EXPERIMENTS
from kaist.annotations import image_path, open_annotations, read_image_list
from kaist.demo import draw_demo
from kaist.files import run_script
from kaist.frames import Frame, load_frames
from kaist.images import cache_frames, read_frame
from kaist.miss_rate import SETUPS, evaluate, load_ground_truth
from kaist.results import read_detections
from model import make_network
from ssd.boxes import Predictions, detect
from ssd.losses import MultiBoxLoss
from tools.isolated import STATUS, Subprocess, added_memory
from tools.reference import (
    plain_miss_rates,
    torchvision_image,
    torchvision_loss,
    torchvision_ssd,
    torchvision_step,
    v2_sample,
)
from tools.workloads import (
    LIMITS,
    make_model,
    make_pairs,
    our_image,
    our_loss,
    our_step,
    random_objects,
    random_predictions,
    random_result,
    trunk_step,
    with_malloc_tuning,
)
from utils import choose_device, choose_precision, detect_image


@dataclass(frozen=True)
class Bench:
    """What every row needs: the device and its precision, a folder, and how long to measure.

    seconds, rounds: of measuring a row, at least.
    """

    device: torch.device
    precision: torch.dtype
    folder: Path
    quick: bool
    seconds: float
    rounds: int = 3

    def demo(self, train_frames: int = 16) -> tuple[Path, list[Frame]]:
        """A small demo set of so many training frames, and those that have people."""
        root = self.folder / f"demo-{train_frames}"
        if not root.exists():
            draw_demo(root, train_frames=train_frames, test_frames=6, progress=False)
        ids = read_image_list(root / "imageSets/train-all.txt")
        frames = load_frames(ids, open_annotations(root), min_height=12, margin=5)
        return root, [frame for frame in frames if (frame.labels == 1).any()]


class Row(NamedTuple):
    """A line of the table; `passed` is None where there is nothing to reach."""

    work: str
    ours: str
    reference: str
    ratio: str
    target: str = ""
    passed: bool | None = None

    def __str__(self) -> str:
        verdict = {None: "", True: "met", False: "missed"}[self.passed]
        return f"| {' | '.join(self[:5])} | {verdict} |"


def speedup_row(work: str, ours: float, reference: float, name: str, target: float) -> Row:
    """A row of two times in milliseconds; the target is how many times faster ours has to be."""
    times, ratio = (f"{ours:.4g} ms", f"{name}: {reference:.4g} ms"), reference / ours
    return Row(work, *times, f"{ratio:.3g}x faster", f">= {target:g}x", ratio >= target)


def ratio_row(work: str, ours: str, reference: str, ratio: float, target: float) -> Row:
    """A row in which ours has to stay below a share of the reference."""
    return Row(work, ours, reference, f"{ratio:.3g} of it", f"<= {target:g}", ratio <= target)


def time_once(function: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, until the device is done with it."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def interleave(bench: Bench, *functions: Callable[[], object]) -> list[float]:
    """Median milliseconds of each function: a warm-up, then rounds in turns."""
    for function in functions:
        time_once(function, bench.device)
    end = time.perf_counter() + bench.seconds
    rounds: list[list[float]] = []
    while len(rounds) < bench.rounds or time.perf_counter() < end:
        rounds.append([time_once(function, bench.device) for function in functions])
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def start(make: Callable[..., Callable], bench: Bench, *arguments: object, tuned: bool = False) -> Callable:
    """make(device, …), on a CPU in a process of its own: its allocator's settings (`tuned`, see
    `tune_malloc`) are not for its rivals."""
    if bench.device.type != "cpu":
        return make(bench.device, *arguments)
    first = (with_malloc_tuning, make) if tuned else (make,)
    return Subprocess(*first, bench.device, *arguments)


# ------------------------------------------------------------------------------ training


def bench_step(bench: Bench) -> Iterator[Row]:
    """The whole training step, and how much of it is not convolution."""
    on_gpu = bench.device.type == "cuda"
    n = 32 if on_gpu else 2 if bench.quick else 8
    reference = start(torchvision_step, bench, n)
    for precision in dict.fromkeys([bench.precision, torch.float32]):
        name, target = ("bf16", 2.5) if precision == torch.bfloat16 else ("fp32", 1.1)
        steps = [start(make, bench, precision, n, tuned=True) for make in (our_step, trunk_step)]
        ours, bare, theirs = interleave(bench, *steps, reference)
        speed = f" ({1e3 * n / ours:.0f} images/s)" if on_gpu else ""
        work = f"training step with masks, batch {n}, {name}{speed}"
        yield speedup_row(work, ours, theirs, "torchvision fp32", target)
        times = f"{ours:.4g} ms", f"bare trunk: {bare:.4g} ms"
        yield ratio_row(f"all of the step that is not convolution, {name}", *times, ours / bare, 1.05)


def bench_training(bench: Bench) -> Iterator[Row]:
    """Training on a GPU, data included."""
    if bench.device.type == "cuda":
        yield from training_rows(bench, n=32, width=1.0, n_frames=256, workers=8)


def training_rows(bench: Bench, n: int, width: float, n_frames: int, workers: int) -> Iterator[Row]:
    """Images a second from the frame cache to the updated weights, the share of what the bare
    convolutions reach, and what the parts take by themselves."""
    root, frames = bench.demo(n_frames)
    cache = cache_frames(bench.folder / "cache", root, [frame.id for frame in frames], "early")
    model = make_model(width=width).to(bench.device).train()
    loader = DeviceLoader(
        make_pairs(root, frames, cache),
        batch_size=n,
        workers=workers,
        map_sizes=[model.grids[i] for i in model.infused_maps],
        device=bench.device,
    )
    batches = (batch for epoch in itertools.count() for batch in loader.epoch(epoch))
    batch = next(batches)
    predictions, loss = model(batch.images), our_loss(model)
    outputs = [*predictions[:2], *predictions.seg]
    loss(predictions, batch).backward(retain_graph=True)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, fused=bench.device.type == "cuda")
    step, bare, *parts = interleave(
        bench,
        our_step(bench.device, bench.precision, n, batches, width=width),
        trunk_step(bench.device, bench.precision, n, width=width),
        lambda: next(batches),
        lambda: torch.autograd.grad(loss(predictions, batch), outputs),
        optimizer.step,
    )
    speeds = f"{1e3 * n / step:.0f} images/s", f"bare trunk: {1e3 * n / bare:.0f} images/s"
    verdict = f"{bare / step:.2f} of it", ">= 0.46", bare / step >= 0.46
    yield Row(f"training end to end, batch {n}", *speeds, *verdict)
    for name, value in zip(("data and augmentation", "losses", "update"), parts, strict=True):
        yield Row(f"{name} alone", f"{value:.3g} ms", f"step: {step:.4g} ms", f"{value / step:.3f} of it")


def bench_memory(bench: Bench) -> Iterator[Row]:
    """Peak memory that a step of batch 8 adds, each in a process of its own."""
    if not bench.quick and STATUS.exists():
        on_gpu = bench.device.type == "cuda"
        step = added_memory, on_gpu, our_step, bench.device, bench.precision, 8
        ours = Subprocess(with_malloc_tuning, *step)() / 2**20
        theirs = Subprocess(added_memory, on_gpu, torchvision_step, bench.device, 8)() / 2**20
        sizes = f"{ours:.0f} MB", f"torchvision: {theirs:.0f} MB"
        yield ratio_row("memory added by a batch-8 step", *sizes, ours / theirs, 0.8)


def bench_loss(bench: Bench) -> Iterator[Row]:
    """The multibox loss, forward and backward, for a batch of 32."""
    priors = make_model(width=0.01).priors.to(bench.device)
    loss = MultiBoxLoss(priors, loc_loss="smooth_l1", loc_reduction="sum").to(bench.device)
    for people, target in ((3, 6.0), (20, 4.0)):
        objects = random_objects(32, people, bench.device)
        predictions = random_predictions(32, 0.0, bench.device)
        predictions = Predictions(*(x.requires_grad_() for x in predictions[:2]), [])
        theirs = torchvision_loss(predictions, *objects, priors)
        times = interleave(
            bench,
            lambda: torch.autograd.grad(sum(loss(predictions, *objects)), predictions[:2]),  # noqa: B023
            lambda: torch.autograd.grad(theirs(), predictions[:2]),  # noqa: B023
        )
        work = f"multibox loss and gradient, batch 32, {people} people"
        target = 20 if bench.device.type == "cuda" else target
        yield speedup_row(work, *times, "torchvision", target)


# ------------------------------------------------------------------------------ detection


def bench_detect(bench: Bench) -> Iterator[Row]:
    """Decoding and NMS of a batch of 8 down to 200 boxes."""
    priors = make_model(width=0.01).priors.to(bench.device)
    ssd = torchvision_ssd(bench.device)
    anchors = [300 * box_convert(priors, "cxcywh", "xyxy")] * 8
    for mean, target in ((-3.6, 1.1), (-8.94, 2.0)):
        predictions = random_predictions(8, mean, bench.device)
        candidates = torch.sigmoid(predictions.conf[..., 1] - predictions.conf[..., 0]) >= 0.01
        outputs = {"bbox_regression": predictions.loc, "cls_logits": predictions.conf}
        ours = partial(detect, predictions, priors, **LIMITS)
        theirs = partial(ssd.postprocess_detections, outputs, anchors, [(300, 300)] * 8)
        work = f"decode + NMS, batch 8, {candidates.sum() // 8} candidates each"
        yield speedup_row(work, *interleave(bench, ours, theirs), "torchvision", target)


def bench_image(bench: Bench) -> Iterator[Row]:
    """One visible image's file to boxes."""
    root, frames = bench.demo()
    path = image_path(root, frames[0].id, "visible")
    reference = start(torchvision_image, bench, path)
    for precision in dict.fromkeys([bench.precision, torch.float32]):
        name, target = ("bf16", 2.2) if precision == torch.bfloat16 else ("fp32", 1.2)
        times = interleave(bench, start(our_image, bench, precision, path, tuned=True), reference)
        yield speedup_row(f"one image, file to boxes, {name}", *times, "torchvision fp32", target)


def row_detector(bench: Bench, name: str) -> Callable[[], object]:
    """Detection by a row's network with random weights, of which few priors say person."""
    config = resolve_row(name) | {"width": 1.0}
    root, frames = bench.demo()
    model = make_network(**model_arguments(Namespace(**config)))
    model.to(bench.device, memory_format=torch.channels_last)
    for head in model.eval().conf_heads:
        head.bias.data.view(-1, model.n_logits)[:, 1:] = -4.0

    def run() -> object:
        frame = read_frame(root, frames[0].id, config["input_mode"])
        nms_settings = {name: config[name] for name in ("min_score", "nms_iou", "max_boxes")}
        return detect_image(model, frame, bench.precision, test_flip=config["test_flip"], **nms_settings)

    return run


def detect_rows(bench: Bench) -> Iterator[str]:
    """Lines of a table: one image or pair, files to boxes, by every network of the lab book at full
    width, against row 26's. Rows that differ in training alone share a line."""
    networks: dict[str, list[str]] = {}
    for name in EXPERIMENTS:
        config = resolve_row(name)
        words = [config["input_mode"], "{}x{}".format(*config["input_size"]), config["priors"]]
        words = [config["network"]] * (config["network"] != "ssd300") + words
        words += ["BatchNorm"] * config["batch_norm"] + ["test flip"] * config["test_flip"]
        networks.setdefault(", ".join(words), []).append(name)
    times = interleave(bench, *(row_detector(bench, names[0]) for names in networks.values()))
    [reference] = [t for t, names in zip(times, networks.values(), strict=True) if "26" in names]
    for (network, names), value in zip(networks.items(), times, strict=True):
        yield f"| {', '.join(names)} | {network} | {value:.4g} ms | {value / reference:.2f} |"


# ------------------------------------------------------------------------------ data


def bench_sample(bench: Bench) -> Iterator[Row]:
    """One augmented training sample, from files and from the frame cache, on one thread."""
    root, frames = bench.demo()
    cache = cache_frames(bench.folder / "cache", root, [frame.id for frame in frames], "early")
    collate, recipe, epochs = Collate([(38, 38), (19, 19)]), v2_sample(root), itertools.count()

    def ours(cache: object) -> Callable[[], object]:
        pairs = make_pairs(root, frames, cache)
        return lambda: collate([pairs[epoch, i] for epoch in [next(epochs)] for i in range(len(frames))])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = interleave(bench, ours(None), ours(cache), lambda: [recipe(frame) for frame in frames])
    torch.set_num_threads(threads)
    files, cached, theirs = (value / len(frames) for value in times)
    yield speedup_row("training sample from JPEG pair, one thread", files, theirs, "v2 recipe", 7)
    yield speedup_row("training sample from frame cache", cached, theirs, "v2 recipe", 14)


def bench_evaluation(bench: Bench) -> Iterator[Row]:
    """Reading a result file and all nine setups; KAIST's real ones where KAIST_REFERENCE is."""
    work = "evaluation, 9 setups, 2,252 frames"
    if "KAIST_REFERENCE" in os.environ:
        reference = Path(os.environ["KAIST_REFERENCE"])
        people = load_ground_truth(reference / "annotations/KAIST_annotation.json")
        path = reference / "results/MSDS-RCNN_result.txt"
        work += f", {path.stem}"
    else:
        people, path = random_result(bench.folder, 2252)

    def ours() -> dict[str, float]:
        results = evaluate(people, read_detections(path, people.frames))
        return {name: results[name].miss_rate for name in SETUPS}

    plain = partial(plain_miss_rates, path, people, SETUPS)
    assert np.allclose([*ours().values()], [*plain().values()])
    yield speedup_row(work, *interleave(bench, ours, plain), "frame by frame", 30)


BENCHMARKS = {
    "loss": bench_loss,
    "detect": bench_detect,
    "sample": bench_sample,
    "evaluation": bench_evaluation,
    "image": bench_image,
    "step": bench_step,
    "training": bench_training,
    "memory": bench_memory,
}


# ------------------------------------------------------------------------------ the script


def main() -> None:
    """Print the machine, and the table row by row."""
    arguments = parse_arguments()
    device = choose_device(arguments.device)
    precision = choose_precision("auto", device)
    torch.manual_seed(0)
    print(describe_machine(device, precision), end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, precision, Path(folder), arguments.quick, 2.0 if arguments.quick else 8.0)
        if arguments.rows:
            print("| rows | network | detect | of row 26 |\n|---|---|---|---|")
            lines: Iterator[object] = detect_rows(bench)
        else:
            print("| work | ours | reference | ratio | target | |\n|---|---|---|---|---|---|")
            lines = (row for name in arguments.only or BENCHMARKS for row in BENCHMARKS[name](bench))
        for line in lines:
            print(line, flush=True)


def describe_machine(device: torch.device, precision: torch.dtype) -> str:
    """One line on the processor, the device, its precision and torch's version."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    parts = [names[0] if names else platform.processor(), f"{torch.get_num_threads()} threads"]
    parts += [torch.backends.cpu.get_cpu_capability()]
    parts += [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    parts += [f"convolutions in {str(precision).removeprefix('torch.')}", f"torch {torch.__version__}"]
    return ", ".join(parts)


def parse_arguments() -> Namespace:
    """The command line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="under three minutes on two cores")
    add("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    add("--device", default="cpu", help="cpu, cuda (default: %(default)s)")
    add("--rows", action="store_true", help="detection by every row of the lab book, instead")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
