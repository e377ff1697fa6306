"""Row 35 against torchvision's own SSD300 from one state file, on real KAIST frames."""

from pathlib import Path

import pytest
import torch
from torchvision.models.detection import ssd300_vgg16

from engine.config import model_arguments, read_config
from kaist.images import load_image, to_array
from model import SSD300
from ssd.augment import whole_frame
from ssd.boxes import detect
from ssd.pretrained import load_pretrained

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def network():
    """A torchvision SSD300 of background and person that detects something everywhere."""
    torch.manual_seed(0)
    limits = {"score_thresh": 0.3, "nms_thresh": 0.45, "detections_per_img": 200}
    network = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=2, **limits).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith("head"):
                parameter.normal_(std=0.003)  # scores well apart from 0 and 1
    return network


def test_row_35_detects_what_torchvision_does(network, reference, tmp_path):
    torch.save(network.state_dict(), tmp_path / "ssd300.pth")
    row = read_config(str(PROJECT / "train.py"), ["--experiment", "35", "--input-mode", "visible"])
    ours = SSD300(**model_arguments(row)).eval()
    load_pretrained(ours, str(tmp_path / "ssd300.pth"), row.lwir_filters)
    paths = sorted((reference / "mini" / "images").glob("set*/V*/visible/*.jpg"))
    assert len(paths) >= 5
    for path in (paths[0], paths[-1]):  # a day and a night
        image = whole_frame(3, (300, 300)).apply(to_array(load_image(path, "visible")))
        with torch.inference_mode():
            [expected] = network([image / 255])
            predictions = ours(image.unsqueeze(0))
            [(boxes, scores)] = detect(predictions, ours.priors, min_score=0.3, nms_iou=0.45, max_boxes=200)
        assert len(boxes) == len(expected["boxes"]) > 20
        assert torch.allclose(boxes * 300, expected["boxes"], atol=0.01)
        assert torch.allclose(scores, expected["scores"], atol=1e-4)
