"""The multi-label loss: compared with its authors' numbers and a slow implementation, and by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert, box_iou

from ssd.boxes import Predictions, detect, encode, make_grids, make_priors, person_scores, prior_shapes
from ssd.losses import MultiLabelLoss
from ssd.matching import match_multilabel


def priors_of(size):
    return make_priors(make_grids(size, "even", "mlpd"), prior_shapes("multispectral"))


def pad(objects, spare=2):
    """Boxes (N, M, 4) and labels (N, M) of frames with different numbers of objects."""
    most = max(len(labels) for _, labels in objects) + spare
    boxes, labels = torch.zeros(len(objects), most, 4), torch.zeros(len(objects), most).long()
    for i, (own_boxes, own_labels) in enumerate(objects):
        boxes[i, : len(own_labels)] = torch.as_tensor(own_boxes)
        labels[i, : len(own_labels)] = torch.as_tensor(own_labels)
    return boxes, labels


@pytest.mark.parametrize(("seed", "name"), [(1, "multilabel_loss"), (10, "multilabel_loss_10")])
def test_numbers_and_boxes_are_the_published_ones(seed, name, published, by_rule):
    expected = np.load(published / f"{name}.npz")
    priors = priors_of((512, 640))
    loc, conf = map(torch.from_numpy, by_rule.predictions_by_rule(seed, 3, len(priors)))
    boxes, labels = pad(by_rule.objects_by_rule(seed, 3))
    predictions = Predictions(loc.requires_grad_(), conf.requires_grad_(), [])
    losses = MultiLabelLoss(priors)(predictions, boxes, labels)
    sum(losses).backward()
    assert losses[0].item() == pytest.approx(expected["loc"], rel=1e-5)
    assert losses[1].item() == pytest.approx(expected["conf"], rel=1e-5)
    assert sum(losses).item() == pytest.approx(expected["loss"], rel=1e-5)
    target, _ = match_multilabel(boxes, labels, priors)
    assert (target > 0).sum(1).tolist() == expected["positives"].tolist()
    grads = [x.grad.abs().double().sum((0, 1)).numpy() for x in (loc, conf)]
    assert grads[0].sum() == pytest.approx(expected["loc_grad_abs_sum"], rel=1e-5)
    assert grads[1] == pytest.approx(expected["score_grad_abs_sum"], rel=1e-5)

    found = detect(predictions, priors, min_score=0.1, nms_iou=0.425, max_boxes=200)
    for i, (own_boxes, scores) in enumerate(found):
        assert np.allclose(own_boxes, expected[f"boxes{i}"], atol=1e-5)
        assert np.allclose(scores, expected[f"scores{i}"].mean(1), atol=1e-6)


def plain_loss(priors, loc, conf, objects):
    """(loc, conf, number of positives), one frame and one prior at a time."""
    corners = box_convert(priors, "cxcywh", "xyxy")
    loc_sum = conf_sum = positives = 0
    for i, (boxes, labels) in enumerate(objects):
        target = torch.zeros(len(priors), dtype=torch.int64)
        matched = torch.zeros(len(priors), dtype=torch.int64)
        if len(labels):
            iou = box_iou(boxes, corners)
            overlap, matched = iou.max(0)
            for k in range(len(labels)):
                prior = iou[k].argmax()
                overlap[prior], matched[prior] = 1, k
            target = torch.where(overlap < 0.5, 0, labels[matched])
        expected = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1]])[target.clamp(min=0)]
        bce = F.binary_cross_entropy_with_logits(conf[i], expected.float(), reduction="none").sum(1)
        positive = (target > 0).nonzero()[:, 0]
        background = bce[target == 0].sort(descending=True).values
        conf_sum += bce[positive].sum() + background[: 3 * len(positive)].sum()
        if len(positive):
            offsets = encode(box_convert(boxes, "xyxy", "cxcywh")[matched[positive]], priors[positive])
            loc_sum += (loc[i, positive] - offsets).abs().sum()
        positives += len(positive)
    count = max(1, positives)
    return loc_sum / (4 * count), conf_sum / count, positives


@pytest.mark.parametrize("seed", range(6))
def test_loss_equals_the_slow_implementation(seed):
    generator = torch.Generator().manual_seed(seed)
    priors = priors_of((64, 128))
    objects = []
    for n in torch.randint(0, 9, (4,), generator=generator).tolist():
        corner, size = torch.rand(n, 2, generator=generator), torch.rand(n, 2, generator=generator)
        labels = torch.tensor([-1, 1, 2, 3])[torch.randint(4, (n,), generator=generator)]
        boxes = torch.cat([corner, corner + 0.02 + size * 0.6], 1)
        boxes[n // 2 :] = boxes[: n - n // 2].clone()  # some share their best prior
        objects.append((boxes, labels))
    loc = torch.randn(4, len(priors), 4, generator=generator)
    conf = torch.randn(4, len(priors), 3, generator=generator)
    *expected, _ = plain_loss(priors, loc, conf, objects)
    ours = MultiLabelLoss(priors)(Predictions(loc, conf, []), *pad(objects))
    assert torch.stack(ours).tolist() == pytest.approx([float(w) for w in expected], rel=1e-5)


def test_loss_by_hand(monkeypatch):
    priors = torch.tensor([[0.25, 0.5, 0.5, 1], [0.75, 0.5, 0.5, 1], [0.5, 0.5, 0.02, 0.02]])
    boxes, labels = pad([(torch.tensor([[0, 0, 0.5, 1.0]]), [3])])
    loc = torch.full((1, 3, 4), 0.5)
    conf = torch.zeros(1, 3, 3)
    conf[0, 0] = torch.tensor([0.0, 2.0, -1.0])
    monkeypatch.setattr("ssd.losses.NEG_TO_POS_RATIO", 1)
    conf[0, 1, 0] = 1.0  # an easier negative than the third prior
    ours = MultiLabelLoss(priors)(Predictions(loc, conf, []), boxes, labels)
    log2 = math.log(2)
    person = log2 + math.log1p(math.exp(-2)) + math.log1p(math.exp(1))
    assert ours[0].item() == pytest.approx(0.5)  # its offsets are 0
    assert ours[1].item() == pytest.approx(person + 3 * log2)


def test_priors_of_ignored_objects_have_no_loss(monkeypatch):
    priors = priors_of((64, 128))
    ignored = torch.tensor([[0.2, 0.2, 0.5, 0.6]])
    person = torch.tensor([[0.6, 0.2, 0.7, 0.8]])
    boxes, labels = pad([(torch.cat([ignored, person]), [-1, 1])])
    conf = torch.zeros(1, len(priors), 3, requires_grad=True)
    loc = torch.zeros(1, len(priors), 4, requires_grad=True)
    target, _ = match_multilabel(boxes, labels, priors)
    assert (target == -1).sum() >= 1 and (target == 1).sum() >= 1
    monkeypatch.setattr("ssd.losses.NEG_TO_POS_RATIO", 10**6)
    loss = MultiLabelLoss(priors)
    sum(loss(Predictions(loc, conf, []), boxes, labels)).backward()
    touched = (conf.grad != 0).any(2)
    assert torch.equal(touched, target != -1)
    assert torch.equal((loc.grad != 0).any(2) & (target != 1), torch.zeros_like(touched))


def test_the_later_of_two_objects_takes_their_best_prior():
    priors = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1]])
    same = torch.tensor([[0.3, 0.3, 0.7, 0.7], [0.35, 0.35, 0.7, 0.7]])
    boxes, labels = pad([(same, [1, 2]), (same.flip(0), [2, 1]), (same, [3, -1])])
    target, matched_idxs = match_multilabel(boxes, labels, priors)
    assert target.tolist() == [[2, 0], [1, 0], [-1, 0]]
    assert matched_idxs[:, 0].tolist() == [1, 1, 1]


def test_frames_without_objects_and_batches_without_people_have_finite_losses():
    priors = priors_of((64, 128))
    loc, conf = torch.randn(2, len(priors), 4), torch.randn(2, len(priors), 3)
    predictions = Predictions(loc.requires_grad_(), conf.requires_grad_(), [])
    losses = MultiLabelLoss(priors)(predictions, torch.zeros(2, 0 + 1, 4), torch.zeros(2, 1).long())
    sum(losses).backward()
    assert [x.item() for x in losses] == [0, 0]
    assert not loc.grad.any() and not conf.grad.any()


def test_scores_by_hand():
    three = torch.tensor([5.0, 0.0, math.log(3)])
    assert person_scores(three).item() == pytest.approx((0.5 + 0.75) / 2)
    assert person_scores(torch.tensor([0.0, math.log(3)])).item() == pytest.approx(0.75)


def test_boxes_of_three_logits_are_not_clipped():
    priors = torch.tensor([[0.05, 0.5, 0.2, 0.5]])
    for conf, left in ((torch.tensor([[[0.0, 1, 1]]]), -0.05), (torch.tensor([[[0.0, 1]]]), 0.0)):
        predictions = Predictions(torch.zeros(1, 1, 4), conf, [])
        [(boxes, _)] = detect(predictions, priors, min_score=0.1, nms_iou=0.4, max_boxes=9)
        assert boxes[0, 0].item() == pytest.approx(left)
