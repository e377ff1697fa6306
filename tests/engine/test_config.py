"""Constants, flags, rows of the lab book, and the name of a run."""

import re
import shutil
from pathlib import Path

import pytest

import train
from engine.config import checkpoint_config, parse_flags, read_constants, resolve_row
from engine.experiments import BASE, EXPERIMENTS, Row
from engine.optim import lr_factor
from engine.validation import CHOICES
from kaist.files import InputError

NO_MAPS = ["--infusion", "0,0,0,0,0,0"]


def defaults():
    return {name: value for name, (value, _) in read_constants(train.__file__).items()}


def test_constants_become_flags_with_their_comments(capsys):
    constants = read_constants(train.__file__)
    assert constants["batch_size"] == (4, "frames per step")
    assert all(comment for _, comment in constants.values()), "each constant has a comment"
    with pytest.raises(SystemExit):
        parse_flags("", constants, ["--help"])
    assert "--no-batch-norm" in capsys.readouterr().out


def test_flags_win_over_rows_and_rows_over_constants():
    config = train.configure(["--experiment", "19", "--lr", "0.25", "--infusion", "0,0,1,0,0,0"])
    assert config.lr == 0.25 and config.infusion == (0, 0, 1, 0, 0, 0)
    assert config.epochs == 100 and config.width == 1.0  # the row's
    assert config.data_root == defaults()["data_root"]  # in no row
    assert train.configure(["--no-augment"]).augment is False


def test_row_streets_sets_its_data_root_and_flags_win(monkeypatch, tmp_path):
    own = Path(train.__file__).parent / "data" / "streets"
    monkeypatch.chdir(tmp_path)
    assert Path(train.configure(["--experiment", "streets"]).data_root).resolve() == own.resolve()
    assert train.configure(["--experiment", "streets", "--data-root", "mine"]).data_root == "mine"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--experiment", "99"], "no experiment '99'.*1, 2,"),
        (["--bath-size", "3"], "unrecognized arguments: --bath-size"),
        (["--batch-size", "many"], "invalid int value: 'many'"),
        (["--batch-size", "0"], "BATCH_SIZE = 0.*from 1 to"),
        (["--width", "nan"], "WIDTH = nan"),
        (["--input-mode", "radar"], "invalid choice: 'radar'"),
        (["--infusion", "1,0"], "expected 6 values"),
        (["--pretrained", "imagenet"], "WIDTH = 1.0"),
        (["--pretrained", "coco", "--width", "1"], "BATCH_NORM = False"),
        (["--validation", "1"], "VALIDATION = 1.0"),
        (["--zoom-out", "0.5"], "ZOOM_OUT = 0.5"),
        (["--zoom-out", "inf"], "ZOOM_OUT = inf"),
        (["--workers", "-1"], "WORKERS = -1"),
        (["--seed", "-1"], "SEED = -1"),
        (["--weight-decay", "-1"], "WEIGHT_DECAY = -1"),
        (["--min-score", "7"], "MIN_SCORE = 7"),
        (["--ema-decay", "1"], "EMA_DECAY = 1.0"),
        (["--modality-dropout", "1.5"], "MODALITY_DROPOUT = 1.5"),
        (["--modality-dropout", "0.5", "--input-mode", "lwir"], "MODALITY_DROPOUT.*both modal"),
        (["--modality-dropout", "0.5", "--no-augment"], "MODALITY_DROPOUT.*AUGMENT"),
        (["--infusion", "2,0,0,0,0,0"], r"INFUSION = \(2, 0, 0, 0, 0, 0\)"),
        ([*NO_MAPS, "--seg-weight", "2"], "SEG_WEIGHT = 2.0.*set INFUSION"),
        ([*NO_MAPS, "--seg-maps", "uncertainty"], "SEG_MAPS = 'uncertainty'.*set INFUSION"),
        ([*NO_MAPS, "--out-of-range", "ignore"], "OUT_OF_RANGE = 'ignore'.*set INFUSION"),
        ([*NO_MAPS, "--infusion-conv"], "INFUSION_CONV = True.*set INFUSION"),
        (["--input-size", "100,100"], r"INPUT_SIZE = \(100, 100\)"),
        (["--epochs", "9" * 400], "EPOCHS = 999"),
        (["--batch-size", "9" * 400], "BATCH_SIZE = 999"),
        (["--seed", str(2**64)], "SEED = 18446744073709551616.*from 0 to"),
        (["--max-boxes", str(2**63)], "MAX_BOXES = 9223372036854775808"),
        (["--width", "1e9"], "WIDTH = 1000000000.0"),
        (["--bias-lr-factor", "1e308"], "BIAS_LR_FACTOR"),
        (["--weight-decay", "1e308"], "WEIGHT_DECAY"),
        (["--workers", "9" * 20], "WORKERS"),
        (["--name", "\udce9"], "NAME = .*UTF-8"),
        (["--name", ".."], "NAME = '..'"),
        (["--name", ".hidden"], "NAME = '.hidden'"),
        (["--name", "a/b"], "NAME = 'a/b'"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3; did you mean --epochs"),
        (["--loader", "device"], "unrecognized arguments: --loader device; .* --help lists the flags"),
    ],
)
def test_invalid_values_and_flags_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        train.configure(flags)


def test_a_row_with_a_wrong_key_is_refused(monkeypatch):
    row = Row("26", {"lrr": 1.0}, "")
    monkeypatch.setitem(EXPERIMENTS, "77", row)
    with pytest.raises(InputError, match="row 77 changes lrr, which BASE does not have"):
        train.configure(["--experiment", "77", "--data-root", "nowhere"])


def test_every_row_resolves_to_known_constants():
    names = defaults()
    assert BASE.keys() <= names.keys()
    for name in EXPERIMENTS:
        row = resolve_row(name)
        assert row.keys() - {"data_root"} == BASE.keys()
        for key, value in row.items():
            assert type(value) is type(names[key]), (name, key)
            assert key not in CHOICES or value in CHOICES[key]


def test_list_prints_the_lab_book(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--list"])
    with pytest.raises(SystemExit):
        train.main()
    said = capsys.readouterr().out
    assert all(f"\n{name:>5} " in said for name in EXPERIMENTS)
    assert "26.33 / 31.38 / 15.89" in said and "infusion 1,1,0,0,0,0" in said


def test_the_constants_of_train_are_the_demo_row():
    assert {key: defaults()[key] for key in BASE} == resolve_row("demo")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            "12",
            {
                "input_mode": "lwir",
                "optimizer": "adam",
                "lr": 5e-4,
                "batch_size": 32,
                "epochs": 100,
                "batch_norm": True,
                "loc_loss": "smooth_l1",
                "validation": 0.0,
                "loc_reduction": "mean",
                "infusion": (0,) * 6,
                "pretrained": "imagenet",
                "augment": True,
                "schedule": "step",
                "width": 1.0,
            },
        ),
        (
            "19",
            {
                "infusion": (1, 1, 0, 0, 0, 0),
                "seg_maps": "sum",
                "masks_follow": False,
                "infusion_conv": False,
                "seg_cells": "mean",
                "epochs": 100,
            },
        ),
        ("26", {"infusion": (1, 0, 0, 0, 0, 0), "seg_maps": "sum", "masks_follow": True}),
    ],
)
def test_rows_have_the_values_of_the_log(row, expected):
    resolved = resolve_row(row)
    assert {key: resolved[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("row", "change"),
    [
        ("31", {"priors": "pedestrian"}),
        ("32", {"input_size": (512, 640)}),
        ("33", {"input_mode": "halfway"}),
        ("34", {"input_mode": "halfway", "modality_dropout": 0.25}),
        (
            "35",
            {
                "pretrained": "coco",
                "batch_norm": False,
                "priors": "ssd300-coco",
                "pixel_mean": (0.48235, 0.45882, 0.40784, 0.1598),
                "pixel_std": (0.229, 0.224, 0.225, 0.0813),
            },
        ),
        ("36", {"ema_decay": 0.999}),
        ("37", {"schedule": "cosine"}),
        ("38", {"test_flip": True}),
        (
            "39",
            {
                "priors": "pedestrian",
                "input_size": (512, 640),
                "input_mode": "halfway",
                "ema_decay": 0.999,
                "schedule": "cosine",
                "test_flip": True,
            },
        ),
        ("40", {"priors": "pedestrian", "input_mode": "halfway", "test_flip": True}),
    ],
)
def test_rows_beyond_the_log_change_only_these_constants_of_row_26b(row, change):
    before, after = resolve_row("26b"), resolve_row(row)
    assert {key: value for key, value in after.items() if value != before[key]} == change
    train.configure(["--experiment", row])  # it can be trained


def test_a_run_name_has_the_row_and_all_changes():
    name = lambda *flags: train.run_name(train.configure(list(flags)))  # noqa: E731
    assert name("--data-root", "/data/kaist") == "demo-onkaist"  # the demo row trains on the demo set
    assert name() == "demo"
    assert name("--experiment", "26") == "26"
    assert name("--experiment", "26", "--workers", "7", "--data-root", "x") == "26"
    assert name("--experiment", "26", "--seed", "3") == "26-seed3"
    assert name("--experiment", "26", "--lr", "0.1") == "26-lr0.1"
    assert name("--epochs", "1", "--no-augment") == "demo-epochs1-noaugment"
    assert name("--name", "mine", "--epochs", "1") == "mine"
    many = name(*"--epochs 1 --lr 0.1 --zoom-out 2 --seed 1 --batch-size 3 --margin 1 --min-height 9".split())
    assert re.fullmatch("demo-7-changes-[0-9a-f]{6}", many)


def test_schedules_by_hand():
    def factor(schedule, epoch):
        return lr_factor(schedule, 100, epoch * 10, 1000)

    assert [factor("step", e) for e in (0, 63, 64, 79, 80, 99)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )  # int(100 / 6) * 4 = 64 and * 5 = 80
    assert factor("constant", 99) == 1
    assert [lr_factor("step", 3, step, 30) for step in (0, 29)] == [1, 1]
    assert lr_factor("cosine", 100, 0, 1000) == pytest.approx(1 / 50)
    assert factor("cosine", 5) == pytest.approx(1)
    assert lr_factor("cosine", 100, 525, 1000) == pytest.approx(0.5)


# ------------------------------------------------------------------------------ checkpoints' configurations


def content_of(**changes):
    config = train.configure([])
    return {"config": {**vars(config), **changes}, "model_args": train.model_arguments(config)}


def test_constants_that_an_old_checkpoint_lacks_get_old_defaults():
    content = content_of(loader="device")  # a constant that was removed
    for name in ("test_flip", "start_method", "ema_decay"):  # constants that were added later
        del content["config"][name]
    config = checkpoint_config(content, "last.pt", device="cpu", data_root="elsewhere")
    assert (config.test_flip, config.start_method, config.ema_decay) == (False, "auto", 0.0)
    assert config.device == "cpu" and config.data_root == "elsewhere"


@pytest.mark.parametrize(
    "changes",
    [
        {"input_mode": "x"},
        {"input_mode": 3},
        {"precision": "x"},
        {"nms_iou": "x"},
        {"nms_iou": float("nan")},
        {"max_boxes": -1},
        {"max_boxes": 10**30},
        {"margin": [1.0]},
        {"input_size": (512, 640)},  # differs from the network's
        {"pixel_mean": (0.5, 0.5, 0.5, 0.5)},
        {"batch_size": 0},
        {"batch_size": "x"},
        {"batch_size": 2.5},
        {"max_boxes": 20.5},
        {"lwir_range": (float("nan"), 1.0)},
        {"workers": 9999},
        {"data_root": 3},
        {"test_list": None},
        {"infusion": [1] * 8},
        {"infusion": [1, 1, 1, 1, 1, "x"]},
        {"input_size": ("a", "b")},
        {"start_method": "x"},
        {"test_flip": "yes"},
    ],
)
def test_an_impossible_configuration_in_a_checkpoint_is_refused(changes):
    with pytest.raises(InputError, match="^last.pt: not a run's configuration .*; choose a checkpoint"):
        checkpoint_config(content_of(**changes), "last.pt")


@pytest.mark.parametrize(("asked", "started"), [(256, 8), (8, 8), (3, 3)])
def test_workers_are_limited_by_the_cores(asked, started, monkeypatch, capsys):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert train.configure(["--workers", str(asked)]).workers == started
    said = capsys.readouterr().out
    assert (said == "") == (asked == started)
    assert asked == started or "WORKERS = 256 is too many for 2 cores; using 8" in said
    monkeypatch.setenv("RANK", "1")
    assert train.configure(["--workers", str(asked)]).workers == started
    assert not capsys.readouterr().out


@pytest.mark.parametrize("missing", ["input_mode", "data_root", "test_list", "device", "batch_size"])
def test_a_checkpoint_without_a_needed_constant_is_refused(missing):
    content = content_of()
    del content["config"][missing]
    with pytest.raises(InputError, match=f"{missing.upper()} is missing"):
        checkpoint_config(content, "last.pt")


def test_kaist_sets_the_paths_that_are_not_given(demo_root, tmp_path):
    root = shutil.copytree(demo_root, tmp_path / "kaist")
    for old, new in (("train-all", "train-all-04"), ("test-all", "test-all-20")):
        (root / f"imageSets/{old}.txt").rename(root / f"imageSets/{new}.txt")
    config = train.configure(["--experiment", "26", "--pretrained", "none", "--kaist", str(root)])
    assert (config.data_root, config.train_list) == (str(root), "imageSets/train-all-04.txt")
    assert (config.annotations, config.test_annotations) == ("bbgt", "KAIST_annotation.json")
    assert not hasattr(config, "kaist")  # only the resulting paths are kept
    given = ["--test-list", "mine.txt", "--test-annotations", "auto"]
    config = train.configure(["--kaist", str(root), *given])
    assert (config.test_list, config.test_annotations) == ("mine.txt", "auto")
    with pytest.raises(InputError, match="nowhere: no such folder"):
        train.configure(["--kaist", str(tmp_path / "nowhere")])
