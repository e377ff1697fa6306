"""Training stays finite on adversarial batches."""

import pytest
import torch

from model import SSD300, L2Norm
from pseudo_gt import box_masks
from ssd.boxes import Predictions, encode, make_grids, make_priors, prior_shapes
from ssd.losses import MultiBoxLoss, SegmentationLoss
from utils import autocast

FRAMES = 2
WHOLE, PIXEL = [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.5 + 1 / 300, 0.5 + 1 / 300]


def crowd(n):
    """n boxes of all sizes, many of them equal."""
    g = torch.Generator().manual_seed(n)
    low = torch.rand(n, 2, generator=g) * 0.9
    size = torch.rand(n, 2, generator=g) * (1 - low)
    boxes = torch.cat([low, low + size.clamp(min=1 / 300)], -1)
    boxes[n // 2 :] = boxes[: n - n // 2]
    return boxes.tolist()


BATCHES = {
    "empty": ([], 1),
    "all ignored": ([WHOLE, PIXEL, [0.2, 0.2, 0.4, 0.8]], -1),
    "one pixel": ([PIXEL, [0.0, 0.0, 1 / 300, 1 / 300], [1 - 1 / 300, 0.0, 1.0, 1.0]], 1),
    "full frame": ([WHOLE, WHOLE], 1),
    "200 boxes": (crowd(200), 1),
    "no area": ([[0.5, 0.5, 0.5, 0.5], [0.3, 0.2, 0.3, 0.9]], 1),
    "inverted": ([[0.6, 0.7, 0.4, 0.2]], 1),
}
IMAGES = {
    "noise": lambda: torch.randint(0, 256, (FRAMES, 4, 300, 300), dtype=torch.uint8),
    "black": lambda: torch.zeros((FRAMES, 4, 300, 300), dtype=torch.uint8),
    "white": lambda: torch.full((FRAMES, 4, 300, 300), 255, dtype=torch.uint8),
    "mean": lambda: (
        torch.tensor([124, 116, 104, 114], dtype=torch.uint8).view(1, 4, 1, 1).expand(FRAMES, 4, 300, 300)
    ),
}


@pytest.mark.parametrize(
    ("precision", "batch_norm"), [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_training_on_adversarial_batches_stays_finite(precision, batch_norm):
    torch.manual_seed(0)
    model = SSD300(
        input_mode="early",
        batch_norm=batch_norm,
        width=0.03,
        infusion=(1,) * 6,
        infusion_conv=True,
        prior_set="ssd300",
        size=(300, 300),
    ).train()
    multibox = MultiBoxLoss(model.priors, loc_loss="smooth_l1", loc_reduction="sum")
    segmentation = SegmentationLoss(6, cells="mean", maps="uncertainty")
    parameters = [*model.parameters(), *segmentation.parameters()]
    optimizer = torch.optim.Adam(parameters, 2e-3)
    names = list(IMAGES)
    for i, (objects, label) in enumerate(BATCHES.values()):
        boxes = torch.tensor(objects).view(1, -1, 4).repeat(FRAMES, 1, 1)
        labels = torch.full(boxes.shape[:2], label)
        padded = boxes if boxes.shape[1] else torch.zeros(FRAMES, 1, 4)
        masks = box_masks(padded, labels if objects else torch.zeros(FRAMES, 1).long(), model.map_sizes)
        for image in (names[i % len(names)], names[(i + 1) % len(names)]):
            with autocast(torch.device("cpu"), precision):
                predictions = model(IMAGES[image]())
            loss = sum(multibox(predictions, boxes, labels))
            loss = loss + segmentation(predictions.seg, [m.long() for m in masks])[0]
            optimizer.zero_grad()
            loss.backward()
            assert loss.isfinite(), (image, objects)
            assert all(p.grad is None or p.grad.isfinite().all() for p in parameters)
            optimizer.step()
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_the_l2_norm_cannot_blow_up_a_gradient():
    """For cells with tiny features, dividing by their length would make the gradient huge."""
    norm = L2Norm(8)
    x = (torch.rand(1, 8, 1, 50) * torch.logspace(-30, 0, 50)).requires_grad_()
    norm(x)[0, 0].sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() <= 20 / 1e-3


def test_no_box_has_an_infinite_offset():
    prior = torch.tensor([0.5, 0.5, 0.2, 0.4])
    for box in ([0.5, 0.5, 0.0, 0.0], [0.5, 0.5, -0.1, 0.3], [0.0, 0.0, 1e-30, 1.0]):
        assert encode(torch.tensor(box), prior).isfinite().all()


def test_logits_of_any_size_give_a_finite_loss_and_gradient():
    priors = make_priors(make_grids((300, 300), "even"), prior_shapes("ssd300"))
    multibox = MultiBoxLoss(priors, loc_loss="smooth_l1", loc_reduction="sum")
    boxes, labels = torch.tensor([[[0.2, 0.2, 0.4, 0.7]]]), torch.tensor([[1]])
    for size in (1e3, 1e10, 1e30):
        loc = torch.full((1, 8732, 4), size).requires_grad_()
        conf = (torch.randn(1, 8732, 2) * size).requires_grad_()
        losses = multibox(Predictions(loc, conf, []), boxes, labels)
        gradients = torch.autograd.grad(sum(losses), (loc, conf))
        assert all(g.isfinite().all() for g in gradients) and sum(losses).isfinite()
