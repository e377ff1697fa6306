"""Options of the rows after the 2021 log: input sizes, fusion, modality dropout, EMA, test flip."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import detect as detect_script
import eval as eval_script
import train
from datasets import KaistPairs
from engine.checkpoint import save_checkpoint
from engine.optim import update_ema
from kaist.annotations import image_path, open_annotations, read_image_list
from kaist.files import InputError
from kaist.frames import load_frames
from kaist.images import read_frame
from model import SSD300, predict_mirrored
from ssd.augment import Augmentation, mean_colour, sample_transform
from ssd.boxes import decode, detect
from utils import predict

QUICK = (
    "--checkpoints checkpoints --name custom --batch-size 4 --workers 0 --width 0.0625 --device cpu "
    "--precision fp32 --epochs 1"
).split()


def call(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    script.main()


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        ("300,375", ["--input-mode", "mean", "--no-batch-norm", "--priors", "ssd300"]),
        (
            "512,640",
            ["--input-mode", "halfway", "--modality-dropout", "0.5", "--ema-decay", "0.9", "--test-flip"],
        ),
    ],
)
def test_any_input_through_the_three_commands(size, flags, demo_root, tmp_path, monkeypatch, capsys, undrawn):
    monkeypatch.chdir(tmp_path)
    for name, step in (("train", 3), ("test", 2)):  # four training and three test frames
        lines = (demo_root / f"imageSets/{name}-all.txt").read_text().splitlines(True)
        Path(f"{name}.txt").write_text("".join(lines[::step]))
        flags = [*flags, f"--{name}-list", tmp_path / f"{name}.txt"]
    call(monkeypatch, train, "--data-root", demo_root, "--input-size", size, *QUICK, *flags)
    trained = [line for line in capsys.readouterr().out.splitlines() if line.startswith("custom")]
    call(monkeypatch, eval_script)
    evaluated = [line for line in capsys.readouterr().out.splitlines() if line.startswith("custom")]
    assert trained == evaluated != []
    images = demo_root / "images/set06/V000/lwir"
    call(monkeypatch, detect_script, images, "--min-score", "0.001")
    sizes = np.loadtxt("detections/detections.csv", delimiter=",", skiprows=1, usecols=(1, 2, 3, 4), ndmin=2)
    assert len(sizes) and (sizes[:, 0] + sizes[:, 2] <= 640.001).all()
    assert (sizes[:, 1] + sizes[:, 3] <= 512.001).all()


# ------------------------------------------------------------------------------ a missing modality


def test_dropout_blanks_one_modality_and_changes_no_other_random_value(demo_root):
    ids = read_image_list(demo_root / "imageSets/train-all.txt")
    frames = load_frames(ids, open_annotations(demo_root), min_height=12, margin=5)

    def samples(dropout):
        pairs = KaistPairs(
            demo_root,
            frames,
            input_mode="early",
            input_size=(60, 75),
            filler=mean_colour(4),
            augmentation=Augmentation(modality_dropout=dropout),
            masks_follow=True,
            seed=3,
        )
        return [pairs[epoch, i] for epoch in range(2) for i in range(len(frames))]

    blank = torch.from_numpy(mean_colour(4)).view(4, 1, 1)
    gone = []
    for whole, half in zip(samples(0.0), samples(1.0), strict=True):
        assert np.array_equal(whole.boxes, half.boxes) and len(whole.boxes) == len(half.boxes)
        visible_gone = bool((half.image[:3] == blank[:3]).all())
        kept, lost = (slice(3, 4), slice(0, 3)) if visible_gone else (slice(0, 3), slice(3, 4))
        assert torch.equal(whole.image[kept], half.image[kept])
        assert (half.image[lost] == blank[lost]).all()
        gone.append(visible_gone)
    assert 0.2 < np.mean(gone) < 0.8
    assert all(map(torch.equal, *([s.image for s in samples(1.0)] for _ in "ab")))


def test_dropout_has_the_given_probability():
    rng, mean, filler = np.random.default_rng(0), np.full(4, 99.0), mean_colour(4)
    augmentation = Augmentation(modality_dropout=0.3)
    dropped = np.array(
        [
            (sample_transform(rng, np.zeros((0, 4)), mean, augmentation, (60, 75), filler).matrix == 0).all(1)
            for _ in range(3000)
        ]
    )
    assert dropped[:, 0].mean() == pytest.approx(0.15, abs=0.02)
    assert dropped[:, 3].mean() == pytest.approx(0.15, abs=0.02)
    assert not (dropped[:, 0] & dropped[:, 3]).any()


def test_a_blanked_modality_is_not_read(demo_root, tmp_path):
    frame_id = read_image_list(demo_root / "imageSets/test-all.txt")[0]
    path = image_path(tmp_path, frame_id, "lwir")
    path.parent.mkdir(parents=True)
    path.write_bytes(image_path(demo_root, frame_id, "lwir").read_bytes())
    alone = read_frame(tmp_path, frame_id, "halfway", "visible")
    both = read_frame(demo_root, frame_id, "halfway")
    assert np.array_equal(alone[..., 3], both[..., 3])
    assert (alone[..., :3] == mean_colour(3)).all()


@pytest.fixture
def save(tmp_path, demo_root):
    """A function that saves a checkpoint of an untrained network."""

    def save(*flags):
        config = train.configure(["--width", "0.0625", "--data-root", str(demo_root), *flags])
        model = SSD300(**train.model_arguments(config))
        path = tmp_path / "run" / "last.pt"
        path.parent.mkdir(exist_ok=True)
        save_checkpoint(
            path,
            {
                "model_args": train.model_arguments(config),
                "config": vars(config),
                "model": model.state_dict(),
            },
        )
        return path

    return save


@pytest.mark.parametrize("modality", ["visible", "lwir"])
def test_one_modality_is_enough_only_after_modality_dropout(
    save, modality, demo_root, tmp_path, monkeypatch, capsys
):
    source = demo_root / f"images/set06/V000/{modality}/I00000.jpg"
    alone = tmp_path / modality / "I00000.jpg"
    alone.parent.mkdir()
    alone.write_bytes(source.read_bytes())
    monkeypatch.chdir(tmp_path)
    path = save("--input-mode", "halfway", "--modality-dropout", "0.5")
    call(monkeypatch, detect_script, alone, "--checkpoint", path)
    assert "note: 1 image without the other modality" in capsys.readouterr().out
    with pytest.raises(InputError, match="is missing.*MODALITY_DROPOUT"):
        call(monkeypatch, detect_script, alone, "--checkpoint", save("--input-mode", "halfway"))


def test_evaluation_without_a_modality(save, demo_root, tmp_path, monkeypatch, capsys, undrawn):
    monkeypatch.chdir(tmp_path)
    path = save("--input-mode", "early", "--modality-dropout", "0.5", "--workers", "0")
    for name in ("visible", "lwir"):
        call(monkeypatch, eval_script, "--checkpoint", path, "--without", name)
        assert path.with_name(f"detections-without-{name}.txt").exists()
    assert "was not trained" not in capsys.readouterr().out
    files = [path.with_name(f"detections-without-{name}.txt") for name in ("visible", "lwir")]
    assert files[0].read_text() != files[1].read_text()
    call(monkeypatch, eval_script, "--checkpoint", save("--workers", "0"), "--without", "lwir")
    assert "the network was not trained to work without lwir" in capsys.readouterr().out
    with pytest.raises(InputError, match="'lwir' has a single modality"):
        call(monkeypatch, eval_script, "--checkpoint", save("--input-mode", "lwir"), "--without", "lwir")
    with pytest.raises(InputError, match="--without need a checkpoint"):
        call(
            monkeypatch,
            eval_script,
            "--detections",
            files[0],
            "--annotations",
            demo_root,
            "--without",
            "lwir",
        )


# ------------------------------------------------------------------------------ averaged weights


def test_averaged_weights_by_hand():
    model = torch.nn.BatchNorm1d(1)
    ema = copy.deepcopy(model)
    expected = None
    for step, weight in enumerate((3.0, 5.0, 9.0, -2.0)):
        model.weight.data.fill_(weight)
        model.running_mean.fill_(weight)
        model.num_batches_tracked.fill_(step)
        update_ema(ema, model, 0.5, step)
        decay = min(0.5, step / (step + 10))
        expected = weight if step == 0 else decay * expected + (1 - decay) * weight
        assert ema.weight.item() == pytest.approx(expected)
        assert ema.running_mean.item() == pytest.approx(expected)  # statistics are averaged too
        assert ema.num_batches_tracked.item() == step
    assert model.weight.item() == -2.0
    update_ema(model, model, 0.5, 9)
    assert model.weight.item() == -2.0


# ------------------------------------------------------------------------------ test flip


def make_model(**changes):
    torch.manual_seed(0)
    return SSD300(
        input_mode="early",
        batch_norm=False,
        width=0.0625,
        infusion=(0,) * 6,
        infusion_conv=False,
        prior_set="pedestrian",
        **{"size": (300, 375)} | changes,
    ).eval()


@pytest.mark.parametrize(("centres", "width"), [("even", 375), ("stride", 375), ("stride", 384)])
def test_mirrored_predictions_decode_to_mirrored_boxes(centres, width):
    """Compared with the same network for the width of the padded mirror image."""
    model = make_model(size=(300, width), centres=centres)
    for head in (*model.loc_heads, *model.conf_heads):
        torch.nn.init.normal_(head.weight, std=0.02)
    padded_width = width if centres == "even" else 384
    padded = make_model(size=(300, padded_width), centres=centres)
    padded.load_state_dict(model.state_dict())
    images = torch.randint(256, (2, 4, 300, width), dtype=torch.uint8)
    filler = model.mean.round().to(torch.uint8).expand(2, 4, 300, padded_width - width)
    with torch.inference_mode():
        theirs = padded(torch.cat([filler, images.flip(3)], dim=3))
        ours = predict_mirrored(model, images)
    unit, padded_unit = (torch.tensor([w, 300, w, 300]) for w in (width, padded_width))
    boxes = decode(ours.loc, model.priors) * unit
    # The prediction of the padded network, with the prior's shape in the other network.
    for i, (h, w, _, dx, _) in enumerate(model.grids):
        own, other = (m.map_priors()[i] * u for m, u in ((model, unit), (padded, padded_unit)))
        own, other = (x.view(h, -1, len(own) // (h * w), 4) for x in (own, other))
        first = [sum(map(len, m.map_priors()[:i])) for m in (model, padded)]
        rows = [slice(start, start + x[..., 0].numel()) for start, x in zip(first, (own, other), strict=True)]
        mirrored = theirs.loc[:, rows[1]].view(2, *other.shape).flip(2)[:, :, :w]
        x = padded_width - (torch.arange(other.shape[1]).flip(0)[:w] + 0.5) * dx * width
        x = x.view(1, 1, w, 1) - mirrored[..., 0] * 0.1 * own[..., 2]
        y = own[..., 1] + mirrored[..., 1] * 0.1 * own[..., 3]
        size = own[..., 2:] * (mirrored[..., 2:] * 0.2).exp()
        expected = torch.cat([torch.stack([x, y], -1), size], -1).view(2, -1, 4)
        assert torch.allclose(boxes[:, rows[0]], expected, atol=1e-2)
        conf = theirs.conf[:, rows[1]].view(2, *other.shape[:3], 2).flip(2)[:, :, :w]
        assert torch.allclose(ours.conf[:, rows[0]], conf.reshape(2, -1, 2), atol=1e-5)


def test_test_flip_is_symmetric():
    model = make_model()
    for head in (*model.loc_heads, *model.conf_heads):
        torch.nn.init.normal_(head.weight, std=0.02)  # scores below 1, so there are no ties
    images = torch.randint(256, (1, 4, 300, 375), dtype=torch.uint8)
    limits = {"min_score": 0.5, "nms_iou": 0.5, "max_boxes": 50}

    def found(flip, images):
        with torch.inference_mode():
            predictions = predict(model, images, torch.float32, test_flip=flip)
        return detect(predictions, model.priors, **limits)[0]

    def difference(flip):
        (boxes, scores), (mirrored, same) = found(flip, images), found(flip, images.flip(3))
        mirrored = torch.stack(
            [1 - mirrored[:, 2], mirrored[:, 1], 1 - mirrored[:, 0], mirrored[:, 3]], dim=1
        )
        assert len(boxes) == len(mirrored) == 50
        return (boxes - mirrored).abs().max() + (scores - same).abs().max()

    assert difference(True) < 1e-4 < difference(False)
