"""Check, decode and join the visible and LWIR images of a frame.

Missing, broken and too large images, and those of an unexpected bit depth, raise an InputError.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kaist.annotations import FRAME_HEIGHT, FRAME_SIZE, FRAME_WIDTH, MODALITIES, PairSet, image_path
from kaist.files import InputError, check_file

if TYPE_CHECKING:
    from PIL import Image

# Visible R, G, B, and LWIR: ImageNet's mean, which normalisation maps to zero.
MEAN_COLOUR = np.array([124, 116, 104, 114], np.uint8)
MAX_PIXELS = 2**25  # of one image; 100 MB as decoded RGB
# Blackout -> modality -> the area that is kept: left, top, right, bottom in 640x512; default: everything.
KEPT_AREAS = {
    "sides-a": {"visible": (0, 0, 320, 512), "lwir": (320, 0, 640, 512)},
    "sides-b": {"visible": (320, 0, 640, 512), "lwir": (0, 0, 320, 512)},
    "surroundings": {"lwir": (120, 96, 520, 416)},
}


def check_images(root: Path | PairSet, frame_ids: Sequence[str], input_mode: str, blackout: str = "") -> None:
    """Check the header of every image, and print a note if images have another size than 640x512.

    blackout: as in `read_frame`; images of a blanked modality need not exist.

    Raises:
        InputError: an image is missing or is not an 8-bit image.
    """
    if isinstance(root, PairSet):
        return  # `open_pairs` has checked every header
    modalities = [modality for modality in MODALITIES[input_mode] if modality != blackout]
    paths = [image_path(root, frame_id, modality) for frame_id in frame_ids for modality in modalities]
    sizes = ((path, *image_size(path)) for path in paths)
    other_sizes = ["{} is {}x{}".format(*x) for x in sizes if x[1:] != FRAME_SIZE]
    if other_sizes:
        note = f"{len(other_sizes)} of {len(paths)} images are scaled to {FRAME_WIDTH}x{FRAME_HEIGHT}"
        print(f"note: {note}, the frame size of annotations and detections (first: {other_sizes[0]})")


def image_size(path: Path, deep: bool = False) -> tuple[int, int]:
    """Read the width and height of an image from its header; deep: as in `open_image`."""
    with open_image(path, deep) as image:
        return image.size


@contextlib.contextmanager
def open_image(path: Path, deep: bool = False) -> Iterator[Image.Image]:
    """Open an image without decoding it; deep: also accept one channel of more than 8 bits."""
    from PIL import Image

    problem, remedy = "unreadable image", "copy it again, or save it as PNG, JPEG or TIFF"
    try:
        check_file(path)
        with warnings.catch_warnings():  # large sizes raise an InputError below
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=("JPEG", "PNG", "TIFF"))
        with image:
            too_deep = not deep if image.mode[0] in "IF" else ";16" in str(image.tile)
            if too_deep:
                raise InputError("not an 8-bit image", "scale all frames alike to 0 … 255", file=path)
            if image.width * image.height > MAX_PIXELS:
                large = f"the image is {image.width}x{image.height}, too large to decode"
                raise InputError(large, "scale it down", file=path)
            problem, remedy = "broken image", "copy it again"
            yield image
    except InputError:
        raise
    except FileNotFoundError:
        remedy = "check the path: DATA_ROOT, the image list, INPUT_MODE"
        raise InputError("image not found", remedy, file=path) from None
    except Exception as error:  # Pillow raises many types for broken data or huge sizes
        raise InputError(f"{problem} ({error})", remedy, file=path) from None


def load_image(path: Path, modality: str, lwir_range: Sequence[float] = (0, 0)) -> Image.Image:
    """Decode an image of any size: visible as RGB, LWIR as one channel of 8 bits.

    lwir_range: the LWIR values that become 0 and 255, others are clipped; (0, 0): LWIR has 8 bits.
    """
    from PIL import Image

    low, high = lwir_range if modality == "lwir" else (0, 0)
    if low < high:
        pixels = load_deep_image(path)
        if pixels is None:
            problem = "an 8-bit image, but the training images have more bits"
            raise InputError(problem, "convert all frames in the same way", file=path)
        scaled = (pixels - low) * (255 / (high - low))
        return Image.fromarray((scaled.clip(0, 255) + 0.5).astype(np.uint8))
    mode = "RGB" if modality == "visible" else "L"
    with open_image(path) as image:
        image.draft(mode, None)  # decode only the luma of a JPEG, without converting colours
        image.load()
        return image if image.mode == mode else image.convert(mode)


def load_deep_image(path: Path) -> np.ndarray | None:
    """Decode one channel of more than 8 bits to (h, w) float32; None if the image has 8 bits."""
    with open_image(path, deep=True) as image:
        return np.asarray(image, np.float32) if image.mode[0] in "IF" else None


def load_frame_image(root: Path | PairSet, frame_id: str, modality: str) -> Image.Image:
    """Decode a frame's image by `load_image`; scale it to 640x512 below a KAIST root."""
    path = image_path(root, frame_id, modality)
    if isinstance(root, PairSet):
        return load_image(path, modality, root.lwir_range)
    return rescale(load_image(path, modality))


def rescale(image: Image.Image) -> Image.Image:
    """Scale an image to 640x512."""
    from PIL import Image

    return image if image.size == FRAME_SIZE else image.resize(FRAME_SIZE, Image.Resampling.BILINEAR)


def to_array(image: Image.Image) -> np.ndarray:
    """Convert an image to (h, w, channels) uint8."""
    return np.atleast_3d(np.array(image))


def join_modalities(images: dict[str, np.ndarray], input_mode: str, filler: np.ndarray) -> np.ndarray:
    """Concatenate modalities to (h, w, C) uint8, visible first; `filler` (4,) replaces a missing one."""
    height, width, _ = next(iter(images.values())).shape
    blank = np.broadcast_to(filler, (height, width, len(filler)))
    blanks = {"visible": blank[..., :3], "lwir": blank[..., 3:]}
    return np.concatenate([images.get(m, blanks[m]) for m in MODALITIES[input_mode]], axis=2)


def read_frame(
    root: Path | PairSet, frame_id: str, input_mode: str, blackout: str = "", filler: np.ndarray = MEAN_COLOUR
) -> np.ndarray:
    """Read the modalities of a frame as (h, w, C) uint8 channels, visible first; (512, 640, C) on KAIST.

    Args:
        blackout: a modality that is blanked and not read, or a key of `KEPT_AREAS`; "": neither.
        filler: (4,) uint8, the colour of blanked areas.
    """
    modalities = MODALITIES[input_mode]
    if blackout in modalities or len(modalities) == 1:
        images = {m: to_array(load_frame_image(root, frame_id, m)) for m in modalities if m != blackout}
        return join_modalities(images, input_mode, filler)
    visible, lwir = (load_frame_image(root, frame_id, m) for m in modalities)
    visible.putalpha(lwir)  # much faster than numpy: Pillow stores RGB as four bytes a pixel
    return black_out(np.array(visible), blackout, filler) if blackout else np.array(visible)


def black_out(frame: np.ndarray, blackout: str, filler: np.ndarray) -> np.ndarray:
    """Fill a (h, w, 4) frame, visible first, with `filler` (4,) except for the `KEPT_AREAS`.

    These are the fusion dead zones of Kim et al., "MLPD" (2021).
    """
    blanked = np.broadcast_to(filler, frame.shape).copy()
    height, width, _ = frame.shape
    for modality, channels in (("visible", slice(3)), ("lwir", slice(3, 4))):
        area = KEPT_AREAS[blackout].get(modality, (0, 0, *FRAME_SIZE))
        left, right = (x * width // FRAME_WIDTH for x in area[::2])
        top, bottom = (y * height // FRAME_HEIGHT for y in area[1::2])
        blanked[top:bottom, left:right, channels] = frame[top:bottom, left:right, channels]
    return blanked
