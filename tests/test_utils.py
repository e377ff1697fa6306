"""Evaluating a network over a list: whose masks it is held against, and their IoU."""

import torch

from utils import mask_intersection_union


def test_mask_intersection_union_by_hand():
    mask = torch.tensor([[[1, 1, 0, 0, -1, -1]]])
    predicted = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]).view(1, 1, 1, 6)
    logits = torch.cat([torch.zeros_like(predicted), predicted], dim=1)
    assert mask_intersection_union(logits, mask).tolist() == [1, 3]  # the ignored cells count nowhere
