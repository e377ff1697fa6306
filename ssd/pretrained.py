"""Pretrained weights: ImageNet's VGG16 or VGG16-BN, COCO's SSD300 (both torchvision's), or a file.

Downloads are checked by torchvision's hash. The tensors of a file are checked by name and shape.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.checkpoint import unpickling_problem
from engine.validation import invalid_constant
from kaist.files import InputError
from ssd.layers import Detector
from ssd.multispectral import MultispectralSSD
from ssd.published import check_published, check_tensors, is_published, load_published, read_published

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

HEAD_NAMES = ("regression", "classification")
REMEDY = "use a state dictionary of torchvision's VGG16, VGG16-BN or SSD300"


def load_pretrained(model: nn.Module, source: str, lwir_filters: str = "mean") -> None:
    """Copy pretrained weights into a network of width 1.0, in place; downloads them once.

    Args:
        model: its first convolutions are adapted to their channels by `adapt_channels`.
        source: "none"; "imagenet": the backbone, of VGG16-BN if the model has BatchNorm; "coco": the
            backbone, extra layers and, if the priors are COCO's, the heads for background and person; or
            the path of a file that passed `check_pretrained`.
        lwir_filters: see `adapt_channels`.

    Raises:
        InputError: the weights cannot be downloaded, or do not fit the model.
    """
    if source == "none":
        return
    from torchvision.models import VGG16_BN_Weights, VGG16_Weights  # here, because it takes two seconds
    from torchvision.models.detection import SSD300_VGG16_Weights

    if source == "imagenet":
        has_bn = any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
        state = download((VGG16_BN_Weights if has_bn else VGG16_Weights).IMAGENET1K_V1)
    elif source == "coco":
        state = download(SSD300_VGG16_Weights.COCO_V1)
    else:
        state = read_published(Path(source))
        if is_published(state):
            load_published(model, state, Path(source))
            return
    convert = convert_torchvision_ssd if is_ssd(state) else convert_torchvision_vgg
    convert(model, state, lwir_filters)


def check_pretrained(source: str, model: Detector, *, width: float, batch_norm: bool) -> None:
    """Check that pretrained weights fit a network, which may be on "meta".

    Raises:
        InputError: WIDTH or BATCH_NORM do not allow these weights; or the file is neither a state dictionary
            of torchvision's VGG16, VGG16-BN or SSD300 nor a published network of the model's kind.
    """
    if source == "none":
        return
    state = {} if source in ("imagenet", "coco") else read_published(Path(source))
    if is_published(state):
        check_published(model, state, Path(source))
        return
    if width != 1.0:
        remedy = "pretrained weights need WIDTH = 1.0; otherwise add --pretrained none"
        raise invalid_constant("pretrained", source, remedy)
    if source not in ("imagenet", "coco"):
        check_torchvision(Path(source), state, batch_norm)
    if batch_norm and (source == "coco" or is_ssd(state)):
        remedy = "an SSD300's weights need BATCH_NORM = False; otherwise add --pretrained none"
        raise invalid_constant("pretrained", source, remedy)


def check_torchvision(file: Path, state: dict[str, Tensor], batch_norm: bool) -> None:
    """Raise InputError if a state is not that of torchvision's SSD300, VGG16 or VGG16-BN."""
    from torchvision.models import vgg16, vgg16_bn
    from torchvision.models.detection import ssd300_vgg16

    has_bn = any(key.endswith("running_mean") for key in state)
    if is_ssd(state):
        kind, make = "SSD300", partial(ssd300_vgg16, weights_backbone=None)
    else:
        kind, make = ("VGG16-BN", vgg16_bn) if has_bn else ("VGG16", vgg16)
        if has_bn != batch_norm:
            problem = f"weights of {kind} for a network with BATCH_NORM = {batch_norm}"
            raise InputError(problem, f"set BATCH_NORM = {has_bn}, or use the other VGG16", file=file)
    with torch.device("meta"):
        tensors = make(weights=None).state_dict()
    # A classifier's last layer is not used, and an SSD's heads may have other classes.
    expected = {key: value.shape for key, value in tensors.items() if not key.startswith("classifier.6.")}
    heads = {key: state[key].shape for key in expected if "classification" in key and key in state}
    check_tensors(state, expected | heads, f"torchvision's {kind}", file, REMEDY)


def is_ssd(state: dict[str, Tensor]) -> bool:
    """Whether a torchvision state is that of an SSD300, not of a classifier."""
    return any(key.startswith("backbone.") for key in state)


def download(weights: WeightsEnum) -> dict[str, Tensor]:
    """The state dictionary of torchvision weights, from torch's cache or downloaded, its hash checked."""
    folder, name = f"{torch.hub.get_dir()}/checkpoints", weights.url.rsplit("/", 1)[-1]
    try:
        if os.path.exists(f"{folder}/{name}") and not os.path.isfile(f"{folder}/{name}"):
            raise EOFError("it is not a file")
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError) as error:
        problem = f"damaged pretrained weights ({unpickling_problem(error)})"
        raise InputError(problem, "delete this file and run again", file=f"{folder}/{name}") from error
    except OSError as error:  # includes URLError
        problem = f"cannot download pretrained weights ({error})"
        remedy = f"put {name} from {weights.url} into {folder}, or train from scratch with --pretrained none"
        raise InputError(problem, remedy) from error


def convert_torchvision_vgg(model: nn.Module, state: dict[str, Tensor], lwir_filters: str = "mean") -> None:
    """Copy the state of torchvision's VGG16 or VGG16-BN into a model's backbone.

    fc6 and fc7 become conv6 and conv7, as in SSD: every fourth output, every third row and column.
    """
    for stream in model.backbones():
        for i, layer in enumerate(stream):  # in torchvision ReLUs and pools have indices too
            keys = {name: f"features.{i}.{name}" for name in layer.state_dict()}
            copy_layer(layer, {name: state[key] for name, key in keys.items() if key in state}, lwir_filters)
    if isinstance(model, MultispectralSSD):  # its conv6 is another layer; LWIR takes the filters of red
        model.lwir[0].weight.data.copy_(state["features.0.weight"][:, :1])
        return
    conv6, conv7 = (layer for layer in model.conv6_7 if isinstance(layer, nn.Conv2d))
    fc6 = state["classifier.0.weight"].view(4096, 512, 7, 7)[::4, :, ::3, ::3]
    fc7 = state["classifier.3.weight"].view(4096, 4096, 1, 1)[::4, ::4]
    copy_layer(conv6, {"weight": fc6, "bias": state["classifier.0.bias"][::4]})
    copy_layer(conv7, {"weight": fc7, "bias": state["classifier.3.bias"][::4]})


def convert_torchvision_ssd(model: nn.Module, state: dict[str, Tensor], lwir_filters: str = "mean") -> None:
    """Copy the state of torchvision's `ssd300_vgg16` into a model, with the person class of its heads.

    The heads belong to COCO's priors: with other priors, a model's heads are not changed. torchvision feeds
    its network 255 x (image - mean); the standard deviations of ImageNet in conv1_1 make up for that. With
    torchvision's `pixel_mean`, the model then detects what torchvision's network does (row 35).
    """
    # Both networks list their convolutions in the order of computation.
    rest = [layer for part in (model.conv6_7, *model.extras) for layer in part]
    convs = [key for key, value in state.items() if value.ndim == 4 and key.startswith("backbone.")]
    for stream in model.backbones():
        layers = [layer for layer in (*stream, *rest) if isinstance(layer, nn.Conv2d)]
        for layer, key in zip(layers, convs, strict=True):
            weight, bias = state[key], state[f"{key.removesuffix('weight')}bias"]
            if key == convs[0]:
                weight = weight * (255 * weight.new_tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1))
            copy_layer(layer, {"weight": weight, "bias": bias}, lwir_filters)
    model.conv4_3_norm.scale.data.copy_(state["backbone.scale_weight"])
    if model.prior_set != "ssd300-coco":
        return
    for i, (loc, conf) in enumerate(zip(model.loc_heads, model.conf_heads, strict=True)):
        for name in ("weight", "bias"):
            offsets, logits = (state[f"head.{kind}_head.module_list.{i}.{name}"] for kind in HEAD_NAMES)
            # Channels are ordered by anchor, then class; classes 0 and 1 are background and person.
            logits = logits.unflatten(0, (conf.out_channels // 2, -1))[:, :2].flatten(0, 1)
            copy_layer(loc, {name: offsets})
            copy_layer(conf, {name: logits})


@torch.no_grad()
def copy_layer(layer: nn.Module, values: dict[str, Tensor], lwir_filters: str = "mean") -> None:
    """Copy tensors into a layer's parameters and buffers of these names; see `adapt_channels`."""
    for name, value in values.items():
        if value.ndim == 4 and value.shape[1] == 3:
            value = adapt_channels(value, layer.in_channels, lwir_filters)
        getattr(layer, name).copy_(value)


def adapt_channels(weight: Tensor, channels: int, lwir_filters: str) -> Tensor:
    """Adapt RGB filters (C, 3, k, k) to 3 channels (R, G, B), 1 (LWIR) or 4 (R, G, B, LWIR).

    lwir_filters: "sum" of the RGB filters, which responds to LWIR as they do to a grey image; or "mean", a
    third of it, as in the logged experiments.
    """
    lwir = getattr(weight, lwir_filters)(dim=1, keepdim=True)
    return {1: lwir, 3: weight, 4: torch.cat([weight, lwir], dim=1)}[channels]
