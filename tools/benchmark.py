"""How fast this project is on this machine, against torchvision doing the same; and all of a GPU.

    python -m tools.benchmark --quick                 # under three minutes on two cores
    python -m tools.benchmark --only loss detect      # some lines
    python -m tools.benchmark --device cuda           # the same on a GPU
    python -m tools.benchmark --rows                  # detection by every row of the lab book
    python -m tools.benchmark --rows 41 42            # by some, beside row 26
    python -m tools.benchmark --memory-plan           # what a GPU's memory holds; needs no GPU
    python -m tools.benchmark --device cuda --report out/  # is it right, how fast is it, in 8 minutes

Functions that do the same work run in turns, and medians are compared. The references are
torchvision's SSD300 and augmentation, and the usual SSD loss.
"""

import itertools
import os
import platform
import tempfile
from argparse import Namespace
from collections.abc import Callable, Container, Iterable, Iterator
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
from tools.timing import Line, Setting, Subprocess, added_memory, at_least, at_most, time_in_turns
from tools.workloads import detection, loss_step, plain_config, repeated_step, row_image
from utils import choose_device, choose_precision, tune_malloc

CARDS = (8, 16, 24, 80, 140)  # GB of memory of the GPUs that --memory-plan knows
BENCHMARKS = ("loss", "detect", "sample", "image", "step", "evaluation", "memory")  # of --only
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def compare(setting: Setting, ours: tuple, *peers: tuple[str, float, str, tuple]) -> Iterator[Line]:
    """Ours and others timed in turns, on a CPU in a process each: the allocator's settings of ours (see
    `tune_malloc`) are not for its rivals.

    Args:
        ours: (make, …): make(setting, …) gives the function.
        peers: the work, how many times faster ours has to be, who does the same work, and what makes its
            function, as of ours.
    """
    run = (lambda make, *arguments: make(*arguments)) if setting.on_gpu else Subprocess
    makers = [(tuned, *ours), *(make for *_, make in peers)]
    timings = time_in_turns(setting, *(run(make, setting, *more) for make, *more in makers))
    own, *others = (taken.seconds for taken in timings)
    for (what, aim, name, _), other in zip(peers, others, strict=True):
        note = f"{1e3 * own:.4g} ms, {name}: {1e3 * other:.4g} ms"
        yield at_least(what, other / own, "times faster", aim, note)


def tuned(setting: Setting, make: Callable, *arguments: object) -> Callable:
    """make(…) where the C library keeps freed memory, as in train.py, eval.py and detect.py."""
    tune_malloc()
    return make(setting, *arguments)


def compared(setting: Setting) -> Iterator[tuple[str, tuple]]:
    """What is compared, as `compare` takes it, and its name for --only."""
    for people, aim in ((3, 6.0), (20, 4.0)):
        what = f"multibox loss and gradient, batch 32, {people} people"
        usual = (what, aim, "usual SSD loss", (loss_step, people, False))
        yield "loss", ((loss_step, people, True), usual)
    for candidates, mean, aim in (("6,046", -3.6, 1.1), ("136", -8.94, 2.0)):
        what = f"decode + NMS, batch 8, {candidates} candidates each"
        yield "detect", ((detection, mean, True), (what, aim, "torchvision", (detection, mean, False)))
    for source, aim, cached in (("JPEG pairs", 7, False), ("the frame cache", 14, True)):
        what = f"samples from {source}, one thread"
        recipe = (what, aim, "the v2 recipe", (workloads.recipe_samples,))
        yield "sample", ((workloads.our_samples, cached), recipe)
    plain, visible, n = plain_config(), plain_config(input_mode="visible"), setting.batch
    for precision in dict.fromkeys([setting.precision, torch.float32]):
        name, usual, fast = NAMES[precision], "torchvision, fp32", precision == torch.bfloat16
        what = f"one image, file to boxes, {name}"
        theirs = (what, 2.2 if fast else 1.2, usual, (workloads.torchvision_image,))
        yield "image", ((row_image, visible, precision), theirs)
        what = f"training step with masks, batch {n}, {name}"
        theirs = (what, 2.5 if fast else 1.1, usual, (workloads.torchvision_step,))
        bare = (tuned, workloads.bare_step, plain, precision)
        bare = (f"{what}, beside its convolutions alone", 0.95, "convolutions", bare)
        yield "step", ((repeated_step, plain, precision), theirs, bare)


def measured_lines(setting: Setting, names: Container[str]) -> Iterator[Line]:
    """What is measured of these names."""
    for name, arguments in compared(setting):
        if name in names:
            yield from compare(setting, *arguments)
    if "evaluation" in names:
        yield from time_evaluation(setting)
    if "memory" in names and not setting.on_gpu and timing.STATUS.exists():
        yield compare_memory(setting)


def time_evaluation(setting: Setting) -> Iterator[Line]:
    """Nine setups of a drawn result file, reading it included, or, where KAIST_REFERENCE is, of KAIST's own,
    reading its people too."""
    if root := os.environ.get("KAIST_REFERENCE"):
        read = partial(load_ground_truth, Path(root, "annotations/KAIST_annotation.json"))
        paths = sorted(Path(root, "results").glob("*_result.*"))
    else:
        paths = [setting.folder / "drawn_result.txt"]
        drawn = workloads.random_result(paths[0], 2252)
    for path in paths:

        def ours(path: Path = path) -> None:
            people = read() if root else drawn
            evaluate(people, read_detections(path, people.frames))

        [taken] = time_in_turns(setting, ours)
        what = f"evaluation, 9 setups, 2,252 frames, {path.name}"
        yield Line(what, 1e3 * taken.seconds, "ms", taken.spread)


def compare_memory(setting: Setting) -> Line:
    """Peak memory that a step adds on a CPU, each in a process of its own."""
    ours = Subprocess(tuned, setting, added_memory, repeated_step, plain_config(), setting.precision)
    theirs = Subprocess(added_memory, setting, workloads.torchvision_step)
    mine, reference = (held() / 2**20 for held in (ours, theirs))
    note = f"{mine:.0f} MiB, torchvision: {reference:.0f} MiB"
    what = f"memory added by a step of batch {setting.batch}"
    return at_most(what, mine / reference, "of torchvision's", 0.8, note)


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

    yield "| rows | network | weights | a step | a frame | batch in |\n|---|---|---|---|---|---|"
    for text, names in rows_by(EXPERIMENTS, words).items():
        config = workloads.row_config(names[0])
        with torch.device("meta"):
            model, criterion = workloads.row_network(config)
        for precision, name in NAMES.items():
            plan = plan_memory(model, criterion, config.optimizer, precision)
            if config.ema_decay:
                plan = plan._replace(fixed=plan.fixed + plan.weights)
            sizes = [f"{value / 2**20:,.0f} MiB" for value in plan]
            fits = ", ".join(f"{card} GB: {plan.largest_batch(1e9 * card)}" for card in CARDS)
            yield f"| {', '.join(names)} | {text}, {name} | {' | '.join(sizes)} | {fits} |"


def detect_rows(setting: Setting, rows: list[str]) -> Iterator[str]:
    """Lines of a table: one image or pair, files to boxes, by the networks of some rows at full width, or
    of all, against row 26's. Rows that differ in training alone share a line."""
    yield "| rows | network | detect | of row 26 |\n|---|---|---|---|"
    chosen = dict.fromkeys(["26", *rows]) if rows else EXPERIMENTS
    networks = rows_by(chosen, lambda row: [*network_words(row), *["test flip"] * row["test_flip"]])
    configs = (workloads.row_config(names[0], width=setting.speed_width) for names in networks.values())
    detectors = (row_image(setting, config, setting.precision) for config in configs)
    timings = time_in_turns(setting, *detectors)
    timed = [(*item, taken.seconds) for item, taken in zip(networks.items(), timings, strict=True)]
    [reference] = [seconds for _, names, seconds in timed if "26" in names]
    for network, names, seconds in timed:
        yield f"| {', '.join(names)} | {network} | {1e3 * seconds:.4g} ms | {seconds / reference:.2f} |"


def main() -> None:
    """Print the machine, and the table line by line."""
    arguments = parse_arguments()
    device = choose_device(arguments.device)
    precision = choose_precision("auto", device)
    torch.manual_seed(0)
    machine = describe_machine(device, precision)
    on_gpu, seconds = device.type == "cuda", 2.0 if arguments.quick else 8.0
    how = {"seconds": seconds, "batch": 32 if on_gpu else 2 if arguments.quick else 8, "drawn": 16}
    if arguments.report:
        how = {} if on_gpu else timing.TINY
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(device, precision, Path(folder), **how)
        if arguments.report:
            gpu_report.write_report(arguments.report, setting, machine)
            return
        print(machine, end="\n\n")
        if arguments.rows is not None:
            lines = detect_rows(setting, arguments.rows)
        elif arguments.memory_plan:
            lines = memory_rows()
        else:
            measured = measured_lines(setting, arguments.only or BENCHMARKS)
            lines = itertools.chain([timing.HEADER], (line.row() for line in measured))
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
    whole = f"all that is to know of a GPU in under {gpu_report.MINUTES} minutes, into this folder, instead"
    add("--report", type=Path, metavar="FOLDER", help=whole)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
