"""Weights as other authors published them: MLPD, INSANet, and the SSD tutorial's SSD300.

Such a file is the pickle of a whole module, sometimes in a dict with an optimiser. Loading it would run its
author's code, so its classes are replaced by stand-ins, and only tensors and names are read. State
dictionaries with the same names are read as well.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoint import unpickling_problem, verify_archive
from kaist.files import InputError, check_file
from ssd.boxes import VARIANCES, prior_shapes
from ssd.layers import Detector
from ssd.multispectral import MLPD, INSANet

# Classes of these modules are replaced by stand-ins; any other class or function is an error.
STAND_IN_MODULES = ("model.", "insa.", "torch.nn.", "torch.optim.", "numpy.")
REMEDY = "use the authors' file, or a state dictionary with the authors' names"
TUTORIAL = "the SSD tutorial's SSD300"
# Published names of convolutions. "{}" is replaced by "", or by "_bn" for the BatchNorm after it.
VGG16 = [f"base.conv{i}_{j}{{}}" for i, n in enumerate((2, 2, 3, 3, 3), 1) for j in range(1, n + 1)]
LOWER_STAGES = [[f"base.conv{i}_{j}{{}}" for j in (1, 2)] for i in range(6, 11)]
STREAM_SUFFIXES = {"visible": "_vis", "lwir": "_lwir"}
HEAD_NAMES = {
    "multispectral": ("conv4_3", "conv6", "conv7", "conv8", "conv9", "conv10"),
    "tutorial": ("conv4_3", "conv7", "conv8_2", "conv9_2", "conv10_2", "conv11_2"),
}


class StandIn:
    """Replaces a class while unpickling: it stores an object's state and does nothing else."""

    state: dict[str, Any] = {}

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.state = state


def read_published(path: Path) -> dict[str, Tensor]:
    """Read a network's state dictionary, with its author's names less the "module." of DataParallel.

    Raises:
        InputError: the file does not exist, is damaged, has no network, or has other classes or functions.
    """
    if not path.exists():
        remedy = "check the path; PRETRAINED can also be none, imagenet or coco"
        raise InputError("weights file not found", remedy, file=path)
    check_file(path)
    try:
        if zipfile.is_zipfile(path):
            verify_archive(path)
        with torch.serialization.safe_globals(stand_ins(path)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for unknown or damaged files
        problem = f"not a readable weights file ({unpickling_problem(error)})"
        raise InputError(problem, REMEDY, file=path) from None
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict | StandIn):
            content = content[key]
    state = module_state(content) if isinstance(content, StandIn) else content
    values = state.values() if isinstance(state, dict) else [None]
    if not all(isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta for x in values):
        raise InputError("not a state dictionary of tensors", REMEDY, file=path)
    return {str(key).removeprefix("module."): value.detach() for key, value in state.items()}


def stand_ins(path: Path) -> list[tuple[Any, str]]:
    """(stand-in, name) for each class in a file that may be replaced, as torch's safe_globals takes it."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # the format before zip archives; only state dictionaries are read from it
        return []
    # A plain dict replaces a defaultdict, because its default factory must not be called.
    known = {"collections.defaultdict": lambda *_: {}, "builtins.dict": StandIn}
    known |= {name: StandIn for name in names if name.startswith(STAND_IN_MODULES)}
    return [(known[name], name) for name in names if name in known]


def module_state(module: StandIn) -> dict[str, Tensor]:
    """The parameters and buffers of a module and its submodules, by their dotted names."""
    state: dict[str, Tensor] = {}
    stack, visited = [("", module)], {id(module)}
    while stack:
        prefix, module = stack.pop()
        for kind in ("_parameters", "_buffers", "_modules"):
            members = module.state.get(kind)
            for name, value in members.items() if isinstance(members, dict) else ():
                if isinstance(value, Tensor):
                    state[f"{prefix}{name}"] = value
                elif isinstance(value, StandIn) and id(value) not in visited:
                    visited.add(id(value))
                    stack.append((f"{prefix}{name}.", value))
    return state


def is_published(state: dict[str, Tensor]) -> bool:
    """Whether a state dictionary has the names of MLPD, INSANet or the SSD tutorial."""
    return any(key.startswith("pred_convs.") for key in state)


def tutorial_input_mode(state: dict[str, Tensor], input_mode: str) -> str:
    """The INPUT_MODE that fits the first filters of a tutorial network; `input_mode` if it does."""
    if "base.conv1_1.weight" not in state:
        return input_mode
    channels = tuple(state["base.conv1_1.weight"].shape[1:2])
    fitting = {(1,): ("lwir",), (3,): ("visible", "mean"), (4,): ("early",)}.get(channels, ())
    return input_mode if input_mode in fitting or not fitting else fitting[0]


def load_published(model: Detector, state: dict[str, Tensor], file: Path) -> None:
    """Copy a state of `read_published` into a network, in place, after `check_published`.

    Segmentation heads are not changed, because published networks have none.
    """
    check_published(model, state, file)
    names = published_names(model)
    values = {name: state[published] for name, published in names.items() if published in state}
    values["conv4_3_norm.scale"] = values["conv4_3_norm.scale"].flatten()
    if not isinstance(model, MLPD | INSANet):
        for i, shapes in enumerate(prior_shapes("ssd300")):
            convert_tutorial_heads(values, i, shapes)
    model.load_state_dict(values, strict=False)


def check_published(model: Detector, state: dict[str, Tensor], file: Path) -> None:
    """Raise InputError if a published state does not fit a network; see `check_tensors`."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes["conv4_3_norm.scale"] = (1, *shapes["conv4_3_norm.scale"], 1, 1)
    expected = {published: shapes[name] for name, published in published_names(model).items()}
    kind = type(model).__name__ if isinstance(model, MLPD | INSANet) else TUTORIAL
    distinctive = {
        "MLPD": "base.feat_1.weight",
        "INSANet": "base.conv1x1_vis.weight",
        TUTORIAL: "aux_convs.conv8_1.weight",
        "a checkpoint of train.py (omit --experiment)": "conv4_3_norm.scale",
    }
    others = [f", but {name}" for name, key in distinctive.items() if key in state and name != kind]
    remedy = f"{REMEDY}, and check INPUT_MODE, WIDTH and PRIORS"
    check_tensors(state, expected, kind, file, remedy, "".join(others[:1]))


def check_tensors(
    state: dict[str, Tensor], expected: dict[str, tuple], kind: str, file: Path, remedy: str, hint: str = ""
) -> None:
    """Compare a file's tensors with the expected shapes of a network called `kind`.

    hint: what the file seems to contain instead, appended to the message if tensors are missing.

    Raises:
        InputError: names the first tensor that is missing or has another shape.
    """
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        count = f"({len(missing)} of {len(expected)} tensors are missing)"
        problem = f"it lacks {missing[0]} and so is not {kind} {count}{hint}"
        raise InputError(problem, remedy, file=file)
    for key, shape in expected.items():
        if key in state and state[key].shape != shape:
            problem = f"{key} has shape {tuple(state[key].shape)}, this network needs {tuple(shape)}"
            raise InputError(problem, remedy, file=file)


def published_names(model: Detector) -> dict[str, str]:
    """State-dict key of a network -> its published key. Raises InputError if none like it was published."""
    is_multispectral = isinstance(model, MLPD | INSANet)
    if not is_multispectral and (model.input_mode == "halfway" or model.prior_set != "ssd300"):
        problem = "the SSD tutorial's weights do not fit this network"
        raise InputError(problem, "they need PRIORS = ssd300 and an INPUT_MODE other than halfway")
    layers = {}
    for sequence, convs in published_sequences(model).items():
        layers |= pair_layers(model, sequence, convs)
    layers |= attention_layers() if isinstance(model, INSANet) else {}
    for i, name in enumerate(HEAD_NAMES["multispectral" if is_multispectral else "tutorial"]):
        layers |= {f"loc_heads.{i}": f"pred_convs.loc_{name}", f"conf_heads.{i}": f"pred_convs.cl_{name}"}
    names = {}
    for name, published in layers.items():
        names |= {f"{name}.{key}": f"{published}.{key}" for key in model.get_submodule(name).state_dict()}
    return names | {"conv4_3_norm.scale": f"{'base.' if is_multispectral else ''}rescale_factors"}


def published_sequences(model: Detector) -> dict[str, list[str]]:
    """Name of a sequence of layers -> published names of its convolutions, in the form of `VGG16`."""
    if not isinstance(model, MLPD | INSANet):
        extras = {f"extras.{i}": [f"aux_convs.conv{8 + i}_{j}" for j in (1, 2)] for i in range(4)}
        lower = {"to_conv5_3": VGG16[10:], "conv6_7": ["base.conv6", "base.conv7"]}
        return {"to_conv4_3": VGG16[:10], **lower, **extras}
    sequences = {f"stages.{i}": names for i, names in enumerate(LOWER_STAGES)}
    sequences["stages.0"] = VGG16[10:] + LOWER_STAGES[0]
    if isinstance(model, MLPD):
        stream_convs = VGG16[:10]
        sequences |= {f"joins.{i}": [f"base.feat_{i + 1}{{}}"] for i in range(6)}
    else:
        stream_convs = [*VGG16[:7], "base.conv1x1"]
        sequences["to_conv4_3"] = VGG16[7:10]
    streams = {name: [conv + suffix for conv in stream_convs] for name, suffix in STREAM_SUFFIXES.items()}
    return streams | sequences


def attention_layers() -> dict[str, str]:
    """Name of a layer of INSANet's attention -> its published name."""
    layers = {}
    for i in range(2):
        prefix, published = f"attention.rounds.{i}", f"base.insa.insa.{i}"
        for kind in ("intra", "inter"):
            for name in ("q_emb", "k_emb", "v_emb", "fc", "norm"):
                layers[f"{prefix}.{kind}.{name.removesuffix('_emb')}"] = f"{published}.{kind}_attn.{name}"
        for index, name in ((0, "mlp.0"), (2, "mlp.2"), (3, "ffn_norm")):
            layers[f"{prefix}.mlp.{index}"] = f"{published}.inter_attn.{name}"
    return layers


def pair_layers(model: Detector, sequence: str, convs: Iterable[str]) -> dict[str, str]:
    """Name of each convolution and BatchNorm of a sequence -> its published name."""
    pairs, convs = {}, iter(convs)
    for index, layer in model.get_submodule(sequence).named_children():
        if isinstance(layer, nn.Conv2d):
            conv = next(convs)
            pairs[f"{sequence}.{index}"] = conv.format("")
        elif isinstance(layer, nn.BatchNorm2d):
            pairs[f"{sequence}.{index}"] = conv.format("_bn")
    return pairs


def convert_tutorial_heads(values: dict[str, Tensor], i: int, shapes: list[tuple[float, float]]) -> None:
    """Convert the heads of map `i` from the tutorial's priors to "ssd300", in place; boxes stay the same.

    The tutorial lists ratios above 1 before those below 1; here they alternate. Two of its shapes differ from
    the paper's: the second square of the last map, and ratios of 0.333.
    """
    scales = (0.1, 0.2, 0.375, 0.55, 0.725, 0.9)
    between = math.sqrt(scales[i] * scales[i + 1]) if i < 5 else 1.0
    tutorial_shapes = [(scales[i], scales[i]), (between, between)]
    for root in map(math.sqrt, (2, 0.5) if i in (0, 4, 5) else (2, 0.5, 3, 0.333)):
        tutorial_shapes.append((min(1.0, scales[i] * root), min(1.0, scales[i] / root)))
    order = [0, 1, 2, 4, 3, 5] if len(tutorial_shapes) == 6 else [0, 1, 2, 3]
    ratio = torch.tensor(tutorial_shapes) / torch.tensor(shapes)
    for name in ("weight", "bias"):
        loc, conf = (f"{kind}_heads.{i}.{name}" for kind in ("loc", "conf"))
        offsets = values[loc].unflatten(0, (-1, 4))[order]
        factor = torch.cat([ratio, torch.ones_like(ratio)], dim=1)
        offsets = offsets * factor.view(*factor.shape, *[1] * (offsets.ndim - 2))
        if name == "bias":
            offsets[:, 2:] += ratio.log() / VARIANCES[1]
        values[loc] = offsets.flatten(0, 1)
        values[conf] = values[conf].unflatten(0, (-1, 2))[order].flatten(0, 1)
