"""How fast this project is on this machine, against torchvision doing the same.

    python -m tools.benchmark --quick                 # under three minutes on two cores
    python -m tools.benchmark --only loss detect      # some rows
    python -m tools.benchmark --device cuda           # the rows of a GPU
    python -m tools.benchmark --rows                  # detection by every row of the lab book
    python -m tools.benchmark --rows 41 42            # by some, beside row 26
    python -m tools.benchmark --memory-plan           # what a GPU's memory holds; needs no GPU
    python -m tools.benchmark --device cuda --report out/  # is it right, how fast is it, in 8 minutes

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_convert

from datasets import Collate, DeviceLoader
from engine.config import OneLineParser, resolve_row
from engine.experiments import EXPERIMENTS
from kaist.annotations import image_path
from kaist.demo import draw_demo
from kaist.files import run_script
from kaist.frame_cache import FrameCache, cache_frames
from kaist.frames import Frame
from kaist.miss_rate import SETUPS, evaluate, load_ground_truth
from kaist.results import read_detections
from ssd.boxes import Predictions, detect
from ssd.losses import MultiBoxLoss
from ssd.memory_plan import plan_memory
from tools import gpu_report, workloads
from tools.gpu_parts import FULL, TINY
from tools.isolated import STATUS, Subprocess, added_memory
from tools.workloads import LIMITS, MAPS, our_model, our_step
from utils import choose_device, choose_precision

REPORT_MINUTES = 7.5  # that --report takes at most, its last part aside
CARDS = (8, 16, 24, 80, 140)  # GB of memory of the GPUs that --memory-plan knows


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

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def demo(self, train_frames: int = 16) -> tuple[Path, list[Frame]]:
        """A small demo set of so many training frames, and those that have people."""
        root = self.folder / f"demo-{train_frames}"
        if not root.exists():
            draw_demo(root, train_frames=train_frames, test_frames=6, progress=False)
        return root, workloads.people_frames(root)


def table_row(*cells: str, passed: bool | None = None) -> str:
    """A row of the table: work, ours, reference, ratio and target, and whether that is reached."""
    verdict = {None: "", True: "met", False: "missed"}[passed]
    return f"| {' | '.join([*cells, *[''] * (5 - len(cells)), verdict])} |"


def speedup_row(work: str, ours: float, reference: float, target: float, name: str = "torchvision") -> str:
    """A row of two times in milliseconds; the target is how many times faster ours has to be."""
    times, ratio = (f"{ours:.4g} ms", f"{name}: {reference:.4g} ms"), reference / ours
    return table_row(work, *times, f"{ratio:.3g}x faster", f">= {target:g}x", passed=ratio >= target)


def ratio_row(work: str, ours: str, reference: str, ratio: float, target: float) -> str:
    """A row in which ours has to stay below a share of the reference."""
    return table_row(work, ours, reference, f"{ratio:.3g} of it", f"<= {target:g}", passed=ratio <= target)


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


def start(bench: Bench, make: Callable[..., Callable], *arguments: object) -> Callable:
    """make(device, …), on a CPU in a process of its own: the allocator's settings of ours (see
    `tune_malloc`) are not for its rivals."""
    if bench.on_gpu:
        return make(bench.device, *arguments)
    theirs = make.__name__.startswith("torchvision")
    return Subprocess(*([make] if theirs else [workloads.with_malloc_tuning, make]), bench.device, *arguments)


# ------------------------------------------------------------------------------ training


def bench_step(bench: Bench) -> Iterator[str]:
    """The whole training step, and how much of it is not convolution."""
    n = 32 if bench.on_gpu else 2 if bench.quick else 8
    reference = start(bench, workloads.torchvision_step, n)
    for precision in dict.fromkeys([bench.precision, torch.float32]):
        name, target = ("bf16", 2.5) if precision == torch.bfloat16 else ("fp32", 1.1)
        steps = [start(bench, make, precision, n) for make in (our_step, workloads.bare_step)]
        ours, bare, theirs = interleave(bench, *steps, reference)
        speed = f" ({1e3 * n / ours:.0f} images/s)" if bench.on_gpu else ""
        yield speedup_row(f"training step with masks, batch {n}, {name}{speed}", ours, theirs, target)
        times = f"{ours:.4g} ms", f"bare convolutions: {bare:.4g} ms"
        yield ratio_row(f"all of the step that is not convolution, {name}", *times, ours / bare, 1.05)


def bench_training(bench: Bench) -> Iterator[str]:
    """Training on a GPU, data included."""
    if bench.on_gpu:
        yield from training_rows(bench, n=32, width=1.0, n_frames=256, workers=8)


def training_rows(bench: Bench, n: int, width: float, n_frames: int, workers: int) -> Iterator[str]:
    """Images a second from the frame cache to the updated weights, the share of what the bare
    convolutions reach, and what the parts take by themselves."""
    root, frames = bench.demo(n_frames)
    cache = cache_frames(bench.folder / "cache", root, [frame.id for frame in frames], "early")
    pairs = workloads.row_pairs(root, frames, workloads.row_config("26", input_mode="early"), cache)
    loader = DeviceLoader(pairs, batch_size=n, workers=workers, map_sizes=MAPS, device=bench.device)
    batches = (batch for epoch in itertools.count() for batch in loader.epoch(epoch))
    batch, model = next(batches), our_model(bench.device, width=width).train()
    predictions, loss = model(batch.images), workloads.our_loss(model)
    loss(predictions, batch).backward(retain_graph=True)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, fused=bench.on_gpu)
    step, bare, *parts = interleave(
        bench,
        our_step(bench.device, bench.precision, n, batches, width),
        workloads.bare_step(bench.device, bench.precision, n, width),
        lambda: next(batches),
        lambda: torch.autograd.grad(loss(predictions, batch), [*predictions[:2], *predictions.seg]),
        optimizer.step,
    )
    speeds = [f"{1e3 * n / step:.0f} images/s", f"bare convolutions: {1e3 * n / bare:.0f} images/s"]
    ratio = bare / step
    cells = f"training end to end, batch {n}", *speeds, f"{ratio:.2f} of it", ">= 0.46"
    yield table_row(*cells, passed=ratio >= 0.46)
    for name, value in zip(("data and augmentation", "losses", "update"), parts, strict=True):
        cells = f"{value:.3g} ms", f"step: {step:.4g} ms", f"{value / step:.3f} of it"
        yield table_row(f"{name} alone", *cells)


def bench_memory(bench: Bench) -> Iterator[str]:
    """Peak memory that a step of batch 8 adds on a CPU, each in a process of its own."""
    if not (bench.quick or bench.on_gpu) and STATUS.exists():
        ours = workloads.with_malloc_tuning, added_memory, our_step, bench.device, bench.precision, 8
        theirs = added_memory, workloads.torchvision_step, bench.device, 8
        mine, reference = (Subprocess(*step)() / 2**20 for step in (ours, theirs))
        sizes = f"{mine:.0f} MB", f"torchvision: {reference:.0f} MB"
        yield ratio_row("memory added by a batch-8 step", *sizes, mine / reference, 0.8)


def bench_loss(bench: Bench) -> Iterator[str]:
    """The multibox loss, forward and backward, for a batch of 32."""
    priors = our_model(bench.device, width=0.01).priors
    ours = MultiBoxLoss(priors, loc_loss="smooth_l1", loc_reduction="sum")
    for people, target in ((3, 6.0), (20, 4.0)):
        objects = workloads.random_objects(32, people, bench.device)
        predictions = workloads.random_predictions(32, 0.0, bench.device)
        predictions = Predictions(*(x.requires_grad_() for x in predictions[:2]), [])
        theirs = workloads.plain_loss(predictions, *objects, priors)

        def gradient(loss: Callable, predictions: Predictions = predictions) -> object:
            return torch.autograd.grad(loss(), predictions[:2])

        losses = (lambda p=predictions, o=objects: sum(ours(p, *o))), theirs
        times = interleave(bench, *(partial(gradient, loss) for loss in losses))
        work = f"multibox loss and gradient, batch 32, {people} people"
        yield speedup_row(work, *times, 20 if bench.on_gpu else target, "plain SSD loss")


# ------------------------------------------------------------------------------ detection


def bench_detect(bench: Bench) -> Iterator[str]:
    """Decoding and NMS of a batch of 8 down to 200 boxes."""
    priors, ssd = our_model(bench.device, width=0.01).priors, workloads.torchvision_ssd(bench.device)
    anchors = [300 * box_convert(priors, "cxcywh", "xyxy")] * 8
    for mean, target in ((-3.6, 1.1), (-8.94, 2.0)):
        predictions = workloads.random_predictions(8, mean, bench.device)
        candidates = torch.sigmoid(predictions.conf[..., 1] - predictions.conf[..., 0]) >= 0.01
        outputs = {"bbox_regression": predictions.loc, "cls_logits": predictions.conf}
        ours = partial(detect, predictions, priors, **LIMITS)
        theirs = partial(ssd.postprocess_detections, outputs, anchors, [(300, 300)] * 8)
        work = f"decode + NMS, batch 8, {candidates.sum() // 8} candidates each"
        yield speedup_row(work, *interleave(bench, ours, theirs), target)


def bench_image(bench: Bench) -> Iterator[str]:
    """One visible image's file to boxes."""
    root, frames = bench.demo()
    path = image_path(root, frames[0].id, "visible")
    reference = start(bench, workloads.torchvision_image, path)
    for precision in dict.fromkeys([bench.precision, torch.float32]):
        name, target = ("bf16", 2.2) if precision == torch.bfloat16 else ("fp32", 1.2)
        times = interleave(bench, start(bench, workloads.our_image, precision, path), reference)
        yield speedup_row(f"one image, file to boxes, {name}", *times, target, "torchvision fp32")


def row_detector(bench: Bench, name: str, width: float = 1.0) -> Callable[[], object]:
    """Detection by a row's network with random weights, of which few priors say person."""
    root, frames = bench.demo()
    config = workloads.row_config(name, width=width)
    return workloads.row_image(config, bench.device, bench.precision, root, frames[0])


def network_words(row: dict) -> list[str]:
    """What a row's network is."""
    words = [row["input_mode"], "{}x{}".format(*row["input_size"]), row["priors"]]
    words = [row["network"]] * (row["network"] != "ssd300") + words
    return words + ["BatchNorm"] * row["batch_norm"]


def rows_by(rows: Iterable[str], words: Callable[[dict], list[str]]) -> dict[str, list[str]]:
    """Those of some rows of the lab book of which the same words are said."""
    groups: dict[str, list[str]] = {}
    for name in rows:
        groups.setdefault(", ".join(words(resolve_row(name))), []).append(name)
    return groups


def memory_rows() -> Iterator[str]:
    """Lines of a table: bytes of a training step as planned, and the largest batch by memory."""

    def words(row: dict) -> list[str]:
        maps = "".join(map(str, row["infusion"]))
        changes = ["averaged weights"] * bool(row["ema_decay"])
        changes += [f"width {row['width']:g}"] * (row["width"] < 1)
        return [*network_words(row), f"masks {maps}", row["optimizer"], *changes]

    for text, names in rows_by(EXPERIMENTS, words).items():
        config = workloads.row_config(names[0])
        with torch.device("meta"):
            model, criterion = workloads.row_network(config)
        for precision, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            plan = plan_memory(model, criterion, config.optimizer, precision)
            if config.ema_decay:
                plan = plan._replace(fixed=plan.fixed + plan.weights)
            sizes = [f"{value / 2**20:,.0f} MiB" for value in plan]
            fits = ", ".join(f"{card} GB: {plan.largest_batch(1e9 * card)}" for card in CARDS)
            yield f"| {', '.join(names)} | {text}, {name} | {' | '.join(sizes)} | {fits} |"


def detect_rows(bench: Bench, rows: list[str]) -> Iterator[str]:
    """Lines of a table: one image or pair, files to boxes, by the networks of some rows at full width, or
    of all, against row 26's. Rows that differ in training alone share a line."""
    chosen = dict.fromkeys(["26", *rows]) if rows else EXPERIMENTS
    networks = rows_by(chosen, lambda row: [*network_words(row), *["test flip"] * row["test_flip"]])
    times = interleave(bench, *(row_detector(bench, names[0]) for names in networks.values()))
    [reference] = [t for t, names in zip(times, networks.values(), strict=True) if "26" in names]
    for (network, names), value in zip(networks.items(), times, strict=True):
        yield f"| {', '.join(names)} | {network} | {value:.4g} ms | {value / reference:.2f} |"


# ------------------------------------------------------------------------------ data


def bench_sample(bench: Bench) -> Iterator[str]:
    """One augmented training sample, from files and from the frame cache, on one thread."""
    root, frames = bench.demo()
    cache = cache_frames(bench.folder / "cache", root, [frame.id for frame in frames], "early")
    collate, theirs, epochs = Collate(MAPS), workloads.torchvision_sample(root), itertools.count()
    config = workloads.row_config("26", input_mode="early")

    def ours(cache: FrameCache | None) -> Callable[[], object]:
        pairs = workloads.row_pairs(root, frames, config, cache)
        return lambda: collate([pairs[epoch, i] for epoch in [next(epochs)] for i in range(len(frames))])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = interleave(bench, ours(None), ours(cache), lambda: [theirs(frame) for frame in frames])
    torch.set_num_threads(threads)
    files, cached, reference = (value / len(frames) for value in times)
    yield speedup_row("training sample from JPEG pair, one thread", files, reference, 7, "v2 recipe")
    yield speedup_row("training sample from frame cache", cached, reference, 14, "v2 recipe")


def bench_evaluation(bench: Bench) -> Iterator[str]:
    """Reading a result file and all nine setups; KAIST's real ones where KAIST_REFERENCE is."""
    work, path = "evaluation, 9 setups, 2,252 frames", bench.folder / "result.txt"
    if "KAIST_REFERENCE" in os.environ:
        reference = Path(os.environ["KAIST_REFERENCE"])
        people = load_ground_truth(reference / "annotations/KAIST_annotation.json")
        path = reference / "results/MSDS-RCNN_result.txt"
        work += f", {path.stem}"
    else:
        people = workloads.random_result(path, 2252)

    def ours() -> list[float]:
        results = evaluate(people, read_detections(path, people.frames))
        return [results[name].miss_rate for name in SETUPS]

    plain = partial(workloads.plain_miss_rates, path, people, SETUPS)
    assert np.allclose(ours(), [*plain().values()])
    yield speedup_row(work, *interleave(bench, ours, plain), 30, "frame by frame")


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
    machine = describe_machine(device, precision)
    if arguments.report:
        scale = FULL if device.type == "cuda" else TINY
        gpu_report.write_report(arguments.report, device, machine, 60 * REPORT_MINUTES, scale)
        return
    print(machine, end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, precision, Path(folder), arguments.quick, 2.0 if arguments.quick else 8.0)
        if arguments.rows is not None:
            print("| rows | network | detect | of row 26 |\n|---|---|---|---|")
            lines = detect_rows(bench, arguments.rows)
        elif arguments.memory_plan:
            print("| rows | network | weights | a step | a frame | batch in |\n|---|---|---|---|---|---|")
            lines = memory_rows()
        else:
            print("| work | ours | reference | ratio | target | |\n|---|---|---|---|---|---|")
            lines = (row for name in arguments.only or BENCHMARKS for row in BENCHMARKS[name](bench))
        for line in lines:
            print(line, flush=True)


def describe_machine(device: torch.device, precision: torch.dtype) -> str:
    """One line on the processor, the device, its precision and torch's version."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(": ")[2] for line in info.splitlines() if line.startswith("model name")]
    parts = [*(names or [platform.processor()])[:1], f"{torch.get_num_threads()} threads"]
    parts += [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    parts += [torch.backends.cpu.get_cpu_capability(), f"convolutions in {precision}"]
    return ", ".join([*parts, f"torch {torch.__version__}"])


def parse_arguments() -> Namespace:
    """The command line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="under three minutes on two cores")
    add("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    add("--device", default="cpu", help="cpu, cuda (default: %(default)s)")
    add("--rows", nargs="*", metavar="ROW", help="detection by these rows, or by all of the lab book")
    add("--memory-plan", action="store_true", help="largest batches by a GPU's memory, instead")
    whole = f"all that is to know of a GPU in under {REPORT_MINUTES} minutes, into this folder, instead"
    add("--report", type=Path, metavar="FOLDER", help=whole)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
