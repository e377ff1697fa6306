"""COCO's average precision of persons. Needs only numpy.

The numbers equal those of pycocotools' COCOeval ("bbox") for one category. Every object annotated as a
person counts, whatever its height or occlusion. Ignored objects are crowd regions: any number of detections
in them is ignored.
"""

from __future__ import annotations

import numpy as np

from kaist.miss_rate import GroundTruth, match_greedily, overlapping_pairs, sort_candidates
from kaist.results import Detections

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MAX_DETECTIONS = 100  # of the highest scores in each frame
# Area ranges (lowest, highest), inclusive, square pixels.
AREAS = {"": (0.0, 1e10), " small": (0.0, 32.0**2), " medium": (32.0**2, 96.0**2), " large": (96.0**2, 1e10)}


def coco_ap(ground_truth: GroundTruth, detections: Detections) -> dict[str, float]:
    """ "AP", "AP50", "AP75", "AP small", "AP medium" and "AP large", fractions; nan where nobody counts.

    AP is the mean over ten IoU thresholds and 101 recalls of the highest precision at that recall or
    above. A person outside of the area range is ignored. So is an unmatched detection outside of it.
    """
    ranked = detections.sort_by_score()
    order = np.argsort(ranked.frame_idxs, kind="stable")
    idxs = ranked.frame_idxs[order]
    rank_in_frame = np.arange(len(idxs)) - np.searchsorted(idxs, idxs)
    detections = ranked.take(np.sort(order[rank_in_frame < MAX_DETECTIONS]))
    det, gt, intersection, area, gt_area = overlapping_pairs(ground_truth, detections)
    overlap = intersection / np.where(ground_truth.ignore[gt], area, area + gt_area - intersection)
    best = sort_candidates(det, gt, overlap, IOU_THRESHOLDS[0])
    pairs = det[best], gt[best], overlap[best]
    gt_areas, det_areas = (boxes[:, 2] * boxes[:, 3] for boxes in (ground_truth.boxes, detections.boxes))
    values = {}
    for name, (low, high) in AREAS.items():
        counts = ~ground_truth.ignore & (gt_areas >= low) & (gt_areas <= high)
        in_range = (det_areas >= low) & (det_areas <= high)
        precision = precision_curves(*match(pairs, counts, ground_truth.ignore, in_range), counts.sum())
        values["AP" + name] = float(precision.mean())
        if not name:
            values |= {"AP50": float(precision[0].mean()), "AP75": float(precision[5].mean())}
    return values


def match(
    pairs: tuple[np.ndarray, ...], counts: np.ndarray, crowd: np.ndarray, in_range: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Match detections at each IoU threshold: true positives and ignored detections, (10, n) bool each.

    A detection matches the best unmatched person that counts, or else the best other object. A crowd region
    can be matched any number of times. All thresholds are matched in one call, with indices of their own.

    Args:
        pairs: (p,) det, gt and overlap, as sorted by `sort_candidates`. The overlap is the IoU, or with a
            crowd region the fraction of the detection's area that it covers.
        counts, crowd: (m,) bool, persons that count, and crowd regions.
        in_range: (n,) bool, detections whose area is in the range.
    """
    det, gt, iou = pairs
    n, m, n_levels = len(in_range), len(counts), len(IOU_THRESHOLDS)
    level, pair = np.nonzero(iou >= IOU_THRESHOLDS[:, None])
    det, gt, is_crowd = det[pair] + n * level, gt[pair] + m * level, crowd[gt[pair]]
    matched = np.zeros(n_levels * n, bool)

    def match_pairs(selected: np.ndarray, objects: np.ndarray, n_objects: int) -> None:
        gt_match = match_greedily(det[selected], objects[selected], n_objects)
        matched[gt_match[gt_match >= 0]] = True

    match_pairs(np.tile(counts, n_levels)[gt], gt, n_levels * m)
    true = matched.copy()
    others = ~np.tile(counts, n_levels)[gt] & ~true[det]
    # A copy of the crowd region for each of its pairs, so that none takes it from another.
    objects = np.where(is_crowd, n_levels * m + np.arange(len(gt)), gt)
    match_pairs(others, objects, n_levels * m + len(gt))
    ignored = (matched & ~true) | ~(matched | np.tile(in_range, n_levels))
    return true.reshape(n_levels, -1), ignored.reshape(n_levels, -1)


def precision_curves(true: np.ndarray, ignored: np.ndarray, n_positive: int) -> np.ndarray:
    """(10, 101) precision at each of `RECALLS`, nan where nobody counts.

    Args:
        true, ignored: (10, n) bool, as from `match`, by descending score.
    """
    if not n_positive:
        return np.full((len(true), len(RECALLS)), np.nan)
    hits = np.cumsum(true, axis=1)
    misses = np.cumsum(~(true | ignored), axis=1)
    precision = hits / (hits + misses + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    precision = np.pad(precision, ((0, 0), (0, 1)))  # 0 at recalls that are never reached
    places = [np.searchsorted(recall, RECALLS) for recall in hits / n_positive]
    return np.take_along_axis(precision, np.array(places), axis=1)
