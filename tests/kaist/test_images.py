"""Images of every layout a user may have; those that would be misread are refused."""

import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kaist.annotations import image_path, read_image_list
from kaist.files import InputError
from kaist.frame_cache import fingerprint
from kaist.images import MAX_PIXELS, cache_frames, check_images, image_size, read_frame, read_image


def random_pixels(size=(512, 640), channels=3):
    small = np.random.default_rng(0).integers(0, 256, (size[0] // 16, size[1] // 16, channels), np.uint8)
    return np.array(Image.fromarray(small.squeeze()).resize(size[::-1], Image.Resampling.BICUBIC))


def sixteen_bits(path, kind):
    """A PNG or TIFF of 16 bits or floats."""
    grey = random_pixels(channels=1).astype(np.uint16) * 257
    if kind == "float":
        Image.fromarray(grey.astype(np.float32) / 65535).save(path, "TIFF")
    elif kind == "32 bits":
        Image.fromarray(grey.astype(np.int32)).save(path, "TIFF")
    elif kind == "colours":
        path.write_bytes(colour_png(random_pixels().astype(np.uint16) * 257))
    else:
        Image.fromarray(grey).save(path, kind)


def colour_png(pixels):
    """A 16-bit RGB PNG, which Pillow reads but does not write."""
    import struct
    import zlib

    def chunk(name, content):
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "float", "32 bits", "colours"])
def test_deep_images_are_refused(tmp_path, kind):
    """Pillow would clip them: a thermal image of 14 bits came out white."""
    path = tmp_path / "images/set00/V000/lwir/I00000.png"
    path.parent.mkdir(parents=True)
    sixteen_bits(path, kind)
    for read in (
        lambda: read_image(path, "lwir"),
        lambda: check_images(tmp_path, ["set00/V000/I00000"], "lwir"),
    ):
        with pytest.raises(InputError, match="I00000.png: not an 8-bit image; scale all frames alike"):
            read()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".jpeg", ".tif", ".tiff", ".JPG", ".PNG", ".TIF"])
def test_images_are_found_by_any_ending(demo_root, tmp_path, suffix, capsys):
    """Beside others: visible keeps its .jpg, LWIR has another ending and content."""
    root = tmp_path / "set"
    frame_id = read_image_list(demo_root / "imageSets/train-all.txt")[0]
    expected = read_frame(demo_root, frame_id, "early")
    for modality in ("visible", "lwir"):
        source = image_path(demo_root, frame_id, modality)
        target = root / source.relative_to(demo_root)
        target.parent.mkdir(parents=True)
        shutil.copy(source, target)
    if suffix != ".jpg":
        target.unlink()
        kind = {".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF"}.get(suffix.lower(), "PNG")
        Image.fromarray(expected[..., 3]).save(target.with_suffix(suffix), kind)
    assert image_path(root, frame_id, "lwir") == target.with_suffix(suffix)
    check_images(root, [frame_id], "early")
    assert np.array_equal(read_frame(root, frame_id, "early"), expected)
    assert np.array_equal(
        cache_frames(tmp_path / "cache", root, [frame_id], "early").read(frame_id), expected
    )
    assert capsys.readouterr().out == ""


def test_a_jpg_is_looked_up_once_and_preferred(tmp_path, monkeypatch):
    path = tmp_path / "images/set00/V000/lwir/I00000.jpg"
    path.parent.mkdir(parents=True)
    for suffix in (".jpg", ".png"):
        Image.new("L", (640, 512)).save(path.with_suffix(suffix))
    looked_up = []
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda name: looked_up.append(name) or exists(name))
    assert image_path(tmp_path, "set00/V000/I00000", "lwir") == path and len(looked_up) == 1
    assert image_path(tmp_path, "set00/V000/I00001", "lwir") == path.with_name("I00001.jpg")


def test_sizes_are_those_that_pillow_reads(tmp_path):
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x9286] = "long " * 1000
    ways = [
        {},
        {"progressive": True},
        {"quality": 100, "subsampling": 0},
        {"exif": exif},
        {"comment": b"c" * 600},
    ]
    for mode, size, how in itertools.product(("RGB", "L", "CMYK"), ((640, 512), (31, 700)), ways):
        Image.new(mode, size).save(path, **how)
        assert image_size(path) == size
        content = path.read_bytes()
        for cut in (1, 2, 30, content.index(b"\xff\xc0" if "progressive" not in how else b"\xff\xc2") + 6):
            path.write_bytes(content[:cut])
            with pytest.raises(InputError, match="unreadable image"):
                image_size(path)


@pytest.mark.parametrize("size", [(1024, 1280), (471, 640)])
def test_other_sizes_are_scaled_with_one_note(tmp_path, size, capsys):
    folder = tmp_path / "images/set00/V000"
    frames = [f"set00/V000/I{i:05d}" for i in range(3)]
    picture = Image.fromarray(random_pixels(size))
    for modality in ("visible", "lwir"):
        (folder / modality).mkdir(parents=True)
        for frame_id in frames:
            picture.save(folder / modality / f"{frame_id[-6:]}.png")
    Image.fromarray(random_pixels()).save(folder / "visible/I00000.png")
    check_images(tmp_path, frames, "early")
    [note] = capsys.readouterr().out.splitlines()
    assert note.startswith("note: 5 of 6 images are scaled to 640x512") and f"{size[1]}x{size[0]})" in note
    frame = read_frame(tmp_path, frames[1], "early")
    assert frame.shape == (512, 640, 4) and frame.dtype == np.uint8
    expected = np.array(picture.resize((640, 512), Image.Resampling.BILINEAR), np.int16)
    assert np.abs(frame[..., :3] - expected).max() <= 1
    assert np.array_equal(frame, cache_frames(tmp_path / "c", tmp_path, frames, "early").read(frames[1]))


def test_pipes_and_images_beyond_memory_are_refused(tmp_path):
    with pytest.raises(InputError, match="not found"):
        read_image(tmp_path / "a.jpg", "lwir")
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="a.jpg: it is a pipe or a device"):
        read_image(tmp_path / "a.jpg", "lwir")
    Image.new("1", (8192, MAX_PIXELS // 8192 + 1)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="b.png: the image is 8192x4097, too large to decode"):
        read_image(tmp_path / "b.png", "lwir")


def test_names_that_are_not_utf_8_have_a_fingerprint(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))
    path.write_bytes(b"")
    assert fingerprint([path]) != fingerprint([tmp_path])
