"""Copy-paste augmentation: pixels of both modalities, boxes and masks."""

import numpy as np
import pytest

from datasets import Collate, KaistPairs
from kaist.annotations import open_annotations, read_image_list, time_of_day
from kaist.frames import load_frames
from ssd.augment import Augmentation, mean_colour
from ssd.copy_paste import MAX_PASTED, paste_people

BLACK, WHITE = np.zeros((512, 640, 4), np.uint8), np.full((512, 640, 4), 255, np.uint8)
NOBODY = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)


def boxes(*rows):
    return np.array(rows, dtype=np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_a_person_is_pasted_whole_in_both_modalities_at_its_height(seed):
    people = boxes([100, 200, 140, 300])
    pixels, found, labels = paste_people(np.random.default_rng(seed), BLACK, *NOBODY, WHITE, people)
    [(x0, y0, x1, y1)] = found.astype(int)
    assert labels.tolist() == [1] and (y0, y1, x1 - x0) == (200, 300, 40) and 0 <= x0 <= x1 <= 640
    assert (pixels[y0:y1, x0:x1] == 255).all()  # all four channels
    rim = round(0.15 * 40)
    outside = pixels.copy()
    outside[y0 - rim : y1 + rim, max(0, x0 - rim) : x1 + rim] = 0
    assert not outside.any() and not BLACK.any()  # nothing beyond the rim, the source untouched
    assert 0 < pixels[y0 - rim : y0, x0:x1].mean() < 255  # it fades


def test_pasted_persons_overlap_no_object():
    rng = np.random.default_rng(0)
    crowd = boxes([0, 100, 640, 400])
    own = crowd, np.array([-1])
    pixels, found, labels = paste_people(rng, BLACK, *own, WHITE, boxes([100, 200, 140, 300]))
    assert (pixels == BLACK).all() and labels.tolist() == [-1] and np.array_equal(found, crowd)
    for _ in range(30):
        people = boxes([100, 200, 180, 400], [300, 210, 380, 390], [500, 190, 580, 380])
        _, found, labels = paste_people(rng, BLACK, people[:1], np.ones(1, np.int64), WHITE, people)
        assert 1 <= len(found) <= 1 + MAX_PASTED and len(found) == len(labels)
        for i, a in enumerate(found):
            for b in found[:i]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_persons_at_the_border_are_pasted():
    for seed in range(20):
        people = boxes([0, 0, 30, 90], [610, 420, 640, 512])
        pixels, found, _ = paste_people(np.random.default_rng(seed), BLACK, *NOBODY, WHITE, people)
        for x0, y0, x1, y1 in found.astype(int):
            assert (pixels[y0:y1, x0:x1] == 255).all()


@pytest.fixture(scope="module")
def frames(demo_root):
    ids = read_image_list(demo_root / "imageSets/train-all.txt")
    return load_frames(ids, open_annotations(demo_root), min_height=12, margin=5)


def data_set(root, frames, **options):
    return KaistPairs(
        root,
        frames,
        input_mode="early",
        input_size=(300, 300),
        filler=mean_colour(4),
        augmentation=Augmentation(**options),
        masks_follow=True,
        seed=0,
    )


def test_samples_with_pasted_people_are_repeatable_and_their_masks_follow(demo_root, frames):
    pasted = data_set(demo_root, frames, copy_paste=1.0)
    plain = data_set(demo_root, frames)
    n_added = 0
    for i in range(len(frames)):
        sample, again = pasted[3, i], pasted[3, i]
        assert (sample.image == again.image).all() and np.array_equal(sample.boxes, again.boxes)
        assert np.array_equal(sample.boxes, sample.mask_boxes)
        batch, _ = Collate([(38, 38)])([sample])
        [mask] = batch.masks
        assert (mask == 1).any() == (sample.labels > 0).any()
        n_added += len(sample.boxes) - len(plain[3, i].boxes)
    assert n_added > 0
    off = data_set(demo_root, frames, copy_paste=0.0)
    assert all((off[3, i].image == plain[3, i].image).all() for i in range(3))


def test_donors_are_of_the_same_time_of_day(demo_root, frames):
    dataset = data_set(demo_root, frames, copy_paste=1.0)
    for (time, _), indices in dataset.donors.items():
        assert len(indices) and {time_of_day(frames[i].id) for i in indices} == {time}
        assert all((frames[i].labels == 1).any() for i in indices)
