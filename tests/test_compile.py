"""torch.compile: one graph a network, in training and in evaluation, that computes the same.

Without the kernels' generator, which takes minutes; one of them is traced through autograd too (`aot_eager`).
"""

import pytest
import torch
import torch._dynamo.testing

import datasets
from kaist.sources import KAIST, open_testing
from model import make_network
from utils import detect_frames, predict

LIMITS = {"min_score": 0.01, "nms_iou": 0.45, "max_boxes": 20}
SHARED = {"width": 0.01, "infusion": (1, 0, 1, 0, 0, 1), "infusion_conv": True}
SSD = {"batch_norm": True, "prior_set": "pedestrian", "centres": "stride", "size": (257, 257), **SHARED}
PAPERS = {"prior_set": "multispectral", "size": (128, 128), **SHARED}
NETWORKS = {
    "mean": {"input_mode": "mean", **SSD},
    "halfway": {"input_mode": "halfway", **SSD},
    "mlpd": {"network": "mlpd", **PAPERS},
    "insanet": {"network": "insanet", **PAPERS},
}


@pytest.fixture
def pair(request):
    """A network, its compiled version, and the number of graphs so far."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = make_network(**NETWORKS[request.param])
    tracer = "aot_eager" if request.param == "mean" else "eager"
    backend = torch._dynamo.testing.CompileCounterWithBackend(tracer)
    return model, torch.compile(model, fullgraph=True, dynamic=False, backend=backend), backend


@pytest.mark.parametrize("pair", ["mean", "mlpd", "insanet"], indirect=True)
def test_training_and_evaluation_are_one_graph_each(pair):
    model, compiled, backend = pair
    images = torch.randint(256, (2, 4, *model.size), dtype=torch.uint8)
    gradients = []
    for network in (model, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            loc, conf, seg = network.train()(images)
        assert len(seg) == 3
        loss = loc.square().mean() + conf.square().mean() + sum(x.square().mean() for x in seg)
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(torch.cat([part.flatten() for part in gradient]))
    theirs, ours = gradients
    assert (ours - theirs).norm() < 0.05 * theirs.norm()  # of bf16, rounded in another order
    assert backend.frame_count == 1
    evaluated = torch.compile(model.eval(), fullgraph=True, dynamic=False, backend="eager")  # no gradient
    with torch.inference_mode():
        theirs, ours = (predict(network, images, torch.float32, True) for network in (model, evaluated))
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pair", ["halfway"], indirect=True)
def test_frames_are_detected_by_a_graph_of_one_shape(pair, demo_root):
    """Six frames in batches of four: the last batch is padded, without effect on the detections."""
    model, compiled, backend = pair
    for head in model.conf_heads:
        torch.nn.init.normal_(head.weight, std=0.1)
    where = {"test_list": "imageSets/test-all.txt", "test_annotations": "auto"}
    _, test_set = open_testing(KAIST, demo_root, **where)
    settings = {"min_height": 12.0, "margin": 5.0, "batch_size": 4, "workers": 0}
    loader = datasets.test_loader(demo_root, test_set, model, **settings)
    found = [detect_frames(network, loader, torch.float32, **LIMITS) for network in (model, compiled)]
    (ours, our_masks), (theirs, their_masks) = found
    assert len(ours.scores) == len(theirs.scores) > 0
    assert (ours.frame_idxs == theirs.frame_idxs).all() and abs(ours.boxes - theirs.boxes).max() < 0.1
    assert our_masks == pytest.approx(their_masks, abs=1e-3)
    assert backend.frame_count == 1
