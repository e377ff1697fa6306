"""COCO's average precision of people, beside the miss rate. Needs numpy alone.

The numbers are those of pycocotools' COCOeval, "bbox", for one category: every object annotated as a
person counts, whatever its height or occlusion; objects to ignore are crowd regions, in which any
number of detections is forgiven.
"""

from __future__ import annotations

import numpy as np

from kaist.miss_rate import GroundTruth, match_greedily, overlapping_pairs, sort_by_score, sort_candidates
from kaist.results import Detections

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MAX_DETECTIONS = 100  # of a frame that are looked at, the highest scores
# Areas (lowest, highest), inclusive, pixels.
AREAS = {"": (0.0, 1e10), " small": (0.0, 32.0**2), " medium": (32.0**2, 96.0**2), " large": (96.0**2, 1e10)}


def coco_ap(ground_truth: GroundTruth, detections: Detections) -> dict[str, float]:
    """ "AP", "AP50", "AP75", "AP small", "AP medium" and "AP large", fractions; nan where nobody counts.

    AP is the mean over ten IoU thresholds and 101 recalls of the highest precision at that recall or
    above. A person outside of a range of areas is ignored; so is a detection outside of it that
    matches nothing.
    """
    ranked = sort_by_score(detections)
    order = np.argsort(ranked.frame_idxs, kind="stable")
    frame = ranked.frame_idxs[order]
    place = np.arange(len(frame)) - np.searchsorted(frame, frame)  # of a detection in its frame
    detections = ranked.take(np.sort(order[place < MAX_DETECTIONS]))
    det, gt, shared, area, other_area = overlapping_pairs(ground_truth, detections)
    overlap = shared / np.where(ground_truth.ignore[gt], area, area + other_area - shared)
    best = sort_candidates(det, gt, overlap, IOUS[0])
    pairs = det[best], gt[best], overlap[best]
    gt_area, det_area = (boxes[:, 2] * boxes[:, 3] for boxes in (ground_truth.boxes, detections.boxes))
    values = {}
    for name, (low, high) in AREAS.items():
        counts = ~ground_truth.ignore & (gt_area >= low) & (gt_area <= high)
        in_range = (det_area >= low) & (det_area <= high)
        precision = precision_curves(*match(pairs, counts, ground_truth.ignore, in_range), counts.sum())
        values["AP" + name] = float(precision.mean())
        if not name:
            values |= {"AP50": float(precision[0].mean()), "AP75": float(precision[5].mean())}
    return values


def match(
    pairs: tuple[np.ndarray, ...], counts: np.ndarray, crowd: np.ndarray, in_range: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(10, n) bool of each threshold: detections that are true positives, and those that are ignored.

    A detection takes the best free person that counts; else the best other object, of which a crowd is
    never taken away. All thresholds are matched at once, as if each had frames of its own.

    Args:
        pairs: (p,) det, gt and overlap, as sorted by `sort_candidates`. The overlap is the IoU, or with a
            crowd region the fraction of the detection's area that it covers.
        counts, crowd: (m,) bool, people that count and objects to ignore.
        in_range: (n,) bool, detections whose area is within the range.
    """
    det, gt, iou = pairs
    n, m = len(in_range), len(counts)
    level, pair = np.nonzero(iou >= IOUS[:, None])
    det, gt, is_crowd = det[pair] + n * level, gt[pair] + m * level, crowd[gt[pair]]
    matched = np.zeros(len(IOUS) * n, bool)

    def take(some: np.ndarray, objects: np.ndarray, n_objects: int) -> None:
        taken = match_greedily(det[some], objects[some], n_objects)
        matched[taken[taken >= 0]] = True

    take(np.tile(counts, len(IOUS))[gt], gt, len(IOUS) * m)
    true = matched.copy()
    others = ~np.tile(counts, len(IOUS))[gt] & ~true[det]
    own = np.where(is_crowd, len(IOUS) * m + np.arange(len(gt)), gt)  # a crowd for each that asks
    take(others, own, len(IOUS) * m + len(gt))
    ignored = (matched & ~true) | ~(matched | np.tile(in_range, len(IOUS)))
    return true.reshape(len(IOUS), -1), ignored.reshape(len(IOUS), -1)


def precision_curves(true: np.ndarray, ignored: np.ndarray, n_positive: int) -> np.ndarray:
    """(10, 101) precision at each of `RECALLS`, nan where nobody counts.

    Args:
        true, ignored: (10, n) as from `match`, from the highest score down.
    """
    if not n_positive:
        return np.full((len(true), len(RECALLS)), np.nan)
    hits = np.cumsum(true, axis=1)
    misses = np.cumsum(~(true | ignored), axis=1)
    precision = hits / (hits + misses + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    precision = np.pad(precision, ((0, 0), (0, 1)))  # a recall that is never reached
    places = [np.searchsorted(recall, RECALLS) for recall in hits / n_positive]
    return np.take_along_axis(precision, np.array(places), axis=1)
