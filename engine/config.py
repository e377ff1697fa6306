"""A script's constants as its command line: every constant is a flag, its comment the help."""

from __future__ import annotations

import argparse
import ast
import math
import re
from pathlib import Path
from typing import Any

from engine.experiments import BASE, EXPERIMENTS
from kaist import demo as demo_data
from kaist.files import InputError
from kaist.images import MODALITIES

# Constants that take one of a few words.
CHOICES = {
    "input_mode": ("lwir", "visible", "mean", "early", "halfway"),
    "priors": ("ssd300", "ssd300-coco", "pedestrian"),
    "seg_cells": ("mean", "sum"),
    "seg_maps": ("mean", "sum", "uncertainty"),
    "out_of_range": ("keep", "background", "ignore"),
    "loc_loss": ("l1", "smooth_l1"),
    "loc_reduction": ("mean", "sum"),
    "optimizer": ("sgd", "adam"),
    "schedule": ("constant", "step", "cosine"),
    "loader": ("auto", "workers", "device"),
    "compile": ("auto", "on", "off"),
    "precision": ("auto", "fp32", "bf16"),
    "on_nonfinite": ("stop", "skip"),
    "start_method": ("auto", "fork", "spawn", "forkserver"),
}


def read_constants(script: str | Path) -> dict[str, tuple[Any, str]]:
    """A script's upper-case constants: lower-case name -> (value, comment on its line)."""
    source = Path(script).read_text(encoding="utf-8")
    lines = source.splitlines()
    constants = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name.isupper():
                comment = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2]
                constants[name.lower()] = (ast.literal_eval(node.value), comment.strip())
    return constants


def parse_flags(
    description: str, constants: dict[str, tuple[Any, str]], argv: list[str] | None
) -> dict[str, Any]:
    """The flags given on the command line, as lower-case name -> value; nothing else.

    Raises:
        InputError: an unknown flag or a value of the wrong type.
    """
    parser = OneLineParser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, (value, comment) in constants.items():
        flag = "--" + name.replace("_", "-")
        text = f"{comment} (default: {show(value)})".replace("%", "%%")
        if isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif isinstance(value, tuple):
            parser.add_argument(flag, type=tuple_of(value), help=text, metavar="N,N,…")
        else:
            choices = CHOICES.get(name)
            parser.add_argument(
                flag,
                type=type(value),
                choices=choices,
                help=text,
                metavar=None if choices else type(value).__name__.upper(),
            )
    return vars(parser.parse_args(argv))


def as_flags(changes: dict[str, Any]) -> list[str]:
    """The command line that gives these values: the inverse of `parse_flags`."""
    flags = []
    for name, value in changes.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", show(value)]
    return flags


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose refusal is one InputError instead of a usage screen."""

    def error(self, message: str) -> None:
        raise InputError(message, f"python {self.prog} --help lists the flags")


def resolve_row(name: str) -> dict[str, Any]:
    """Every constant of a row of the lab book: `BASE` and the changes down to it.

    Raises:
        InputError: there is no such row, or a row changes an unknown constant.
    """
    if name not in EXPERIMENTS:
        raise InputError(
            f"the lab book has no experiment {name!r}", f"choose one of {', '.join(EXPERIMENTS)}"
        )
    row = EXPERIMENTS[name]
    values = resolve_row(row["based_on"]) if row["based_on"] else BASE
    unknown = row["change"].keys() - BASE.keys()
    if unknown:
        raise InputError(
            f"row {name} changes {', '.join(unknown)}, which no recipe has",
            "correct the row in experiments.py",
        )
    return {**values, **row["change"]}


def lab_book() -> str:
    """The lab book as a table: each row, what it builds on, what it changes, what was logged."""
    lines = [f"{'row':>5} {'on':>4}  change, and what the 2021 log recorded (miss rate in %)"]
    for name, row in EXPERIMENTS.items():
        change = ", ".join(f"{key} {show(value)}" for key, value in row["change"].items())
        lines.append(f"{name:>5} {row['based_on'] or '':>4}  {row['words']}")
        lines += [f"{'':12}{part}" for part in (change, row["logged"]) if part]
    return "\n".join(lines)


def tuple_of(default: tuple) -> Any:
    """A parser of "1,0,0" into a tuple of the default's length and element type."""
    kind = type(default[0])

    def parse(text: str) -> tuple:
        values = tuple(kind(part) for part in re.split(r"[,\s]+", text.strip("()[] ")))
        if len(values) != len(default):
            raise argparse.ArgumentTypeError(f"wants {len(default)} values, like {show(default)}")
        return values

    return parse


def show(value: Any) -> str:
    """A value as one would type it on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


# What numbers have to be: (names, test, in words).
RANGES = (
    (
        ("width", "lr", "batch_size", "epochs", "eval_every", "max_boxes", "samples"),
        lambda v: v > 0,
        "it has to be greater than 0",
    ),
    (
        (
            "seed",
            "workers",
            "max_bad_frames",
            "bias_lr_factor",
            "weight_decay",
            "seg_weight",
            "min_height",
            "margin",
            "save_minutes",
        ),
        lambda v: v >= 0,
        "it cannot be below 0",
    ),
    (
        ("min_score", "nms_iou", "copy_paste", "modality_dropout"),
        lambda v: 0 <= v <= 1,
        "it is a share, from 0 to 1",
    ),
    (("validation", "ema_decay"), lambda v: 0 <= v < 1, "it is a share, from 0 to below 1"),
    (("zoom_out",), lambda v: 1 <= v <= 16, "it is a canvas in frames a side, from 1 to 16"),
)


def check_config(config: dict[str, Any]) -> None:
    """Refuse values that no run can use, before anything is read.

    Raises:
        InputError: the constant, its value and what is allowed.
    """
    for name, choices in CHOICES.items():
        if name in config and config[name] not in choices:
            refuse(name, config[name], f"choose one of {', '.join(choices)}")
    for names, fits, words in RANGES:
        for name in names:
            if name in config and not (fits(config[name]) and math.isfinite(config[name])):
                refuse(name, config[name], words)


def model_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """SSD300's arguments."""
    names = ("input_mode", "batch_norm", "width", "infusion", "infusion_conv")
    return {name: config[name] for name in names} | {
        "prior_set": config["priors"],
        "size": config["input_size"],
    }


def check_infusion(config: dict[str, Any]) -> None:
    """Refuse maps that are neither infused nor not, and options of masks where no map has any.

    Raises:
        InputError: the constant, its value and what it needs.
    """
    if not set(config["infusion"]) <= {0, 1}:
        refuse("infusion", config["infusion"], "write 1 for a map with a segmentation head, else 0")
    if any(config["infusion"]):
        return
    plain = {
        "infusion_conv": (False,),
        "seg_maps": ("mean", "sum"),
        "out_of_range": ("keep",),
        "seg_weight": (1.0, 0.0),
    }
    for name, values in plain.items():
        if config[name] not in values:
            refuse(name, config[name], "there is no mask without a map to infuse: set INFUSION")


def refuse(name: str, value: Any, remedy: str) -> None:
    """Raise the InputError for a constant."""
    raise InputError(f"{name.upper()} = {value!r} cannot be used", remedy)


def obstacle(config: dict[str, Any]) -> str:
    """What keeps a configuration's batches from being made on the device; nothing: ""."""
    if not config["cache"]:
        return "it needs a folder for decoded frames: set CACHE"
    if config["augment"] and config["copy_paste"]:
        return "it cannot paste people: set COPY_PASTE = 0"
    return ""


def read_config(script: str, description: str, argv: list[str] | None = None) -> dict[str, Any]:
    """A run's configuration: the script's constants, a row of the lab book over them, flags
    over both; lower-case name -> value.

    Raises:
        InputError: an unknown row or flag, or values that cannot be used.
    """
    constants = read_constants(script)
    flags = parse_flags(description, constants, argv)
    config = {name: value for name, (value, _) in constants.items()} | flags
    if config["experiment"]:
        config |= resolve_row(config["experiment"]) | flags
    check_config(config)
    check_infusion(config)
    if config["loader"] == "device" and (reason := obstacle(config)):
        refuse("loader", "device", reason)
    if config["modality_dropout"] and not (config["augment"] and len(MODALITIES[config["input_mode"]]) == 2):
        refuse(
            "modality_dropout",
            config["modality_dropout"],
            "it needs AUGMENT and an INPUT_MODE of both modalities",
        )
    name = config["name"]
    if name.split("-")[0] in EXPERIMENTS or Path(name).name != name:
        refuse("name", name, "choose a folder's name that does not begin with a row's")
    return config


def run_name(config: dict[str, Any]) -> str:
    """The lab book's name for a configuration: its row, or "demo" for the constants as they come.

    A seed of one's own is told in the name; a recipe that differs from its row in anything else,
    and the demo row on other data than the demo set, is "custom", or what NAME says.
    """
    if config["name"]:
        return config["name"]
    row = config["experiment"] or "demo"
    book = resolve_row(row)
    changed = {name for name, value in book.items() if config[name] != value}
    elsewhere = row == "demo" and Path(config["data_root"]) != demo_data.ROOT
    if changed - {"seed"} or elsewhere:
        return "custom"
    return f"{row}-seed{config['seed']}" if changed else row
