"""Rows of the lab book have the values of the log, and each can be trained."""

import sys
from pathlib import Path

import pytest
import torch

import train
from engine.checkpoint import load_checkpoint
from engine.config import resolve_row
from engine.experiments import CORRECTIONS, EXPERIMENTS

# The log, transcribed independently: input, optimiser, lr, batch, epochs, schedule, loc loss, validation,
# augmentation, BatchNorm, evaluation interval.
ONE = ("lwir", "sgd", 1e-3, 8, 122, "constant", "l1", 0.1, False, False, 5)
FOUR = ("lwir", "sgd", 5e-4, 32, 150, "step", "l1", 0.0, True, False, 5)
TWELVE = ("lwir", "adam", 5e-4, 32, 100, "step", "smooth_l1", 0.0, True, True, 5)
KEYS = (
    "input_mode",
    "optimizer",
    "lr",
    "batch_size",
    "epochs",
    "schedule",
    "loc_loss",
    "validation",
    "augment",
    "batch_norm",
    "eval_every",
)


def but(row, **changes):
    return tuple(changes.get(key, value) for key, value in zip(KEYS, row, strict=True))


LOG = {
    "1": ONE,
    "2": but(ONE, optimizer="adam"),
    "3": but(ONE, optimizer="adam", lr=5e-4, batch_size=32, epochs=150, schedule="step"),
    "4": FOUR,
    "5": but(FOUR, validation=0.1),
    "6": but(FOUR, validation=0.1, optimizer="adam"),
    "7": but(FOUR, validation=0.1, optimizer="adam", loc_loss="smooth_l1"),
    "8": but(FOUR, validation=0.1, optimizer="adam", loc_loss="smooth_l1", epochs=300),
    "9": but(FOUR, optimizer="adam", loc_loss="smooth_l1"),
    "10": but(TWELVE, batch_norm=False, epochs=120),
    "11": but(TWELVE, batch_norm=False),
    "12": TWELVE,
    "13": but(TWELVE, input_mode="visible"),
    "14": but(TWELVE, input_mode="mean"),
    "15": but(TWELVE, input_mode="visible", lr=1e-3),
    "16": but(TWELVE, eval_every=10),
    "17": but(TWELVE, input_mode="visible", eval_every=10),
    **{str(row): TWELVE for row in range(18, 31)},
}
# infusion maps, 3x3 conv, cells, maps, masks follow the augmentation, persons out of range
SEG_KEYS = ("infusion", "infusion_conv", "seg_cells", "seg_maps", "masks_follow", "out_of_range")
NONE = ((0, 0, 0, 0, 0, 0), False, "mean", "mean", False, "keep")
SEG_LOG = {
    **{str(row): NONE for row in range(1, 18)},
    "18": ((1, 1, 0, 0, 0, 0), False, "mean", "mean", False, "keep"),
    "19": ((1, 1, 0, 0, 0, 0), False, "mean", "sum", False, "keep"),
    "20": ((1, 1, 1, 0, 0, 0), False, "mean", "sum", False, "keep"),
    "21": ((1, 1, 1, 0, 0, 0), True, "mean", "sum", False, "keep"),
    "22": ((1, 1, 1, 1, 1, 1), False, "mean", "sum", False, "keep"),
    "23": ((1, 0, 0, 0, 0, 0), False, "mean", "sum", False, "keep"),
    "24": ((1, 0, 0, 0, 0, 0), False, "mean", "sum", False, "keep"),
    "25": ((1, 0, 0, 0, 0, 0), False, "sum", "sum", False, "keep"),
    "26": ((1, 0, 0, 0, 0, 0), False, "mean", "sum", True, "keep"),
    "27": ((1, 0, 0, 0, 0, 0), False, "mean", "sum", True, "background"),
    "28": ((1, 0, 0, 0, 0, 0), False, "mean", "sum", True, "ignore"),
    "29": ((1, 1, 1, 1, 1, 1), False, "mean", "uncertainty", True, "keep"),
    "30": ((1, 0, 0, 0, 0, 0), False, "mean", "sum", True, "keep"),
}
# Constants that no logged row changes.
COMMON = {
    "seed": 42,
    "input_size": (300, 300),
    "width": 1.0,
    "priors": "ssd300",
    "pretrained": "imagenet",
    "seg_weight": 1.0,
    "loc_reduction": "mean",
    "bias_lr_factor": 2.0,
    "weight_decay": 5e-4,
    "zoom_out": 4.0,
    "min_score": 0.2,
    "nms_iou": 0.5,
    "max_boxes": 200,
}


@pytest.mark.parametrize("row", LOG)
def test_a_row_has_the_constants_of_the_log(row):
    resolved = resolve_row(row)
    assert tuple(resolved[key] for key in KEYS) == LOG[row]
    assert tuple(resolved[key] for key in SEG_KEYS) == SEG_LOG[row]
    if int(row) <= 26:
        assert {key: resolved[key] for key in COMMON} == COMMON
        assert not any(resolved[key] == value for key, value in CORRECTIONS.items())
    else:
        assert {key: resolved[key] for key in CORRECTIONS} == CORRECTIONS
    assert resolved["copy_paste"] == (0.5 if row == "30" else 0.0)


def rows_by_step():
    """One row for each set of constants that affect a training step; other constants are ignored."""
    pace = {
        "epochs",
        "eval_every",
        "lr",
        "batch_size",
        "weight_decay",
        "schedule",
        "seed",
        "validation",
        "test_flip",
    }
    kinds = {}
    for row in EXPERIMENTS:
        constants = {key: value for key, value in resolve_row(row).items() if key not in pace}
        kinds.setdefault(repr(sorted(constants.items())), row)
    return [row for row in kinds.values() if row != "demo"]


@pytest.mark.parametrize("row", rows_by_step())
def test_every_kind_of_row_trains_a_step(row, demo_root, tmp_path, monkeypatch):
    """One optimiser step of a narrow network, started from the command line."""

    class Stepped(Exception):
        """Ends a run after its first step."""

    def stop(run, losses, seconds):
        raise Stepped(run, losses)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.Run, "add_step", stop)
    flags = (
        "--width 0.03 --pretrained none --batch-size 2 --workers 0 --device cpu --checkpoints . --name custom"
    )
    root = ["--data-root", str(demo_root)]
    if resolve_row(row)["network"] == "insanet" and row != "42":
        root += ["--input-size", "256,320"]  # a quarter of the work
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--experiment", row, *root, *flags.split(), "--name", "custom"]
    )
    with pytest.raises(Stepped) as stepped:
        train.main()
    run, losses = stepped.value.args
    infusion = resolve_row(row)["infusion"]
    maps = [f"seg_map{i + 1}" for i, infused in enumerate(infusion) if infused]
    maps += ["seg_map7", "seg_map8"] * (infusion[0] == 2)  # visible's and LWIR's stream
    assert run.terms == ("loss", "loc", "conf", "seg", *maps) and len(losses) == len(run.terms)
    assert losses[0] > 0 and losses.isfinite().all() and (losses[4:] > 0).all()
    start = load_checkpoint(Path("custom/last.pt"))["model"]
    moved = {
        name for name, value in run.parts["model"].state_dict().items() if not torch.equal(value, start[name])
    }
    first = next(iter(start))  # of the first convolution, in whichever stream
    assert first.endswith(".0.weight")
    assert {first, "conf_heads.0.weight", "conf_heads.0.bias"} <= moved
