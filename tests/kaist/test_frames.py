"""Annotated frames: who is learned, who is ignored, and whose boxes are whose."""

from kaist.annotations import make_objects
from kaist.frames import frames_of, label_objects
from kaist.miss_rate import load_ground_truth


def test_what_is_learned_and_what_is_ignored():
    rows = [
        ("person", [100, 100, 20, 50], 0, False),
        ("person", [100, 100, 20, 50], 2, False),  # occlusion alone does not ignore
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
    labels = label_objects(objects.boxes, objects.is_person, min_height=12, margin=5)
    assert labels.tolist() == [1, 1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 1]


def test_frames_hold_the_objects_of_their_own(demo_root):
    ids = (demo_root / "imageSets/test-all.txt").read_text().split()
    people = load_ground_truth(demo_root, ids)
    frames = frames_of(people, min_height=12.0, margin=5.0)
    assert [frame.id for frame in frames] == ids
    assert sum(len(frame.labels) for frame in frames) == len(people.boxes) > 0
    for i, frame in enumerate(frames):
        own = people.boxes[people.frame == i]
        assert (frame.boxes_px[:, :2] == own[:, :2]).all()
        assert (frame.boxes_px[:, 2:] - frame.boxes_px[:, :2] - own[:, 2:] < 1e-3).all()
        assert (frame.labels[people.ignore[people.frame == i]] == -1).all()
