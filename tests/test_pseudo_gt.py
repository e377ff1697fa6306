"""Box-shaped masks: which cells a box covers."""

import torch

from kaist.frames import BOTH, LWIR, VISIBLE
from pseudo_gt import MapRange, box_masks
from ssd.boxes import Grid, feature_map_sizes, make_grids, make_priors, prior_shapes
from ssd.losses import cell_heights


def mask_of(box, size, label=1):
    return box_masks(torch.tensor([[box]]), torch.tensor([[label]]), [size])[0][0]


def test_a_cell_belongs_to_a_box_that_contains_its_centre():
    # 4x4 cells have their centres at 0.125, 0.375, 0.625, 0.875.
    mask = mask_of([0.25, 0.125, 0.625, 0.7], (4, 4))
    assert mask.tolist() == [[0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_a_box_without_a_cell_centre_marks_the_cell_at_its_own_centre():
    assert mask_of([0.26, 0.26, 0.3, 0.3], (4, 4)).nonzero().tolist() == [[1, 1]]
    assert mask_of([0.9, 0.0, 1.0, 0.1], (1, 1)).tolist() == [[1]]
    thin = mask_of([0.26, 0.0, 0.3, 0.5], (4, 4))  # tall, but between two columns of centres
    assert thin.nonzero().tolist() == [[1, 1]]
    assert mask_of([0.99, 0.99, 1.0, 1.0], (4, 4)).nonzero().tolist() == [[3, 3]]


def test_persons_take_precedence_over_ignored_objects_and_padding_marks_nothing():
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]]])
    [mask] = box_masks(boxes, torch.tensor([[-1, 1, 0]]), [(1, 4)])
    assert mask.tolist() == [[[1, 1, -1, -1]]]


def test_masks_agree_with_a_loop_over_cells():
    torch.manual_seed(0)
    low = torch.rand(3, 5, 2) * 0.9
    boxes = torch.cat([low, low + torch.rand(3, 5, 2) * (1 - low)], -1)
    labels = torch.randint(-1, 2, (3, 5))
    for (h, w), mask in zip([(38, 38), (5, 7)], box_masks(boxes, labels, [(38, 38), (5, 7)]), strict=True):
        expected = torch.zeros(3, h, w, dtype=torch.int64)
        for value in (-1, 1):
            for n in range(3):
                for box in boxes[n, labels[n] == value]:
                    x0, y0, x1, y1 = box.tolist()
                    cells = [
                        (i, j)
                        for i in range(h)
                        for j in range(w)
                        if x0 <= (j + 0.5) / w < x1 and y0 <= (i + 0.5) / h < y1
                    ]
                    centre = (int((y0 + y1) / 2 * h), int((x0 + x1) / 2 * w))
                    for i, j in cells or [centre]:
                        expected[n, i, j] = value
        assert torch.equal(mask, expected)


def ssd300_priors():
    maps = zip(make_grids((300, 300), "even"), prior_shapes("ssd300"), strict=True)
    return [make_priors([grid], [shapes]) for grid, shapes in maps]


def test_a_map_keeps_the_persons_its_priors_match():
    # The priors of map 38 are squares of 0.1 and 0.14 and two of 1:2; map 1's are 0.9 and more.
    small, large, tiny = [0.45, 0.45, 0.55, 0.55], [0.05, 0.05, 0.95, 0.95], [0.5, 0.5, 0.51, 0.51]
    boxes, labels = torch.tensor([[small, large, tiny]]), torch.ones(1, 3, dtype=torch.int64)
    maps = [0, 2, 5]
    for outside in (0, -1):
        finest, middle, coarsest = MapRange(ssd300_priors(), maps, outside).labels(boxes, labels)
        assert finest.tolist() == [[1, outside, 1]]  # the best prior of a tiny person
        assert middle.tolist() == [[outside, outside, outside]]
        assert coarsest.tolist() == [[outside, 1, outside]]
    sizes = [feature_map_sizes((300, 300))[i] for i in maps]
    masks = box_masks(boxes, labels, sizes, MapRange(ssd300_priors(), maps, -1))
    assert (masks[0] == 1).sum() < (masks[0] == -1).sum() and not (masks[1] == 1).any()
    assert masks[2].tolist() == [[[1]]]


def test_ignored_objects_and_padding_are_in_every_range():
    boxes = torch.tensor([[[0.4, 0.4, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0]]])
    for labels in MapRange(ssd300_priors(), [0, 3], 0).labels(boxes, torch.tensor([[-1, 0]])):
        assert labels.tolist() == [[-1, 0]]


def test_every_person_is_in_range_of_some_map():
    torch.manual_seed(1)
    low = torch.rand(4, 9, 2) * 0.98
    boxes = torch.cat([low, low + torch.rand(4, 9, 2) * (1 - low)], -1)
    labels = torch.ones(4, 9, dtype=torch.int64)
    labels_of_maps = MapRange(ssd300_priors(), list(range(6)), 0).labels(boxes, labels)
    assert torch.stack(labels_of_maps).any(0).all()


def test_masks_follow_the_stride():
    """With an input of 300 pixels, the centre of the last cell of 8 pixels is at 300, outside every box."""
    grids = make_grids((300, 300), "stride")[:2]
    boxes = torch.tensor([[[0.9, 0.0, 1.0, 1.0]]])
    even, stride = (box_masks(boxes, torch.tensor([[1]]), maps)[0] for maps in ([(38, 38)], grids))
    assert even[0, 0].nonzero().flatten().tolist() == [34, 35, 36, 37]
    # Centres at 276, 284, 292 and 300 pixels; the box spans 270 to 300.
    assert stride[0, 0].nonzero().flatten().tolist() == [34, 35, 36]


def test_the_mask_of_a_stream_has_the_persons_of_its_modality():
    """A person in visible only, one in LWIR only, one in both, and an ignored object."""
    boxes = torch.tensor([[[0.0, 0, 0.25, 1], [0.25, 0, 0.5, 1], [0.5, 0, 0.75, 1], [0.75, 0, 1, 1]]])
    labels = torch.tensor([[VISIBLE, LWIR, BOTH, -1]])
    masks = box_masks(boxes, labels, [Grid(1, 4, 1.0, 0.25, seen) for seen in (VISIBLE, LWIR, BOTH)])
    assert [m.flatten().tolist() for m in masks] == [[1, 0, 1, -1], [0, 1, 1, -1], [1, 1, 1, -1]]
    heights = [cell_heights(boxes, labels, Grid(1, 4, 1.0, 0.25, seen)) for seen in (VISIBLE, LWIR)]
    assert [h.flatten().tolist() for h in heights] == [[512, 0, 512, 0], [0, 512, 512, 0]]
