"""KAIST's images as pixels: headers looked at, modalities decoded and joined, frames cached."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from kaist.annotations import FRAME_HEIGHT, FRAME_WIDTH, MODALITIES, image_path
from kaist.files import InputError
from kaist.frame_cache import FrameCache, open_cache
from kaist.remember import remember

# Visible R, G, B, then LWIR: the colour that normalisation by ImageNet's mean turns into zero.
MEAN_COLOUR = np.array([124, 116, 104, 114], np.uint8)


def check_images(root: Path, frame_ids: Sequence[str], input_mode: str, without: str = "") -> None:
    """Look at every image's header: it exists, is an image, and has KAIST's size.

    Args:
        without: a modality that is not needed.

    Raises:
        InputError: for the first image that is missing, unreadable or of another size.
    """
    paths = [
        image_path(root, frame_id, modality)
        for frame_id in frame_ids
        for modality in MODALITIES[input_mode]
        if modality != without
    ]

    def look() -> dict[str, np.ndarray]:
        for path in paths:
            with open_image(path):
                pass
        return {}

    remember("images", paths, look)


def open_image(path: Path) -> Image.Image:
    """Open an image of KAIST's size without decoding it."""
    try:
        with warnings.catch_warnings():  # Pillow warns of sizes that are refused below
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=("JPEG", "PNG"))
    except FileNotFoundError:
        raise InputError(
            "image not found", "check DATA_ROOT, the image list and INPUT_MODE", file=path
        ) from None
    except Exception as error:  # whatever Pillow meets in broken data, or a size beyond reason
        raise InputError(f"unreadable image ({error})", "copy it again", file=path) from None
    if image.size != (FRAME_WIDTH, FRAME_HEIGHT):
        size = "{}x{}".format(*image.size)
        image.close()
        raise InputError(
            f"the image is {size}, KAIST frames are {FRAME_WIDTH}x{FRAME_HEIGHT}",
            "use the benchmark's own images",
            file=path,
        )
    return image


def decode(path: Path, modality: str) -> Image.Image:
    """Decode one image of KAIST's size: visible as RGB, LWIR as a single channel."""
    with open_image(path) as image:
        mode = "RGB" if modality == "visible" else "L"
        try:
            image.draft(mode, None)  # a grey JPEG's luma alone: no colour conversion to undo
            image.load()
            return image if image.mode == mode else image.convert(mode)
        except Exception as error:  # whatever Pillow meets in broken data
            raise InputError(f"broken image ({error})", "copy it again", file=path) from None


def read_image(path: Path, modality: str) -> np.ndarray:
    """Decode one image: visible as (512, 640, 3), LWIR as (512, 640, 1), uint8."""
    pixels = np.array(decode(path, modality))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def join_modalities(images: dict[str, np.ndarray], input_mode: str, filler: np.ndarray) -> np.ndarray:
    """(512, 640, C) uint8, visible first; a modality that `images` lacks is `filler` (4,) alone."""
    blank = np.broadcast_to(filler, (FRAME_HEIGHT, FRAME_WIDTH, len(filler)))
    blanks = {"visible": blank[..., :3], "lwir": blank[..., 3:]}
    return np.concatenate([images.get(m, blanks[m]) for m in MODALITIES[input_mode]], axis=2)


def read_frame(
    root: Path, frame_id: str, input_mode: str, without: str = "", filler: np.ndarray = MEAN_COLOUR
) -> np.ndarray:
    """The modalities of one frame side by side: (512, 640, C) uint8, visible first.

    Args:
        without: a modality that is blanked instead of read; filler: (4,) uint8, the blanks' colour.
    """
    modalities = MODALITIES[input_mode]
    if without:
        images = {m: read_image(image_path(root, frame_id, m), m) for m in modalities if m != without}
        return join_modalities(images, input_mode, filler)
    if len(modalities) == 1:
        return read_image(image_path(root, frame_id, modalities[0]), modalities[0])
    visible, lwir = (decode(image_path(root, frame_id, m), m) for m in modalities)
    visible.putalpha(lwir)  # Pillow keeps four bytes a pixel anyhow: much faster than numpy
    return np.array(visible)


def cache_frames(folder: str | Path, root: Path, frame_ids: Sequence[str], input_mode: str) -> FrameCache:
    """The frames of a list decoded into a cache in `folder`, drawn only where it is not there yet.

    Raises:
        InputError: an image cannot be read, or the disk is too small.
    """

    def read(frame_id: str) -> np.ndarray:
        return read_frame(root, frame_id, input_mode)

    return open_cache(folder, Path(root), frame_ids, MODALITIES[input_mode], read)
