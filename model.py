"""SSD300 on VGG16 with segmentation infusion heads: network, priors, box coding, decode + NMS.

Sources: Liu et al., "SSD: Single Shot MultiBox Detector" (ECCV 2016) for the network, the priors
and the box coding; Brazil et al., "Illuminating Pedestrians via Simultaneous Detection &
Segmentation" (ICCV 2017) for segmentation infusion: heads that learn box-shaped masks from the
same feature maps, supervise the backbone during training, and are left out at inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, clip_boxes_to_image, nms

from kaist.files import InputError

# What a batch carries.
INPUT_CHANNELS = {"lwir": 1, "visible": 3, "mean": 4, "early": 4, "halfway": 4}
MEAN = (0.485, 0.456, 0.406, 0.449)  # ImageNet R, G, B, then their mean for LWIR
STD = (0.229, 0.224, 0.225, 0.226)
NORM_FLOOR = 1e-3  # length below which conv4_3's features are not scaled to unit length
MIN_SIZE = 1e-5  # of a box that is encoded, as a fraction: no logarithm of zero
VARIANCES = (0.1, 0.2)  # SSD's scaling of centre and size offsets
MAX_LOG_SCALE = math.log(1000 / 16)  # a decoded box is at most this many e-folds its prior

# VGG16 up to conv5_3: convolutions' widths, "M" a 2x2 max-pool. The third pool rounds up
# (75 -> 38), the one before conv6 keeps its resolution.
VGG16_STAGES = ((64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512),
                ("M", 512, 512, 512))
# Extra layers as (1x1 width, 3x3 width, stride, padding).
EXTRA_LAYERS = ((256, 512, 2, 1), (128, 256, 2, 1), (128, 256, 1, 0), (128, 256, 1, 0))


class Predictions(NamedTuple):
    """What the network says of a batch.

    loc: (N, P, 4) encoded offsets of each prior; conf: (N, P, 2) logits of background and person;
    seg: per infused map (N, 2, h, w) mask logits; empty unless asked for.
    """

    loc: Tensor
    conf: Tensor
    seg: list[Tensor]


class SSD300(nn.Module):
    """SSD with a VGG16 backbone, six feature maps and optional segmentation infusion heads.

    Args:
        input_mode: "lwir" (1 channel), "visible" (3), "mean" (visible and LWIR averaged into 3),
            "early" (4 channels side by side) or "halfway" (see `HalfwayFusion`). Batches carry
            visible first, LWIR last.
        batch_norm: BatchNorm after each of VGG16's 13 convolutions, as in VGG16-BN.
        width: multiplier of every layer's width; 1.0 is VGG16.
        infusion: for each of the six maps 1 where it has a segmentation head, else 0.
        infusion_conv: a 3x3 convolution of the map's own width before the head's 1x1.
        prior_set: a name in `prior_shapes`.
        size: (height, width) of the input in pixels; feature maps and priors follow from it.

    The priors are the non-persistent buffer `priors`, (P, 4) cxcywh fractions of the input.
    """

    def __init__(
        self,
        *,
        input_mode: str,
        batch_norm: bool,
        width: float,
        infusion: Sequence[int],
        infusion_conv: bool,
        prior_set: str,
        size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.input_mode = input_mode
        self.prior_set = prior_set
        self.size = tuple(size)

        def scaled(channels: int) -> int:
            return max(8, round(channels * width / 8) * 8)

        if input_mode == "halfway":
            streams = [vgg_stage(VGG16_STAGES[0], n, scaled, batch_norm) for n in (3, 1)]
            self.to_conv4_3 = HalfwayFusion(*streams, scaled(512))
        else:
            in_channels = {"early": 4, "lwir": 1}.get(input_mode, 3)
            self.to_conv4_3 = vgg_stage(VGG16_STAGES[0], in_channels, scaled, batch_norm)
        self.to_conv5_3 = vgg_stage(VGG16_STAGES[1], scaled(512), scaled, batch_norm)
        self.conv4_3_norm = L2Norm(scaled(512))
        self.conv6_7 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1),
            nn.Conv2d(scaled(512), scaled(1024), 3, padding=6, dilation=6), nn.ReLU(inplace=True),
            nn.Conv2d(scaled(1024), scaled(1024), 1), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.extras = nn.ModuleList()
        map_widths = [scaled(512), scaled(1024)]
        for squeeze, expand, stride, padding in EXTRA_LAYERS:
            self.extras.append(nn.Sequential(
                nn.Conv2d(map_widths[-1], scaled(squeeze), 1), nn.ReLU(inplace=True),
                nn.Conv2d(scaled(squeeze), scaled(expand), 3, stride, padding),
                nn.ReLU(inplace=True),
            ))  # fmt: skip
            map_widths.append(scaled(expand))

        shapes = prior_shapes(prior_set)
        self.loc_heads = nn.ModuleList(
            nn.Conv2d(w, 4 * len(s), 3, padding=1) for w, s in zip(map_widths, shapes, strict=True)
        )
        self.conf_heads = nn.ModuleList(
            nn.Conv2d(w, 2 * len(s), 3, padding=1) for w, s in zip(map_widths, shapes, strict=True)
        )
        self.apply(init_convolution)
        # conv4_3's features arrive 20 times longer than others: start from small predictions.
        for head in (*self.loc_heads, *self.conf_heads):
            nn.init.normal_(head.weight, std=0.01)
        # Last, so that networks of one seed start alike whatever is infused.
        self.infused_maps = [i for i, infused in enumerate(infusion) if infused]
        self.seg_heads = nn.ModuleList(
            infusion_head(map_widths[i], infusion_conv) for i in self.infused_maps
        )
        self.seg_heads.apply(init_convolution)
        for head in self.seg_heads:
            nn.init.normal_(head[-1].weight, std=0.01)
        if input_mode == "halfway":
            self.to_conv4_3.start_from_mean()

        channels = slice(3, 4) if input_mode == "lwir" else slice(0, INPUT_CHANNELS[input_mode])
        for name, values in (("mean", MEAN[channels]), ("std", STD[channels])):
            buffer = torch.tensor(values).view(1, -1, 1, 1) * 255
            self.register_buffer(name, buffer, persistent=False)
        self.map_sizes = feature_map_sizes(self.size)
        self.register_buffer("priors", make_priors(self.map_sizes, shapes), persistent=False)

    def map_priors(self) -> list[Tensor]:
        """The priors of each feature map, (P_i, 4) cxcywh fractions."""
        cells = zip(self.map_sizes, self.conf_heads, strict=True)
        return list(self.priors.split([h * w * head.out_channels // 2 for (h, w), head in cells]))

    def forward(self, images: Tensor, with_masks: bool = False) -> Predictions:
        """Predict from (N, C, H, W) uint8 images; mask logits in training or on request only."""
        return self.predict(self.normalise(images), with_masks or self.training)

    def normalise(self, images: Tensor) -> Tensor:
        """(N, C, H, W) uint8 -> float with ImageNet's mean and spread; "mean" averages to 3."""
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        return (x[:, :3] + x[:, 3:]) / 2 if self.input_mode == "mean" else x

    def predict(self, x: Tensor, with_masks: bool) -> Predictions:
        """`forward` on images that are already normalised."""
        maps = self.feature_maps(x)
        loc = flatten_heads(self.loc_heads, maps, 4)
        conf = flatten_heads(self.conf_heads, maps, 2)
        seg = []
        if with_masks:
            heads = zip(self.infused_maps, self.seg_heads, strict=True)
            seg = [head(maps[i]).float() for i, head in heads]
        return Predictions(loc.float(), conf.float(), seg)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The six maps the heads read, finest first: 38, 19, 10, 5, 3, 1 for a 300x300 input."""
        conv4_3 = self.to_conv4_3(x)
        maps = [self.conv4_3_norm(conv4_3), self.conv6_7(self.to_conv5_3(conv4_3))]
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        return maps


def vgg_stage(
    stage: Sequence[int | str], in_channels: int, scaled: Callable[[int], int], batch_norm: bool
) -> nn.Sequential:
    """A run of VGG16: 3x3 convolutions (with BatchNorm where asked), ReLUs and max-pools."""
    layers: list[nn.Module] = []
    for width in stage:
        if width == "M":
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            continue
        layers.append(nn.Conv2d(in_channels, scaled(width), 3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(scaled(width)))
        layers.append(nn.ReLU(inplace=True))
        in_channels = scaled(width)
    return nn.Sequential(*layers)


class HalfwayFusion(nn.Module):
    """Visible and LWIR each in a VGG16 stream up to conv4_3, joined there by a 1x1 convolution.

    Liu et al., "Multispectral Deep Neural Networks for Pedestrian Detection" (BMVC 2016), and the
    place of the join in MLPD (Kim et al., 2021).

    Args:
        visible, lwir: from 3 channels and from 1 to `channels` at an eighth of the resolution.
    """

    def __init__(self, visible: nn.Sequential, lwir: nn.Sequential, channels: int) -> None:
        super().__init__()
        self.visible = visible
        self.lwir = lwir
        self.join = nn.Sequential(nn.Conv2d(2 * channels, channels, 1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 4, H, W), visible first -> (N, channels, h, w)."""
        return self.join(torch.cat([self.visible(x[:, :3]), self.lwir(x[:, 3:])], dim=1))

    def start_from_mean(self) -> None:
        """Let the join be the streams' mean, so that pretrained layers after it see what they
        know."""
        half = torch.eye(self.join[0].out_channels) / 2
        with torch.no_grad():
            self.join[0].weight.copy_(torch.cat([half, half], dim=1)[..., None, None])


class L2Norm(nn.Module):
    """Each cell's feature vector scaled to unit length, times a learned factor a channel.

    ParseNet (Liu et al., 2015), with SSD's initial factor 20. Computed in float32, and
    `F.normalize` keeps value and gradient finite where a cell's features are all zero. A cell of
    hardly any features is not scaled up all the way: the gradient is at most 20 / NORM_FLOOR times
    its own, where it could else be as good as infinite (flat images, a network's first steps).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), 20.0))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> the same shape, float32."""
        return F.normalize(x.float(), eps=NORM_FLOOR) * self.scale.view(1, -1, 1, 1)


def infusion_head(width: int, with_conv: bool) -> nn.Sequential:
    """Segmentation infusion: (N, width, h, w) -> (N, 2, h, w) logits of background and person."""
    conv = [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True)] if with_conv else []
    return nn.Sequential(*conv, nn.Conv2d(width, 2, 1))


def init_convolution(module: nn.Module) -> None:
    """He initialisation for convolutions, biases zero; other modules are left alone."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)


def flatten_heads(heads: nn.ModuleList, maps: list[Tensor], values: int) -> Tensor:
    """Apply head i to map i; (N, P, values) in the priors' order: map, row, column, shape."""
    outputs = [
        head(x).permute(0, 2, 3, 1).reshape(len(x), -1, values)
        for head, x in zip(heads, maps, strict=True)
    ]
    return torch.cat(outputs, dim=1)


# ----------------------------------------------------------------------------------- priors


def feature_map_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """(height, width) of the six feature maps for an input of (height, width) pixels.

    Raises:
        InputError: the input is too small for six maps, or larger than any use of it.
    """

    def chain(n: int) -> list[int]:
        for _ in range(3):
            n = math.ceil(n / 2)
        sizes = [n, math.ceil(n / 2)]
        for _, _, stride, padding in EXTRA_LAYERS:
            sizes.append((sizes[-1] + 2 * padding - 3) // stride + 1)
        return sizes

    if max(size) > 10_000:
        raise InputError("INPUT_SIZE is beyond 10,000 pixels a side", "KAIST frames are 512,640")
    sizes = list(zip(chain(size[0]), chain(size[1]), strict=True))
    if min(sizes[-1]) < 1:
        raise InputError(
            f"INPUT_SIZE = {tuple(size)} is too small for six feature maps",
            "use at least 257 pixels a side",
        )
    return sizes


def prior_shapes(prior_set: str) -> list[list[tuple[float, float]]]:
    """(width, height) of each map's priors, as fractions of the input.

    "ssd300": the paper's scales for VOC (0.1, then 0.2 to 0.9); "ssd300-coco": torchvision's for
    COCO (0.07, then 0.15 to 0.87). Their shapes come in torchvision's order: a square of the map's
    scale, a square of the geometric mean with the next scale, then ratio r and 1/r for each r.

    "pedestrian": upright boxes alone, of the median person's shape (width/height 0.44 in a 640x512
    frame, so 0.35 in its fractions) and eight heights from 0.062 to 1, each on the maps whose cells
    suit its width; as `python -m tools.priors --derive 8` prints it for KAIST's train-all-02 list.
    """
    if prior_set == "pedestrian":
        heights = (
            (0.062, 0.093, 0.138, 0.205),
            (0.093, 0.138, 0.205, 0.305),
            (0.205, 0.305, 0.453, 0.673),
            (0.305, 0.453, 0.673, 1.0),
            (0.673, 1.0),
            (1.0,),
        )
        return [[(0.35 * h, h) for h in map_heights] for map_heights in heights]
    scales = {
        "ssd300": (0.1, 0.2, 0.375, 0.55, 0.725, 0.9, 1.075),
        "ssd300-coco": (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05),
    }[prior_set]
    ratios = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
    shapes = []
    for i, map_ratios in enumerate(ratios):
        s = scales[i]
        between = math.sqrt(s * scales[i + 1])
        shapes.append([(s, s), (between, between)])
        for root in map(math.sqrt, map_ratios):
            shapes[-1] += [(s * root, s / root), (s / root, s * root)]
    return shapes


def make_priors(
    map_sizes: list[tuple[int, int]], shapes: list[list[tuple[float, float]]]
) -> Tensor:
    """(P, 4) float32 cxcywh priors as fractions of the input, widths and heights at most 1.

    A cell's priors share its centre ((column + 0.5) / w, (row + 0.5) / h). Priors may cross the
    border: 2,740 of SSD300's 8,732 do.
    """
    priors = []
    for (h, w), map_shapes in zip(map_sizes, shapes, strict=True):
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        centres = torch.stack([(columns + 0.5) / w, (rows + 0.5) / h], dim=-1)
        wh = torch.tensor(map_shapes).clamp(max=1.0).expand(h, w, -1, 2)
        centres = centres.unsqueeze(2).expand_as(wh)
        priors.append(torch.cat([centres, wh], dim=-1).reshape(-1, 4))
    return torch.cat(priors)


# ------------------------------------------------------------------------ coding and decoding


def encode(boxes: Tensor, priors: Tensor) -> Tensor:
    """Offsets (…, 4) that turn priors (…, 4) cxcywh into boxes (…, 4) cxcywh (SSD, eq. 2).

    A box without width or height counts as `MIN_SIZE` wide or high, so that its offsets are finite.
    """
    centre = (boxes[..., :2] - priors[..., :2]) / (priors[..., 2:] * VARIANCES[0])
    size = torch.log(boxes[..., 2:].clamp(min=MIN_SIZE) / priors[..., 2:]) / VARIANCES[1]
    return torch.cat([centre, size], dim=-1)


def decode(loc: Tensor, priors: Tensor) -> Tensor:
    """The inverse of `encode`; sizes are clamped so that no offset overflows to infinity."""
    centre = priors[..., :2] + loc[..., :2] * VARIANCES[0] * priors[..., 2:]
    size = priors[..., 2:] * torch.exp((loc[..., 2:] * VARIANCES[1]).clamp(max=MAX_LOG_SCALE))
    return torch.cat([centre, size], dim=-1)


@torch.no_grad()
def detect(
    predictions: Predictions,
    priors: Tensor,
    *,
    min_score: float,
    nms_iou: float,
    max_boxes: int,
) -> list[tuple[Tensor, Tensor]]:
    """Boxes and scores of each image: decode, clip to the frame, drop overlaps.

    Args:
        predictions: loc (N, P, 4) and conf (N, P, 2).
        priors: (P, 4) cxcywh fractions.
        min_score: candidates below this person probability are dropped.
        nms_iou: of two boxes that overlap by more than this IoU the lower-scored one is dropped.
        max_boxes: keep at most so many boxes an image.

    Returns:
        For each image xyxy boxes (k, 4) as fractions of the frame and their scores (k,), by
        descending score. An image without detections has k = 0.
    """
    scores = torch.sigmoid(predictions.conf[..., 1] - predictions.conf[..., 0])
    results: dict[int, tuple[Tensor, Tensor]] = {}
    # Greedy NMS decides on a box from the higher-scored ones alone, so NMS of a prefix keeps
    # just what NMS of everything keeps of it: decode and suppress until that is enough.
    prefix = 2 * max_boxes
    waiting = torch.arange(len(scores), device=scores.device)
    while len(waiting):
        own = scores[waiting]
        candidates = own >= min_score
        if candidates.sum(dim=1).max() > prefix:
            candidates &= own >= own.topk(prefix, dim=1).values[:, -1:]
        image, prior = candidates.nonzero(as_tuple=True)
        boxes = decode(predictions.loc[waiting[image], prior], priors[prior])
        boxes = clip_boxes_to_image(box_convert(boxes, "cxcywh", "xyxy"), (1, 1))
        lengths = image.bincount(minlength=len(own)).tolist()
        parts = zip(boxes.split(lengths), own[image, prior].split(lengths), strict=True)
        unfinished = []
        for i, (own_boxes, own_scores) in zip(waiting.tolist(), parts, strict=True):
            kept = nms(own_boxes, own_scores, nms_iou)[:max_boxes]
            if len(kept) < max_boxes and len(own_scores) >= prefix:
                unfinished.append(i)  # there may be more below
            else:
                # For so few rows half of the time that own_boxes[kept] takes.
                results[i] = own_boxes.index_select(0, kept), own_scores.index_select(0, kept)
        waiting = waiting.new_tensor(unfinished)
        prefix *= 2
    return [results[i] for i in range(len(scores))]



def build_model(checkpoint: dict[str, Any]) -> SSD300:
    """The network of a checkpoint, rebuilt from its own arguments; no weights are downloaded.

    Raises:
        InputError: the weights are not those of such a network.
    """
    try:
        model = SSD300(**checkpoint["model_args"])
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(
            f"the checkpoint's weights do not fit its own model_args ({reason})", "choose another"
        ) from None
    return model
