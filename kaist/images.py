"""KAIST's images as pixels: headers looked at, modalities decoded and joined.

An image that is missing, unreadable, broken, larger than `MAX_PIXELS` or too deep is refused by an
InputError that names it.
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

# Visible R, G, B, then LWIR: the colour that normalisation by ImageNet's mean turns into zero.
MEAN_COLOUR = np.array([124, 116, 104, 114], np.uint8)
MAX_PIXELS = 2**25  # of an image; decoded, as many take 100 MB
# What `black_out` leaves of a modality: left, top, right, bottom in 640x512. Those not named stay whole.
KEPT_AREAS = {
    "sides-a": {"visible": (0, 0, 320, 512), "lwir": (320, 0, 640, 512)},
    "sides-b": {"visible": (320, 0, 640, 512), "lwir": (0, 0, 320, 512)},
    "surroundings": {"lwir": (120, 96, 520, 416)},
}


def check_images(root: Path | PairSet, frame_ids: Sequence[str], input_mode: str, without: str = "") -> None:
    """Look at every image's header: it exists and is an 8-bit image. One line tells of other sizes.

    without: a modality that is not needed.
    """
    if isinstance(root, PairSet):
        return  # every header of a set of pairs was looked at when it was opened
    modalities = [modality for modality in MODALITIES[input_mode] if modality != without]
    paths = [image_path(root, frame_id, modality) for frame_id in frame_ids for modality in modalities]
    sizes = ((path, *image_size(path)) for path in paths)
    other_sizes = ["{} is {}x{}".format(*x) for x in sizes if x[1:] != FRAME_SIZE]
    if other_sizes:
        n = f"{len(other_sizes)} of {len(paths)} images are scaled to {FRAME_WIDTH}x{FRAME_HEIGHT}"
        print(f"note: {n}, of which annotations and detections are pixels ({other_sizes[0]})")


def image_size(path: Path, deep: bool = False) -> tuple[int, int]:
    """Width and height that an image's header declares; deep: as of `open_image`."""
    with open_image(path, deep) as image:
        return image.size


@contextlib.contextmanager
def open_image(path: Path, deep: bool = False) -> Iterator[Image.Image]:
    """An image, not decoded yet; deep: whether one channel of more than 8 bits is taken too."""
    from PIL import Image

    problem, remedy = "unreadable image", "copy it again, or save it as PNG, JPEG or TIFF"
    try:
        check_file(path)
        with warnings.catch_warnings():  # Pillow warns of sizes that are refused below
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
    except Exception as error:  # whatever Pillow meets in broken data, or a size beyond reason
        raise InputError(f"{problem} ({error})", remedy, file=path) from None


def load_image(path: Path, modality: str, lwir_range: Sequence[float] = (0, 0)) -> Image.Image:
    """Decode an image of any size: visible as RGB, LWIR as one channel of 8 bits.

    lwir_range: of LWIR of more than 8 bits the values that become 0 and 255; what lies beyond is clipped.
    (0, 0): it has 8 bits.
    """
    from PIL import Image

    low, high = lwir_range if modality == "lwir" else (0, 0)
    if low < high:
        pixels = load_deep_image(path)
        if pixels is None:
            problem = "an image of 8 bits, where those to train on have more"
            raise InputError(problem, "scale all frames alike", file=path)
        scaled = (pixels - low) * (255 / (high - low))
        return Image.fromarray((scaled.clip(0, 255) + 0.5).astype(np.uint8))
    mode = "RGB" if modality == "visible" else "L"
    with open_image(path) as image:
        image.draft(mode, None)  # a grey JPEG's luma alone: no colour conversion to undo
        image.load()
        return image if image.mode == mode else image.convert(mode)


def load_deep_image(path: Path) -> np.ndarray | None:
    """The values of an image of one channel of more than 8 bits, (h, w) float32; None if it has 8."""
    with open_image(path, deep=True) as image:
        return np.asarray(image, np.float32) if image.mode[0] in "IF" else None


def load_frame_image(root: Path | PairSet, frame_id: str, modality: str) -> Image.Image:
    """A frame's image as of `load_image`; of KAIST scaled to 640x512 where it is of another size."""
    path = image_path(root, frame_id, modality)
    if isinstance(root, PairSet):
        return load_image(path, modality, root.lwir_range)
    return rescale(load_image(path, modality))


def rescale(view: Image.Image) -> Image.Image:
    """A view at 640x512."""
    from PIL import Image

    return view if view.size == FRAME_SIZE else view.resize(FRAME_SIZE, Image.Resampling.BILINEAR)


def to_array(view: Image.Image) -> np.ndarray:
    """A view as (h, w, channels) uint8."""
    return np.atleast_3d(np.array(view))


def join_modalities(images: dict[str, np.ndarray], input_mode: str, filler: np.ndarray) -> np.ndarray:
    """(h, w, C) uint8, visible first; a modality that `images` lacks is `filler` (4,) alone."""
    height, width, _ = next(iter(images.values())).shape
    blank = np.broadcast_to(filler, (height, width, len(filler)))
    blanks = {"visible": blank[..., :3], "lwir": blank[..., 3:]}
    return np.concatenate([images.get(m, blanks[m]) for m in MODALITIES[input_mode]], axis=2)


def read_frame(
    root: Path | PairSet, frame_id: str, input_mode: str, without: str = "", filler: np.ndarray = MEAN_COLOUR
) -> np.ndarray:
    """The modalities of one frame side by side: (h, w, C) uint8, visible first; KAIST's are (512, 640, C).

    without: a modality that is blanked instead of read, or a key of `KEPT_AREAS`; filler: (4,) uint8, the
    blanks' colour.
    """
    modalities = MODALITIES[input_mode]
    if without in modalities or len(modalities) == 1:
        images = {m: to_array(load_frame_image(root, frame_id, m)) for m in modalities if m != without}
        return join_modalities(images, input_mode, filler)
    visible, lwir = (load_frame_image(root, frame_id, m) for m in modalities)
    visible.putalpha(lwir)  # Pillow keeps four bytes a pixel anyhow: much faster than numpy
    return black_out(np.array(visible), without, filler) if without else np.array(visible)


def black_out(frame: np.ndarray, blackout: str, filler: np.ndarray) -> np.ndarray:
    """A (h, w, 4) frame, visible first, of which parts are `filler` (4,): see `KEPT_AREAS`.

    The fusion dead zones of Kim et al., "MLPD" (2021).
    """
    dark = np.broadcast_to(filler, frame.shape).copy()
    height, width, _ = frame.shape
    for modality, channels in (("visible", slice(3)), ("lwir", slice(3, 4))):
        view = KEPT_AREAS[blackout].get(modality, (0, 0, *FRAME_SIZE))
        left, right = (x * width // FRAME_WIDTH for x in view[::2])
        top, bottom = (y * height // FRAME_HEIGHT for y in view[1::2])
        dark[top:bottom, left:right, channels] = frame[top:bottom, left:right, channels]
    return dark
