"""Does a change help, and how much? Rows of the lab book made small, over several seeds.

    python -m tools.study infusion                    # runs what is not there yet, then reports
    python -m tools.study infusion --report           # reports on the runs that are there
    python -m tools.study kaist --data-root /data/kaist …    # the rows at full size

Each run is `train.py --experiment ROW` with the constants of SMALL over the row's, but for "kaist":
a narrow network from scratch that trains on the demo set in minutes. Arms share their seeds, and
with them initial weights, order of frames and augmentation, so that differences are taken seed by
seed. Other flags go to every run. A study that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import train
from engine.config import OneLineParser, as_flags, show
from engine.experiments import EXPERIMENTS
from engine.run import same_recipe
from kaist.files import InputError, make_folder, run_script, write_atomically, write_text

CHECKPOINTS = "checkpoints"  # the runs are kept in a folder of the study's name below it
OUT = "results"  # where the report's table and figure go
SMALL = {
    "width": 0.125,
    "pretrained": "none",
    "lr": 2e-3,
    "schedule": "cosine",
    "batch_size": 8,
    "epochs": 8,
    "eval_every": 8,
    "zoom_out": 1.5,
    "min_score": 0.01,
}


@dataclass(frozen=True)
class Study:
    """A question: what it compares, and with what.

    baseline: the row that all are compared with; arms: name -> (row, changes to it); small: what
    takes the place of SMALL's values, None what the rows themselves say.
    """

    question: str
    baseline: str
    arms: dict[str, tuple[str, dict[str, Any]]]
    seeds: int
    small: dict[str, Any] = field(default_factory=dict)


STUDIES = {
    "infusion": Study(
        "Does segmentation infusion help, where, and how much?",
        "12",
        {row: (row, {}) for row in ("18", "19", "20", "21", "22", "26", "27", "28")}
        | {"26, SEG_WEIGHT 10": ("26", {"seg_weight": 10.0})},
        seeds=5,
    ),
    "beyond": Study(
        "What do the changes beyond the log bring, each by itself?",
        "26",
        {row: (row, {}) for row in ("31", "32", "33", "34", "36", "37", "38", "40", "12", "19")},
        seeds=3,
        small={"schedule": None, "epochs": 12, "eval_every": 12},
    ),
    "lwir": Study(
        "Do the changes that need no visible image help on a handful of LWIR frames?",
        "26",
        {"31 and 38": ("31", {"test_flip": True})},
        seeds=5,
        small={"schedule": None, "epochs": 36, "eval_every": 36},
    ),
    "kaist": Study(
        "What does each row reach as the lab book has it, at full size?",
        "26",
        {row: (row, {}) for row in ("12", "19", *map(str, range(31, 41)))},
        seeds=1,
        small=dict.fromkeys(SMALL),
    ),
}


def main() -> None:
    """Run what a study lacks, and report on what it has."""
    arguments, more = parse_arguments()
    study = STUDIES[arguments.study]
    folder = Path(CHECKPOINTS) / f"study-{arguments.study}"
    runs = plan(study, folder, arguments.seeds or study.seeds, more)
    if not arguments.report:
        make_folder(folder)
        run_all([run for run in runs if not is_finished(run)], arguments.jobs)
    outcomes = [read_outcome(run) for run in runs if is_finished(run)]
    table = report(study, outcomes)
    make_folder(Path(OUT))
    command = " ".join(["python -m tools.study", arguments.study, *more])
    text = f"`{command}`: {study.question}\n\n{table}\n"
    write_text(Path(OUT) / f"{arguments.study}.md", text)
    write_atomically(Path(OUT) / f"{arguments.study}.png", lambda path: draw(study, outcomes, path))
    print(text)


def parse_arguments() -> tuple[Namespace, list[str]]:
    """The command line, and what of it goes to every run."""
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("study", choices=STUDIES, help=", ".join(STUDIES))
    add("--seeds", type=int, default=0, help="runs of each arm (default: the study's own)")
    add("--jobs", type=int, default=1, help="runs at a time, sharing the cores (%(default)s)")
    add("--report", action="store_true", help="run nothing, report on what is there")
    arguments, more = parser.parse_known_args()
    if arguments.jobs < 1 or arguments.seeds < 0:
        parser.error("--jobs and --seeds take a number above 0")
    return arguments, more


# ------------------------------------------------------------------------------ running


class StudyRun(NamedTuple):
    """One run: its arm and seed, its folder, train.py's flags, and the constants they give."""

    arm: str
    seed: int
    folder: Path
    flags: list[str]
    config: Namespace


def plan(study: Study, folder: Path, seeds: int, more: list[str]) -> list[StudyRun]:
    """Every run, a seed of all arms after the other, so that any prefix can be compared.

    Raises:
        InputError: flags that train.py refuses, or a folder that holds a run of other constants.
    """
    arms = {study.baseline: (study.baseline, {}), **study.arms}
    runs = []
    for seed in range(seeds):
        for arm, (row, changes) in arms.items():
            changed = "".join(f"-{key}-{show(value)}" for key, value in changes.items())
            name = f"row{row}{changed}-seed{seed}"
            values = SMALL | study.small | changes | {"seed": seed}
            said = {key: value for key, value in values.items() if value is not None}
            flags = ["--experiment", row, *as_flags(said), *more]
            flags += ["--checkpoints", str(folder), "--name", name]
            runs.append(StudyRun(arm, seed, folder / name, flags, train.configure(flags)))
    for run in runs:
        if run.folder.exists() and not same_recipe(run.folder, vars(run.config)):
            raise InputError(
                "it holds a run of other constants", "move it away to run the study anew", file=run.folder
            )
    return runs


def is_finished(run: StudyRun) -> bool:
    """Whether a run was trained and evaluated to its end."""
    return (run.folder / "miss_rate.json").is_file()


def run_all(runs: list[StudyRun], jobs: int) -> None:
    """Train, some runs at a time; what each says goes into a file beside its folder.

    Raises:
        InputError: runs that ended badly, after all others were made.
    """
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}

    def train_one(run: StudyRun) -> bool:
        said = run.folder.with_suffix(".out")
        with said.open("w") as file:
            command = [sys.executable, train.__file__, *run.flags]
            done = subprocess.run(command, stdout=file, stderr=file, env=environment)
        return done.returncode == 0

    with ThreadPoolExecutor(jobs) as pool:
        ended = list(tqdm(pool.map(train_one, runs), total=len(runs), desc="runs", unit="run"))
    failed = [run.folder for run, well in zip(runs, ended, strict=True) if not well]
    if failed:
        raise InputError(
            f"{len(failed)} of {len(runs)} runs failed",
            "what it said is in this file; the same command goes on",
            file=failed[0].with_suffix(".out"),
        )


# ------------------------------------------------------------------------------ reporting


class Outcome(NamedTuple):
    """What one finished run reached: rates in per cent (all, day, night), masks' IoU by map."""

    arm: str
    seed: int
    miss_rates: np.ndarray
    recall: float
    mask_ious: dict[str, float]
    minutes: float


def read_outcome(run: StudyRun) -> Outcome:
    """A finished run's numbers, from its folder."""
    content = json.loads((run.folder / "miss_rate.json").read_text(encoding="utf-8"))
    official = next(iter(content.values()))["official"]
    rates = [official[f"Reasonable-{part}"]["miss_rate"] for part in ("all", "day", "night")]
    with (run.folder / "log.csv").open(encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    ious = {
        key.removeprefix("iou_"): float(value) for key, value in log[-1].items() if key.startswith("iou_")
    }
    minutes = sum(float(row["seconds"]) for row in log) / 60
    rates = 100 * np.array(rates, dtype=float)
    return Outcome(run.arm, run.seed, rates, 100 * official["Reasonable-all"]["recall"], ious, minutes)


def report(study: Study, outcomes: list[Outcome]) -> str:
    """The table, in Markdown: each arm's miss rate, and its paired difference from the baseline.

    p is that of a paired t-test over the seeds that both have; p (Holm) corrects it for the
    number of arms that are compared.
    """
    by_arm = group(study, outcomes)
    compared = {
        arm: paired_test(differences(by_arm, study.baseline, arm)) for arm in by_arm if arm != study.baseline
    }
    adjusted = holm({arm: test.p for arm, test in compared.items()})
    lines = [
        "| arm | seeds | miss rate all (%) | day | night | recall | minus the baseline, 95% | p | "
        "p (Holm) | mask IoU by map |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, own in by_arm.items():
        rates = np.array([outcome.miss_rates for outcome in own])
        spread = f" ± {rates[:, 0].std(ddof=1):.1f}" if len(own) > 1 else ""
        cells = [
            describe_arm(study, arm),
            str(len(own)),
            f"{rates[:, 0].mean():.1f}{spread}",
            *(f"{value:.1f}" for value in rates[:, 1:].mean(0)),
            f"{np.mean([outcome.recall for outcome in own]):.1f}",
        ]
        if arm == study.baseline:
            cells += ["baseline", "", ""]
        else:
            cells += comparison_cells(compared[arm], adjusted[arm])
        ious = [f"{np.mean([o.mask_ious[name] for o in own]):.2f}" for name in own[0].mask_ious]
        lines.append(f"| {' | '.join([*cells, ', '.join(ious)])} |")
    minutes = np.median([outcome.minutes for outcome in outcomes])
    return "\n".join([*lines, "", f"Median training time of a run: {minutes:.1f} minutes."])


def comparison_cells(test: PairedTest, adjusted: float) -> list[str]:
    """A test's difference with its interval, p, and corrected p; of one pair the difference."""
    if np.isnan(test.p):
        return [f"{test.mean:+.1f}", "", ""]
    interval = f"{test.mean:+.1f} [{test.low:+.1f}, {test.high:+.1f}]"
    return [interval, f"{test.p:.3f}", f"{adjusted:.3f}"]


def group(study: Study, outcomes: list[Outcome]) -> dict[str, list[Outcome]]:
    """The outcomes of each arm that has any, by seed, the baseline first.

    Raises:
        InputError: no run of the baseline, or of any other arm, is finished.
    """
    by_arm = {arm: [o for o in outcomes if o.arm == arm] for arm in (study.baseline, *study.arms)}
    by_arm = {arm: own for arm, own in by_arm.items() if own}
    if study.baseline not in by_arm or len(by_arm) < 2:
        raise InputError("the study has no finished runs to compare", "run it without --report")
    return by_arm


def differences(by_arm: dict[str, list[Outcome]], baseline: str, arm: str) -> np.ndarray:
    """Miss rate of an arm minus the baseline's, in points, for each seed that both have."""
    reference = {outcome.seed: outcome.miss_rates[0] for outcome in by_arm[baseline]}
    return np.array(
        [
            outcome.miss_rates[0] - reference[outcome.seed]
            for outcome in by_arm[arm]
            if outcome.seed in reference
        ]
    )


def describe_arm(study: Study, arm: str) -> str:
    """An arm in the lab book's own words."""
    row, changes = study.arms.get(arm, (arm, {}))
    return arm if changes else f"{arm}: {EXPERIMENTS[row].words}"


class PairedTest(NamedTuple):
    """Mean of paired differences, its 95% interval, and the two-sided p of their being 0."""

    mean: float
    low: float
    high: float
    p: float


def paired_test(values: np.ndarray) -> PairedTest:
    """Student's paired t-test of differences (n,); NaN where n is below 2.

    With t = sqrt(df) tan(a) the density of Student's distribution becomes cos(a)^(df - 1) on
    (-pi/2, pi/2), which the trapezoid rule integrates to many digits.
    """
    n = len(values)
    if n < 2:
        return PairedTest(float(values.mean()) if n else np.nan, np.nan, np.nan, np.nan)
    mean, error = values.mean(), values.std(ddof=1) / n**0.5
    angle = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(angle) ** (n - 2)
    inside = np.append(0, np.cumsum(density[1:] + density[:-1]))
    inside /= inside[-1]  # the probability of |t| <= sqrt(df) tan(angle)
    reach = (n - 1) ** 0.5 * np.tan(np.interp(0.95, inside, angle)) * error
    p = 1 - np.interp(np.arctan2(abs(mean), (n - 1) ** 0.5 * error), angle, inside)
    return PairedTest(float(mean), float(mean - reach), float(mean + reach), float(p))


def holm(p: dict[str, float]) -> dict[str, float]:
    """p values corrected for their number by Holm's step-down method (1979); NaN stays."""
    adjusted, highest = {}, 0.0
    for i, name in enumerate(sorted(p, key=lambda name: p[name])):
        highest = max(highest, min(1.0, (len(p) - i) * p[name]))
        adjusted[name] = p[name] if np.isnan(p[name]) else highest
    return adjusted


def draw(study: Study, outcomes: list[Outcome], path: Path) -> None:
    """Every run's miss rate as a dot, lines between the runs of a seed, each arm's mean a bar."""
    from matplotlib.figure import Figure

    by_arm = group(study, outcomes)
    figure = Figure(figsize=(1.5 + 1.1 * len(by_arm), 4), layout="constrained")
    axis = figure.subplots()
    places = {arm: i for i, arm in enumerate(by_arm)}
    for seed in sorted({outcome.seed for outcome in outcomes}):
        own = [outcome for outcome in sum(by_arm.values(), []) if outcome.seed == seed]
        axis.plot(
            [places[outcome.arm] for outcome in own],
            [outcome.miss_rates[0] for outcome in own],
            "o-",
            markersize=4,
            linewidth=0.6,
            alpha=0.7,
            label=f"seed {seed}",
        )
    for arm, own in by_arm.items():
        mean = np.mean([outcome.miss_rates[0] for outcome in own])
        axis.hlines(mean, places[arm] - 0.3, places[arm] + 0.3, color="black", linewidth=2)
    baseline = np.mean([outcome.miss_rates[0] for outcome in by_arm[study.baseline]])
    axis.axhline(baseline, color="grey", linestyle=":")
    axis.set_xticks(list(places.values()), [arm.replace(", ", "\n") for arm in places])
    axis.set(xlabel="row of the lab book", ylabel="miss rate, Reasonable (%)", title=study.question)
    axis.legend(fontsize="small", ncols=2)
    figure.savefig(path, format="png", dpi=110)


if __name__ == "__main__":
    run_script(main)
