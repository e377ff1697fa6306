"""Validation of constants: allowed words, ranges of numbers, combinations of values."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.experiments import EXPERIMENTS
from kaist.annotations import MODALITIES
from kaist.files import InputError
from kaist.frames import PERSON_LABELS

# Allowed values of constants that are words.
CHOICES = {
    "input_mode": ("lwir", "visible", "mean", "early", "halfway"),
    "network": ("ssd300", "mlpd", "insanet"),
    "priors": ("ssd300", "ssd300-coco", "pedestrian", "multispectral"),
    "centres": ("even", "stride"),
    "lwir_filters": ("mean", "sum"),
    "seg_cells": ("mean", "sum"),
    "seg_maps": ("mean", "sum", "uncertainty"),
    "seg_balance": ("none", "share", "height"),
    "out_of_range": ("keep", "background", "ignore"),
    "learn": tuple(PERSON_LABELS),
    "loc_loss": ("l1", "smooth_l1"),
    "conf_divisor": ("positives", "balanced"),
    "loc_reduction": ("mean", "sum"),
    "optimizer": ("sgd", "adam"),
    "schedule": ("constant", "step", "step-mlpd", "cosine"),
    "compile": ("auto", "on", "graphs", "off"),
    "precision": ("auto", "fp32", "bf16"),
    "on_nonfinite": ("stop", "skip"),
    "start_method": ("auto", *multiprocessing.get_all_start_methods()),
}

# Smallest and largest value of constants that are numbers.
BELOW_1 = math.nextafter(1.0, 0.0)
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("jitter", "copy_paste", "modality_dropout"), (0, 1)),
    **dict.fromkeys(("mirror_apart", "crop_apart", "shift_left"), (0, 1)),
    **dict.fromkeys(("pixel_mean", "min_score", "nms_iou"), (0, 1)),
    **dict.fromkeys(("ema_decay", "validation", "seg_person_share"), (0, BELOW_1)),
    **dict.fromkeys(("min_height", "margin"), (0, 10**4)),
    **dict.fromkeys(("save_minutes", "seg_weight"), (0, 10**6)),
    **dict.fromkeys(("epochs", "eval_every"), (1, 10**6)),
    "seed": (0, 2**63 - 1),
    "workers": (0, 256),
    "max_bad_frames": (0, 10**9),
    "pixel_std": (1e-3, 10),
    "width": (1e-3, 4),
    "lr": (1e-12, 1e9),
    "bias_lr_factor": (0, 1000),
    "weight_decay": (0, 100),
    "batch_size": (1, 2**16),
    "input_size": (1, 10_000),
    "zoom_out": (1, 16),
    "max_boxes": (1, 10**5),
    "samples": (1, 10**3),
    "lwir_range": (-1e9, 1e9),
}

# Allowed mask options where no map has a mask head, and constants that MLPD and INSANet require.
ALLOWED_WITHOUT_MASKS = {
    "infusion_conv": (False,),
    "seg_maps": ("mean", "sum"),
    "seg_balance": ("none",),
    "out_of_range": ("keep",),
    "seg_weight": (1.0, 0.0),
}
MULTISPECTRAL_NEEDS = {"input_mode": "halfway", "batch_norm": True, "loc_loss": "l1", "loc_reduction": "mean"}


def check_config(values: dict[str, Any]) -> None:
    """Check the values of constants. Raises InputError if one cannot be used, with what is allowed."""
    for name, value in values.items():
        if name in CHOICES and value not in CHOICES[name]:
            raise invalid_constant(name, value, f"choose one of {', '.join(CHOICES[name])}")
        if name in RANGES:
            low, high = RANGES[name]
            for number in value if isinstance(value, tuple | list) else (value,):
                if not (isinstance(number, int | float) and low <= number <= high):
                    raise invalid_constant(name, value, f"choose a number from {low:g} to {high:g}")
        if isinstance(value, str) and not value.isprintable():  # such as a surrogate of another encoding
            raise invalid_constant(name, ascii(value), "write it in UTF-8, without control characters")
    for name, remedy in conflicts(values):
        raise invalid_constant(name, values[name], remedy)


def conflicts(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Constants whose values do not fit others, or are not valid names, and the remedy for each."""
    maps, network, name = values.get("infusion", ()), values.get("network", "ssd300"), values.get("name", "")
    if not (set(maps[:1]) <= {0, 1, 2} and set(maps[1:]) <= {0, 1}):
        yield "infusion", "write 1 for a map with a segmentation head, else 0"
    if 2 in maps and network == "ssd300":
        yield "infusion", "2 (heads on both streams too) needs NETWORK = mlpd or insanet"
    if maps and values.get("seg_balance") == "height" and not values["masks_follow"]:
        yield "seg_balance", "it uses heights after augmentation: set MASKS_FOLLOW"
    for option, allowed in ALLOWED_WITHOUT_MASKS.items() if maps and not any(maps) else ():
        if values.get(option, allowed[0]) not in allowed:
            yield option, "no map has a segmentation head: set INFUSION"
    for constant, value in MULTISPECTRAL_NEEDS.items() if network != "ssd300" else ():
        if values[constant] != value:
            yield constant, f"NETWORK = {network} needs {constant.upper()} = {value}"
    low, high = values.get("crop_aspect", (0, 1))
    if not low < high:
        yield "crop_aspect", "the first value must be less than the second"
    two_modalities = len(MODALITIES[values.get("input_mode", "early")]) == 2
    for option in ("modality_dropout", "mirror_apart", "crop_apart"):
        if values.get(option) and not (two_modalities and values.get("augment", True)):
            yield option, "it needs AUGMENT and an INPUT_MODE with both modalities"
    if Path(name).name != name or name.startswith("."):
        yield "name", "choose a folder name without a slash or a leading dot"
    if name.split("-")[0] in EXPERIMENTS:
        yield "name", "choose a folder name that does not begin with the name of a row"


def invalid_constant(name: str, value: Any, remedy: str) -> InputError:
    """The error for a constant whose value cannot be used."""
    text = repr(value)
    text = text if len(text) <= 80 else f"{text[:80]}…"
    return InputError(f"{name.upper()} = {text} cannot be used", remedy)
