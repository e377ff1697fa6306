"""The KAIST benchmark: its formats, its miss rate, its images and a drawn demo set. Never torch."""

from kaist.miss_rate import GroundTruth, evaluate, load_ground_truth
from kaist.results import Detections, read_detections, write_detections

__all__ = [
    "Detections",
    "GroundTruth",
    "evaluate",
    "load_ground_truth",
    "read_detections",
    "write_detections",
]
