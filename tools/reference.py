"""What tools/benchmark.py measures this project against: torchvision's SSD300, its augmentation
recipe, and a metric that goes through the frames one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.models.detection.ssd import SSD, ssd300_vgg16
from torchvision.ops import box_convert, box_iou
from torchvision.transforms import v2

from kaist.annotations import FRAME_HEIGHT, FRAME_WIDTH, image_path
from kaist.frames import Frame
from kaist.miss_rate import FPPI_POINTS, GroundTruth, Setup
from pseudo_gt import box_masks
from ssd.boxes import Predictions
from tools.workloads import random_objects


def torchvision_ssd(device: torch.device) -> SSD:
    """torchvision's SSD300 for persons, in fp32, untrained."""
    network = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=2, score_thresh=0.01)
    return network.to(device)


def torchvision_step(device: torch.device, n: int) -> Callable[[], None]:
    """A training step of torchvision's SSD300 in fp32, without masks."""
    model = torchvision_ssd(device).train()
    images = list(torch.rand(n, 3, 300, 300, device=device))
    labels = torch.ones(3, dtype=torch.int64, device=device)
    targets = [{"boxes": b[:3] * 300, "labels": labels} for b in random_objects(n, 3, device)[0]]
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9)

    def step() -> None:
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def torchvision_image(device: torch.device, path: Path) -> Callable[[], None]:
    """Detection in an image's file by torchvision's SSD300 in fp32."""
    model = torchvision_ssd(device).eval()

    @torch.inference_mode()
    def run() -> None:
        model([decode_image(path, ImageReadMode.RGB).to(device) / 255])

    return run


def torchvision_loss(predictions: Predictions, boxes: Tensor, labels: Tensor, priors: Tensor) -> Callable:
    """A function that matches the persons with the priors and gives the sum of both losses."""
    ssd, anchors = torchvision_ssd(priors.device), 300 * box_convert(priors, "cxcywh", "xyxy")
    people = [labels[i] == 1 for i in range(len(boxes))]
    targets = [{"boxes": 300 * b[p], "labels": x[p]} for b, x, p in zip(boxes, labels, people, strict=True)]
    outputs = {"bbox_regression": predictions.loc, "cls_logits": predictions.conf}

    def loss() -> Tensor:
        matched = [ssd.proposal_matcher(box_iou(target["boxes"], anchors)) for target in targets]
        return sum(ssd.compute_loss(targets, outputs, [anchors] * len(targets), matched).values())

    return loss


def v2_sample(root: Path) -> Callable[[Frame], tuple]:
    """torchvision's SSD recipe on a pair: zoom-out on a canvas, crop, flip, resize, masks."""
    transform = v2.Compose(
        [
            v2.RandomPhotometricDistort(),
            v2.RandomZoomOut(),
            v2.RandomIoUCrop(),
            v2.RandomHorizontalFlip(),
            v2.Resize((300, 300), antialias=True),
            v2.SanitizeBoundingBoxes(labels_getter=lambda inputs: inputs[-1]["labels"]),
        ]
    )

    def sample(frame: Frame) -> tuple:
        paths = [image_path(root, frame.id, modality) for modality in ("visible", "lwir")]
        pair = [tv_tensors.Image(Image.open(path).convert("RGB")) for path in paths]
        size = (FRAME_HEIGHT, FRAME_WIDTH)
        boxes = tv_tensors.BoundingBoxes(frame.boxes_px, format="XYXY", canvas_size=size)
        visible, lwir, target = transform(*pair, {"boxes": boxes, "labels": torch.from_numpy(frame.labels)})
        boxes = (target["boxes"] / 300)[None]
        masks = box_masks(boxes, target["labels"][None], [(38, 38), (19, 19)])
        return torch.cat([visible, lwir[:1]]), boxes, masks

    return sample


def plain_miss_rates(path: Path, ground_truth: GroundTruth, setups: dict[str, Setup]) -> dict[str, float]:
    """Read a text result file and evaluate it frame by frame, for each setup anew."""
    rows: list[list[list[float]]] = [[] for _ in ground_truth.frames]
    for line in path.read_text().splitlines():
        image_id, *row = map(float, line.split(","))
        rows[int(image_id) - 1].append(row)
    rates = {}
    x, y, w, h = ground_truth.boxes.T
    inside = (x >= 5) & (y >= 5) & (x + w <= FRAME_WIDTH - 5) & (y + h <= FRAME_HEIGHT - 5)
    for name, setup in setups.items():
        low, high = setup.heights
        counts = inside & ~ground_truth.ignore & (low <= h) & (h <= high)
        counts &= np.isin(ground_truth.occlusion, setup.occlusion)
        people: list[list[tuple]] = [[] for _ in ground_truth.frames]
        for i, box, positive in zip(ground_truth.frame, ground_truth.boxes.tolist(), counts, strict=True):
            people[i].append((box, positive))
        frames = np.flatnonzero(ground_truth.in_subset(setup.subset))
        n_people = sum(positive for i in frames for _, positive in people[i])
        hits = sorted(
            (hit for i in frames for hit in match_frame(rows[i], people[i])), key=lambda hit: -hit[0]
        )
        found = np.array([hit for _, hit in hits], dtype=bool)
        fppi, recall = np.cumsum(~found) / len(frames), np.cumsum(found) / n_people
        reached = [max(recall[fppi <= point], default=0.0) for point in FPPI_POINTS]
        rates[name] = float(np.exp(np.log(np.maximum(1 - np.array(reached), 1e-10)).mean()))
    return rates


def match_frame(rows: list[list[float]], objects: list[tuple[list[float], bool]]) -> list[tuple[float, bool]]:
    """(score, found a person) of one frame's detections, without those that are ignored."""
    results, taken = [], set()
    for *box, score in sorted(rows, key=lambda row: -row[-1]):
        best, chosen, ignored = 0.5, None, False
        x, y, w, h = box
        for k, ((u, v, s, t), positive) in enumerate(objects):
            width, height = min(x + w, u + s) - max(x, u), min(y + h, v + t) - max(y, v)
            shared = width * height if width > 0 and height > 0 else 0.0
            if not positive:
                ignored |= shared / (w * h) >= 0.5
            elif k not in taken and shared / (w * h + s * t - shared) >= best:
                best, chosen = shared / (w * h + s * t - shared), k
        if chosen is not None:
            taken.add(chosen)
            results.append((score, True))
        elif not ignored:
            results.append((score, False))
    return results
