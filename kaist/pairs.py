"""One split of a set of visible and LWIR pairs other than KAIST; see `kaist.pair_sets`. Needs numpy alone."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kaist.annotation_files import ObjectRow, Objects, make_objects


@dataclass(frozen=True)
class PairSet:
    """One split of a set of pairs.

    Attributes:
        source: the description, or the root of a named set, for messages.
        frames: ids, in the order of the list, or sorted.
        images: id -> modality, or "labels" -> file; sizes: id -> width and height, of both.
        objects: id -> what is labelled, without dropped classes; who is to be learned is a "person".
        night: pattern of the ids of frames by night.
        lwir_range: as from `find_lwir_range`.

    It is used like a KAIST root where images are read, and like `Annotations` where objects are.
    """

    source: Path
    frames: tuple[str, ...]
    images: Mapping[str, Mapping[str, Path]]
    sizes: Mapping[str, tuple[int, int]]
    objects: Mapping[str, Objects]
    night: str = ""
    lwir_range: tuple[float, float] = (0.0, 0.0)

    def time_of_day(self, frame_id: str) -> str:
        """ "day" or "night", as the description has it, or "" where it does not say."""
        if not self.night:
            return ""
        return "night" if fnmatch.fnmatchcase(frame_id, self.night) else "day"

    def sizes_of(self, frame_ids: Sequence[str]) -> np.ndarray:
        """(n, 2) int64 width and height of frames."""
        return np.array([self.sizes[frame_id] for frame_id in frame_ids], np.int64).reshape(-1, 2)

    def take(self, frame_id: str) -> PairSet:
        """One frame alone, without its objects: quick to send to another process."""
        files, size = {frame_id: self.images[frame_id]}, {frame_id: self.sizes[frame_id]}
        return replace(self, frames=(frame_id,), images=files, sizes=size, objects={})

    def read_all(self, frame_ids: Sequence[str]) -> tuple[Objects, np.ndarray]:
        """The objects of many frames, one frame after another, and how many each has, (n,) int64."""
        rows = [rows_of(self.objects[frame_id]) for frame_id in frame_ids]
        return make_objects([*itertools.chain(*rows)]), np.array([len(own) for own in rows], np.int64)


def rows_of(objects: Objects) -> list[ObjectRow]:
    """Objects as rows."""
    columns = objects.labels, objects.boxes.tolist(), objects.occlusion.tolist(), objects.ignore.tolist()
    return [ObjectRow(*row, 0) for row in zip(*columns, strict=True)]
