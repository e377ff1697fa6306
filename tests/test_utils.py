"""Evaluating a network over a list: whose masks it is held against, and their IoU."""

import torch

from kaist.frames import frames_of
from kaist.miss_rate import load_ground_truth
from utils import mask_intersection_union


def test_mask_intersection_union_by_hand():
    mask = torch.tensor([[[1, 1, 0, 0, -1, -1]]])
    predicted = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]).view(1, 1, 1, 6)
    logits = torch.cat([torch.zeros_like(predicted), predicted], dim=1)
    assert mask_intersection_union(logits, mask).tolist() == [1, 3]  # the ignored cells count nowhere


def test_frames_hold_the_objects_of_their_own(demo_root):
    ids = (demo_root / "imageSets/test-all.txt").read_text().split()
    people = load_ground_truth(demo_root, ids)
    frames = frames_of(people, min_height=12.0, margin=5.0)
    assert [frame.id for frame in frames] == ids
    assert sum(len(frame.labels) for frame in frames) == len(people.boxes) > 0
    for i, frame in enumerate(frames):
        own = people.boxes[people.frame == i]
        assert (frame.boxes_px[:, :2] == own[:, :2]).all()
        assert (frame.boxes_px[:, 2:] - frame.boxes_px[:, :2] - own[:, 2:] < 1e-3).all()
        assert (frame.labels[people.ignore[people.frame == i]] == -1).all()
