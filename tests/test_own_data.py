"""Training, evaluation and detection on sets of pairs other than KAIST, whose frames have their own sizes."""

import csv
import json
import sys

import numpy as np
import pytest

import detect
import eval as eval_script
import train
from datasets import KaistPairs
from engine.checkpoint import load_checkpoint
from kaist.annotations import open_annotations, read_image_list
from kaist.files import InputError
from kaist.frame_cache import cache_frames
from kaist.frames import load_frames
from kaist.images import read_frame
from kaist.miss_rate import evaluate, load_ground_truth
from kaist.pair_sets import open_pairs
from kaist.results import Detections
from ssd.augment import Augmentation
from tests import pair_trees

QUICK = (
    "--checkpoints checkpoints --name own --batch-size 4 --workers 0 --width 0.0625 --device cpu "
    "--precision fp32 "
    "--epochs 1 --eval-every 1"
).split()
FILLER = np.array([124, 116, 104, 114], np.uint8)


def samples(root, frames, augmentation, keys):
    options = {"input_mode": "early", "input_size": (300, 300), "filler": FILLER, "seed": 3}
    pairs = KaistPairs(root, frames, augmentation=augmentation, masks_follow=True, **options)
    return [pairs[key] for key in keys]


@pytest.fixture
def run(tmp_path, monkeypatch, undrawn):
    """Run a script's main() in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
        script.main()

    return run


def test_kaist_opened_by_a_description_gives_the_same_samples(demo_root, tmp_path):
    """Bit for bit: pixels, boxes and labels, copy-paste included."""
    description = {
        "visible": f"{demo_root}/images/*/*/visible/*.jpg",
        "lwir": f"{demo_root}/images/*/*/lwir/*.jpg",
        "labels": f"{demo_root}/annotations",
        "list": f"{demo_root}/imageSets/{{split}}-all.txt",
        "ignore": ["*"],
    }
    (tmp_path / "pairs.json").write_text(json.dumps(description))
    pairs = open_pairs(str(tmp_path / "pairs.json"), None, "train")
    ids = read_image_list(demo_root / "imageSets/train-all.txt")
    how = {"min_height": 12, "margin": 5}
    theirs = load_frames(ids, open_annotations(demo_root, "bbgt", "lwir"), **how)
    ours = load_frames(list(pairs.frames), pairs, **how)
    keys = [(epoch, i) for epoch in (0, 1) for i in range(len(ids))]
    for options in (None, Augmentation(copy_paste=0.5)):
        a, b = (samples(*set_, options, keys) for set_ in ((demo_root, theirs), (pairs, ours)))
        for one, other in zip(a, b, strict=True):
            assert one.frame_id == other.frame_id
            assert (one.image == other.image).all()
            np.testing.assert_array_equal(one.boxes, other.boxes)
            np.testing.assert_array_equal(one.labels, other.labels)


def test_boxes_follow_the_pixels_of_frames_of_any_size(tmp_path):
    """Persons are the bright boxes of the drawn pairs: what moves with them stays bright."""
    for size in ((200, 160), (160, 320)):
        pairs = open_pairs(str(pair_trees.draw_own(tmp_path / f"{size[0]}", size=size)), None, "train")
        frames = load_frames(list(pairs.frames), pairs, min_height=0, margin=0)
        assert {frame.size for frame in frames} == {size}
        [sample] = samples(pairs, frames, None, [(0, 0)])
        np.testing.assert_allclose(sample.boxes[0] * (*size, *size), (20, 30, 40, 80), rtol=1e-5)
        options = Augmentation(zoom_out=2.0, hue_saturation=False, lwir_jitter=False)
        found = 0
        for sample in samples(pairs, frames, options, [(e, i) for e in range(6) for i in range(4)]):
            for box in (sample.boxes[sample.labels > 0] * 300).round().astype(int):
                x0, y0, x1, y1 = box + (2, 2, -2, -2)
                if x1 - x0 > 4 and y1 - y0 > 4:
                    lwir, around = sample.image[3].float(), FILLER[3]
                    inside = lwir[y0:y1, x0:x1]
                    assert inside.mean() > lwir.mean() and (inside != around).float().mean() > 0.9
                    found += 1
        assert found > 10


def test_people_are_pasted_from_frames_of_the_same_time_of_day(tmp_path):
    """As the description marks it, by whatever names."""
    pairs = open_pairs(str(pair_trees.draw_own(tmp_path, n=8, night="00[4-7]")), None, "train")
    frames = load_frames(list(pairs.frames), pairs, min_height=0, margin=0)
    options = {"input_mode": "early", "input_size": (300, 300), "filler": FILLER, "seed": 3}
    how = Augmentation(copy_paste=1.0)
    dataset, looked_at = KaistPairs(pairs, frames, augmentation=how, masks_follow=True, **options), []
    dataset.read = lambda frame_id: looked_at.append(frame_id) or KaistPairs.read(dataset, frame_id)
    donors = set()
    for key in [(epoch, i) for epoch in range(4) for i in range(8)]:
        looked_at.clear()
        dataset[key]
        frame_id, donor = looked_at
        assert (frame_id < "004") == (donor < "004")
        donors.add(donor)
    assert len(donors) > 5


def test_borders_and_subsets_are_those_of_the_set(tmp_path):
    """CVC-14: borders 5, 5, 635, 466 of 640x471, day and night by folder."""
    pairs = open_pairs("cvc14", pair_trees.draw_cvc14(tmp_path), "test")
    truth = load_ground_truth(pairs, pairs.frames)
    nothing = Detections(np.empty(0, np.int64), np.empty((0, 4)), np.empty(0))
    counts = {name: result.n_positive for name, result in evaluate(truth, nothing).items()}
    assert (counts["Reasonable-all"], counts["Reasonable-day"], counts["Reasonable-night"]) == (6, 3, 3)
    low = truth.boxes.copy()
    low[:, 3] = (466 - low[:, 1]) + np.array([0, 0, 0, 1, 1, 1])
    moved = type(truth)(truth.frames, truth.frame_idxs, low, truth.occlusion, truth.ignore, None, pairs)
    assert evaluate(moved, nothing)["Reasonable-all"].n_positive == 3


def test_a_cache_has_frames_of_one_size(tmp_path):
    pairs = open_pairs(str(pair_trees.draw_own(tmp_path, size=(161, 119))), None, "train")
    cache = cache_frames(tmp_path / "cache", pairs, pairs.frames, "early")
    assert cache.all().shape == (4, 119, 161, 4)
    np.testing.assert_array_equal(cache.read("002"), read_frame(pairs, "002", "early"))
    assert not cache.find_damaged()
    pair_trees.draw_pair(tmp_path / "colour/train/9.png", tmp_path / "thermal/train/9.png", (80, 60))
    pairs = open_pairs(str(tmp_path / "pairs.json"), None, "train")
    with pytest.raises(InputError, match="the frames have 2 sizes, and a cache needs one; leave CACHE empty"):
        cache_frames(tmp_path / "cache", pairs, pairs.frames, "early")


def test_train_evaluate_and_detect_on_16_bits(run, tmp_path, capsys, monkeypatch):
    """The checkpoint keeps the set and how its LWIR is scaled; boxes are pixels of the frames."""
    path = pair_trees.draw_own(tmp_path / "mine", size=(200, 160), deep=True, height=60)
    run(train, "--data", "mine/pairs.json", *QUICK)
    printed = capsys.readouterr().out
    assert "become 0 … 255" in printed and "in both the training and the test list" not in printed
    folder = tmp_path / "checkpoints/own"
    config = load_checkpoint(folder / "last.pt")["config"]
    low, high = config["lwir_range"]
    assert config["data"] == "mine/pairs.json" and 20300 < low < high < 22200
    assert (folder / "detections.frames.txt").read_text().split() == ["000", "001", "002", "003"]
    table = [line for line in printed.splitlines() if line.startswith("own ")]
    run(eval_script, "--show-errors", 2, "--all-setups")
    again = capsys.readouterr().out
    assert table and table[0] in again.splitlines()
    assert (folder / "errors.png").is_file()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr("engine.config.ROOT", tmp_path)  # where the run was started
    run(eval_script, "--checkpoint", folder)
    monkeypatch.chdir(tmp_path)
    assert table[0] in capsys.readouterr().out.splitlines()
    run(eval_script, "--data", "mine/pairs.json")
    assert (folder / "detections-mine.txt").is_file()  # the run's own stay as they are
    run(eval_script, "--detections", folder / "detections.txt", "--data", path)
    assert "4 frames, 4 people count" in capsys.readouterr().out
    visible, lwir = tmp_path / "mine/colour/test/001.png", tmp_path / "mine/thermal/test/001.png"
    run(detect, "--visible", visible, "--lwir", lwir, "--min-score", 0, "--checkpoint", folder)
    rows = list(csv.DictReader((tmp_path / "detections/detections.csv").open()))
    boxes = np.array([[float(row[side]) for side in "xywh"] for row in rows])
    evaluated = np.loadtxt(folder / "detections.txt", delimiter=",")
    evaluated = evaluated[evaluated[:, 0] == 2][:, 1:]
    apart = np.abs(boxes[:, None] - evaluated[:, :4]).max(2).min(0)
    assert (apart < 0.01).mean() > 0.95  # rounding may decide between two that are near to equal
    assert (boxes[:, 0] + boxes[:, 2]).max() <= 200.001 and (boxes[:, 1] + boxes[:, 3]).max() <= 160.001


def test_a_named_set_is_trained_on(run, tmp_path, capsys):
    pair_trees.draw_llvip(tmp_path / "LLVIP")
    run(train, "--data", "llvip", "--data-root", "LLVIP", *QUICK)
    printed = capsys.readouterr().out
    assert "3 frames" in printed and "3 people count (0 day, 3 night)" in printed


def test_an_invalid_set_is_refused_before_training(run, tmp_path):
    with pytest.raises(InputError, match="no such set of pairs; choose a description, pairs.json, or one of"):
        run(train, "--data", "lvip", *QUICK)
    with pytest.raises(InputError, match="needs its folder; set it with --data-root"):
        run(train, "--data", "llvip", "--data-root", "nowhere", *QUICK)


def test_frames_of_both_splits_are_reported(run, tmp_path, capsys):
    path = pair_trees.draw_own(tmp_path / "mine", height=60)
    path.write_text(path.read_text().replace("{split}", "train"))
    run(train, "--data", path, *QUICK)
    assert "4 frames are in both the training and the test list" in capsys.readouterr().out
