"""Does a change help, and how much? Scaled-down rows of the lab book, compared over several seeds.

    python -m tools.study infusion                    # start or resume the runs, then report
    python -m tools.study infusion --report           # report on the finished runs
    python -m tools.study kaist --data-root /data/kaist …    # the rows at full size

Each run is `train.py --experiment ROW` with the row's constants replaced by those of SMALL: a narrow network
trained from scratch on the demo set, in minutes. "kaist" replaces nothing. Arms share their seeds, that is,
initial weights, frame order and augmentation, so differences are paired by seed. Other flags are passed to
every run.
"""

import json
import os
import subprocess
import sys
import textwrap
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from engine.config import ROOT, OneLineParser, as_flags, format_value
from engine.experiments import EXPERIMENTS
from engine.history import read_log
from kaist import demo
from kaist.files import InputError, make_folder, run_script, write_atomically, write_text
from kaist.report import markdown_table

SMALL = {"width": 0.125, "pretrained": "none", "lr": 2e-3, "schedule": "cosine", "batch_size": 8}
SMALL |= {"epochs": 8, "eval_every": 8, "zoom_out": 1.5, "min_score": 0.01}


class Study(NamedTuple):
    """A question and the compared arms: name -> (row, changes to it), first the baseline. `small` replaces
    values of SMALL; None stands for the row's own value."""

    question: str
    arms: dict[str, tuple[str, dict[str, Any]]]
    seeds: int = 5
    small: dict[str, Any] = {}


def rows(names: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Arms that are unchanged rows."""
    return {name: (name, {}) for name in names.split()}


STUDIES = {
    "infusion": Study(
        "Does segmentation infusion help, where, and how much?",
        rows("12 18 19 20 21 22 26 27 28") | {"26, SEG_WEIGHT 10": ("26", {"seg_weight": 10.0})},
    ),
    "masks": Study(
        "Does segmentation infusion help where its masks are learned?",
        {
            "without": ("demo", {"infusion": (0,) * 6}),
            "weight 1": ("demo", {"seg_weight": 1.0}),
            "weight 4, persons a fifth": ("demo", {"seg_weight": 4.0, "seg_balance": "share"}),
            "weight 4, 1 + height / 50": ("demo", {"seg_weight": 4.0, "seg_balance": "height"}),
        },
        small={"zoom_out": None},
    ),
    "beyond": Study(
        "Which changes since the log of 2021 help?",
        rows("26b 31 32 33 34 36 37 38 40 12 19"),
        seeds=3,
        small={"schedule": None, "epochs": 12, "eval_every": 12},
    ),
    "lwir": Study(
        "Do the changes that need no visible image help on a handful of LWIR frames?",
        rows("26b") | {"31 and 38": ("31", {"test_flip": True})},
        small={"schedule": None, "epochs": 36, "eval_every": 36},
    ),
    "past": Study(
        "Which changes to INSANet help if the cameras are slightly misaligned?",
        rows("42 43 44 45 46 47 49 50") | {"48, batch 8": ("48", {"batch_size": 8, "lr": 4e-3})},
        small={"data_root": str(demo.SHIFTED_ROOT), "input_size": (192, 256), "min_input_height": 5.0}
        | {"optimizer": "adam", "batch_size": 4, "epochs": 4, "eval_every": 4},
    ),
    "streets": Study(
        "Which parts of the synthetic training help?",
        rows("streets")
        | {
            "without crowds": ("streets", {"data_root": "data/streets-without-crowds"}),
            "without haze and blur": ("streets", {"data_root": "data/streets-without-haze"}),
            "without jitter": ("streets", {"jitter": 0.0}),
            "visible only": ("streets", {"input_mode": "visible", "modality_dropout": 0.0}),
            "LWIR only": ("streets", {"input_mode": "lwir", "modality_dropout": 0.0}),
            "a quarter of the frames": ("streets", {"train_list": "imageSets/train-quarter.txt"}),
            "twice the width": ("streets", {"width": 0.25}),
        },
        seeds=3,
        small=dict.fromkeys(SMALL) | {"width": 0.125, "epochs": 3, "eval_every": 3},
    ),
    "kaist": Study(
        "What are the miss rates of the rows on KAIST, at full size?",
        rows("26b 12 19 31 32 33 34 35 36 37 38 39 40"),
        seeds=1,
        small=dict.fromkeys(SMALL),
    ),
}


def main() -> None:
    """Run the unfinished runs of a study, and report on the finished ones."""
    arguments, extra = parse_arguments()
    study, out = STUDIES[arguments.study], arguments.out
    folder = Path("checkpoints") / f"study-{arguments.study}"
    runs = plan(study, folder, arguments.seeds or study.seeds, extra)
    if not arguments.report:
        make_folder(folder)
        run_all([run for run in runs if not run.is_finished()], arguments.jobs)
    by_arm = read_finished(study, runs)
    command = " ".join(["python -m tools.study", arguments.study, *extra])
    text = f"`{command}`: {study.question}\n\n{report(study, by_arm)}\n"
    make_folder(out)
    write_text(out / f"{arguments.study}.md", text)
    write_atomically(out / f"{arguments.study}.png", lambda path: plot(study, by_arm, path))
    print(text)


def parse_arguments() -> tuple[Namespace, list[str]]:
    """Parse the command line; return its arguments, and the flags that are passed to every run."""
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("study", choices=STUDIES, help=" ".join(f"{k}: {study.question}" for k, study in STUDIES.items()))
    add("--seeds", type=int, default=0, help="runs of each arm (default: the number that the study sets)")
    add("--jobs", type=int, default=1, help="runs at the same time, which share the cores (%(default)s)")
    add("--report", action="store_true", help="run nothing, report on the finished runs")
    add("--out", type=Path, default=Path("docs/results"), help="folder of table and figure (%(default)s)")
    arguments, extra = parser.parse_known_args()
    if arguments.jobs < 1 or arguments.seeds < 0:
        parser.error("--jobs and --seeds must be positive")
    return arguments, extra


# ------------------------------------------------------------------------------ running


class StudyRun(NamedTuple):
    """A run: its arm, seed, folder, flags of train.py, and the configuration that these give."""

    arm: str
    seed: int
    folder: Path
    flags: list[str]
    config: Namespace

    def is_finished(self) -> bool:
        """Whether it was trained and evaluated."""
        return (self.folder / "miss_rate.json").is_file()


def plan(study: Study, folder: Path, seeds: int, extra: list[str]) -> list[StudyRun]:
    """List all runs, ordered by seed, so that the arms of an interrupted study can be compared.

    Raises:
        InputError: train.py refuses a flag, or a folder has a run of another configuration.
    """
    import train  # here, because torch takes seconds
    from engine.run import same_recipe

    runs = []
    for seed in range(seeds):
        for arm, (row, changes) in study.arms.items():
            parts = [f"-{key}-{format_value(value).split('/')[-1]}" for key, value in changes.items()]
            name = f"row{row}{''.join(parts)}-seed{seed}"
            values = SMALL | study.small | changes | {"seed": seed}
            flags = as_flags({key: value for key, value in values.items() if value is not None})
            flags = ["--experiment", row, *flags, *extra, "--checkpoints", str(folder), "--name", name]
            runs.append(StudyRun(arm, seed, folder / name, flags, train.configure(flags)))
            if runs[-1].config.seed != seed:
                raise InputError("a study sets the seeds of its runs", "use --seeds to set their number")
            if runs[-1].folder.exists() and not same_recipe(folder / name, vars(runs[-1].config)):
                remedy = "move it away to start the run again"
                raise InputError("it has a run of another configuration", remedy, file=folder / name)
    return runs


def run_all(runs: list[StudyRun], jobs: int) -> None:
    """Run train.py for each run, `jobs` at a time, with its output in FOLDER.out.

    Raises:
        InputError: some runs failed; the others were completed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}

    def train_one(run: StudyRun) -> int:
        command = [sys.executable, ROOT / "train.py", *run.flags]
        with Path(f"{run.folder}.out").open("w") as file:
            return subprocess.run(command, stdout=file, stderr=file, env=environment).returncode

    with ThreadPoolExecutor(jobs) as pool:
        codes = list(tqdm(pool.map(train_one, runs), total=len(runs), desc="runs", unit="run"))
    failed = [Path(f"{run.folder}.out") for run, code in zip(runs, codes, strict=True) if code]
    if failed:
        remedy = "see this file for its output; the same command resumes the study"
        raise InputError(f"{len(failed)} of {len(runs)} runs failed", remedy, file=failed[0])


# ------------------------------------------------------------------------------ reporting


# Arm -> seed -> results of the run: miss rates (all, day, night) and recall in per cent, minutes, and the
# masks' average precision by map.
Results = dict[str, dict[int, np.ndarray]]


def read_finished(study: Study, runs: list[StudyRun]) -> Results:
    """Read the results of the finished runs; arms without any are left out.

    Raises:
        InputError: the baseline or all other arms have no finished run.
    """
    by_arm: Results = {arm: {} for arm in study.arms}
    for run in filter(StudyRun.is_finished, runs):
        content = json.loads((run.folder / "miss_rate.json").read_text(encoding="utf-8"))
        official = next(iter(content.values()))["official"]
        rates = [official[f"Reasonable-{part}"]["miss_rate"] for part in ("all", "day", "night")]
        rates = 100 * np.array([*rates, official["Reasonable-all"]["recall"]], dtype=float)
        log = read_log(run.folder)
        aps = [value for key, value in log[-1].items() if key.startswith("ap_")]
        minutes = sum(row["seconds"] for row in log) / 60
        by_arm[run.arm][run.seed] = np.array([*rates, minutes, *aps])
    baseline, *others = by_arm.values()
    if not baseline or not any(others):
        raise InputError("the study has no finished runs to compare", "run it without --report")
    return {arm: by_seed for arm, by_seed in by_arm.items() if by_seed}


def report(study: Study, by_arm: Results) -> str:
    """A Markdown table of each arm's miss rate and its difference from the baseline.

    p is from a paired t-test over the seeds that both arms have. p (Holm) corrects it for the number of arms.
    """
    baseline, *others = by_arm
    tests = {}
    for arm in others:
        seeds = by_arm[arm].keys() & by_arm[baseline].keys()
        differences = [by_arm[arm][seed][0] - by_arm[baseline][seed][0] for seed in sorted(seeds)]
        tests[arm] = paired_test(np.array(differences))
    adjusted = holm({arm: p for arm, (*_, p) in tests.items() if not np.isnan(p)})
    columns = "arm|seeds|miss rate all (%)|day|night|recall|minus baseline, 95%|p|p (Holm)|mask AP by map"
    table = []
    for arm, by_seed in by_arm.items():
        results = np.array([*by_seed.values()])
        rate, day, night, recall, _, *aps = results.mean(0)
        row, changes = study.arms[arm]
        name = arm if changes else f"{arm}: {EXPERIMENTS[row].description}"
        spread = f" ± {results[:, 0].std(ddof=1):.1f}" if len(by_seed) > 1 else ""
        cells = [name, str(len(by_seed)), f"{rate:.1f}{spread}"]
        cells += [f"{percent:.1f}" for percent in (day, night, recall)]
        mean, low, high, p = tests.get(arm, (np.nan,) * 4)
        if arm == baseline:
            cells += ["baseline", "", ""]
        elif np.isnan(p):  # one seed has no interval
            cells += [f"{mean:+.1f}", "", ""]
        else:
            cells += [f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", f"{p:.3f}", f"{adjusted[arm]:.3f}"]
        table.append([*cells, ", ".join(f"{ap:.2f}" for ap in aps)])
    minutes = np.median([result[4] for by_seed in by_arm.values() for result in by_seed.values()])
    closing = f"Median training time of a run: {minutes:.1f} minutes."
    return f"{markdown_table(columns.split('|'), table)}\n\n{closing}"


def paired_test(values: np.ndarray) -> tuple[float, float, float, float]:
    """Mean, 95% interval (low, high) and two-sided p of paired differences (n,) by Student's t-test.

    All but the mean are NaN if n is below 2. With t = sqrt(df) tan(a), the density of Student's distribution
    is proportional to cos(a)^(df - 1) on (-pi/2, pi/2), which the trapezoid rule integrates accurately.
    """
    n = len(values)
    if n < 2:
        return float(values.mean()) if n else np.nan, np.nan, np.nan, np.nan
    mean, error = values.mean(), values.std(ddof=1) / n**0.5
    angle = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(angle) ** (n - 2)
    probability = np.append(0, np.cumsum(density[1:] + density[:-1]))
    probability /= probability[-1]  # of |t| <= sqrt(df) tan(angle)
    margin = (n - 1) ** 0.5 * np.tan(np.interp(0.95, probability, angle)) * error
    p = 1 - np.interp(np.arctan2(abs(mean), (n - 1) ** 0.5 * error), angle, probability)
    return tuple(map(float, (mean, mean - margin, mean + margin, p)))


def holm(p: dict[str, float]) -> dict[str, float]:
    """Correct p values for their number by Holm's step-down method (1979)."""
    adjusted, highest = {}, 0.0
    for i, name in enumerate(sorted(p, key=lambda name: p[name])):
        adjusted[name] = highest = max(highest, min(1.0, (len(p) - i) * p[name]))
    return adjusted


def plot(study: Study, by_arm: Results, path: Path) -> None:
    """Plot each run's miss rate as a dot, with lines between runs of a seed and a bar at each arm's mean."""
    from matplotlib.figure import Figure

    width = max(6, 1.5 + 1.1 * len(by_arm))
    figure = Figure(figsize=(width, 4.5), layout="constrained")
    axis = figure.subplots()
    for seed in sorted({seed for by_seed in by_arm.values() for seed in by_seed}):
        dots = [(i, by_seed[seed][0]) for i, by_seed in enumerate(by_arm.values()) if seed in by_seed]
        axis.plot(*zip(*dots, strict=True), "o-", markersize=4, linewidth=0.6, label=f"seed {seed}")
    means = [np.mean([result[0] for result in by_seed.values()]) for by_seed in by_arm.values()]
    x = np.arange(len(means))
    axis.hlines(means, x - 0.3, x + 0.3, color="black", linewidth=2, label="mean")
    axis.axhline(means[0], color="grey", linestyle=":", label="the baseline's mean")
    axis.set_xticks(x, [textwrap.fill(arm, 13) for arm in by_arm])
    axis.set(xlabel="row of the lab book", ylabel="miss rate, Reasonable (%)")
    axis.set_title(textwrap.fill(study.question, int(9 * width)))
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path, format="png", dpi=110)


if __name__ == "__main__":
    run_script(main)
