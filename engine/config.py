"""A script's constants as its command line: every constant is a flag, its comment the help."""

from __future__ import annotations

import argparse
import ast
import hashlib
import math
import multiprocessing
import os
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.experiments import BASE, EXPERIMENTS
from engine.history import runs_table
from kaist.annotations import MODALITIES
from kaist.files import InputError, OneLineParser, PrintAction
from kaist.frames import PERSON_LABELS
from kaist.sources import KAIST, dataset_name, find_kaist

ROOT = Path(__file__).parents[1]  # of the repository; its constants' relative paths are meant from here

# Constants that take one of a few words.
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

# Config keys of detection: thresholds and limits, and averaging over mirror images.
DETECT_KEYS = ("min_score", "nms_iou", "max_boxes", "test_flip")

# The smallest and the largest value of constants that are numbers.
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

# What the options of masks are where no map is infused, and what MLPD and INSANet are made for.
ALLOWED_WITHOUT_MASKS = {
    "infusion_conv": (False,),
    "seg_maps": ("mean", "sum"),
    "seg_balance": ("none",),
    "out_of_range": ("keep",),
    "seg_weight": (1.0, 0.0),
}
MULTISPECTRAL_NEEDS = {"input_mode": "halfway", "batch_norm": True, "loc_loss": "l1", "loc_reduction": "mean"}

# Constants that may differ between a run and its continuation: they change no number.
MACHINE_CONSTANTS = (
    *("experiment", "checkpoints", "name", "device", "workers", "cache", "start_method"),
    *("lwir_range", "save_minutes", "deterministic", "compile", "on_nonfinite", "max_bad_frames"),
)
PATH_CONSTANTS = ("data_root", "checkpoints", "cache", "data")  # each a folder; DATA may also be a file
# What a run from before a constant was added had.
OLD_DEFAULTS = BASE | {"data": KAIST, "lwir_range": (0.0, 0.0)}


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
    description: str, constants: dict[str, tuple[Any, str]], argv: list[str] | None, **actions: Any
) -> dict[str, Any]:
    """The flags given on the command line, as lower-case name -> value; nothing else. InputError: an unknown
    flag or a value of the wrong type.

    actions: further flags: name -> (function that returns a text to print instead of going on, help).
    """
    parser = OneLineParser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, (text, help_) in actions.items():
        parser.add_argument(f"--{name}", action=PrintAction, text=text, help=help_)
    for name, (value, comment) in constants.items():
        flag = "--" + name.replace("_", "-")
        text = f"{comment} (default: {format_value(value)})".replace("%", "%%")
        if isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif isinstance(value, tuple):
            parser.add_argument(flag, type=tuple_type(value), help=text, metavar="N,N,…")
        else:
            choices = CHOICES.get(name)
            metavar = None if choices else type(value).__name__.upper()
            parser.add_argument(flag, type=type(value), choices=choices, help=text, metavar=metavar)
    return vars(parser.parse_args(argv))


def as_flags(changes: dict[str, Any]) -> list[str]:
    """The command line that gives these values: the inverse of `parse_flags`."""
    flags = []
    for name, value in changes.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", format_value(value)]
    return flags


def read_config(script: str, argv: list[str] | None = None) -> Namespace:
    """A run's configuration: the script's constants < a row of the lab book < --kaist < other flags.

    Relative folders among the constants are meant from the script's folder, those among the flags from the
    working directory. InputError: an unknown row or flag, or values that cannot be used.
    """
    constants = read_constants(script)
    description = ast.get_docstring(ast.parse(Path(script).read_text(encoding="utf-8")))

    def runs() -> str:
        return runs_table(from_root(constants["checkpoints"][0]), describe_changes)

    actions = {"list": (lab_book_table, "print the lab book"), "runs": (runs, "print the runs")}
    kaist = "root of a full KAIST: fills DATA_ROOT, both lists and both ANNOTATIONS, but for those given"
    flags = parse_flags(description, constants | {"kaist": ("", kaist)}, argv, **actions)
    if root := flags.pop("kaist", ""):
        flags = find_kaist(Path(root), flags) | flags
    values = {name: value for name, (value, _) in constants.items()}
    own = {name: from_root(values[name]) for name in PATH_CONSTANTS if values[name]}
    if not os.path.isfile(own.get("data", "")):  # but a set's name
        own.pop("data", None)
    values |= own | flags
    if values["experiment"]:
        row = resolve_row(values["experiment"])
        values |= row | {name: from_root(row[name]) for name in PATH_CONSTANTS if name in row} | flags
    check_config(values)
    return limit_workers(Namespace(**values))


def from_root(folder: str) -> str:
    """A folder named from the repository's, as it is called from the working directory."""
    return folder if Path.cwd() == ROOT else str(ROOT / folder)


def find_folder(name: str) -> Path:
    """A folder to read from: below the working directory, or else the repository's own of that name."""
    return Path(name if os.path.exists(name) else from_root(name))


def find_data(values: dict[str, Any]) -> dict[str, str]:
    """A run's DATA_ROOT, and its DATA where that is a file, as they are found by `find_folder`."""
    data = find_folder(values.get("data", KAIST))
    found = {"data_root": str(find_folder(values["data_root"]))}
    return found | {"data": str(data)} if os.path.isfile(data) else found


def same_value(name: str, a: Any, b: Any) -> bool:
    """Whether two values of a constant mean the same; tuples may have become lists."""
    if name in PATH_CONSTANTS and isinstance(a, str) and isinstance(b, str):
        return os.path.abspath(ROOT / a) == os.path.abspath(ROOT / b)
    return (list(a) if isinstance(a, tuple) else a) == (list(b) if isinstance(b, tuple) else b)


def resolve_row(name: str) -> dict[str, Any]:
    """Every constant of a row of the lab book: `BASE` and the changes down to it. InputError: there is no
    such row, or a row changes an unknown constant."""
    if name not in EXPERIMENTS:
        problem = f"the lab book has no experiment {name!r}"
        raise InputError(problem, f"choose one of {', '.join(EXPERIMENTS)}")
    row = EXPERIMENTS[name]
    if unknown := row.changes.keys() - BASE.keys() - {"data_root"}:
        problem = f"row {name} changes {', '.join(unknown)}, which no recipe has"
        raise InputError(problem, "correct the row in engine/experiments.py")
    return (resolve_row(row.based_on) if row.based_on else BASE) | row.changes


def lab_book_table() -> str:
    """The lab book as a table: each row, what it builds on, what it changes, what was logged."""
    lines = ["Rows 1 to 26 are the log of 2021, rows 27 to 29 ideas that it left open; later rows are new."]
    lines += [f"{'row':>5} {'on':>4}  description, changes, results of the 2021 log (miss rates in %)"]
    for name, row in EXPERIMENTS.items():
        change = ", ".join(f"{key} {format_value(value)}" for key, value in row.changes.items())
        lines.append(f"{name:>5} {row.based_on:>4}  {row.description}")
        lines += [f"{'':12}{part}" for part in (change, row.logged) if part]
    return "\n".join(lines)


# ------------------------------------------------------------------------------- what can be used


def check_config(values: dict[str, Any]) -> None:
    """Refuse values that no run can use, before anything is read. InputError: the constant, its value and
    what is allowed."""
    for name, value in values.items():
        if name in CHOICES and value not in CHOICES[name]:
            raise invalid_constant(name, value, f"choose one of {', '.join(CHOICES[name])}")
        if name in RANGES:
            low, high = RANGES[name]
            for number in value if isinstance(value, tuple | list) else (value,):
                if not (isinstance(number, int | float) and low <= number <= high):
                    raise invalid_constant(name, value, f"choose a number from {low:g} to {high:g}")
        if isinstance(value, str) and not value.isprintable():  # half a character, of a foreign encoding
            raise invalid_constant(name, ascii(value), "write it in UTF-8, without control characters")
    for name, remedy in conflicts(values):
        raise invalid_constant(name, values[name], remedy)


def conflicts(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The constants that do not go with others, or are no name, and what each needs instead."""
    maps, network, name = values.get("infusion", ()), values.get("network", "ssd300"), values.get("name", "")
    if not (set(maps[:1]) <= {0, 1, 2} and set(maps[1:]) <= {0, 1}):
        yield "infusion", "write 1 for a map with a segmentation head, else 0"
    if 2 in maps and network == "ssd300":
        yield "infusion", "a 2, for heads on both streams too, is for mlpd and insanet"
    if maps and values.get("seg_balance") == "height" and not values["masks_follow"]:
        yield "seg_balance", "it takes heights after the augmentation: set MASKS_FOLLOW"
    for option, allowed in ALLOWED_WITHOUT_MASKS.items() if maps and not any(maps) else ():
        if values.get(option, allowed[0]) not in allowed:
            yield option, "there is no mask without a map to infuse: set INFUSION"
    for constant, value in MULTISPECTRAL_NEEDS.items() if network != "ssd300" else ():
        if values[constant] != value:
            yield constant, f"NETWORK = {network} needs {constant.upper()} = {value}"
    low, high = values.get("crop_aspect", (0, 1))
    if not low < high:
        yield "crop_aspect", "write the smallest and the largest, with a range between them"
    both = len(MODALITIES[values.get("input_mode", "early")]) == 2
    for option in ("modality_dropout", "mirror_apart", "crop_apart"):
        if values.get(option) and not (both and values.get("augment", True)):
            yield option, "it needs AUGMENT and an INPUT_MODE of both modalities"
    if Path(name).name != name or name.startswith("."):
        yield "name", "choose a folder's name, without a slash and with no dot in front"
    if name.split("-")[0] in EXPERIMENTS:
        yield "name", "choose a folder's name that does not begin with a row's"


def limit_workers(config: Namespace) -> Namespace:
    """The configuration with no more loader processes than the machine's cores have a use for."""
    cores = os.cpu_count() or 1
    most = max(8, 4 * cores)
    if config.workers > most:
        note = f"note: WORKERS = {config.workers} are more than {cores} cores have a use for"
        if os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first one prints
            print(f"{note}: {most} are started")
        config.workers = most
    return config


def invalid_constant(name: str, value: Any, remedy: str) -> InputError:
    """The error for a constant whose value cannot be used."""
    text = repr(value)
    text = text if len(text) <= 80 else f"{text[:80]}…"
    return InputError(f"{name.upper()} = {text} cannot be used", remedy)


def checkpoint_config(checkpoint: dict[str, Any], path: Path, **changes: Any) -> Namespace:
    """The configuration in a checkpoint, as from `load_checkpoint`, with `changes` over it.

    Constants that the checkpoint is too old to know have the value that did what it did. InputError: a
    constant is missing, or has a type or a value that no run has.
    """
    needed = ("data_root", "test_list", "test_annotations", "device", "precision")
    known = OLD_DEFAULTS | {"start_method": "auto", "workers": 0, "cache": ""} | dict.fromkeys(needed, "")
    values = checkpoint["config"]
    try:
        for name in (*needed, "input_mode", "input_size", "batch_size"):
            if name not in values:
                raise InputError(f"{name.upper()} is missing", "")
        for name, default in known.items():
            if not matches_default_type(value := values.get(name, default), default):
                raise invalid_constant(name, value, "")
        for argument, own in checkpoint["model_args"].items():
            name = {"size": "input_size", "prior_set": "priors"}.get(argument, argument)
            if name in values and format_value(own) != format_value(values[name]):
                raise InputError(f"{name.upper()} is not its network's", "")
        known = known | values | changes
        check_config({key: value for key, value in known.items() if key != "name"})
        known |= find_data(known)
    except InputError as error:
        problem = f"not a run's configuration ({error.problem})"
        raise InputError(problem, "choose a checkpoint that train.py wrote", file=path) from None
    return Namespace(**known)


def matches_default_type(value: Any, default: Any) -> bool:
    """Whether a value is of a default's type, or a list for a tuple of its length; a float may be whole."""
    if isinstance(default, tuple):
        same_length = isinstance(value, tuple | list) and len(value) == len(default)
        return same_length and all(type(number) in (int, type(default[0])) for number in value)
    return type(value) is type(default) or (isinstance(default, float) and type(value) is int)


def pick(config: Namespace, *names: str) -> dict[str, Any]:
    """Some of a configuration's values, for keyword arguments of the same names."""
    return {name: getattr(config, name) for name in names}


def model_arguments(config: Namespace) -> dict[str, Any]:
    """The arguments of the network, as a checkpoint keeps them."""
    names = ["width", "infusion", "infusion_conv"]
    if config.network == "ssd300":
        names += ["input_mode", "pixel_mean", "pixel_std", "batch_norm", "centres"]
    else:
        names += ["network"]
    arguments = pick(config, *names)
    return arguments | {"prior_set": config.priors, "size": config.input_size}


# ------------------------------------------------------------------------------- names and words


def changed_constants(config: Namespace) -> dict[str, Any]:
    """What a configuration has different from its row, or from the row "demo" where it names none."""
    from kaist import demo  # here, so that result files are evaluated without Pillow

    book = resolve_row(config.experiment or "demo")
    changed = {name: getattr(config, name) for name, value in book.items()}
    changed = {name: value for name, value in changed.items() if not same_value(name, value, book[name])}
    if config.data != KAIST:
        changed = {"on": dataset_name(config.data), **changed}
    elif not config.experiment and not same_value("data_root", config.data_root, str(demo.ROOT)):
        changed = {"on": Path(config.data_root).resolve().name, **changed}
    return changed


def describe_changes(values: dict[str, Any]) -> str:
    """`changed_constants` a run's config.json in words."""
    try:
        changes = changed_constants(Namespace(**OLD_DEFAULTS | values))
    except (InputError, AttributeError, TypeError, ValueError):  # of another version, or edited
        return "its row or constants are unknown"
    return ", ".join(f"{name.upper()} {format_value(value)}" for name, value in changes.items())


def run_name(config: Namespace) -> str:
    """The name a run is saved under: NAME, else its row and what differs from it (26-lr0.0005)."""
    if config.name:
        return config.name
    parts = [config.experiment or "demo"]
    for name, value in changed_constants(config).items():
        word = name.replace("_", "")
        if isinstance(value, bool):
            parts.append(word if value else f"no{word}")
        else:
            text = Path(value).stem if name == "pretrained" else format_value(value).replace(",", "_")
            parts.append(word + re.sub(r"[^\w.]", "_", text))
    name = "-".join(parts)
    if len(name) > 60:
        name = f"{parts[0]}-{len(parts) - 1}-changes-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return name


def describe_config(config: Namespace, script: str) -> str:
    """Where a configuration comes from: its row, and what that sets over the script's constants."""
    changed = describe_changes(vars(config))
    if not config.experiment:
        return f"constants of {Path(script).name}" + (f", not the demo's: {changed}" if changed else "")
    constants, replaced = read_constants(script), []
    for name, value in resolve_row(config.experiment).items():
        if not same_value(name, value, constants[name][0]) and same_value(name, value, getattr(config, name)):
            replaced.append(f"{name.upper()} {format_value(value)}")
    text = f"row {config.experiment} sets over the constants of {Path(script).name}: {', '.join(replaced)}"
    return text + (f"; flags over the row: {changed}" if changed else "")


def tuple_type(default: tuple) -> Any:
    """A parser of "1,0,0" into a tuple of the default's length and element type."""
    kind = type(default[0])

    def parse(text: str) -> tuple:
        values = tuple(kind(part) for part in re.split(r"[,\s]+", text.strip("()[] ")))
        if len(values) != len(default):
            raise argparse.ArgumentTypeError(f"wants {len(default)} values, like {format_value(default)}")
        return values

    return parse


def check_experiment(parser: OneLineParser, arguments: Namespace) -> None:
    """Refuse --experiment, which is about a file of weights, without --checkpoint, which names it."""
    if arguments.experiment and not arguments.checkpoint:
        parser.error("--experiment says whose network --checkpoint holds: name that file too")


def format_value(value: Any) -> str:
    """A value as one would type it on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
