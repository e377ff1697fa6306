"""Matching and losses: by hand, and compared with slow implementations of the paper."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert, box_iou

from ssd.boxes import Grid, Predictions, encode, make_grids, make_priors, prior_shapes
from ssd.losses import MultiBoxLoss, SegmentationLoss, cell_heights
from ssd.matching import PriorTable, match, match_static
from tests.reference import plain_multibox_loss

PRIORS = make_priors(make_grids((300, 300), "even"), prior_shapes("ssd300"))


def random_batch(n, most, seed, share_ignored=0.3):
    """Boxes (n, most, 4) xyxy and labels (n, most) of frames with 0 to `most` objects."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.rand(n, most, 2, generator=g)
    size = torch.rand(n, most, 2, generator=g) * 0.4 + 0.1
    boxes = torch.cat([centre - size / 2, centre + size / 2], -1).clamp(0, 1)
    labels = torch.where(torch.rand(n, most, generator=g) < share_ignored, -1, 1)
    count = torch.randint(0, most + 1, (n, 1), generator=g)
    labels[torch.arange(most) >= count] = 0
    boxes[labels == 0] = 0
    return boxes, labels


def slow_match(boxes, labels, priors):
    """The rules of `ssd.matching` for one image, one pair at a time."""
    corners = box_convert(priors, "cxcywh", "xyxy")
    iou = box_iou(boxes, corners)
    target, matched_idxs = [0] * len(priors), [0] * len(priors)
    people, ignored = ([i for i, x in enumerate(labels.tolist()) if x == label] for label in (1, -1))
    for j in range(len(priors)):
        for i in ignored:
            low = torch.maximum(boxes[i, :2], corners[j, :2])
            high = torch.minimum(boxes[i, 2:], corners[j, 2:])
            if (high - low).clamp(min=0).prod() >= 0.5 * priors[j, 2] * priors[j, 3]:
                target[j] = -1
        if people + ignored:
            best = max(people + ignored, key=lambda i: iou[i, j])
            if iou[best, j] >= 0.5:
                target[j], matched_idxs[j] = int(labels[best]), best
    free, waiting = set(range(len(priors))), set(people)
    for i in ignored:
        for j in range(len(priors)):
            if iou[i, j] > 0 and iou[i, j] >= iou[i].max() * (1 - 1e-5):
                target[j] = -1
                free -= {j}
    while waiting and free:
        i, j = max(((i, j) for i in waiting for j in free), key=lambda ij: iou[ij])
        target[j], matched_idxs[j] = 1, i
        waiting.remove(i)
        free.remove(j)
    return target, matched_idxs


def slow_loss(predictions, boxes, labels, priors, distance):
    """(loc sum / N, conf / N), image by image with a sorted list of negatives."""
    loc = conf = torch.zeros(())
    total = 0
    for image in range(len(boxes)):
        target, matched_idxs = slow_match(boxes[image], labels[image], priors)
        ce = F.cross_entropy(predictions.conf[image], torch.tensor(target).clamp(min=0), reduction="none")
        positives = [j for j, t in enumerate(target) if t == 1]
        for j in positives:
            expected = box_convert(boxes[image, matched_idxs[j]], "xyxy", "cxcywh")
            loc = loc + distance(predictions.loc[image, j], encode(expected, priors[j]), reduction="sum")
            conf = conf + ce[j]
        negatives = sorted((ce[j] for j, t in enumerate(target) if t == 0), reverse=True)
        conf = conf + sum(negatives[: max(3, 3 * len(positives))])
        total += len(positives)
    return loc / max(total, 1), conf / max(total, 1)


@pytest.mark.parametrize("seed", range(6))
def test_loss_and_gradient_equal_the_slow_implementation(seed):
    torch.manual_seed(seed)
    priors = PRIORS[torch.randperm(len(PRIORS))[:300]]
    boxes, labels = random_batch(4, 6, seed)
    loc = torch.randn(4, 300, 4, requires_grad=True)
    conf = torch.randn(4, 300, 2, requires_grad=True)
    predictions = Predictions(loc, conf, [])
    for name, distance in (("smooth_l1", F.smooth_l1_loss), ("l1", F.l1_loss)):
        ours = MultiBoxLoss(priors, loc_loss=name, loc_reduction="sum")(predictions, boxes, labels)
        slow = slow_loss(predictions, boxes, labels, priors, distance)
        assert torch.allclose(ours[0], slow[0], rtol=1e-5)
        assert torch.allclose(ours[1], slow[1], rtol=1e-5)
        ours = torch.autograd.grad(sum(ours), (loc, conf))
        slow = torch.autograd.grad(sum(slow), (loc, conf))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, slow, strict=True))


def match_both(boxes, labels, priors):
    """Target and matched_idxs, after a check that both implementations agree on positives."""
    target, matched_idxs = match(boxes, labels, PriorTable(priors))
    static_target, static_idxs = match_static(boxes, labels, priors)
    assert target.dtype == static_target.dtype == torch.int8
    assert torch.equal(target, static_target)
    assert torch.equal(matched_idxs[target == 1], static_idxs[target == 1])
    return target, matched_idxs


def person(*box):
    return torch.tensor([box], dtype=torch.float32)


SHIFTS = torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
CROWD = torch.tensor([0.4, 0.3, 0.85, 0.7]) + SHIFTS * torch.tensor([0.4, 0.2, 0.1, 0.3])
ADVERSARIAL = {
    "no object": (torch.zeros(0, 4), 1),
    "all ignored": (CROWD[:9], -1),
    "60 people": (CROWD[:60], 1),
    "50 ignored": (CROWD[:50], -1),
    "duplicates": (CROWD[:1].expand(40, 4), 1),
    "symmetric duplicates": (person(0.5 - 0.1, 0.5 - 0.1, 0.5 + 0.1, 0.5 + 0.1).expand(9, 4), 1),
    "one pixel": (person(0.5, 0.5, 0.5 + 1 / 300, 0.5 + 1 / 300), 1),
    "one pixel in a corner": (person(0, 0, 1 / 300, 1 / 300), 1),
    "full frame": (person(0, 0, 1, 1), 1),
    "full frame ignored": (person(0, 0, 1, 1), -1),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_hard_cases_equal_the_plain_loss(name):
    objects, label = ADVERSARIAL[name]
    boxes = torch.zeros(2, max(1, len(objects)), 4)
    labels = torch.zeros(boxes.shape[:2], dtype=torch.int64)
    boxes[0, : len(objects)], labels[0, : len(objects)] = objects, label
    boxes[1, 0], labels[1, 0] = CROWD[3], 1  # another frame is not disturbed
    torch.manual_seed(0)
    loc = torch.randn(2, 8732, 4, requires_grad=True)
    conf = torch.randn(2, 8732, 2, requires_grad=True)
    predictions = Predictions(loc, conf, [])
    criterion = MultiBoxLoss(PRIORS, loc_loss="smooth_l1", loc_reduction="sum")
    plain = plain_multibox_loss(predictions, boxes, labels, PRIORS)
    plain_gradient = torch.autograd.grad(plain, (loc, conf))
    for way in (criterion.sparse, criterion.static):
        *sums, positives, _ = way(predictions, boxes, labels)
        ours = sum(sums) / positives
        assert torch.isclose(ours, plain, rtol=1e-5)
        gradient = torch.autograd.grad(ours, (loc, conf))
        for a, b in zip(gradient, plain_gradient, strict=True):
            assert torch.allclose(a, b, atol=1e-6) and a.isfinite().all()


@pytest.mark.parametrize("seed", range(10))
def test_both_implementations_give_the_same_loss_and_gradient(seed):
    torch.manual_seed(seed)
    priors = PRIORS[torch.randperm(len(PRIORS))[: [8732, 300, 40, 3][seed % 4]]]
    most = 7
    boxes, labels = random_batch(5, most, seed, share_ignored=[0.3, 0.0, 1.0][seed % 3])
    match_both(boxes, labels, priors)
    loc = torch.randn(5, len(priors), 4, requires_grad=True)
    conf = torch.randn(5, len(priors), 2, requires_grad=True)
    criterion = MultiBoxLoss(priors, loc_loss="l1", loc_reduction="sum")
    ways = [way(Predictions(loc, conf, []), boxes, labels) for way in (criterion.sparse, criterion.static)]
    assert ways[0][2:] == ways[1][2:]
    for term in (0, 1):
        a, b = (way[term] for way in ways)
        assert torch.isclose(a, b, rtol=1e-5)
        a, b = (torch.autograd.grad(x, (loc, conf)[term], retain_graph=True)[0] for x in (a, b))
        assert torch.allclose(a, b, atol=1e-6)


def test_losses_of_a_broken_network_are_not_finite():
    """A NaN in a prior that nothing matches must not go unnoticed."""
    boxes, labels = random_batch(2, 4, seed=1)
    criterion = MultiBoxLoss(PRIORS, loc_loss="l1", loc_reduction="sum")
    conf = torch.zeros(2, 8732, 2)
    conf[0, (match(boxes, labels, PriorTable(PRIORS))[0][0] == 0).nonzero()[5], 1] = torch.nan
    for way in (criterion.sparse, criterion.static):
        assert way(Predictions(torch.zeros(2, 8732, 4), conf, []), boxes, labels)[1].isnan()


def test_every_person_owns_a_prior_when_two_share_their_best():
    priors = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2]])
    twin = torch.tensor([0.4, 0.4, 0.6, 0.6])
    boxes = torch.stack([twin, twin + 0.01, torch.zeros(4)]).unsqueeze(0)
    target, matched_idxs = match_both(boxes, torch.tensor([[1, 1, 0]]), priors)
    assert target.tolist() == [[1, 1]] and matched_idxs.tolist() == [[0, 1]]


def test_a_person_takes_its_second_best_prior_before_a_weaker_person():
    # IoUs fall 0 > 1 > 2 on prior 0; person 1, refused there, beats person 2 on prior 1.
    priors = torch.tensor([[0.30, 0.5, 0.2, 0.2], [0.42, 0.5, 0.2, 0.2], [0.9, 0.9, 0.1, 0.1]])
    x = torch.tensor([0.30, 0.34, 0.47])
    cxcywh = torch.stack([x, torch.full((3,), 0.5), *torch.full((2, 3), 0.2)], -1)
    boxes = box_convert(cxcywh, "cxcywh", "xyxy")
    target, matched_idxs = match_both(boxes.unsqueeze(0), torch.ones(1, 3).long(), priors)
    expected = slow_match(boxes, torch.ones(3), priors)
    assert (target[0].tolist(), matched_idxs[0].tolist()) == expected
    assert sorted(matched_idxs[0][target[0] == 1].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(4))
def test_crowds_are_matched_greedily(seed):
    """Many near-identical boxes compete for few priors."""
    g = torch.Generator().manual_seed(seed)
    boxes = torch.tensor([0.4, 0.3, 0.6, 0.8]) + torch.rand(2, 12, 4, generator=g) * 0.03
    labels = torch.ones(2, 12, dtype=torch.int64)
    priors = PRIORS[torch.randperm(len(PRIORS), generator=g)[:60]]
    target, matched_idxs = match_both(boxes, labels, priors)
    for image in range(2):
        slow_target, slow_idxs = slow_match(boxes[image], labels[image], priors)
        assert target[image].tolist() == slow_target
        positive = target[image] == 1
        assert torch.equal(matched_idxs[image][positive], torch.tensor(slow_idxs)[positive])


def test_ignored_objects_are_neither_positive_nor_mined():
    boxes = torch.tensor([[[0.2, 0.2, 0.6, 0.9]]])
    target, _ = match_both(boxes, torch.tensor([[-1]]), PRIORS)
    assert not (target == 1).any()
    iou = box_iou(boxes[0], box_convert(PRIORS, "cxcywh", "xyxy"))[0]
    assert (target[0, iou >= 0.5] == -1).all()
    conf = torch.zeros(1, 8732, 2)
    conf[0, target[0] == -1] = torch.tensor([0.0, 50.0])  # loud, but in the ignored region
    criterion = MultiBoxLoss(PRIORS, loc_loss="l1", loc_reduction="sum")
    _, loss = criterion(Predictions(torch.zeros(1, 8732, 4), conf, []), boxes, torch.tensor([[-1]]))
    assert loss.item() == pytest.approx(3 * math.log(2), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_no_ignored_object_is_mined_by_its_best_prior(seed):
    """Includes objects so small that no prior is half inside them."""
    boxes, labels = random_batch(16, 8, seed, share_ignored=0.5)
    centre, size = (boxes[..., 2:] + boxes[..., :2]) / 2, boxes[..., 2:] - boxes[..., :2]
    size = size * torch.rand(16, 8, 1, generator=torch.Generator().manual_seed(seed))
    boxes = torch.cat([centre - size / 2, centre + size / 2], -1)
    target, _ = match_both(boxes, labels, PRIORS)
    iou = box_iou(boxes.flatten(0, 1), box_convert(PRIORS, "cxcywh", "xyxy")).view(16, 8, -1)
    for image, k in (labels == -1).nonzero().tolist():
        assert target[image, iou[image, k].argmax()] == -1
        people = iou[image, labels[image] == 1].amax(0) if (labels[image] == 1).any() else 0
        near = (iou[image, k] >= 0.5) & (iou[image, k] > people)
        owned = target[image] == 1  # a person may own a prior that is nearer to an ignored object
        assert (target[image, near & ~owned] == -1).all() and (near & owned).sum() <= 8
    assert ((target == 1).any(1) == (labels == 1).any(1)).all()  # no person is left out for that
    conf = torch.zeros(16, 8732, 2, requires_grad=True)
    criterion = MultiBoxLoss(PRIORS, loc_loss="l1", loc_reduction="sum")
    for way in (criterion.sparse, criterion.static):
        terms = way(Predictions(torch.zeros(16, 8732, 4), conf, []), boxes, labels)
        (gradient,) = torch.autograd.grad(terms[1], conf)
        assert not gradient[target == -1].any() and terms[2] == (target == 1).sum()


def test_empty_frames_have_a_finite_loss_and_gradient():
    loc = torch.zeros(2, 8732, 4, requires_grad=True)
    conf = torch.zeros(2, 8732, 2, requires_grad=True)
    criterion = MultiBoxLoss(PRIORS, loc_loss="smooth_l1", loc_reduction="mean")
    for most in (0, 1):
        losses = criterion(
            Predictions(loc, conf, []), torch.zeros(2, most, 4), torch.zeros(2, most, dtype=torch.int64)
        )
        assert losses[0] == 0 and losses[1].item() == pytest.approx(6 * math.log(2), rel=1e-5)
        grads = torch.autograd.grad(sum(losses), (loc, conf))
        assert all(g.isfinite().all() for g in grads) and grads[1].abs().sum() > 0


def test_frames_without_people_do_not_inflate_the_balanced_loss():
    """One person in a batch of eight frames: 3 negatives in each of the other seven."""
    boxes, labels = torch.zeros(8, 1, 4), torch.zeros(8, 1, dtype=torch.int64)
    boxes[0, 0], labels[0, 0] = PRIORS[4000], 1
    boxes[0] = box_convert(boxes[0], "cxcywh", "xyxy")
    predictions = Predictions(torch.zeros(8, 8732, 4), torch.zeros(8, 8732, 2), [])
    n = int((match(boxes, labels, PriorTable(PRIORS))[0] == 1).sum())
    terms = 4 * n + 21
    for divisor, expected in (("positives", terms / n), ("balanced", terms / (n + 7))):
        criterion = MultiBoxLoss(PRIORS, loc_loss="l1", loc_reduction="sum", conf_divisor=divisor)
        loss = criterion(predictions, boxes, labels)[1].item()
        assert loss == pytest.approx(expected * math.log(2), rel=1e-5)
    no_one = criterion(predictions, boxes, torch.zeros_like(labels))[1].item()
    assert no_one == pytest.approx(3 * math.log(2), rel=1e-5)


def test_loc_mean_is_a_quarter_of_the_sum():
    boxes, labels = random_batch(3, 4, seed=1)
    predictions = Predictions(torch.randn(3, 8732, 4), torch.randn(3, 8732, 2), [])
    whole, quarter = (
        MultiBoxLoss(PRIORS, loc_loss="l1", loc_reduction=r)(predictions, boxes, labels)[0]
        for r in ("sum", "mean")
    )
    assert whole.item() == pytest.approx(4 * quarter.item())


def test_segmentation_loss_by_hand():
    # Two maps; logits (background, person). Cross-entropies: log 2 and log(1 + e^-2).
    first = torch.zeros(1, 2, 1, 2)
    first[0, 1, 0, 1] = 2.0
    seg = [first, torch.zeros(1, 2, 1, 1)]
    masks = [torch.tensor([[[-1, 1]]]), torch.tensor([[[0]]])]
    a, b = math.log(1 + math.exp(-2)), math.log(2)
    expected = {("mean", "sum"): a + b, ("mean", "mean"): (a + b) / 2}
    for (cells, maps), value in expected.items():
        loss = SegmentationLoss(2, cells=cells, maps=maps)(seg, masks)[0]
        assert loss.item() == pytest.approx(value, rel=1e-5)
    both = [torch.tensor([[[0, 1]]]), masks[1]]
    loss = SegmentationLoss(2, cells="sum", maps="sum")(seg, both)[0]
    assert loss.item() == pytest.approx(a + 2 * b, rel=1e-5)
    doubled = [torch.cat([s, s]) for s in seg], [torch.cat([m, m]) for m in both]
    assert SegmentationLoss(2, cells="sum", maps="sum")(*doubled)[0] == pytest.approx(loss)


def test_learned_uncertainty_by_hand():
    seg, masks = [torch.zeros(1, 2, 1, 1)] * 2, [torch.tensor([[[0]]]), torch.tensor([[[-1]]])]
    criterion = SegmentationLoss(2, cells="mean", maps="uncertainty")
    a = math.log(2)
    loss, map_losses = criterion(seg, masks)
    assert loss.item() == pytest.approx(a) and map_losses.tolist() == pytest.approx([a, 0])
    with torch.no_grad():
        criterion.log_variance[:] = torch.tensor([math.log(2 * a), 99.0])
    loss, _ = criterion(seg, masks)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 + math.log(2 * a) / 2 + 2.5)  # 99 counts as 5
    assert criterion.log_precision().exp().tolist() == pytest.approx([1 / (2 * a), math.exp(-5)])
    # exp(-s) L + s / 2 is lowest where exp(s) is twice the loss.
    assert criterion.log_variance.grad.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_a_maps_person_cells_have_their_share_of_the_weight():
    """With one person cell of five, a share of 0.2 changes nothing."""
    logits, mask = torch.randn(1, 2, 2, 3), torch.tensor([[[1, 0, 0], [0, 0, -1]]])
    entropy = F.cross_entropy(logits, mask, ignore_index=-1, reduction="none").flatten()
    for share in (0.2, 0.5):
        criterion = SegmentationLoss(1, cells="mean", maps="sum", balance="share", person_share=share)
        expected = share * entropy[0] + (1 - share) * entropy[1:5].mean()
        assert criterion([logits], [mask])[0].item() == pytest.approx(expected.item(), rel=1e-5)
    background = mask.clamp(max=0)  # no person: all cells alike
    expected = F.cross_entropy(logits, background, ignore_index=-1)
    assert criterion([logits], [background])[0].item() == pytest.approx(expected.item(), rel=1e-5)
    persons = torch.ones_like(mask)
    expected = F.cross_entropy(logits, persons)
    assert criterion([logits], [persons])[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_taller_persons_weigh_more_as_in_sds_rcnn():
    grid = Grid(2, 2, 0.5, 0.5)
    # 100 pixels of 512 high over the upper left cell's centre; an ignored object beside it.
    top = 0.25 - 50 / 512
    boxes = torch.tensor([[[0.0, top, 0.5, top + 100 / 512], [0.5, 0.0, 1.0, 1.0]]])
    heights = cell_heights(boxes, torch.tensor([[1, -1]]), grid)
    assert heights.flatten().tolist() == pytest.approx([100, 0, 0, 0])
    assert (
        cell_heights(boxes[:, :0], torch.zeros(1, 0).long(), grid).tolist() == torch.zeros(1, 2, 2).tolist()
    )
    logits, mask = torch.randn(1, 2, 2, 2), torch.tensor([[[1, -1], [0, 0]]])
    entropy = F.cross_entropy(logits, mask, ignore_index=-1, reduction="none").flatten()
    loss = SegmentationLoss(1, cells="mean", maps="sum", balance="height")([logits], [mask], [heights])[0]
    expected = (3 * entropy[0] + entropy[2] + entropy[3]) / 5  # 1 + 100 / 50, over the sum of weights
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_segmentation_loss_is_zero_for_perfect_logits():
    """A reshape that mixes channels with cells, as in the logged experiments, could not reach this."""
    mask = torch.randint(0, 2, (3, 5, 7))
    logits = F.one_hot(mask, 2).permute(0, 3, 1, 2) * 50.0
    assert SegmentationLoss(1, cells="mean", maps="sum")([logits], [mask])[0] < 1e-6


def test_segmentation_loss_is_zero_if_all_cells_are_ignored():
    logits = torch.randn(2, 2, 3, 3, requires_grad=True)
    left_out = [torch.full((2, 3, 3), -1)]
    loss, _ = SegmentationLoss(1, cells="mean", maps="sum")([logits], left_out)
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()
