"""Frames for training: persons, ignored objects, boxes of each modality, and the validation split."""

from pathlib import Path

import numpy as np
import pytest

from kaist.annotations import PairSet, make_objects, open_annotations, time_of_day
from kaist.files import InputError
from kaist.frames import (
    BOTH,
    LWIR,
    PERSON_LABELS,
    VISIBLE,
    describe_videos,
    frames_from_gt,
    hold_out_videos,
    load_frames,
    make_frames,
    split_frames,
    video_of,
)
from kaist.labels import ObjectRow
from kaist.miss_rate import load_ground_truth


def test_persons_and_ignored_objects():
    rows = [
        ("person", [100, 100, 20, 50], 0, False),
        ("person", [100, 100, 20, 50], 2, False),  # occlusion does not make an object ignored
        ("people", [100, 100, 20, 50], 0, False),
        ("person?", [100, 100, 20, 50], 0, False),
        ("cyclist", [100, 100, 20, 50], 0, False),
        ("person", [100, 100, 20, 50], 0, True),
        ("person", [100, 100, 20, 11], 0, False),  # too low
        ("person", [4, 100, 20, 50], 0, False),  # too close to each border
        ("person", [100, 4, 20, 50], 0, False),
        ("person", [616, 100, 20, 50], 0, False),
        ("person", [100, 458, 20, 50], 0, False),
        ("person", [5, 5, 630, 502], 0, False),  # just inside
    ]
    objects = make_objects(rows)
    counts, sizes = np.array([len(rows)]), np.array([(640, 512)])
    [frame] = make_frames(["a"], objects.boxes, objects.is_person, counts, sizes, min_height=12, margin=5)
    assert frame.labels.tolist() == [1, 1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 1]


def test_frames_have_their_own_objects(demo_root):
    ids = (demo_root / "imageSets/test-all.txt").read_text().split()
    people = load_ground_truth(demo_root, ids)
    frames = frames_from_gt(people, min_height=12.0, margin=5.0)
    assert [frame.id for frame in frames] == ids
    assert sum(len(frame.labels) for frame in frames) == len(people.boxes) > 0
    for i, frame in enumerate(frames):
        own = people.boxes[people.frame_idxs == i]
        assert (frame.boxes_px[:, :2] == own[:, :2]).all()
        assert (frame.boxes_px[:, 2:] - frame.boxes_px[:, :2] - own[:, 2:] < 1e-3).all()
        assert (frame.labels[people.ignore[people.frame_idxs == i]] == -1).all()


def paired(root, visible, lwir):
    for modality, lines in (("visible", visible), ("lwir", lwir)):
        folder = root / "annotations_paired/set00/V000" / modality
        folder.mkdir(parents=True)
        text = "\n".join(["% bbGt version=3", *lines])
        (folder / "I00000.txt").write_text(f"{text}\n")
    return open_annotations(root)


def test_paired_annotations_keep_the_boxes_of_each_modality_and_merge_equal_ones(tmp_path):
    annotations = paired(
        tmp_path,
        ["person 100 100 40 90", "person 200 100 40 90", "people 300 100 90 90", "person 20 20 30 60"],
        ["person 100 100 40 90", "person 205 100 40 90", "person 300 100 90 90"],
    )
    how = {"min_height": 12, "margin": 5}
    [frame] = load_frames(["set00/V000/I00000"], annotations, pairs=True, **how)
    x = frame.boxes_px[:, 0].astype(int).tolist()
    objects = [*zip(x, frame.labels.tolist(), frame.seen.tolist(), strict=True)]
    assert objects[:3] == [(100, 1, BOTH), (200, 1, VISIBLE), (300, -1, VISIBLE)]
    assert objects[3:] == [(20, 1, VISIBLE), (205, 1, LWIR), (300, 1, LWIR)]
    assert frame.boxes_px.dtype == np.float32 and frame.n_persons == 3
    [alone] = load_frames(["set00/V000/I00000"], annotations, **how)
    assert alone.boxes_px[:, 0].tolist() == [100, 205, 300] and (alone.seen == BOTH).all()


def test_forms_with_one_box_for_both_modalities(demo_root):
    ids = (demo_root / "imageSets/train-all.txt").read_text().split()
    plain, pairs = (
        load_frames(ids, open_annotations(demo_root, form), min_height=12, margin=5, pairs=pairs)
        for form, pairs in (("bbgt", False), ("bbgt", True))
    )
    for a, b in zip(plain, pairs, strict=True):
        assert np.array_equal(a.boxes_px, b.boxes_px) and (b.seen == BOTH).all()
        assert a.n_persons == (a.labels == 1).sum() == len(a.persons)


def test_classes_that_learn_selects(tmp_path):
    lines = [f"{word} {x} 100 40 90 0 0 0 0 0 0 0" for x, word in ((100, "person"), (200, "person?"))]
    lines += ["people 300 100 40 90 0 0 0 0 0 0 0", "cyclist 400 100 40 90 0 0 0 0 0 0 0"]
    lines += ["person 500 100 40 90 0 0 0 0 0 1 0"]  # flagged to be ignored
    annotations = paired(tmp_path, lines, lines)
    for learn, expected in (
        ("person", [1, -1, -1, -1, -1]),
        ("people", [1, 1, 1, -1, -1]),
        ("all", [1, 1, 1, 1, -1]),
    ):
        how = {"min_height": 12, "margin": 5, "learn": learn}
        [frame] = load_frames(["set00/V000/I00000"], annotations, **how)
        assert frame.labels.tolist() == expected
    assert list(PERSON_LABELS) == ["person", "people", "all"]


def test_whole_videos_are_held_out_of_day_and_night():
    sizes = {"set00/V000": 40, "set00/V001": 30, "set01/V000": 30, "set03/V000": 60, "set04/V001": 40}
    ids = [f"{video}/I{i:05}" for video, n in sizes.items() for i in range(n)]
    times, drawn = {i: time_of_day(i) for i in ids}, set()
    for seed in range(30):
        held_out = list(hold_out_videos(times, 0.3, seed))
        videos = dict.fromkeys(video_of(frame) for frame in held_out)
        assert held_out == [frame for frame in ids if video_of(frame) in videos]
        assert len(videos) == 2 and min(videos) < "set03" < max(videos)
        drawn.add(tuple(videos))
    assert len(drawn) > 3
    assert list(hold_out_videos(times, 0.3, 5)) == list(hold_out_videos(times, 0.3, 5))
    few = hold_out_videos(times, 0.01, 0)  # the smallest video, if none is close to the share
    assert describe_videos(few).split(" (")[1].endswith("set04/V001") and len(few) == 70
    most = hold_out_videos(times, 0.99, 0)
    assert len({video_of(frame) for frame in most}) == 3  # one video by day and one by night remain
    assert not hold_out_videos(times, 0.0, 0)
    with pytest.raises(InputError, match=r"VALIDATION = 0.5 holds out whole videos"):
        hold_out_videos({i: times[i] for i in ids[:40] + ids[-40:]}, 0.5, 0)


def test_time_of_day_of_another_set_comes_from_its_description():
    """CVC-14 has the folders Day and Night and no KAIST ids; neither folder is held out completely."""
    how = {"validation": 0.3, "seed": 1, "min_height": 12, "margin": 5}

    def split(*videos):
        ids = [f"{video}/{i}" for video in videos for i in range(9)]
        rows, sizes = (
            {i: [ObjectRow("person", [50, 50, 20, 60])] for i in ids},
            dict.fromkeys(ids, (640, 471)),
        )
        pairs = PairSet(Path("cvc14"), tuple(ids), {}, sizes, rows, "Night*")
        return {video_of(frame_id) for frame_id in split_frames(ids, pairs, **how)[1]}

    with pytest.raises(InputError, match="VALIDATION = 0.3 holds out whole videos, but there is at most one"):
        split("Day", "Night")
    assert sorted(video[:-1] for video in split("Day1", "Day2", "Night1", "Night2")) == ["Day", "Night"]
    assert split("Day1", "Day2", "Night") < {"Day1", "Day2"}
