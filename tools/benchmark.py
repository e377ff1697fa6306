"""How fast this project is, compared with torchvision and the usual SSD code, and the report on a GPU.

    python -m tools.benchmark --quick                 # under three minutes on two cores
    python -m tools.benchmark --only loss detect      # some of the benchmarks
    python -m tools.benchmark --device cuda           # the same on a GPU
    python -m tools.benchmark --rows                  # detection by every row of the lab book
    python -m tools.benchmark --rows 41 42            # by some rows, compared with row 26
    python -m tools.benchmark --memory-plan           # largest batches by GPU memory; needs no GPU
    python -m tools.benchmark --device cuda --report out/  # correctness and speed, in 8 minutes

Functions that do the same work are timed by turns, and their medians are compared.
"""

import itertools
import os
import platform
import re
import tempfile
from argparse import Namespace
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from engine.config import OneLineParser, resolve_row
from engine.experiments import EXPERIMENTS
from kaist.files import run_script
from kaist.miss_rate import evaluate, load_ground_truth
from kaist.results import read_detections
from ssd.memory_plan import plan_memory
from tools import gpu_report, timing, workloads
from tools.timing import Line, Setting, Subprocess, at_least, at_most, make_timer, time_in_turns, timer
from tools.workloads import plain_config, repeated_step, row_image
from utils import choose_device, choose_precision, tune_malloc

GPU_MEMORY = (8, 16, 24, 80, 140)  # GB, columns of --memory-plan
BENCHMARKS = ("loss", "detect", "sample", "image", "step", "evaluation", "memory")  # values of --only
PRECISION_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def comparisons(setting: Setting) -> Iterator[tuple[str, tuple]]:
    """What is compared: names of `BENCHMARKS`, each with the arguments of `compare` after the setting."""
    for people, aim in ((3, 6.0), (20, 4.0)):
        work = f"multibox loss and gradient, batch 32, {people} people"
        ours, peer = (partial(workloads.loss_step, people=people, ours=x) for x in (True, False))
        yield "loss", (work, aim, ours, "usual SSD loss", peer)
    for candidates, mean, aim in (("6,046", -3.6, 1.1), ("136", -8.94, 2.0)):
        work = f"decode + NMS, batch 8, {candidates} candidates each"
        ours, peer = (partial(workloads.detection, mean=mean, ours=x) for x in (True, False))
        yield "detect", (work, aim, ours, "torchvision", peer)
    for source, aim, cached in (("JPEG pairs", 7, False), ("the frame cache", 14, True)):
        work, ours = f"samples from {source}, one thread", partial(workloads.our_samples, cached=cached)
        yield "sample", (work, aim, ours, "the v2 recipe", workloads.recipe_samples)
    plain, visible, peer_name = plain_config(), plain_config(input_mode="visible"), "torchvision, fp32"
    for precision in dict.fromkeys([setting.precision, torch.float32]):
        name, is_bf16 = PRECISION_NAMES[precision], precision == torch.bfloat16
        work, aim = f"one image, file to boxes, {name}", 2.2 if is_bf16 else 1.2
        ours = partial(row_image, config=visible, precision=precision)
        yield "image", (work, aim, ours, peer_name, workloads.torchvision_image)
        work, aim = f"training step with masks, batch {setting.batch}, {name}", 2.5 if is_bf16 else 1.1
        ours = partial(repeated_step, config=plain, precision=precision)
        yield "step", (work, aim, ours, peer_name, workloads.torchvision_step)
        bare = partial(tuned, partial(workloads.bare_step, config=plain, precision=precision))
        yield "step", (f"{work}, compared with its convolutions", 0.95, ours, "convolutions", bare)


def compare(setting: Setting, work: str, aim: float, ours: Callable, peer_name: str, peer: Callable) -> Line:
    """Time our function and a peer's by turns: ours(setting) and peer(setting) return them.

    On a CPU each runs in its own process, because `tune_malloc` applies to a whole process and the peer has
    to run without it. `aim` is how many times faster ours should be.
    """
    run = (lambda make, *arguments: nullcontext(make(*arguments))) if setting.on_gpu else Subprocess
    with run(make_timer, tuned, ours, setting) as our_timer, run(make_timer, peer, setting) as peer_timer:
        seconds, peer_seconds = (result.seconds for result in time_in_turns(setting, our_timer, peer_timer))
    note = f"{1e3 * seconds:.4g} ms, {peer_name}: {1e3 * peer_seconds:.4g} ms"
    return at_least(work, peer_seconds / seconds, "times faster", aim, note)


def tuned(make: Callable, *arguments: object) -> Callable:
    """make(…) in a process whose C library keeps freed memory, as in train, eval and detect."""
    tune_malloc()
    return make(*arguments)


def measured_lines(setting: Setting, benchmarks: Container[str]) -> Iterator[Line]:
    """Run the chosen benchmarks."""
    for name, arguments in comparisons(setting):
        if name in benchmarks:
            yield compare(setting, *arguments)
    if "evaluation" in benchmarks:
        yield from time_evaluation(setting)
    if "memory" in benchmarks and not setting.on_gpu and timing.PROCESS_STATUS.exists():
        yield compare_memory(setting)


def time_evaluation(setting: Setting) -> Iterator[Line]:
    """Reading and evaluating result files of 2,252 frames under nine setups.

    If KAIST_REFERENCE is set, they are the files of that folder, and reading the annotations is timed too.
    Otherwise it is one file of random detections.
    """
    if root := os.environ.get("KAIST_REFERENCE"):
        load = partial(load_ground_truth, Path(root, "annotations/KAIST_annotation.json"))
        paths = sorted(Path(root, "results").glob("*_result.*"))
    else:
        paths = [setting.folder / "drawn_result.txt"]
        random_ground_truth = workloads.random_result(paths[0])
    for path in paths:

        def evaluate_file(path: Path = path) -> None:
            ground_truth = load() if root else random_ground_truth
            evaluate(ground_truth, read_detections(path, ground_truth.frames))

        [result] = time_in_turns(setting, timer(evaluate_file))
        work = f"evaluation, 9 setups, 2,252 frames, {path.name}"
        yield Line(work, 1e3 * result.seconds, "ms", result.spread)


def compare_memory(setting: Setting) -> Line:
    """Peak memory that a training step adds on a CPU, compared with torchvision's."""
    step = partial(repeated_step, config=plain_config(), precision=setting.precision)
    with Subprocess(tuned, timing.added_memory, step, setting) as measure:
        ours = measure() / 2**20
    with Subprocess(timing.added_memory, workloads.torchvision_step, setting) as measure:
        peer = measure() / 2**20
    note = f"{ours:.0f} MiB, torchvision: {peer:.0f} MiB"
    work = f"memory added by a step of batch {setting.batch}"
    return at_most(work, ours / peer, "of torchvision's", 0.8, note)


def describe_network(row: dict) -> list[str]:
    """A row's network if it is not SSD300, its input, priors, and BatchNorm if it has any."""
    words = [row["input_mode"], "{}x{}".format(*row["input_size"]), row["priors"]]
    words = [row["network"]] * (row["network"] != "ssd300") + words
    return words + ["BatchNorm"] * row["batch_norm"]


def group_rows(rows: Iterable[str], describe: Callable[[dict], list[str]]) -> dict[str, list[str]]:
    """Group rows of the lab book by their description: description -> names of rows."""
    groups: dict[str, list[str]] = {}
    for name in rows:
        groups.setdefault(", ".join(describe(resolve_row(name))), []).append(name)
    return groups


def memory_table() -> Iterator[str]:
    """Lines of a table: the planned bytes of a training step, and the largest batch by GPU memory."""

    def describe(row: dict) -> list[str]:
        maps = "".join(map(str, row["infusion"]))
        changes = ["averaged weights"] * bool(row["ema_decay"])
        changes += [f"width {row['width']:g}"] * (row["width"] < 1)
        return [*describe_network(row), f"masks {maps}", row["optimizer"], *changes]

    yield "| rows | network | weights | per step | per frame | largest batch |\n|---|---|---|---|---|---|"
    for network, names in group_rows(EXPERIMENTS, describe).items():
        config = workloads.row_config(names[0])
        with torch.device("meta"):
            model, criterion = workloads.row_network(config)
        for precision, precision_name in PRECISION_NAMES.items():
            plan = plan_memory(model, criterion, config.optimizer, precision)
            if config.ema_decay:
                plan = plan._replace(fixed=plan.fixed + plan.weights)
            sizes = " | ".join(f"{value / 2**20:,.0f} MiB" for value in plan)
            batches = ", ".join(f"{size} GB: {plan.largest_batch(1e9 * size)}" for size in GPU_MEMORY)
            yield f"| {', '.join(names)} | {network}, {precision_name} | {sizes} | {batches} |"


def detection_table(setting: Setting, rows: list[str]) -> Iterator[str]:
    """Lines of a table: the time of detection in one pair, files to boxes, by the networks of `rows` (empty:
    all) at full width, compared with row 26. Rows that differ only in training share a line."""
    yield "| rows | network | time per frame | relative to row 26 |\n|---|---|---|---|"
    chosen = dict.fromkeys(["26", *rows]) if rows else EXPERIMENTS
    networks = group_rows(chosen, lambda row: [*describe_network(row), *["test flip"] * row["test_flip"]])
    configs = (workloads.row_config(names[0], width=setting.speed_width) for names in networks.values())
    timers = (timer(row_image(setting, config, setting.precision)) for config in configs)
    times = [result.seconds for result in time_in_turns(setting, *timers)]
    [reference] = [t for names, t in zip(networks.values(), times, strict=True) if "26" in names]
    for (network, names), seconds in zip(networks.items(), times, strict=True):
        yield f"| {', '.join(names)} | {network} | {1e3 * seconds:.4g} ms | {seconds / reference:.2f} |"


def main() -> None:
    """Print a description of the machine, and the chosen table line by line."""
    arguments = parse_arguments()
    device = choose_device(arguments.device, training=True)
    precision = choose_precision("auto", device)
    torch.manual_seed(0)
    machine = describe_machine(device, precision)
    kwargs = {"seconds": 2.0 if arguments.quick else 8.0, "train_frames": 16}
    kwargs["batch"] = 2 if arguments.quick else 8
    if device.type == "cuda":
        kwargs["batch"] = 32
    if arguments.report:
        kwargs = {} if device.type == "cuda" else timing.TINY_SETTING
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(device, precision, Path(folder), **kwargs)
        if arguments.report:
            gpu_report.write_report(arguments.report, setting, machine)
            return
        print(machine, end="\n\n")
        if arguments.rows is not None:
            lines = detection_table(setting, arguments.rows)
        elif arguments.memory_plan:
            lines = memory_table()
        else:
            measured = measured_lines(setting, arguments.only or BENCHMARKS)
            lines = itertools.chain([timing.TABLE_HEADER], (line.row() for line in measured))
        for line in lines:
            print(line, flush=True)


def describe_machine(device: torch.device, precision: torch.dtype) -> str:
    """One line: processor, threads, GPU, instruction set, precision of convolutions, torch version."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    parts = [*(names or [platform.processor()])[:1], f"{torch.get_num_threads()} threads"]
    parts += [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    parts += [torch.backends.cpu.get_cpu_capability(), f"convolutions in {precision}"]
    return ", ".join([*parts, f"torch {torch.__version__}"])


def parse_arguments() -> Namespace:
    """Parse the command line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="small batches, short measurements: under three minutes")
    add("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--rows", nargs="*", metavar="ROW", help="time detection by these rows of the lab book, or by all")
    add("--memory-plan", action="store_true", help="print the largest batches by GPU memory")
    report = "run the GPU report, in 8 minutes on a GPU, and write it into this folder"
    add("--report", type=Path, metavar="FOLDER", help=report)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
