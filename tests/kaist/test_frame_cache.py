"""A cache has the pixels of the images, or it is built again, whatever happened to the file."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kaist import frame_cache
from kaist.annotations import read_image_list
from kaist.files import InputError
from kaist.frame_cache import cache_frames, checksum
from kaist.images import read_frame

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def ids(demo_root):
    return read_image_list(demo_root / "imageSets/train-all.txt")[:5]


def assert_equal_frames(cache, root, ids, input_mode="early"):
    for frame_id in ids:
        assert np.array_equal(cache.read(frame_id), read_frame(root, frame_id, input_mode))


def hole(content, n):
    return content[: n + 4096] + bytes(n) + content[2 * n + 4096 :]


DAMAGES = ["a flipped bit", "a hole", "a shift", "swapped frames", "a flipped sum"]
CASES = [("early", damage) for damage in DAMAGES] + [("visible", DAMAGES[0]), ("lwir", DAMAGES[-1])]


@pytest.mark.parametrize(("input_mode", "damage"), CASES)
def test_a_damaged_cache_is_built_again(demo_root, tmp_path, ids, capsys, damage, input_mode):
    cache = cache_frames(tmp_path, demo_root, ids, input_mode)
    assert cache_frames(tmp_path, demo_root, ids, input_mode).path == cache.path
    assert "damaged" not in capsys.readouterr().out
    content, n = cache.path.read_bytes(), int(np.prod(cache.shape[1:]))
    place = {"a flipped bit": 3 * n + n // 2, "a flipped sum": len(content) - 8}.get(damage)
    if place:
        damaged = content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
    elif damage == "a hole":
        damaged = hole(content, n)
    elif damage == "a shift":
        damaged = content[:n] + content[n + 8 : 2 * n] + bytes(8) + content[2 * n :]
    else:
        damaged = content[n : 2 * n] + content[:n] + content[2 * n :]
    cache.path.write_bytes(damaged)
    unchecked = cache_frames(tmp_path, demo_root, ids, input_mode, check=False)
    assert damage == "a flipped sum" or any(
        not np.array_equal(unchecked.read(i), read_frame(demo_root, i, input_mode)) for i in ids
    )
    again = cache_frames(tmp_path, demo_root, ids, input_mode)
    assert f"warning: {cache.path} is damaged" in capsys.readouterr().out
    assert_equal_frames(again, demo_root, ids, input_mode)
    assert again.path.read_bytes() == content and os.listdir(tmp_path) == [cache.path.name]


def test_checksums_detect_random_changes():
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (512, 640, 4), np.uint8)
    expected = checksum(frame)
    for _ in range(200):
        changed = frame.copy()
        start, length = rng.integers(frame.size - 5000), rng.integers(1, 5000)
        changed.reshape(-1)[start : start + length] = rng.integers(0, 256, length)
        assert checksum(changed) != expected or np.array_equal(changed, frame)
    assert checksum(frame[::-1].copy()[::-1]) == expected  # the content counts, not the layout


def test_two_runs_that_build_at_once_both_get_a_complete_cache(demo_root, tmp_path, ids, monkeypatch):
    """The second run finishes while the first one is in the middle."""

    def read(root, frame_id, input_mode):
        if frame_id == ids[2]:
            monkeypatch.undo()
            assert_equal_frames(cache_frames(tmp_path, demo_root, ids, "early"), demo_root, ids)
        return read_frame(root, frame_id, input_mode)

    monkeypatch.setattr(frame_cache, "read_frame", read)
    cache = cache_frames(tmp_path, demo_root, ids, "early")
    assert_equal_frames(cache, demo_root, ids)
    assert_equal_frames(cache_frames(tmp_path, demo_root, ids, "early"), demo_root, ids)
    assert os.listdir(tmp_path) == [cache.path.name]


CONTAINER = """
import os, sys, time
from pathlib import Path
import numpy as np
from kaist.annotations import read_image_list
from kaist import frame_cache
from kaist.images import read_frame

root, folder, slow = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "slow"
ids = read_image_list(root / "imageSets/train-all.txt")[:5]

def read(root, frame_id, input_mode):
    if slow and frame_id == ids[3]:
        (folder.parent / "waiting").touch()
        while not (folder.parent / "go").exists():
            time.sleep(0.01)
    return read_frame(root, frame_id, input_mode)

frame_cache.read_frame = read
cache = frame_cache.cache_frames(folder, root, ids, "early")
print(os.getpid(), sum(not np.array_equal(cache.read(i), read_frame(root, i, "early")) for i in ids))
"""


@pytest.mark.timing
def test_two_containers_with_one_process_id_share_a_cache_folder(demo_root, tmp_path, ids):
    """One of them, on a slow host, is stopped in the middle of its file while the other one continues."""
    container = ["unshare", "-p", "-f", "--mount-proc"]
    if subprocess.run([*container, "true"], capture_output=True).returncode:
        pytest.skip("process namespaces are not permitted here")

    def start(kind):
        command = [*container, sys.executable, "-c", CONTAINER, demo_root, tmp_path / "cache", kind]
        return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)

    slow = start("slow")
    while not (tmp_path / "waiting").exists():
        assert slow.poll() is None
        time.sleep(0.01)
    [stopped] = Path(f"/proc/{slow.pid}/task/{slow.pid}/children").read_text().split()
    os.kill(int(stopped), signal.SIGSTOP)
    try:
        assert start("fast").communicate()[0] == "1 0\n"  # process id, number of wrong frames
    finally:
        (tmp_path / "go").touch()
        os.kill(int(stopped), signal.SIGCONT)
    assert slow.communicate()[0] == "1 0\n"
    [path] = (tmp_path / "cache").iterdir()
    assert_equal_frames(cache_frames(tmp_path / "cache", demo_root, ids, "early"), demo_root, ids)


def test_a_full_disk_is_reported_with_the_size_of_the_cache(demo_root, tmp_path, ids, monkeypatch):
    def read(root, frame_id, input_mode):
        if frame_id == ids[4]:
            raise OSError(28, "No space left on device")
        return read_frame(root, frame_id, input_mode)

    monkeypatch.setattr(frame_cache, "read_frame", read)
    with pytest.raises(InputError, match=r"u8: the disk is full: it needs 6.6 MB or more, "):
        cache_frames(tmp_path, demo_root, ids, "early")
    assert os.listdir(tmp_path) == []
