"""Comparing finished runs, and studies of them."""

import shutil
import sys
from pathlib import Path
from subprocess import CompletedProcess
from threading import Lock

import numpy as np
import pytest

import eval as eval_script
import train
from engine.config import resolve_row
from kaist.files import InputError
from tools import study
from tools.study import Study, holm, paired_test, rows


@pytest.fixture(scope="module")
def runs(nursery, demo_root, tmp_path_factory):
    """A short finished run, and a copy with half of its detections."""
    folder = tmp_path_factory.mktemp("runs")
    quick = "--epochs 1 --batch-size 4 --workers 0 --width 0.03 --device cpu --checkpoints".split()
    nursery.run("--data-root", demo_root, *quick, folder, "--name", "a")
    detections = shutil.copytree(folder / "a", folder / "b") / "detections.txt"
    detections.write_text("".join(detections.read_text().splitlines(True)[::2]))
    return folder


def compare(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--compare", *map(str, arguments)])
    eval_script.main()


def test_runs_are_compared_in_one_table_and_one_figure(runs, monkeypatch, capsys, tmp_path):
    out = tmp_path / "x.png"
    compare(monkeypatch, runs / "a", runs / "b", "--bootstrap", "50", "--out", out)
    printed = capsys.readouterr().out
    assert "\na " in printed and "\nb " in printed and printed.count("95%: all [") == 2
    assert "minus" in printed and out.stat().st_size > 10_000
    monkeypatch.setattr(eval_script, "CHECKPOINTS", str(runs))
    compare(monkeypatch, "a", "b", "--bootstrap", "50", "--out", out)
    assert "\nb " in capsys.readouterr().out


def test_runs_that_cannot_be_compared_are_named(runs, monkeypatch, tmp_path):
    with pytest.raises(InputError, match="nowhere: config.json is missing"):
        compare(monkeypatch, runs / "a", "nowhere")
    with pytest.raises(InputError, match="given twice"):
        compare(monkeypatch, runs / "a", runs / "a")
    other = tmp_path / "other"
    shutil.copytree(runs / "b", other)
    listing = other / "detections.frames.txt"
    listing.write_text("".join(listing.read_text().splitlines(True)[1:]))
    with pytest.raises(InputError, match="other: it was evaluated on other frames"):
        compare(monkeypatch, runs / "a", other)


# ---------------------------------------------------------------------------------- studies


def test_paired_test_by_hand():
    # Of 1, 2, 3: mean 2, standard error 1/sqrt(3), t = 2 sqrt(3), df 2: p = 1 - t / sqrt(t^2 + 2).
    t = 2 * 3**0.5
    mean, low, high, p = paired_test(np.array([1.0, 2.0, 3.0]))
    assert mean == 2 and p == pytest.approx(1 - t / (t**2 + 2) ** 0.5, abs=1e-6)
    reach = 4.302653 / 3**0.5  # the 97.5% point of Student's distribution with 2 degrees of freedom
    assert (low, high) == pytest.approx((2 - reach, 2 + reach), abs=1e-4)
    # The 97.5% point with 4 degrees of freedom is 2.776445.
    five = np.array([-1.0, 0.0, 1.0, 2.0, 3.0])
    reach = 2.776445 * five.std(ddof=1) / 5**0.5
    assert paired_test(five)[2] - 1 == pytest.approx(reach, abs=1e-4)
    assert np.isnan(paired_test(np.array([1.0]))[3])
    assert paired_test(np.zeros(3))[0] == 0


def test_holms_correction_by_hand():
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"b": 0.03, "c": 0.06, "a": 0.06})


def outcomes(rates):
    """Results of runs with these miss rates; rates: arm -> seed -> rate."""
    return {
        arm: {seed: np.array([rate, rate, rate, 90.0, 1.0, 0.5]) for seed, rate in by_seed.items()}
        for arm, by_seed in rates.items()
    }


def test_a_study_compares_seed_by_seed():
    question = Study("Is it?", rows("12 19 26"), seeds=3)
    rates = {"12": (30, 40, 50), "19": (29, 39, 49.5), "26": (31, 40, 49)}
    by_seed = {arm: dict(enumerate(values)) for arm, values in rates.items()}
    by_seed["19"][9] = 5.0  # the baseline has no such seed
    table = study.report(question, outcomes(by_seed))
    line = next(line for line in table.splitlines() if line.startswith("| 19"))
    assert "-0.8 [-1.6, -0.1]" in line and "| 4 |" in line
    by_seed["26"] = {0: 31}  # has no p value, so nothing is corrected for
    table = study.report(question, outcomes(by_seed))
    line = next(line for line in table.splitlines() if line.startswith("| 19"))
    p, corrected = line.split("|")[8:10]
    assert p == corrected
    table = study.report(question, outcomes({"12": {0: 30}, "26": {0: 29}}))
    assert "| -1.0 |  |  |" in table and "nan" not in table  # one seed has no interval


def test_a_study_without_its_baseline_is_refused(runs):
    """The only finished run is another arm's."""
    run = study.StudyRun("19", 0, runs / "a", [], None)
    with pytest.raises(InputError, match="no finished runs to compare"):
        study.read_finished(Study("Is it?", rows("12 19")), [run])


def test_the_kaist_study_does_not_change_rows(tmp_path):
    for run in study.plan(study.STUDIES["kaist"], tmp_path, 1, []):
        row = resolve_row(run.arm) | {"seed": 0}
        assert {key: getattr(run.config, key) for key in row} == row


def test_a_study_refuses_the_seed_flag(tmp_path):
    with pytest.raises(InputError, match="use --seeds to set their number"):
        study.plan(study.STUDIES["lwir"], tmp_path, 2, ["--seed", "7"])


def test_each_arm_of_the_streets_study_changes_one_constant(tmp_path):
    baseline, *runs = study.plan(study.STUDIES["streets"], tmp_path, 1, [])
    assert len(runs) == 7 and len({run.folder for run in runs}) == 7
    for run in runs:
        changed = {key for key, value in vars(baseline.config).items() if getattr(run.config, key) != value}
        assert changed - {"name", "modality_dropout"} in (
            {"data_root"},
            {"jitter"},
            {"input_mode"},
            {"train_list"},
            {"width"},
        )


def test_the_beyond_study_keeps_the_rows_schedules():
    runs = study.plan(study.STUDIES["beyond"], Path("none"), 1, [])
    schedules = {run.arm: run.config.schedule for run in runs}
    assert schedules.pop("37") == "cosine" and set(schedules.values()) == {"step"}


@pytest.fixture
def one_study(nursery, monkeypatch, demo_root, tmp_path):
    """A function that runs a study of two quick arms, whose commands the nursery runs one by one."""
    lock = Lock()

    def run(command, stdout, **_):
        python, script, *flags = command
        assert (python, Path(script)) == (sys.executable, Path(train.__file__))
        with lock:
            stdout.write(nursery.run(*flags, folder=tmp_path))
        return CompletedProcess(command, 0)

    monkeypatch.setattr(study.subprocess, "run", run)
    quick = {"epochs": 1, "eval_every": 1, "width": 0.03, "batch_size": 4}
    tiny = Study("Is it?", rows("12") | {"26": ("26", {"lr": 1e-4})}, 1, quick)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "STUDIES", {"tiny": tiny})

    def main(*flags):
        monkeypatch.setattr(
            sys, "argv", ["study.py", "tiny", *flags, "--data-root", str(demo_root), "--workers", "0"]
        )
        study.main()

    return main


def test_a_study_runs_resumes_and_reports(one_study, monkeypatch, capsys):
    with pytest.raises(InputError, match="no finished runs"):
        one_study("--report")
    one_study("--jobs", "2")
    printed = capsys.readouterr().out
    assert printed.count("\n| 12") == 1 and Path("docs/results/tiny.png").stat().st_size > 5000
    assert Path("docs/results/tiny.md").read_text().strip() in printed
    runs = sorted(p.name for p in Path("checkpoints/study-tiny").iterdir() if p.is_dir())
    assert runs == ["row12-seed0", "row26-lr-0.0001-seed0"]

    monkeypatch.setattr(study.subprocess, "run", pytest.fail)  # no run is left
    one_study()
    with pytest.raises(InputError, match="it has a run of another configuration"):
        one_study("--lr", "0.5")


def test_failed_runs_are_named(one_study, monkeypatch):
    monkeypatch.setattr(study.subprocess, "run", lambda command, **_: CompletedProcess(command, 1))
    with pytest.raises(InputError, match=r"row12-seed0\.out: 2 of 2 runs failed"):
        one_study()


def test_a_studys_bad_flag_is_refused_before_any_run(one_study):
    with pytest.raises(InputError, match="unrecognized arguments: --lrr"):
        one_study("--lrr", "0.5")
    assert not Path("checkpoints").exists()
