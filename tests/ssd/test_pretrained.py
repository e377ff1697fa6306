"""State dictionaries as pretrained weights: loaded if they fit, rejected with a reason if not."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, vgg16, vgg16_bn
from torchvision.models.detection import ssd300_vgg16

import train
from kaist.files import InputError
from model import SSD300, make_network
from ssd.pretrained import load_pretrained

WIDE = ["--width", "1.0"]
PLAIN = [*WIDE, "--no-batch-norm"]


def state_of(make, **arguments):
    """A torchvision state in which each tensor is one repeated number, so that the file is small."""
    with torch.device("meta"):
        wanted = make(weights=None, **arguments).state_dict()
    return {key: torch.tensor(0.01 * i).expand(value.shape) for i, (key, value) in enumerate(wanted.items())}


def save(tmp_path, state):
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    return str(path)


@pytest.mark.parametrize(("make", "flags"), [(vgg16, PLAIN), (vgg16_bn, [*WIDE, "--batch-norm"])])
def test_a_vgg_state_file_fills_the_backbone(make, flags, tmp_path):
    state = state_of(make)
    path = save(tmp_path, state)
    config = train.configure(["--pretrained", path, *flags])
    model = SSD300(**train.model_arguments(config))
    load_pretrained(model, config.pretrained)
    assert (model.to_conv4_3[0].weight == state["features.0.weight"][0, 0, 0, 0]).all()
    assert (model.conv6_7[3].bias == state["classifier.3.bias"][0]).all()


@pytest.mark.parametrize("row", ["41", "42"])
def test_both_streams_of_mlpd_and_insanet_start_from_vgg16_bn(row, tmp_path):
    state = state_of(vgg16_bn)
    red_differs = torch.arange(3.0).view(1, 3, 1, 1).expand(64, 3, 3, 3)
    path = save(tmp_path, state | {"features.0.weight": red_differs})
    config = train.configure(["--experiment", row, "--pretrained", path])
    model = make_network(**train.model_arguments(config))
    load_pretrained(model, path)
    assert torch.equal(model.visible[0].weight, red_differs)
    assert torch.equal(model.lwir[0].weight, red_differs[:, :1])
    assert (model.lwir[1].running_var == state["features.1.running_var"][0]).all()
    assert (model.stages[0][7].weight == state["features.41.weight"][0]).all()  # conv5_3's BatchNorm
    conv4_3 = model.visible[30] if row == "41" else model.to_conv4_3[7]
    assert isinstance(conv4_3, nn.Conv2d)
    assert (conv4_3.weight == state["features.30.weight"][0, 0, 0, 0]).all()
    assert model.stages[0][10].weight.std() > 0.01  # conv6_1 is another's


def test_an_ssd_state_file_fills_everything(tmp_path):
    state = state_of(ssd300_vgg16, weights_backbone=None, num_classes=91)
    path = save(tmp_path, state)
    config = train.configure(["--pretrained", path, *PLAIN, "--priors", "ssd300-coco"])
    model = SSD300(**train.model_arguments(config))
    load_pretrained(model, path)
    assert (model.conv4_3_norm.scale == state["backbone.scale_weight"]).all()
    head = "head.classification_head.module_list.0.weight"
    assert (model.conf_heads[0].weight == state[head][0, 0, 0, 0]).all()


@pytest.mark.parametrize(
    ("make", "change", "flags", "message"),
    [
        (vgg16, {}, WIDE, "weights of VGG16 for a network with BATCH_NORM = True; set BATCH_NORM"),
        (vgg16_bn, {}, PLAIN, "weights of VGG16-BN for a network with BATCH_NORM = False"),
        (vgg16, {}, [], "WIDTH = 1.0"),
        (vgg16, {"classifier.3.weight": None}, PLAIN, "lacks classifier.3.weight.*1 of 30"),
        (vgg16, {"features.28.bias": torch.zeros(7)}, PLAIN, r"features.28.bias has shape \(7,\)"),
        (resnet18, {}, PLAIN, "lacks features.0.weight.*VGG16"),
        (ssd300_vgg16, {}, WIDE, "an SSD300's weights need BATCH_NORM = False"),
        (ssd300_vgg16, {"backbone.scale_weight": None}, PLAIN, "lacks backbone.scale_weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_any_data(make, change, flags, message, tmp_path):
    state = state_of(make, **({"weights_backbone": None} if make is ssd300_vgg16 else {})) | change
    path = save(tmp_path, {key: value for key, value in state.items() if value is not None})
    if make is resnet18 and "--batch-norm" not in flags:
        flags = [*WIDE, "--batch-norm"]  # it has running means
    with pytest.raises(InputError, match=message):
        train.configure(["--pretrained", path, *flags, "--data-root", "nowhere"])


def test_other_files_are_rejected(tmp_path):
    with pytest.raises(InputError, match="weights file not found"):
        train.configure(["--pretrained", "imagnet", *PLAIN])
    path = tmp_path / "x.pth"
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="x.pth: not a readable weights file"):
        train.configure(["--pretrained", str(path), *PLAIN])
    torch.save(nn.Linear(1, 1), path)  # a pickled object of another network
    with pytest.raises(InputError, match="lacks features.0.weight"):
        train.configure(["--pretrained", str(path), *PLAIN])
    torch.save({"epoch": 3}, path)
    with pytest.raises(InputError, match="not a state dictionary"):
        train.configure(["--pretrained", str(path), *PLAIN])


def test_a_file_written_before_zip_archives_is_read(tmp_path):
    """torchvision's VGG16 files have this format."""
    path = tmp_path / "old.pth"
    torch.save(state_of(vgg16), path, _use_new_zipfile_serialization=False)
    assert train.configure(["--pretrained", str(path), *PLAIN]).pretrained == str(path)
