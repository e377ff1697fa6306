"""Files from strangers cannot run code, leave the data root, or exhaust memory."""

import io
import json
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from engine.checkpoint import load_checkpoint
from kaist.annotations import image_path, read_image_list
from kaist.error_sheet import draw_errors
from kaist.files import MAX_TEXT, InputError
from kaist.images import load_image
from kaist.labels import read_json, read_labels
from kaist.miss_rate import load_ground_truth
from kaist.results import Detections, read_detections
from ssd.pretrained import load_pretrained
from ssd.published import read_published


class Attack:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("write", [torch.save, lambda c, p: p.write_bytes(pickle.dumps(c))])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, write):
    path, mark = tmp_path / "last.pt", tmp_path / "attacked"
    attack = Attack(f"touch {mark}")
    write({"format": "sds-ssd-kaist-1", "model": attack}, path)
    with pytest.raises(InputError, match=r"last.pt: not a readable checkpoint \(it ") as refusal:
        load_checkpoint(path)
    assert ("posix.system, which is code; none was run" in str(refusal.value)) == (write is torch.save)
    assert not mark.exists() and "\n" not in str(refusal.value)
    pickle.loads(pickle.dumps(attack))
    assert mark.exists()  # the attack works without protection


def test_published_weights_that_would_run_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    mark = tmp_path / "attacked"
    cache = tmp_path / "hub/checkpoints/vgg16-397923af.pth"
    cache.parent.mkdir(parents=True)
    torch.save({"features.0.weight": Attack(f"touch {mark}")}, cache)
    with pytest.raises(InputError, match="vgg16-397923af.pth: damaged .*posix.system"):
        load_pretrained(torch.nn.Linear(1, 1), "imagenet")
    assert not mark.exists()


def test_an_archive_whose_parts_overlap_is_refused(tmp_path):
    """3,000 entries share one part of 4 kB: 12 MB if read. A larger part would give terabytes."""
    path = tmp_path / "last.pt"
    torch.save({"format": "sds-ssd-kaist-1", "model": {"weight": torch.zeros(1000)}}, path)
    content = path.read_bytes()
    end = content.rindex(b"PK\5\6")
    count, size, start = struct.unpack_from("<HII", content, end + 10)
    directory, place, entry = content[start : start + size], 0, b""
    while b"/data/0" not in entry:
        entry = directory[place : place + 46 + sum(struct.unpack_from("<HHH", directory, place + 28))]
        place += len(entry)
    tail = struct.pack(
        "<4sHHHHIIH", b"PK\5\6", 0, 0, count + 3000, count + 3000, size + 3000 * len(entry), start, 0
    )
    path.write_bytes(content[:start] + directory + 3000 * entry + tail)
    assert sum(part.file_size for part in zipfile.ZipFile(path).infolist()) > 12_000_000
    with pytest.raises(InputError, match="its parts overlap"):
        load_checkpoint(path)


def test_a_compressed_archive_is_refused_before_it_is_read(tmp_path):
    """64 MB of zeros take 64 kB in the file; a larger file could exhaust memory."""
    whole, path = tmp_path / "whole.pt", tmp_path / "last.pt"
    torch.save({"format": "sds-ssd-kaist-1", "model": {"weight": torch.zeros(16 * 2**20)}}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    assert path.stat().st_size < whole.stat().st_size / 500
    with pytest.raises(InputError, match="it is compressed, which train.py never does"):
        load_checkpoint(path)


def test_a_pickle_that_asks_for_any_amount_of_memory_is_refused(tmp_path):
    whole, path = tmp_path / "whole.pt", tmp_path / "last.pt"
    torch.save(
        {"format": "sds-ssd-kaist-1", "config": {"name": "bytearray"}, "model_args": {}, "model": {}}, whole
    )
    load_checkpoint(whole)
    bomb = b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (10**13).to_bytes(6, "little") + b"\x85R."
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for part in old.infolist():
            new.writestr(part, bomb if part.filename.endswith("data.pkl") else old.read(part))
    with pytest.raises(InputError, match="it asks for a bytearray"):
        load_checkpoint(path)


def test_pipes_in_place_of_weights_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "hub/checkpoints/vgg16-397923af.pth"
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match="vgg16-397923af.pth: damaged .*not a file"):
        load_pretrained(torch.nn.Linear(1, 1), "imagenet")
    with pytest.raises(InputError, match="a pipe or a device"):
        read_published(path)
    with pytest.raises(InputError, match="it is not a file"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["../../set00/V000/I00000", "/etc/passwd", "set00/V000/../I00000"])
def test_names_in_files_cannot_leave_the_data_root(tmp_path, name):
    path = tmp_path / "list.txt"
    path.write_text(f"{name}\n")
    with pytest.raises(InputError, match="list.txt:1: .* is not a frame id"):
        read_image_list(path)
    path.write_text(json.dumps({"categories": [], "annotations": [], "images": [{"id": 0, "im_name": name}]}))
    with pytest.raises(InputError, match="is not of the form"):
        read_json(path)


def png_of(width, height):
    """A PNG with a declared size and no pixels."""

    def chunk(name, content):
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg_of(width, height):
    """A JPEG of one block with another declared size."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    content = bytearray(file.getvalue())
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


@pytest.mark.parametrize(
    "content", [jpeg_of(65000, 65000), jpeg_of(12000, 8000), png_of(2**31 - 1, 2**31 - 1), png_of(9999, 9999)]
)
def test_an_image_of_a_huge_declared_size_is_not_decoded(tmp_path, content):
    path = tmp_path / "visible/I00000.jpg"
    path.parent.mkdir()
    path.write_bytes(content)
    with warnings.catch_warnings(), pytest.raises(InputError, match="I00000.jpg: .*(image|size)"):
        warnings.simplefilter("error")
        load_image(path, "visible")


def test_broken_images_are_named_in_the_error(demo_root, tmp_path, monkeypatch):
    frames = read_image_list(demo_root / "imageSets/test-all.txt")
    root = tmp_path / "root"
    for modality in ("visible", "lwir"):
        for frame in frames:
            path = image_path(root, frame, modality)
            path.parent.mkdir(parents=True, exist_ok=True)
            content = image_path(demo_root, frame, modality).read_bytes()
            path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="I00000.jpg: broken image .*truncated"):
        load_image(path, "lwir")
    people = load_ground_truth(demo_root, frames)
    one = Detections(np.zeros(1, np.int64), np.array([[9.0, 9, 20, 50]]), np.ones(1))
    with pytest.raises(InputError, match="jpg: broken image"):
        draw_errors(people, one, root, 1, tmp_path / "errors.png", "one")
    path.write_bytes(jpeg_of(65000, 65000))
    with pytest.raises(InputError, match="jpg: "):
        load_image(path, "lwir")


def test_huge_text_files_are_not_read(tmp_path):
    path = tmp_path / "result.txt"
    with path.open("wb") as file:
        file.truncate(MAX_TEXT + 1)  # a sparse file, which takes no disk space
    read_xml, read_result = (
        partial(read_labels, form="xml"),
        partial(read_detections, frames=["set06/V000/I00000"]),
    )
    for read in (read_result, read_json, read_xml, read_image_list):
        with pytest.raises(InputError, match="result.txt: the file has 268 MB, the limit for text"):
            read(path)
