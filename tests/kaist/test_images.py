"""Decoding images of KAIST, and the cache of decoded frames."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from kaist.annotations import image_path, read_image_list
from kaist.files import InputError
from kaist.images import cache_frames, check_images
from kaist.images import read_frame as read


def test_modalities_and_channels(demo_root):
    frame_id = read_image_list(demo_root / "imageSets/test-all.txt")[0]
    early = read(demo_root, frame_id, "early")
    assert early.shape == (512, 640, 4) and early.dtype == np.uint8
    assert np.array_equal(read(demo_root, frame_id, "visible"), early[..., :3])
    assert np.array_equal(read(demo_root, frame_id, "lwir"), early[..., 3:])
    stored = Image.open(image_path(demo_root, frame_id, "lwir")).convert("RGB")
    assert np.abs(np.asarray(stored).astype(int) - early[..., 3:]).max() <= 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "image not found"),
        (lambda p: p.write_bytes(b"no image"), "unreadable image"),
        (lambda p: Image.new("RGB", (320, 256)).save(p), "the image is 320x256"),
    ],
)
def test_bad_images_are_named_before_training(demo_root, tmp_path, damage, message):
    root = shutil.copytree(demo_root, tmp_path / "set")
    frame_id = read_image_list(root / "imageSets/train-all.txt")[3]
    path = image_path(root, frame_id, "lwir")
    damage(path)
    with pytest.raises(InputError, match=message) as error:
        check_images(root, [frame_id], "early")
    assert str(error.value).startswith(str(path))
    check_images(root, [frame_id], "visible")  # what the input does not need is not asked for


def test_cache_is_reused_until_a_file_changes(demo_root, tmp_path):
    root, folder = shutil.copytree(demo_root, tmp_path / "set"), tmp_path / "cache"
    ids = read_image_list(root / "imageSets/train-all.txt")[:3]
    first = cache_frames(folder, root, ids, "early")
    before = first.path.stat()
    first.read(ids[0])[:] = 0  # whatever a reader does to its frame stays its own
    again = cache_frames(folder, root, ids, "early")
    assert again.path == first.path and again.path.stat().st_ino == before.st_ino
    assert np.array_equal(again.read(ids[0]), read(root, ids[0], "early"))

    path = image_path(root, ids[1], "lwir")
    shutil.copy(image_path(root, ids[2], "lwir"), path)
    redrawn = cache_frames(folder, root, ids, "early")
    assert np.array_equal(redrawn.read(ids[1]), read(root, ids[1], "early"))
    assert not np.array_equal(redrawn.read(ids[1]), first.read(ids[1]))  # a mapped file lives on
    assert [p for p in folder.iterdir()] == [redrawn.path]

    os.utime(path, ns=(0, 0))  # the same size, another time
    assert cache_frames(folder, root, ids, "early").path != redrawn.path


def test_caches_of_other_roots_inputs_and_lists_are_kept_apart(demo_root, tmp_path):
    root, folder = shutil.copytree(demo_root, tmp_path / "set"), tmp_path / "cache"
    ids = read_image_list(root / "imageSets/train-all.txt")[:3]
    kinds = [(demo_root, ids, "early"), (root, ids, "early"), (root, ids, "lwir"), (root, ids[::-1], "early")]
    paths = {cache_frames(folder, *kind).path for kind in kinds}
    assert len(paths) == 4 and set(folder.iterdir()) == paths


def test_interrupted_cache_is_drawn_again(demo_root, tmp_path):
    root, folder = shutil.copytree(demo_root, tmp_path / "set"), tmp_path / "cache"
    ids = read_image_list(root / "imageSets/train-all.txt")[:3]
    path = image_path(root, ids[2], "visible")
    whole = path.read_bytes()
    path.write_bytes(whole[:9000])
    with pytest.raises(InputError, match="broken image"):
        cache_frames(folder, root, ids, "early")
    assert list(folder.iterdir()) == []
    path.write_bytes(whole)
    cache = cache_frames(folder, root, ids, "early")
    name = cache.path.name.rsplit("-", 1)[0]
    unfinished = folder / f".{name}-0.u8.1.tmp"  # of a process that was killed
    unfinished.write_bytes(b"")
    os.utime(unfinished, (0, 0))
    cache.path.write_bytes(b"cut off")
    cache = cache_frames(folder, root, ids, "early")
    assert np.array_equal(cache.read(ids[2]), read(root, ids[2], "early"))
    assert list(folder.iterdir()) == [cache.path]


def test_cache_says_when_it_cannot_be(demo_root, tmp_path, monkeypatch):
    ids = read_image_list(demo_root / "imageSets/train-all.txt")[:3]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used as a folder"):
        cache_frames(tmp_path / "file", demo_root, ids, "early")
    with pytest.raises(InputError, match=r"I99999.jpg: image not found"):
        cache_frames(tmp_path / "cache", demo_root, ["set00/V000/I99999"], "early")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(InputError, match=r"a cache of 0\.0 GB does not fit, 0\.0 GB are free"):
        cache_frames(tmp_path / "cache", demo_root, ids, "early")
