"""Frames that become unreadable during a run are left out and counted, not replaced."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from datasets import KaistPairs, batch_loader
from engine.checkpoint import load_checkpoint
from engine.loader import EpochBatches
from kaist.annotations import image_path, open_annotations, read_image_list
from kaist.files import InputError
from kaist.frames import load_frames
from kaist.images import check_images
from ssd.augment import Augmentation, mean_colour

QUICK = (
    "--checkpoints checkpoints --name custom --batch-size 4 --workers 0 --width 0.0625 --device cpu "
    "--precision fp32 --epochs 1 --copy-paste 0"
).split()


@pytest.fixture
def root(demo_root, tmp_path):
    """A copy of the demo set that may be damaged: 12 training and 6 test frames."""
    return shutil.copytree(demo_root, tmp_path / "demo")


def delete(root, frame_id):
    image_path(root, frame_id, "lwir").unlink()


def truncate(root, frame_id):
    path = image_path(root, frame_id, "visible")
    path.write_bytes(path.read_bytes()[:9000])


def make_loader(root, workers=0, max_bad=0):
    ids = read_image_list(root / "imageSets/train-all.txt")
    check_images(root, ids, "early")
    frames = load_frames(ids, open_annotations(root), min_height=12, margin=5)
    dataset = KaistPairs(
        root,
        frames,
        input_mode="early",
        input_size=(300, 300),
        filler=mean_colour(4),
        masks_follow=True,
        augmentation=Augmentation(),
        seed=7,
    )
    model = SimpleNamespace(priors=torch.zeros(1, 4), grids=[(38, 38)], infused_maps=[0])
    how = {"batch_size": 4, "workers": workers, "max_bad_frames": max_bad}
    return batch_loader(dataset, model, shuffle=True, **how)


def samples(batches):
    """Frame id -> its image, boxes and mask, of all batches."""
    return {
        frame_id: (image, boxes[labels != 0], mask)
        for batch in batches
        if batch is not None
        for image, boxes, labels, mask, frame_id in zip(
            batch.images, batch.boxes, batch.labels, batch.masks[0], batch.frame_ids, strict=True
        )
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_frames_are_left_out_and_named_once(demo_root, root, workers, capsys):
    whole = [samples(make_loader(demo_root).epoch(epoch)) for epoch in (0, 1)]
    loader = make_loader(root, workers, max_bad=2)
    gone, cut = (frame.id for frame in loader.loader.dataset.frames[4:6])
    delete(root, gone)
    truncate(root, cut)
    for epoch in (0, 1):
        left = samples(loader.epoch(epoch))
        assert left.keys() == whole[epoch].keys() - {gone, cut}  # they are not replaced
        for frame_id, parts in left.items():
            for ours, theirs in zip(parts, whole[epoch][frame_id], strict=True):
                assert torch.equal(ours, theirs)
    said = capsys.readouterr().err
    assert said.count("warning: ") == 2
    assert f"{image_path(root, gone, 'lwir')}: image not found" in said
    assert f"{image_path(root, cut, 'visible')}: broken image" in said


def test_a_batch_of_only_bad_frames_is_none(root):
    loader = make_loader(root, max_bad=4)
    ids = [loader.loader.dataset.frames[i].id for _, i in list(loader.batches)[1]]
    for frame_id in ids:
        delete(root, frame_id)
    first, second, third = loader.epoch(0)
    assert second is None and len(first.frame_ids) == len(third.frame_ids) == 4


def test_too_many_bad_frames_are_named(root):
    loader = make_loader(root, max_bad=1)
    ids = [frame.id for frame in loader.loader.dataset.frames[:2]]
    for frame_id in ids:
        delete(root, frame_id)
    with pytest.raises(InputError, match="all unreadable") as error:
        list(loader.epoch(0))
    assert all(frame_id in str(error.value) for frame_id in ids)


@pytest.fixture
def start(root, tmp_path, monkeypatch, undrawn):
    """Run train.main() on the set that may be damaged, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def start(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", "--data-root", str(root), *QUICK, *flags])
        train.main()

    return start


def test_a_run_skips_batches_without_frames_and_saves_when_it_stops(start, root, monkeypatch, capsys):
    losses = []

    def forward(self, *batch, forward=train.Criterion.forward):
        for path in (root / "images").glob("set0[0-5]/*/lwir/*.jpg"):
            path.unlink()
        losses.append(forward(self, *batch))
        return losses[-1]

    monkeypatch.setattr(train.Criterion, "forward", forward)
    with pytest.raises(InputError, match="all unreadable frames so far: set"):
        start("--max-bad-frames", "7")  # the second batch's four, then another four
    said = capsys.readouterr()
    assert said.err.count("is left out") == 8 and "saved; the same command resumes" in said.out
    kept = load_checkpoint(Path("checkpoints/custom/last.pt"))
    assert (kept["epoch"], kept["step"]) == (0, 2)
    assert kept["sums"] == pytest.approx(losses[0].tolist()) and kept["skipped"] == 1


def test_a_bad_test_frame_stops_the_run_and_loses_nothing(start, demo_root, root):
    truncate(root, read_image_list(root / "imageSets/test-all.txt")[2])
    with pytest.raises(InputError, match="visible/.*broken image"):
        start()
    stopped = load_checkpoint(Path("checkpoints/custom/last.pt"))
    assert (stopped["epoch"], stopped["step"]) == (0, 3)
    shutil.copytree(demo_root, root, dirs_exist_ok=True)
    start()  # only the evaluation is left to do
    ended = load_checkpoint(Path("checkpoints/custom/last.pt"))
    assert (ended["epoch"], ended["step"]) == (1, 0) and "miss_rate" in ended["history"][0]
    for key, value in stopped["model"].items():
        assert torch.equal(value, ended["model"][key])


@pytest.mark.timing
def test_two_processes_leave_out_the_same_frames_and_stop_together(nursery, root, tmp_path):
    ids = read_image_list(root / "imageSets/train-all.txt")
    first, _, third = EpochBatches(12, 4, seed=42)
    for _, index in (first[0], third[1]):  # one process's frame, then the other's
        truncate(root, ids[index])
    flags = ["--data-root", root, *QUICK, "--checkpoints", tmp_path, "--max-bad-frames", "1"]
    nursery.start_ranks(["", ""], *flags)
    assert nursery.numbers() == [2, 2]
    said = [nursery.said.with_name(name).read_text() for name in ("said", "said1")]
    assert said[0].count("is left out") == 2 and "is left out" not in said[1]
    assert all(words.count("all unreadable frames so far") == 1 for words in said)
    assert "saved; the same command resumes from epoch 1, step 3" in said[0]
    assert load_checkpoint(tmp_path / "custom/last.pt")["step"] == 2
