"""Networks as other authors saved them: MLPD, INSANet, and the SSD tutorial's SSD300.

Such a file is a pickle of a whole module, alone or under "model" beside an optimiser, and would run
its author's code when it is loaded. Here inert stand-ins take the place of its classes, and tensors
and names alone are read. A state dictionary of the same names is read as well.
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

# Classes of these modules are read as stand-ins; any other class or function is refused.
STAND_IN_MODULES = ("model.", "insa.", "torch.nn.", "torch.optim.", "numpy.")
REMEDY = "take the authors' file, or a state dictionary with their names"
TUTORIAL = "the SSD tutorial's SSD300"
# Published names of convolutions; "{}" is empty, and "_bn" for the BatchNorm that follows.
VGG16 = [f"base.conv{i}_{j}{{}}" for i, n in enumerate((2, 2, 3, 3, 3), 1) for j in range(1, n + 1)]
LOWER_STAGES = [[f"base.conv{i}_{j}{{}}" for j in (1, 2)] for i in range(6, 11)]
STREAMS = {"visible": "_vis", "lwir": "_lwir"}
HEADS = {
    "multispectral": ("conv4_3", "conv6", "conv7", "conv8", "conv9", "conv10"),
    "tutorial": ("conv4_3", "conv7", "conv8_2", "conv9_2", "conv10_2", "conv11_2"),
}


class StandIn:
    """An object of a class that a file names: it keeps the state it is given and does nothing."""

    state: dict[str, Any] = {}

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.state = state


def read_published(path: Path) -> dict[str, Tensor]:
    """The state dictionary of a file's network, by its author's names without DataParallel's "module.".

    Raises:
        InputError: no such file, a damaged one, one that names other classes or functions than
            networks and optimisers are made of, or one without a network.
    """
    if not path.exists():
        raise InputError("no such file of weights", "PRETRAINED is none, imagenet, coco or a file", file=path)
    check_file(path)
    try:
        if zipfile.is_zipfile(path):
            verify_archive(path)
        with torch.serialization.safe_globals(stand_ins(path)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch meets in a foreign or damaged file
        problem = f"not a readable file of weights ({unpickling_problem(error)})"
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
    """Stand-ins for the classes that a file names, each with that name."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # of the format before zip archives, where only state dictionaries are read
        return []
    # A plain dict stands in for a defaultdict: it can be filled without a call of anything.
    known = {"collections.defaultdict": lambda *_: {}, "builtins.dict": StandIn}
    known |= {name: StandIn for name in names if name.startswith(STAND_IN_MODULES)}
    return [(known[name], name) for name in names if name in known]


def module_state(module: StandIn) -> dict[str, Tensor]:
    """The parameters and buffers of a module and of those in it, by their dotted names."""
    state: dict[str, Tensor] = {}
    waiting, seen = [("", module)], {id(module)}
    while waiting:
        prefix, module = waiting.pop()
        for kind in ("_parameters", "_buffers", "_modules"):
            members = module.state.get(kind)
            for name, value in members.items() if isinstance(members, dict) else ():
                if isinstance(value, Tensor):
                    state[f"{prefix}{name}"] = value
                elif isinstance(value, StandIn) and id(value) not in seen:
                    seen.add(id(value))
                    waiting.append((f"{prefix}{name}.", value))
    return state


def is_published(state: dict[str, Tensor]) -> bool:
    """Whether a state has the names of MLPD, INSANet or the SSD tutorial's network."""
    return any(key.startswith("pred_convs.") for key in state)


def tutorial_input_mode(state: dict[str, Tensor], input_mode: str) -> str:
    """The INPUT_MODE that a tutorial network's first filters are made for: the one given if it fits."""
    if "base.conv1_1.weight" not in state:
        return input_mode
    channels = tuple(state["base.conv1_1.weight"].shape[1:2])
    fitting = {(1,): ("lwir",), (3,): ("visible", "mean"), (4,): ("early",)}.get(channels, ())
    return input_mode if input_mode in fitting or not fitting else fitting[0]


def load_published(model: Detector, state: dict[str, Tensor], file: Path) -> None:
    """Fill a network with the state that `read_published` returned, in place, once `check_published` passes:
    all but segmentation heads, which published networks have none of."""
    check_published(model, state, file)
    own, names = model.state_dict(), published_names(model)
    values = {ours: state[theirs] for ours, theirs in names.items() if theirs in state}
    values["conv4_3_norm.scale"] = values["conv4_3_norm.scale"].flatten()
    if not isinstance(model, MLPD | INSANet):
        for i, shapes in enumerate(prior_shapes("ssd300")):
            convert_tutorial_heads(values, i, shapes)
    with torch.no_grad():
        for key, value in values.items():
            own[key].copy_(value)


def check_published(model: Detector, state: dict[str, Tensor], file: Path) -> None:
    """Refuse a published state that is not of this network; see `check_tensors`."""
    own = {ours: tuple(value.shape) for ours, value in model.state_dict().items()}
    own["conv4_3_norm.scale"] = (1, *own["conv4_3_norm.scale"], 1, 1)
    wanted = {theirs: own[ours] for ours, theirs in published_names(model).items()}
    kind = type(model).__name__ if isinstance(model, MLPD | INSANet) else TUTORIAL
    marks = {
        "MLPD": "base.feat_1.weight",
        "INSANet": "base.conv1x1_vis.weight",
        TUTORIAL: "aux_convs.conv8_1.weight",
        "one of train.py's checkpoints: leave --experiment away": "conv4_3_norm.scale",
    }
    others = [f", but {name}" for name, key in marks.items() if key in state and name != kind]
    remedy = f"{REMEDY}, and check INPUT_MODE, WIDTH and PRIORS"
    check_tensors(state, wanted, kind, file, remedy, "".join(others[:1]))


def check_tensors(
    state: dict[str, Tensor], wanted: dict[str, tuple], kind: str, file: Path, remedy: str, hint: str = ""
) -> None:
    """Compare a file's state with the shapes of the network's tensors that it should be of.

    kind: what the network is called; hint: what the file seems to hold where it lacks tensors.

    Raises: InputError: names the first tensor that is missing, or has another shape.
    """
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        how_many = f"({len(missing)} of {len(wanted)} tensors are missing)"
        problem = f"it lacks {missing[0]} and so is not {kind} {how_many}{hint}"
        raise InputError(problem, remedy, file=file)
    for key, shape in wanted.items():
        if key in state and state[key].shape != shape:
            problem = f"{key} has shape {tuple(state[key].shape)}, this network wants {tuple(shape)}"
            raise InputError(problem, remedy, file=file)


def published_names(model: Detector) -> dict[str, str]:
    """Our state-dict keys -> the published ones of the same network. InputError: there is none like it."""
    is_multispectral = isinstance(model, MLPD | INSANet)
    if not is_multispectral and (model.input_mode == "halfway" or model.prior_set != "ssd300"):
        problem = "the SSD tutorial's weights do not fit this network"
        raise InputError(problem, "they need PRIORS = ssd300, and an INPUT_MODE other than halfway")
    layers = {}
    for sequence, convs in published_sequences(model).items():
        layers |= pair_layers(model, sequence, convs)
    layers |= attention_layers() if isinstance(model, INSANet) else {}
    for i, name in enumerate(HEADS["multispectral" if is_multispectral else "tutorial"]):
        layers |= {f"loc_heads.{i}": f"pred_convs.loc_{name}", f"conf_heads.{i}": f"pred_convs.cl_{name}"}
    names = {}
    for ours, theirs in layers.items():
        names |= {f"{ours}.{key}": f"{theirs}.{key}" for key in model.get_submodule(ours).state_dict()}
    return names | {"conv4_3_norm.scale": f"{'base.' if is_multispectral else ''}rescale_factors"}


def published_sequences(model: Detector) -> dict[str, list[str]]:
    """Our sequences of layers -> the published names of their convolutions, as in `VGG16`."""
    if not isinstance(model, MLPD | INSANet):
        extras = {f"extras.{i}": [f"aux_convs.conv{8 + i}_{j}" for j in (1, 2)] for i in range(4)}
        lower = {"to_conv5_3": VGG16[10:], "conv6_7": ["base.conv6", "base.conv7"]}
        return {"to_conv4_3": VGG16[:10], **lower, **extras}
    sequences = {f"stages.{i}": names for i, names in enumerate(LOWER_STAGES)}
    sequences["stages.0"] = VGG16[10:] + LOWER_STAGES[0]
    if isinstance(model, MLPD):
        of_stream = VGG16[:10]
        sequences |= {f"joins.{i}": [f"base.feat_{i + 1}{{}}"] for i in range(6)}
    else:
        of_stream = [*VGG16[:7], "base.conv1x1"]
        sequences["to_conv4_3"] = VGG16[7:10]
    return {stream: [name + end for name in of_stream] for stream, end in STREAMS.items()} | sequences


def attention_layers() -> dict[str, str]:
    """Our names of the layers of INSANet's attention -> the published ones."""
    layers = {}
    for i in range(2):
        ours, theirs = f"attention.rounds.{i}", f"base.insa.insa.{i}"
        for kind in ("intra", "inter"):
            for name in ("q_emb", "k_emb", "v_emb", "fc", "norm"):
                layers[f"{ours}.{kind}.{name.removesuffix('_emb')}"] = f"{theirs}.{kind}_attn.{name}"
        for place, name in ((0, "mlp.0"), (2, "mlp.2"), (3, "ffn_norm")):
            layers[f"{ours}.mlp.{place}"] = f"{theirs}.inter_attn.{name}"
    return layers


def pair_layers(model: Detector, sequence: str, convs: Iterable[str]) -> dict[str, str]:
    """Our names of the convolutions and BatchNorms of a sequence -> the published ones."""
    pairs, convs = {}, iter(convs)
    for place, layer in model.get_submodule(sequence).named_children():
        if isinstance(layer, nn.Conv2d):
            conv = next(convs)
            pairs[f"{sequence}.{place}"] = conv.format("")
        elif isinstance(layer, nn.BatchNorm2d):
            pairs[f"{sequence}.{place}"] = conv.format("_bn")
    return pairs


def convert_tutorial_heads(values: dict[str, Tensor], i: int, shapes: list[tuple[float, float]]) -> None:
    """Bring the heads of map `i` from the tutorial's priors to ours, in place: they predict the same boxes.

    The tutorial has the ratios above 1 before those below, ours come in pairs. Two of its shapes differ from
    the paper's (the last map's second square; ratios of 0.333).
    """
    scales = (0.1, 0.2, 0.375, 0.55, 0.725, 0.9)
    between = math.sqrt(scales[i] * scales[i + 1]) if i < 5 else 1.0
    theirs = [(scales[i], scales[i]), (between, between)]
    for root in map(math.sqrt, (2, 0.5) if i in (0, 4, 5) else (2, 0.5, 3, 0.333)):
        theirs.append((min(1.0, scales[i] * root), min(1.0, scales[i] / root)))
    order = [0, 1, 2, 4, 3, 5] if len(theirs) == 6 else [0, 1, 2, 3]
    sides = torch.tensor(theirs) / torch.tensor(shapes)
    for name in ("weight", "bias"):
        loc, conf = (f"{kind}_heads.{i}.{name}" for kind in ("loc", "conf"))
        offsets = values[loc].unflatten(0, (-1, 4))[order]
        factor = torch.cat([sides, torch.ones_like(sides)], dim=1)
        offsets = offsets * factor.view(*factor.shape, *[1] * (offsets.ndim - 2))
        if name == "bias":
            offsets[:, 2:] += sides.log() / VARIANCES[1]
        values[loc] = offsets.flatten(0, 1)
        values[conf] = values[conf].unflatten(0, (-1, 2))[order].flatten(0, 1)
