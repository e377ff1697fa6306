"""Opening images that nobody vouches for: nothing is decoded before its size is known."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image

from errors import InputError
from kaist import FRAME_HEIGHT, FRAME_WIDTH


def open_image(path: Path) -> Image.Image:
    """Open a JPEG or PNG of KAIST's size without decoding it.

    Raises:
        InputError: it is missing, no such image, or of another size.
    """
    try:
        with warnings.catch_warnings():  # Pillow warns of sizes that are refused below
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=("JPEG", "PNG"))
    except FileNotFoundError:
        raise InputError(
            "image not found", "check DATA_ROOT, the image list and INPUT_MODE", file=path
        ) from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
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
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's words for broken data
            raise InputError(f"broken image ({error})", "copy it again", file=path) from None
