"""The KAIST benchmark without torch: file formats, miss rate, images, and a synthetic demo set.

    import kaist
    test_set = kaist.load_ground_truth("KAIST_annotation.json")
    results = kaist.evaluate(test_set, kaist.read_detections("result.txt", test_set.frames))
    print(results["Reasonable-all"].miss_rate)

This example needs numpy only.
"""

from kaist.annotations import open_annotations, read_image_list
from kaist.miss_rate import GroundTruth, evaluate, load_ground_truth
from kaist.results import Detections, read_detections, write_detections

__all__ = [
    "Detections",
    "GroundTruth",
    "evaluate",
    "load_ground_truth",
    "open_annotations",
    "read_detections",
    "read_image_list",
    "write_detections",
]
