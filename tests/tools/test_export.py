"""tools.export: the files compute the same boxes as PyTorch, on frames of any size."""

import importlib.util
import json
import os
import re
import shutil
import struct
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from engine.checkpoint import save_checkpoint
from kaist.files import InputError
from model import make_network, predict_mirrored
from ssd.deployable import Deployable, resize, to_half
from tools import export
from tools.safetensors import read_safetensors, to_safetensors
from utils import detect_image

PAGE = (Path(__file__).parents[2] / "docs/deploy.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
NEEDED = export.PACKAGES["onnx"]
EARLY = ("--input-mode", "early")
SETTINGS = {"min_score": 0.55, "nms_iou": 0.45, "max_boxes": 200}
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason=f"needs {', '.join(NEEDED)}"
)


def make(*flags, width="0.0625"):
    """An untrained network with widely spread scores, in evaluation mode, and its configuration."""
    config = train.configure(["--width", width, *map(str, flags)])
    torch.manual_seed(0)
    model = make_network(**train.model_arguments(config)).eval()
    for head in model.conf_heads:
        torch.nn.init.normal_(head.weight, std=0.05)  # so that no score is almost 1
    return model, config


def frames(channels, n=1, size=(512, 640), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, *size, channels), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size", [(512, 640), (300, 300), (100, 900), (1080, 1440)])
def test_resize_is_torchs_of_uint8(size):
    pixels = frames(2, size=size)
    expected = F.interpolate(
        pixels.permute(0, 3, 1, 2), (300, 300), mode="bilinear", antialias=True, align_corners=False
    )
    gap = (resize(pixels, (300, 300)) - expected.float()).abs()
    assert gap.max() <= 1 and (gap > 0).float().mean() < 0.01


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "flags",
    [
        ("--input-mode", "lwir"),
        EARLY,
        ("--experiment", "41", "--input-size", "128,128", "--pretrained", "none"),
    ],
)
def test_boxes_are_those_of_detect(flags, flip, monkeypatch):
    """On the same pixels, because the two methods of resizing differ by a grey level in some pixels."""
    model, config = make(*flags)
    frame = frames(1 if config.input_mode == "lwir" else 4)[0]
    same = resize(frame[None], model.size)[0].to(torch.uint8)
    settings = SETTINGS | {"min_score": 0.45}  # with three logits, a score is the mean of two probabilities
    monkeypatch.setattr("ssd.augment.Transform.apply", lambda *_: same)
    boxes, scores = detect_image(model, frame.numpy(), torch.float32, test_flip=flip, **settings)
    deployable = Deployable(model, **settings, predict_mirrored=predict_mirrored if flip else None)
    with torch.inference_mode():
        found, count = deployable(*map(torch.from_numpy, export.split_frame(frame.numpy())))
    assert found.shape == (1, 200, 5) and count.item() == len(scores) > 5
    assert not found[0, len(scores) :].any()
    expected = np.column_stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:], scores])
    n_unpaired, distance, gap = export.difference(found[0, : len(scores)].numpy(), expected)
    assert n_unpaired == 0 and distance < 0.01 and gap < 1e-5


def test_boxes_are_pixels_of_each_frame_and_images_do_not_suppress_each_other():
    model, _ = make("--input-mode", "lwir")
    deployable = Deployable(model, **SETTINGS)
    small = frames(1, n=2)
    with torch.inference_mode():
        both, counts = deployable(small)
        large, _ = deployable(small[:1].repeat_interleave(2, 1).repeat_interleave(2, 2))
        for i in range(2):
            one, count = deployable(small[i : i + 1])
            assert abs(count - counts[i]) <= 2
            assert export.difference(one[0, :count].numpy(), both[i, : counts[i]].numpy())[0] <= 4
        same, counts = deployable(small[:1].expand(3, -1, -1, -1))
    ends = [image[:count].numpy() for image, count in zip(same, counts.tolist(), strict=True)]
    assert all(export.difference(ends[0], other)[0] <= 4 for other in ends[1:])
    assert large[..., :4].max() > 641


def test_halved_networks_are_nearly_the_same():
    model, _ = make(*EARLY)
    raw = Deployable(model, **SETTINGS, raw=True)
    inputs = frames(3), frames(1)
    with torch.inference_mode():
        boxes, scores = raw(*inputs)
        to_half(model)
        half_boxes, half_scores = raw(*inputs)
    assert {p.dtype for p in model.loc_heads.parameters()} == {torch.float16}
    assert boxes.shape == (1, len(model.priors), 4) and scores.shape == boxes.shape[:2]
    assert 0 < (half_scores - scores).abs().max() < 0.05 and (half_boxes - boxes).abs().max() < 20


# ------------------------------------------------------------------- the command


@pytest.fixture
def run(demo_root, tmp_path, monkeypatch):
    """Call tools.export on an untrained network's checkpoint in tmp_path."""
    model, config = make(*EARLY, "--test-flip", "--data-root", demo_root, "--epochs", 2)
    folder = tmp_path / "checkpoints/mine"
    folder.mkdir(parents=True)
    content = {"model_args": train.model_arguments(config), "config": vars(config)}
    save_checkpoint(folder / "last.pt", {**content, "model": model.state_dict(), "epoch": 2})
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        words = ["export", "--checkpoint", "checkpoints/mine", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        export.main()

    return run


def test_safetensors_by_hand():
    """The format's own example: the header's length, its JSON, the bytes."""
    content = to_safetensors({"w": torch.tensor([[1.0, -2.0]]), "n": torch.tensor(3)}, {"by": "me"})
    length = struct.unpack("<Q", content[:8])[0]
    assert length % 8 == 0 and json.loads(content[8 : 8 + length]) == {
        "__metadata__": {"by": "me"},
        "w": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
        "n": {"dtype": "I64", "shape": [], "data_offsets": [8, 16]},
    }
    assert content[8 + length :] == struct.pack("<ffq", 1, -2, 3)


def test_safetensors_return_bit_for_bit(tmp_path):
    tensors = {"nan": torch.tensor([torch.nan, -0.0]), "none": torch.empty(0, 3)}
    tensors |= {str(d): torch.randn(3, 4).to(d) for d in (torch.float16, torch.bfloat16, torch.float32)}
    (tmp_path / "a").write_bytes(to_safetensors(tensors, {}))
    loaded, metadata = read_safetensors(tmp_path / "a")
    assert metadata == {} and [*loaded] == [*tensors]
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert loaded[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


def test_safetensors_rebuild_the_network_with_the_program_of_the_page(run, capsys):
    run("--format", "safetensors")
    assert "read back bit for bit" in capsys.readouterr().out
    found = {}
    exec(PROGRAMS[2], found)
    wanted = make(*EARLY)[0].state_dict()
    assert found["model"].state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found["model"].state_dict().items())
    assert found["about"]["classes"] == "person"


@needs_onnx
def test_an_onnx_file_computes_what_pytorch_does(run, capsys, demo_root):
    import onnxruntime

    command = re.search(r"^python -m tools.export (.* --format onnx .*)$", PAGE, re.MULTILINE)
    run(*command[1].split()[2:], "--min-score", "0.55")
    output = capsys.readouterr().out
    assert "6 frames: boxes differ " in output
    rows = re.findall(r"^((?:checkpoints/)?mine[\w./]*) +\d", output, re.MULTILINE)
    assert {*rows} == {"checkpoints/mine/last.pt", "mine.onnx"}
    for modality in ("visible", "lwir"):
        shutil.copy(demo_root / f"images/set06/V000/{modality}/I00000.jpg", f"{modality}.jpg")
    exec(PROGRAMS[0], {})
    assert "person at" in capsys.readouterr().out
    session = onnxruntime.InferenceSession("mine.onnx", providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert (about["classes"], about["min_score"], about["max_boxes"]) == ("person", "0.55", "200")
    assert about["commit"]
    model, _ = make(*EARLY)
    deployable = Deployable(model, **SETTINGS, predict_mirrored=predict_mirrored)
    for n, size, lwir_size in ((1, (300, 500), (300, 500)), (3, (64, 96), (120, 160))):
        inputs = frames(3, n, size), frames(1, n, lwir_size)
        with torch.inference_mode():
            boxes, counts = deployable(*inputs)
        got, got_counts = session.run(None, {"visible": inputs[0].numpy(), "lwir": inputs[1].numpy()})
        assert got.shape == (n, 200, 5) and np.abs(got_counts - counts.numpy()).max() <= 2
        for i in range(n):
            expected = boxes[i, : counts[i]].numpy()
            n_unpaired, distance, gap = export.difference(got[i, : got_counts[i]], expected)
            assert n_unpaired <= 4 and distance < 0.05 and gap < 1e-3


@needs_onnx  # only where the optional packages are installed, because compiling takes half a minute
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_a_compiled_package_computes_what_pytorch_does(run, capsys, demo_root):
    """With the command and the program of docs/deploy.md."""
    command = re.search(r"^python -m tools.export (.* --format pt2.*)$", PAGE, re.MULTILINE)
    run(*command[1].split()[2:], "--no-flip", "--min-score", "0.55")
    assert "6 frames: boxes differ " in capsys.readouterr().out
    for modality in ("visible", "lwir"):
        shutil.copy(demo_root / f"images/set06/V000/{modality}/I00000.jpg", f"{modality}.jpg")
    found = {}
    exec(PROGRAMS[1], found)
    assert capsys.readouterr().out == "person\n"
    model, _ = make(*EARLY)
    with torch.inference_mode():
        wanted, n = Deployable(model, **SETTINGS)(found["visible"][None], found["lwir"][None, :, :, None])
    own = found["boxes"][0, : found["count"][0]].numpy()
    n_unpaired, distance, gap = export.difference(own, wanted[0, : n[0]].numpy())
    assert len(own) > 5 and n_unpaired <= 4 and distance < 0.05 and gap < 1e-3


def test_flags_are_refused_in_a_line(run, monkeypatch):
    for words in (("--evaluate", "--raw"), ("--format", "safetensors", "--half"), ("--out", "last.pt")):
        with pytest.raises(InputError):
            run(*words)
    monkeypatch.setitem(export.PACKAGES, "onnx", ("missing_package",))
    with pytest.raises(InputError, match="needs missing_package; pip install missing_package"):
        run()


def test_images_without_a_partner_are_left_out_with_a_note(demo_root, tmp_path, capsys):
    (tmp_path / "visible").mkdir()
    paired = demo_root / "images/set06/V000/visible/I00000.jpg"
    lone = Path(shutil.copy(paired, tmp_path / "visible"))
    config = Namespace(input_mode="early", modality_dropout=0.3, lwir_range=(0, 0))
    [[visible, lwir]] = export.read_images([lone, paired], config)
    assert visible.shape == (1, 512, 640, 3) and lwir.shape == (1, 512, 640, 1)
    assert f"note: {lone} is left out" in capsys.readouterr().out
