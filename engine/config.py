"""The configuration of a run: constants at the top of a script, rows of the lab book, flags, checkpoints."""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from engine.experiments import BASE, EXPERIMENTS
from engine.history import runs_table
from engine.validation import CHOICES, check_config, invalid_constant
from kaist.annotations import DEMO_ROOT
from kaist.files import InputError, OneLineParser, PrintAction
from kaist.sources import KAIST, dataset_name, find_kaist

ROOT = Path(__file__).parents[1]  # the repository, to which relative paths among constants belong

# Constants that change no results, so a resumed run may have other values of them.
MACHINE_CONSTANTS = (
    *("experiment", "checkpoints", "name", "device", "workers", "cache", "start_method"),
    *("lwir_range", "save_minutes", "deterministic", "compile", "on_nonfinite", "max_bad_frames"),
)
DETECT_KEYS = ("min_score", "nms_iou", "max_boxes", "test_flip")  # config keys of detection
PATH_CONSTANTS = ("data_root", "checkpoints", "cache", "data")  # each a folder; DATA may also be a file
# Values of constants that did not exist yet when an old run was started.
OLD_DEFAULTS = BASE | {"data": KAIST, "lwir_range": (0.0, 0.0)}


def read_constants(script: str | Path) -> dict[str, tuple[Any, str]]:
    """A script's upper-case constants: lower-case name -> (value, comment in its line)."""
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
    """Parse flags with the names of constants; a constant's comment is the help of its flag.

    Args:
        actions: flag -> (function, help), of flags that print the function's result and exit.

    Returns:
        Lower-case name -> value of the flags that were given.

    Raises:
        InputError: an unknown flag or a value of the wrong type.
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
    """The command line that sets these values: the inverse of `parse_flags`."""
    flags = []
    for name, value in changes.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", format_value(value)]
    return flags


def read_config(script: str, argv: list[str] | None = None) -> Namespace:
    """A run's configuration: constants of the script, replaced by a row, then --kaist, then other flags.

    Relative paths among constants and rows are relative to the repository, those among flags to the working
    directory.

    Raises:
        InputError: an unknown row or flag, or values that cannot be used.
    """
    constants = read_constants(script)
    description = ast.get_docstring(ast.parse(Path(script).read_text(encoding="utf-8")))
    runs = partial(runs_table, from_root(constants["checkpoints"][0]), describe_changes)
    actions = {"list": (lab_book_table, "print the lab book"), "runs": (runs, "print the runs")}
    kaist = "root of the full KAIST: sets DATA_ROOT, both lists and both ANNOTATIONS unless they are given"
    flags = parse_flags(description, constants | {"kaist": ("", kaist)}, argv, **actions)
    if root := flags.pop("kaist", ""):
        flags = find_kaist(Path(root), flags) | flags
    values = {name: value for name, (value, _) in constants.items()}
    if experiment := flags.get("experiment", values["experiment"]):
        values |= resolve_row(experiment)
    for name in PATH_CONSTANTS:
        path = from_root(values[name])
        if values[name] and (name != "data" or os.path.isfile(path)):  # DATA may also be a name
            values[name] = path
    values |= flags
    check_config(values)
    return limit_workers(Namespace(**values))


def from_root(folder: str) -> str:
    """A path relative to the repository, made usable from the working directory."""
    return folder if Path.cwd() == ROOT else str(ROOT / folder)


def find_folder(name: str) -> Path:
    """A folder to read: in the working directory if it exists there, else in the repository."""
    return Path(name if os.path.exists(name) else from_root(name))


def find_data(values: dict[str, Any]) -> dict[str, str]:
    """A run's "data_root", and "data" if it is a file, as paths from `find_folder`."""
    data = find_folder(values.get("data", KAIST))
    found = {"data_root": str(find_folder(values["data_root"]))}
    return found | {"data": str(data)} if os.path.isfile(data) else found


def same_value(name: str, a: Any, b: Any) -> bool:
    """Whether two values of a constant are equal; paths as absolute paths, lists as tuples."""
    if name in PATH_CONSTANTS and isinstance(a, str) and isinstance(b, str):
        return os.path.abspath(ROOT / a) == os.path.abspath(ROOT / b)
    return (list(a) if isinstance(a, tuple) else a) == (list(b) if isinstance(b, tuple) else b)


def resolve_row(name: str) -> dict[str, Any]:
    """All constants of a row of the lab book: `BASE` with the changes of the rows it builds on and its own.

    Raises:
        InputError: there is no such row, or a row changes an unknown constant.
    """
    if name not in EXPERIMENTS:
        problem = f"the lab book has no experiment {name!r}"
        raise InputError(problem, f"choose one of {', '.join(EXPERIMENTS)}")
    row = EXPERIMENTS[name]
    if unknown := row.changes.keys() - BASE.keys() - {"data_root"}:
        problem = f"row {name} changes {', '.join(unknown)}, which BASE does not have"
        raise InputError(problem, "correct the row in engine/experiments.py")
    return (resolve_row(row.based_on) if row.based_on else BASE) | row.changes


def lab_book_table() -> str:
    """The lab book as a table."""
    lines = ["Rows 1 to 26 are the log of 2021, rows 27 to 29 ideas that it left open; later rows are new."]
    lines += [f"{'row':>5} {'on':>4}  description, changes, results of the 2021 log (miss rates in %)"]
    for name, row in EXPERIMENTS.items():
        changes = ", ".join(f"{key} {format_value(value)}" for key, value in row.changes.items())
        lines.append(f"{name:>5} {row.based_on:>4}  {row.description}")
        lines += [f"{'':12}{part}" for part in (changes, row.logged) if part]
    return "\n".join(lines)


def limit_workers(config: Namespace) -> Namespace:
    """Limit the number of worker processes to 4 per core, but not below 8."""
    cores = os.cpu_count() or 1
    max_workers = max(8, 4 * cores)
    if config.workers > max_workers:
        if os.environ.get("RANK", "0") == "0":  # only the first of torchrun's processes prints
            print(f"note: WORKERS = {config.workers} is too many for {cores} cores; using {max_workers}")
        config.workers = max_workers
    return config


def checkpoint_config(checkpoint: dict[str, Any], path: Path, **changes: Any) -> Namespace:
    """The configuration of a checkpoint from `load_checkpoint`, with `changes`.

    Constants that are newer than the checkpoint get the value with the behaviour of that time.

    Raises:
        InputError: a constant is missing, or has a type or a value that train.py does not allow.
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
        for argument, expected in checkpoint["model_args"].items():
            name = {"size": "input_size", "prior_set": "priors"}.get(argument, argument)
            if name in values and format_value(expected) != format_value(values[name]):
                raise InputError(f"{name.upper()} differs from its network's", "")
        known = known | values | changes
        check_config({key: value for key, value in known.items() if key != "name"})
        known |= find_data(known)
    except InputError as error:
        problem = f"not a run's configuration ({error.problem})"
        raise InputError(problem, "choose a checkpoint from train.py", file=path) from None
    return Namespace(**known)


def matches_default_type(value: Any, default: Any) -> bool:
    """Whether a value has the type of a default; a tuple may be a list, and a float an int."""
    if isinstance(default, tuple):
        same_length = isinstance(value, tuple | list) and len(value) == len(default)
        return same_length and all(type(number) in (int, type(default[0])) for number in value)
    return type(value) is type(default) or (isinstance(default, float) and type(value) is int)


def pick(config: Namespace, *names: str) -> dict[str, Any]:
    """Some values of a configuration, as keyword arguments."""
    return {name: getattr(config, name) for name in names}


def model_arguments(config: Namespace) -> dict[str, Any]:
    """The arguments of the network, as checkpoints store them."""
    names = ["width", "infusion", "infusion_conv"]
    if config.network == "ssd300":
        names += ["input_mode", "pixel_mean", "pixel_std", "batch_norm", "centres"]
    else:
        names += ["network"]
    arguments = pick(config, *names)
    return arguments | {"prior_set": config.priors, "size": config.input_size}


# ------------------------------------------------------------------------------- names and descriptions


def changed_constants(config: Namespace) -> dict[str, Any]:
    """The constants in which a configuration differs from its row, or from row "demo" if it has none."""
    row = resolve_row(config.experiment or "demo")
    changed = {name: getattr(config, name) for name in row}
    changed = {name: value for name, value in changed.items() if not same_value(name, value, row[name])}
    if config.data != KAIST:
        changed = {"on": dataset_name(config.data), **changed}
    elif not config.experiment and not same_value("data_root", config.data_root, str(DEMO_ROOT)):
        changed = {"on": Path(config.data_root).resolve().name, **changed}
    return changed


def describe_changes(values: dict[str, Any]) -> str:
    """`changed_constants` of a run's config.json, as text."""
    try:
        changes = changed_constants(Namespace(**OLD_DEFAULTS | values))
    except (InputError, AttributeError, TypeError, ValueError):  # from another version, or edited
        return "its row or constants are unknown"
    return re.sub("^ON ", "data set ", format_constants(changes))


def run_name(config: Namespace) -> str:
    """The name of a run's folder: NAME, or its row and `changed_constants`, such as 26-lr0.0005."""
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
    """The constants of a script that a run's row replaces, and those that its flags replace."""
    constants, changed = read_constants(script), describe_changes(vars(config))
    source = f"constants of {Path(script).name}"
    if not config.experiment:
        return f"{source}, changed: {changed}" if changed else source
    row = resolve_row(config.experiment).items()
    used = {name: value for name, value in row if same_value(name, value, getattr(config, name))}
    changes = {name: value for name, value in used.items() if not same_value(name, value, constants[name][0])}
    text = f"{source}, replaced by row {config.experiment}: {format_constants(changes)}"
    return f"{text}; replaced by flags: {changed}" if changed else text


def tuple_type(default: tuple) -> Any:
    """An argparse type that parses "1,0,0" into a tuple of the default's length and element type."""
    element_type = type(default[0])

    def parse(text: str) -> tuple:
        values = tuple(element_type(part) for part in re.split(r"[,\s]+", text.strip("()[] ")))
        if len(values) != len(default):
            problem = f"expected {len(default)} values, such as {format_value(default)}"
            raise argparse.ArgumentTypeError(problem)
        return values

    return parse


def check_experiment(parser: OneLineParser, arguments: Namespace) -> None:
    """Reject --experiment without --checkpoint: it is the row of the network in that file of weights."""
    if arguments.experiment and not arguments.checkpoint:
        parser.error("--experiment is the row of the network in --checkpoint; give --checkpoint too")


def format_value(value: Any) -> str:
    """A value as on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def format_constants(values: dict[str, Any]) -> str:
    """Constants and their values as text, such as "EPOCHS 3, LR 0.1"."""
    return ", ".join(f"{name.upper()} {format_value(value)}" for name, value in values.items())
