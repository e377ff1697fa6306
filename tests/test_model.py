"""SSD300: shapes, priors, box coding, NMS, and parity with torchvision's networks."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import vgg16, vgg16_bn
from torchvision.models.detection import ssd300_vgg16
from torchvision.ops import box_convert, nms

from kaist.files import InputError
from model import SSD300, L2Norm
from ssd.boxes import (
    Predictions,
    decode,
    detect,
    encode,
    feature_map_sizes,
    make_grids,
    make_priors,
    prior_shapes,
)
from ssd.pretrained import convert_torchvision_ssd, convert_torchvision_vgg, load_pretrained


def make_model(**changes) -> SSD300:
    arguments = {
        "input_mode": "lwir",
        "batch_norm": False,
        "width": 0.125,
        "infusion": (1, 1, 0, 0, 0, 0),
        "infusion_conv": False,
        "prior_set": "ssd300",
        "size": (300, 300),
    }
    return SSD300(**(arguments | changes))


@pytest.mark.parametrize(
    ("mode", "channels"), [("lwir", 1), ("visible", 3), ("mean", 4), ("early", 4), ("halfway", 4)]
)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_output_shapes(mode, channels, batch_norm):
    model = make_model(input_mode=mode, batch_norm=batch_norm, infusion=(1, 0, 1, 0, 0, 1))
    images = torch.randint(0, 256, (2, channels, 300, 300), dtype=torch.uint8)
    loc, conf, seg = model.train()(images)
    assert loc.shape == (2, 8732, 4) and conf.shape == (2, 8732, 2)
    assert [tuple(s.shape) for s in seg] == [(2, 2, 38, 38), (2, 2, 10, 10), (2, 2, 1, 1)]


def test_masks_are_not_computed_at_inference():
    model = make_model(infusion_conv=True).eval()
    calls = []
    for head in model.seg_heads:
        head.register_forward_hook(lambda *_: calls.append(1))
    images = torch.zeros((1, 1, 300, 300), dtype=torch.uint8)
    assert model(images).seg == [] and not calls
    assert len(model(images, with_masks=True).seg) == 2 and len(calls) == 2


def test_mean_mode_averages_the_normalised_modalities():
    model = make_model(input_mode="mean")
    images = torch.full((1, 4, 2, 2), 100, dtype=torch.uint8)
    red = ((100 / 255 - 0.485) / 0.229 + (100 / 255 - 0.449) / 0.226) / 2
    assert torch.allclose(model.normalise(images)[0, 0], torch.tensor(red), atol=1e-5)


def test_feature_maps_follow_the_input_size():
    assert feature_map_sizes((300, 300)) == [(s, s) for s in (38, 19, 10, 5, 3, 1)]
    model = make_model(size=(300, 375)).eval()
    with torch.no_grad():
        maps = model.feature_maps(torch.zeros(1, 1, 300, 375))
    assert [tuple(m.shape[2:]) for m in maps] == model.map_sizes
    with pytest.raises(InputError, match="INPUT_SIZE"):
        make_model(size=(256, 320))


def test_priors_by_hand():
    priors = make_priors(make_grids((300, 300), "even"), prior_shapes("ssd300"))
    assert priors.shape == (8732, 4)
    assert torch.allclose(priors[0], torch.tensor([0.5 / 38, 0.5 / 38, 0.1, 0.1]))
    between = math.sqrt(0.1 * 0.2)
    assert torch.allclose(priors[1, 2:], torch.tensor([between, between]))
    wide = torch.tensor([0.1 * math.sqrt(2), 0.1 / math.sqrt(2)])
    assert torch.allclose(priors[2, 2:], wide) and torch.allclose(priors[3, 2:], wide.flip(0))
    assert torch.allclose(priors[4, :2], torch.tensor([1.5 / 38, 0.5 / 38]))  # columns first
    corners = box_convert(priors, "cxcywh", "xyxy")
    crossing = ((corners < -1e-6) | (corners > 1 + 1e-6)).any(1).sum()
    assert crossing == 2740  # a known property of SSD300's priors


def test_prior_centres_are_receptive_field_centres():
    """In a network of equal weights a bright dot gives the highest value in the cell whose prior centre
    is nearest. The two coarsest maps keep even centres."""
    even, stride = (make_grids((300, 300), centres) for centres in ("even", "stride"))
    assert stride[4:] == even[4:] and [grid[:4] for grid in stride[:2]] == [
        (38, 38, 8 / 300, 8 / 300),
        (19, 19, 16 / 300, 16 / 300),
    ]
    assert np.allclose(make_grids((512, 640), "stride"), make_grids((512, 640), "even"))
    model = make_model(infusion=(0,) * 6, prior_set="pedestrian", centres="stride").eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 1 / layer.weight[0].numel())
    for x in (36, 148, 276):  # 8 (j + 0.5) for j = 4, 18, 34
        image = torch.zeros(1, 1, 300, 300)
        image[..., 146:150, x - 2 : x + 2] = 1
        with torch.no_grad():
            conv4_3 = model.to_conv4_3(image)[0, 0].double()
        centre = (conv4_3.sum(0) * (torch.arange(38) + 0.5) * 8).sum() / conv4_3.sum()
        assert centre == pytest.approx(x, abs=1)  # even cells would be off by 3.6 at the last
    centres = model.priors[:: len(prior_shapes("pedestrian")[0])][:38, 0] * 300
    assert torch.allclose(centres, torch.arange(38) * 8 + 4.0)


def test_priors_move_with_the_model_but_are_not_saved():
    model = make_model()
    assert "priors" in dict(model.named_buffers()) and "priors" not in model.state_dict()


def test_encode_decode_round_trip_and_hand_value():
    prior = torch.tensor([0.5, 0.5, 0.2, 0.4])
    box = torch.tensor([0.52, 0.46, 0.1, 0.4])
    wanted = [0.02 / (0.1 * 0.2), -0.04 / (0.1 * 0.4), math.log(0.5) / 0.2, 0.0]
    assert torch.allclose(encode(box, prior), torch.tensor(wanted), atol=1e-5)
    boxes = torch.rand(100, 4) * 0.5 + 0.01
    priors = torch.rand(100, 4) * 0.5 + 0.01
    assert torch.allclose(decode(encode(boxes, priors), priors), boxes, atol=1e-5)


def test_decode_stays_finite():
    assert decode(torch.full((1, 4), 1e6), torch.full((1, 4), 0.5)).isfinite().all()


def test_l2_norm_is_finite_where_features_are_zero():
    norm = L2Norm(8)
    x = torch.zeros(1, 8, 3, 3, requires_grad=True)
    out = norm(x)
    out.sum().backward()
    assert (out == 0).all() and x.grad.isfinite().all() and norm.scale.grad.isfinite().all()
    unit = norm(torch.rand(2, 8, 3, 3) + 0.1)
    assert torch.allclose(unit.norm(dim=1), torch.full((2, 3, 3), 20.0), atol=1e-3)


@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_detect_equals_nms_of_the_400_best_candidates(spread):
    torch.manual_seed(0)
    priors = make_model().priors
    predictions = Predictions(torch.randn(3, 8732, 4) * 0.3, torch.randn(3, 8732, 2) * spread, [])
    found = detect(predictions, priors, min_score=0.01, nms_iou=0.45, max_boxes=200)
    for (boxes, scores), loc, conf in zip(found, predictions.loc, predictions.conf, strict=True):
        p = conf.softmax(-1)[:, 1]
        candidates = (p >= 0.01) & (p >= p.sort(descending=True).values[399])
        everything = box_convert(decode(loc, priors), "cxcywh", "xyxy").clamp(0, 1)[candidates]
        kept = nms(everything, p[candidates], 0.45)[:200]
        assert torch.allclose(boxes, everything[kept], atol=1e-6)
        assert torch.allclose(scores, p[candidates][kept], atol=1e-6)
        assert (scores.diff() <= 0).all()


def test_detect_can_return_nothing():
    priors = make_model().priors
    conf = torch.tensor([10.0, -10.0]).expand(1, 8732, 2)
    predictions = Predictions(torch.zeros(1, 8732, 4), conf, [])
    [(boxes, scores)] = detect(predictions, priors, min_score=0.5, nms_iou=0.5, max_boxes=200)
    assert boxes.shape == (0, 4) and scores.shape == (0,)


def test_torchvision_ssd_weights_give_the_same_outputs():
    torch.manual_seed(0)
    theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=91).eval()
    with torch.no_grad():
        for bias in (p for name, p in theirs.named_parameters() if name.endswith("bias")):
            bias.normal_(std=0.1)
        theirs.backbone.scale_weight.uniform_(10, 30)
    ours = make_model(input_mode="visible", width=1.0, prior_set="ssd300-coco").eval()
    convert_torchvision_ssd(ours, theirs.state_dict())
    x = torch.randn(1, 3, 300, 300)
    with torch.no_grad():
        loc, conf, _ = ours.predict(x, with_masks=False)
        std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        outputs = theirs.head(list(theirs.backbone(x * std * 255).values()))
    scale = outputs["bbox_regression"].abs().max()
    assert torch.allclose(loc / scale, outputs["bbox_regression"] / scale, atol=1e-4)
    assert torch.allclose(conf / scale, outputs["cls_logits"][..., :2] / scale, atol=1e-4)
    assert torch.allclose(loc, outputs["bbox_regression"], atol=1e-4, rtol=1e-4)
    assert torch.allclose(conf, outputs["cls_logits"][..., :2], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module", params=[vgg16, vgg16_bn])
def vgg(request):
    """torchvision's untrained VGG16, with random BatchNorm statistics; half a gigabyte."""
    torch.manual_seed(0)
    network = request.param(weights=None).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.1, 0.1)
            layer.running_var.uniform_(0.5, 2)
    return network


def has_batch_norm(network):
    return any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())


def test_torchvision_vgg_weights_give_the_same_features(vgg):
    ours = make_model(input_mode="visible", width=1.0, batch_norm=has_batch_norm(vgg)).eval()
    convert_torchvision_vgg(ours, vgg.state_dict())
    x = torch.randn(1, 3, 64, 64)
    conv5_3 = vgg.features[:-1]  # all but the last pool
    with torch.no_grad():
        assert torch.allclose(ours.to_conv5_3(ours.to_conv4_3(x)), conv5_3(x), atol=1e-5)
    fc6 = vgg.classifier[0].weight.view(4096, 512, 7, 7)
    assert torch.equal(ours.conv6_7[1].weight[5, :, 1, 2], fc6[20, :, 3, 6])
    assert torch.equal(ours.conv6_7[3].bias, vgg.classifier[3].bias[::4])


@pytest.mark.parametrize("vgg", [vgg16], indirect=True)
@pytest.mark.parametrize("lwir_filters", ["mean", "sum"])
def test_conv1_1_of_lwir_comes_from_the_rgb_filters(vgg, lwir_filters):
    theirs = vgg.state_dict()
    rgb = theirs["features.0.weight"]
    lwir, early = make_model(width=1.0), make_model(input_mode="early", width=1.0)
    for model in (lwir, early):
        convert_torchvision_vgg(model, theirs, lwir_filters)
    expected = rgb.sum(1, keepdim=True) / (3 if lwir_filters == "mean" else 1)
    assert torch.allclose(lwir.to_conv4_3[0].weight, expected, atol=1e-6)
    assert torch.equal(early.to_conv4_3[0].weight[:, :3], rgb)
    assert torch.allclose(early.to_conv4_3[0].weight[:, 3:], expected, atol=1e-6)


def test_a_frame_of_the_mean_colour_is_normalised_to_zero():
    mean, std = (0.2, 0.4, 0.6, 0.8), (0.1, 0.2, 0.3, 0.4)
    for mode, channels in {"lwir": slice(3, 4), "visible": slice(0, 3), "early": slice(0, 4)}.items():
        model = make_model(input_mode=mode, pixel_mean=mean, pixel_std=std)
        frame = (torch.tensor(mean)[channels] * 255).round().view(1, -1, 1, 1)
        assert torch.allclose(model.normalise(frame), torch.zeros(()), atol=1e-5)
        spread = torch.tensor(std)[channels].view(1, -1, 1, 1) * 255
        assert torch.allclose(model.normalise(frame + spread), torch.ones(()), atol=1e-5)


def test_both_streams_start_from_published_weights_and_are_fused_by_their_mean(vgg):
    ours = make_model(input_mode="halfway", width=1.0, batch_norm=has_batch_norm(vgg)).eval()
    convert_torchvision_vgg(ours, vgg.state_dict())
    x = torch.randn(1, 4, 64, 64)
    grey = x[:, 3:] / 3  # RGB filters on three equal channels equal their mean on the channels' sum
    conv4_3 = vgg.features[: 33 if has_batch_norm(vgg) else 23]
    with torch.no_grad():
        streams = conv4_3(x[:, :3]), conv4_3(grey.expand(-1, 3, -1, -1))
        assert torch.allclose(ours.to_conv4_3(x), sum(streams) / 2, atol=1e-5)
        conv5_3 = vgg.features[len(conv4_3) : -1](ours.to_conv4_3(x))
        assert torch.allclose(ours.to_conv5_3(ours.to_conv4_3(x)), conv5_3, atol=1e-5)


def test_coco_weights_do_not_change_heads_with_other_priors():
    theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=91).state_dict()
    ours = make_model(input_mode="halfway", width=1.0, prior_set="pedestrian")
    heads = [p.clone() for p in (*ours.loc_heads.parameters(), *ours.conf_heads.parameters())]
    convert_torchvision_ssd(ours, theirs)
    after = [*ours.loc_heads.parameters(), *ours.conf_heads.parameters()]
    assert all(map(torch.equal, heads, after))
    for stream in (ours.to_conv4_3.visible, ours.to_conv4_3.lwir):
        assert torch.equal(stream[2].bias, theirs["backbone.features.2.bias"])
    assert torch.equal(ours.extras[3][2].bias, theirs["backbone.extra.4.2.bias"])


def test_a_failed_download_names_the_remedy(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"vgg16-.*\.pth.*--pretrained none"):
        load_pretrained(make_model(), "imagenet")
