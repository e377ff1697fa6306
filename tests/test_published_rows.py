"""The rows of MLPD and INSANet in the three commands, also with their authors' files."""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import detect as detect_script
import eval as eval_script
import train
from engine.checkpoint import load_checkpoint
from engine.config import resolve_row
from engine.experiments import EXPERIMENTS, Row
from engine.optim import lr_factor
from kaist.files import InputError
from kaist.images import load_image, to_array
from model import build_model, make_network
from ssd.boxes import Predictions
from ssd.losses import Criterion
from ssd.published import published_names
from tests.ssd import published_networks

NARROW = {"width": 0.0625, "input_size": (128, 192)}
FLAGS = ["--width", "0.0625", "--input-size", "128,192", "--epochs", "1", "--batch-size", "4"]
FLAGS += ["--workers", "0", "--device", "cpu", "--precision", "fp32", "--name", "x"]
FLAGS += ["--checkpoints", "checkpoints", "--pretrained"]


def call(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    script.main()


def author_file(path, row):
    """Write a file of random weights for a narrow network of a row, with the published key names."""
    model = make_network(**train.model_arguments(Namespace(**resolve_row(row) | NARROW)))
    own = model.state_dict()
    shapes = {theirs: tuple(own[ours].shape) for ours, theirs in published_names(model).items()}
    shapes["base.rescale_factors"] = (1, *shapes["base.rescale_factors"], 1, 1)
    state = published_networks.random_state(shapes)
    for key in state:  # scores below 1
        if key.startswith("pred_convs."):
            state[key] = state[key] / 20
    torch.save({"epoch": 1, "model": state}, path)
    return state


@pytest.mark.parametrize(("row", "infusion", "maps"), [("41", 1, [0, 3]), ("42", 2, [0, 3, 6, 7])])
def test_a_row_trains_from_the_authors_weights_and_is_evaluated(
    row, infusion, maps, demo_root, tmp_path, monkeypatch, capsys, undrawn
):
    monkeypatch.chdir(tmp_path)
    author_file("author.pth", row)
    flags = [*FLAGS, "author.pth", "--validation", "0.2", "--infusion", f"{infusion},0,0,1,0,0"]
    call(monkeypatch, train, "--experiment", row, "--data-root", demo_root, *flags)
    trained = [line for line in capsys.readouterr().out.splitlines() if line.startswith("x ")]
    checkpoint = load_checkpoint(Path("checkpoints/x/last.pt"))
    assert checkpoint["model_args"]["network"] == resolve_row(row)["network"]
    assert build_model(checkpoint).infused_maps == maps
    call(monkeypatch, eval_script, "--checkpoint", "checkpoints/x")
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("x ")] == trained != []
    assert all(f"ap_map{i + 1}" in out for i in maps)


@pytest.mark.parametrize("row", ["41", "42"])
def test_the_authors_file_is_evaluated_and_detects(row, demo_root, tmp_path, monkeypatch, undrawn):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(EXPERIMENTS, "narrow", Row(row, NARROW, ""))
    state = author_file("author.pth", row)
    file = ["--checkpoint", "author.pth", "--experiment", "narrow"]
    call(monkeypatch, eval_script, *file, "--data-root", demo_root, "--device", "cpu")
    assert Path("detections-author-demo.txt").stat().st_size
    lwir = demo_root / "images/set06/V000/lwir"
    call(monkeypatch, detect_script, *file, "--precision", "fp32", "--min-score", "0.1", "--out", "out", lwir)
    lines = Path("out/detections.csv").read_text().splitlines()
    assert lines[0] == "image,x,y,w,h,score" and len(lines) > 1

    # The best detection in the first image, computed from the published keys.
    name = sorted(lwir.iterdir())[0].name
    images = [to_array(load_image(lwir.parent / m / name, m)) for m in ("visible", "lwir")]
    pixels = torch.from_numpy(np.concatenate(images, axis=2)).permute(2, 0, 1)[None].float()
    pixels = torch.nn.functional.interpolate(pixels, (128, 192), mode="bilinear", antialias=True)
    mean = torch.tensor([0.3465, 0.3219, 0.2842, 0.1598]).view(1, 4, 1, 1)
    std = torch.tensor([0.2358, 0.2265, 0.2274, 0.0813]).view(1, 4, 1, 1)
    _, logits = published_networks.multispectral(state, (pixels / 255 - mean) / std)
    best = logits.sigmoid()[:, 1:].mean(1).max().item()
    name = lines[1].split(",")[0]
    assert max(float(line.split(",")[5]) for line in lines[1:] if line.startswith(f"{name},")) == (
        pytest.approx(best, abs=0.01)
    )


def test_files_that_do_not_fit_are_refused_before_any_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    author_file("author.pth", "41")
    narrow = ["--width", "0.0625", "--pretrained", "author.pth", "--data-root", "nowhere"]
    assert train.configure(["--experiment", "41", *narrow]).network == "mlpd"
    with pytest.raises(InputError, match="author.pth: it lacks .* and so is not INSANet .*, but MLPD"):
        train.configure(["--experiment", "42", *narrow])
    with pytest.raises(InputError, match=r"base.conv1_1_vis.weight has shape \(8, 3, 3, 3\)"):
        train.configure(["--experiment", "41", "--pretrained", "author.pth", "--data-root", "nowhere"])
    with pytest.raises(InputError, match="but MLPD"):
        call(monkeypatch, eval_script, "--checkpoint", "author.pth", "--experiment", "42")
    for script in (eval_script, detect_script):
        images = ["x.jpg"] if script is detect_script else []
        with pytest.raises(InputError, match="--experiment is the row of the network"):
            call(monkeypatch, script, *images, "--experiment", "41")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--network", "mlpd"],
            "INPUT_MODE = 'early' cannot be used; NETWORK = mlpd needs INPUT_MODE = halfway",
        ),
        (["--experiment", "41", "--no-batch-norm"], "BATCH_NORM = False cannot be used"),
        (["--experiment", "42", "--loc-loss", "smooth_l1"], "LOC_LOSS = 'smooth_l1' cannot be used"),
        (["--experiment", "42", "--input-size", "300,300"], "multiples of 64"),
        (["--experiment", "26", "--infusion", "2,0,0,0,0,0"], "both streams too. needs NETWORK = mlpd"),
        (["--experiment", "42", "--infusion", "1,2,0,0,0,0"], "write 1 for a map with a segmentation head"),
    ],
)
def test_unsupported_constants_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        train.configure([*flags, "--pretrained", "none"])


def test_schedule_and_recipe_of_the_rows():
    config = resolve_row("41")
    factors = [lr_factor(config["schedule"], config["epochs"], epoch * 10, 400) for epoch in range(40)]
    assert factors == pytest.approx([1.0] * 20 + [0.1] * 16 + [0.01] * 4)
    recipe = {
        "lr": 1e-4,
        "bias_lr_factor": 2.0,
        "weight_decay": 5e-4,
        "optimizer": "sgd",
        "epochs": 40,
        "input_size": (512, 640),
        "min_score": 0.1,
        "nms_iou": 0.425,
        "max_boxes": 200,
    }
    recipe |= {"crop_apart": 0.5, "mirror_apart": 0.5, "learn": "all", "masks_follow": True}
    for row, network, batch_size, shift in (("41", "mlpd", 12, 0.0), ("42", "insanet", 8, 0.3)):
        config = resolve_row(row)
        assert {name: config[name] for name in recipe} == recipe
        own = (config["network"], config["batch_size"], config["shift_left"])
        assert own == (network, batch_size, shift)


def test_the_modality_of_a_person_matters_only_with_three_logits():
    model = make_network(
        "mlpd",
        width=0.0625,
        infusion=(0,) * 6,
        infusion_conv=False,
        prior_set="multispectral",
        size=(64, 128),
    )
    terms = {
        "loc_loss": "l1",
        "loc_reduction": "mean",
        "conf_divisor": "positives",
        "seg_cells": "mean",
        "seg_maps": "mean",
        "seg_balance": "none",
        "seg_person_share": 0.2,
        "seg_weight": 1.0,
    }
    criterion = Criterion(model.priors, model.grids, model.infused_maps, model.n_logits, **terms)
    predictions = model.train()(torch.randint(256, (1, 4, 64, 128), dtype=torch.uint8))
    boxes = torch.tensor([[[0.3, 0.2, 0.5, 0.9]]])
    losses = [criterion(predictions, boxes, torch.tensor([[label]]), []) for label in (1, 2, 3)]
    assert len({loss[0].item() for loss in losses}) == 3  # three logits distinguish the modalities
    single = Criterion(model.priors, model.grids, model.infused_maps, 2, **terms)
    predictions = Predictions(predictions.loc, predictions.conf[..., :2], [])
    losses = [single(predictions, boxes, torch.tensor([[label]]), []) for label in (1, 2, 3)]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2]) and losses[0][0] > 0
