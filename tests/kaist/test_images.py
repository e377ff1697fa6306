"""Images of all supported kinds; images that would be decoded wrongly are refused."""

import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kaist.annotations import image_path, read_image_list
from kaist.files import InputError
from kaist.frame_cache import cache_frames, fingerprint
from kaist.images import MAX_PIXELS, check_images, image_size, load_image, read_frame


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
    """Pillow would clip them: a thermal image of 14 bits would become white."""
    path = tmp_path / "images/set00/V000/lwir/I00000.png"
    path.parent.mkdir(parents=True)
    sixteen_bits(path, kind)
    for read in (
        lambda: load_image(path, "lwir"),
        lambda: check_images(tmp_path, ["set00/V000/I00000"], "lwir"),
    ):
        with pytest.raises(InputError, match="I00000.png: not an 8-bit image; scale all frames alike"):
            read()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".jpeg", ".tif", ".tiff", ".JPG", ".PNG", ".TIF"])
def test_images_are_found_by_any_suffix(demo_root, tmp_path, suffix, capsys):
    """Visible images keep .jpg, LWIR images have another suffix and content."""
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


def test_a_jpg_is_preferred_and_needs_one_lookup(tmp_path, monkeypatch):
    path = tmp_path / "images/set00/V000/lwir/I00000.jpg"
    path.parent.mkdir(parents=True)
    for suffix in (".jpg", ".png"):
        Image.new("L", (640, 512)).save(path.with_suffix(suffix))
    looked_up = []
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda name: looked_up.append(name) or exists(name))
    assert image_path(tmp_path, "set00/V000/I00000", "lwir") == path and len(looked_up) == 1
    assert image_path(tmp_path, "set00/V000/I00001", "lwir") == path.with_name("I00001.jpg")


def test_the_header_has_the_size_unless_it_is_truncated(tmp_path):
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
            picture.save(folder / modality / f"{frame_id[-6:]}.png", compress_level=1)
    Image.fromarray(random_pixels()).save(folder / "visible/I00000.png")
    check_images(tmp_path, frames, "early")
    [note] = capsys.readouterr().out.splitlines()
    assert note.startswith("note: 5 of 6 images are scaled to 640x512") and f"{size[1]}x{size[0]})" in note
    frame = read_frame(tmp_path, frames[1], "early")
    assert frame.shape == (512, 640, 4) and frame.dtype == np.uint8
    expected = np.array(picture.resize((640, 512), Image.Resampling.BILINEAR), np.int16)
    assert np.abs(frame[..., :3] - expected).max() <= 1
    assert np.array_equal(frame, cache_frames(tmp_path / "c", tmp_path, frames, "early").read(frames[1]))


def test_pipes_and_huge_images_are_refused(tmp_path):
    with pytest.raises(InputError, match="not found"):
        load_image(tmp_path / "a.jpg", "lwir")
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="a.jpg: it is a pipe or a device"):
        load_image(tmp_path / "a.jpg", "lwir")
    Image.new("1", (8192, MAX_PIXELS // 8192 + 1)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="b.png: the image is 8192x4097, too large to decode"):
        load_image(tmp_path / "b.png", "lwir")


def test_the_fingerprint_of_names_that_are_not_utf_8(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))
    path.write_bytes(b"")
    assert fingerprint([path]) != fingerprint([tmp_path])


# ----------------------------------------------------------------------------------- decoding


def test_modalities_and_channels(demo_root):
    frame_id = read_image_list(demo_root / "imageSets/test-all.txt")[0]
    early = read_frame(demo_root, frame_id, "early")
    assert early.shape == (512, 640, 4) and early.dtype == np.uint8
    assert np.array_equal(read_frame(demo_root, frame_id, "visible"), early[..., :3])
    assert np.array_equal(read_frame(demo_root, frame_id, "lwir"), early[..., 3:])
    stored = Image.open(image_path(demo_root, frame_id, "lwir")).convert("RGB")
    assert np.abs(np.asarray(stored).astype(int) - early[..., 3:]).max() <= 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "image not found"),
        (lambda p: p.write_bytes(b"no image"), "unreadable image"),
        (lambda p: Image.new("I;16", (640, 512)).save(p, "PNG"), "not an 8-bit image"),
    ],
)
def test_invalid_images_are_reported_before_training(demo_root, tmp_path, damage, message):
    root = shutil.copytree(demo_root, tmp_path / "set")
    frame_id = read_image_list(root / "imageSets/train-all.txt")[3]
    path = image_path(root, frame_id, "lwir")
    damage(path)
    with pytest.raises(InputError, match=message) as error:
        check_images(root, [frame_id], "early")
    assert str(error.value).startswith(str(path))
    check_images(root, [frame_id], "visible")  # the other modality is not needed


def test_cache_is_reused_until_a_file_changes(demo_root, tmp_path):
    root, folder = shutil.copytree(demo_root, tmp_path / "set"), tmp_path / "cache"
    ids = read_image_list(root / "imageSets/train-all.txt")[:3]
    first = cache_frames(folder, root, ids, "early")
    before = first.path.stat()
    first.read(ids[0])[:] = 0  # a change of the frame in memory does not reach the file
    again = cache_frames(folder, root, ids, "early")
    assert again.path == first.path and again.path.stat().st_ino == before.st_ino
    assert np.array_equal(again.read(ids[0]), read_frame(root, ids[0], "early"))

    path = image_path(root, ids[1], "lwir")
    shutil.copy(image_path(root, ids[2], "lwir"), path)
    rebuilt = cache_frames(folder, root, ids, "early")
    assert np.array_equal(rebuilt.read(ids[1]), read_frame(root, ids[1], "early"))
    assert not np.array_equal(rebuilt.read(ids[1]), first.read(ids[1]))  # a map outlives its file
    assert [p for p in folder.iterdir()] == [rebuilt.path]

    os.utime(path, ns=(0, 0))  # the same size, another modification time
    assert cache_frames(folder, root, ids, "early").path != rebuilt.path


def test_caches_of_other_roots_inputs_and_lists_have_other_names(demo_root, tmp_path):
    root, folder = shutil.copytree(demo_root, tmp_path / "set"), tmp_path / "cache"
    ids = read_image_list(root / "imageSets/train-all.txt")[:3]
    kinds = [(demo_root, ids, "early"), (root, ids, "early"), (root, ids, "lwir"), (root, ids[::-1], "early")]
    paths = {cache_frames(folder, *kind).path for kind in kinds}
    assert len(paths) == 4 and set(folder.iterdir()) == paths


def test_an_interrupted_cache_is_built_again(demo_root, tmp_path):
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
    unfinished = folder / f".{name}-0.u8.1.tmp"  # left by a killed process
    unfinished.write_bytes(b"")
    os.utime(unfinished, (0, 0))
    cache.path.write_bytes(b"cut off")
    cache = cache_frames(folder, root, ids, "early")
    assert np.array_equal(cache.read(ids[2]), read_frame(root, ids[2], "early"))
    assert list(folder.iterdir()) == [cache.path]


def test_errors_of_a_cache_are_reported(demo_root, tmp_path, monkeypatch):
    ids = read_image_list(demo_root / "imageSets/train-all.txt")[:3]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot use this folder"):
        cache_frames(tmp_path / "file", demo_root, ids, "early")
    with pytest.raises(InputError, match=r"I99999.jpg: image not found"):
        cache_frames(tmp_path / "cache", demo_root, ["set00/V000/I99999"], "early")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(InputError, match=r"a cache of 3\.9 MB does not fit, 0\.0 MB are free"):
        cache_frames(tmp_path / "cache", demo_root, ids, "early")
