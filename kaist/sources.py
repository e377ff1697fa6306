"""Open the training and test frames of a run, from a KAIST root or another set of pairs. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from kaist.annotations import (
    FORM_PATHS,
    JSON_NAME,
    Annotations,
    PairSet,
    find_form_paths,
    open_annotations,
    read_image_list,
    resolve_path,
)
from kaist.files import InputError
from kaist.frames import Frame
from kaist.miss_rate import GroundTruth, load_ground_truth
from kaist.pair_sets import NAMED_SETS, SPLITS, find_lwir_range, open_pairs

KAIST = "kaist"  # the value of DATA for a KAIST root
# Config keys that `open_training` and `open_testing` take.
TRAIN_SET_KEYS = ("data", "data_root", "train_list", "annotations", "input_mode")
TEST_SET_KEYS = ("data", "data_root", "test_list", "test_annotations", "lwir_range")
# Split -> config keys of its list and annotations, and the published lists, from the longest to the shortest.
SPLIT_FILES = {
    "train": ("train_list", "annotations", [f"imageSets/train-all-{n}.txt" for n in ("02", "04", "20")]),
    "test": ("test_list", "test_annotations", ["imageSets/test-all-20.txt"]),
}


def open_training(
    data: str, data_root: str | Path, *, train_list: str, annotations: str, input_mode: str
) -> tuple[Path | PairSet, list[str], Annotations | PairSet]:
    """Open the training set: where to read its images, its frame ids, and its annotations.

    Args:
        data: "kaist", another name in `pair_sets.NAMED_SETS`, or the path of a description.
        data_root, train_list, annotations, input_mode: the config values. From KAIST's paired annotations,
            the visible boxes are read for INPUT_MODE = "visible", else the LWIR boxes.
    """
    if data != KAIST:
        pairs = open_pairs(data, pairs_root(data, data_root), "train")
        pairs = replace(pairs, lwir_range=find_lwir_range(pairs))
        if pairs.lwir_range[1]:
            print("LWIR values {:g} … {:g} become 0 … 255, others are clipped".format(*pairs.lwir_range))
        return pairs, list(pairs.frames), pairs
    root, modality = Path(data_root), "visible" if input_mode == "visible" else "lwir"
    frame_ids = read_image_list(resolve_path(root, train_list))
    return root, frame_ids, open_annotations(root, annotations, modality)


def open_testing(
    data: str,
    data_root: str | Path,
    *,
    test_list: str,
    test_annotations: str,
    lwir_range: tuple[float, float] = (0.0, 0.0),
) -> tuple[Path | PairSet, GroundTruth]:
    """Open the test set: where to read its images, and its ground truth; a demo set is rendered if missing.

    Args:
        data, data_root: as in `open_training`; test_list, test_annotations: the config values.
        lwir_range: the `PairSet.lwir_range` of the training set.
    """
    if data != KAIST:
        pairs = open_pairs(data, pairs_root(data, data_root), "test")
        pairs = replace(pairs, lwir_range=tuple(lwir_range))
        return pairs, load_ground_truth(pairs, pairs.frames)
    from kaist.demo import open_root  # imported here because it needs Pillow

    root = open_root(data_root)
    frame_ids = read_image_list(resolve_path(root, test_list))
    annotations = root if test_annotations == "auto" else open_annotations(root, test_annotations, "lwir")
    return root, load_ground_truth(annotations, frame_ids)


def overlap_warning(root: Path | PairSet, frames: Sequence[Frame], test_set: GroundTruth) -> list[str]:
    """Warn of frames, compared by id and image, that are in both the training and the test set."""
    shared = {frame.id for frame in frames} & set(test_set.frames)
    if isinstance(root, PairSet) and test_set.pair_set:
        test_images = test_set.pair_set.images
        shared = {i for i in shared if root.images[i]["visible"] == test_images[i]["visible"]}
    return [f"warning: {len(shared)} frames are in both the training and the test list"] if shared else []


def dataset_name(data: str) -> str:
    """Return the display name of DATA: the folder of a description, or the name of a named set."""
    return Path(data).parent.name or data


def pairs_root(data: str, data_root: str | Path) -> Path | None:
    """Return the `root` argument of `open_pairs`: DATA_ROOT for a named set, else None."""
    return Path(data_root) if data in NAMED_SETS else None


def find_kaist(root: Path, given: Mapping[str, str] = {}, splits: Iterable[str] = SPLITS) -> dict[str, str]:
    """Find the lists and annotations of a full KAIST; return them as config values, with DATA_ROOT.

    The test set uses KAIST_annotation.json, the training set the first form that annotates all frames.

    Args:
        given: config values that the user has set; splits: "train", "test", or both.

    Raises:
        InputError: a folder, list or form of annotations is missing.
    """
    values = {"data_root": str(root)}
    if not root.is_dir() or ("train" in splits and not (root / "images").is_dir()):
        problem = "no images/ here" if root.is_dir() else "no such folder"
        raise InputError(problem, "choose the folder that contains KAIST's images/", file=root)
    for split in splits:
        list_key, annotations_key, lists = SPLIT_FILES[split]
        existing = [name for name in lists if (root / name).is_file()]
        if not existing and list_key not in given:
            remedy = f"copy one there, or choose a list with --{list_key.replace('_', '-')}"
            remedy += " (eval.py: --image-list)" * (split == "test")
            raise InputError(f"no {' or '.join(lists)} here", remedy, file=root)
        values[list_key] = given.get(list_key) or existing[0]
        if annotations_key in given:
            continue
        if split == "train":
            frame_ids = read_image_list(resolve_path(root, values[list_key]))
            values[annotations_key] = complete_form(root, frame_ids)
        elif found := find_form_paths(root, "json"):
            values[annotations_key] = str(found[0].relative_to(root))
        else:
            problem = f"no {JSON_NAME} here, the improved annotations that papers test on"
            remedy = "copy it there, or choose others with --test-annotations (eval.py: --annotations)"
            raise InputError(problem, remedy, file=root)
    return values


def complete_form(root: Path, frame_ids: Sequence[str]) -> str:
    """Return the first form of annotations that has a file for each of these frames."""
    n_annotated = {}
    for form, [folder, *_] in FORM_PATHS.items():
        if form != "json":
            annotations = Annotations(root / folder, form, "lwir")
            n_annotated[folder] = sum(os.path.exists(annotations.path(frame_id)) for frame_id in frame_ids)
            if n_annotated[folder] == len(frame_ids):
                return form
    found = ", ".join(f"{folder}/ {n}" for folder, n in n_annotated.items())
    problem = f"no folder annotates all {len(frame_ids)} frames to train on ({found})"
    raise InputError(problem, "complete one, or choose others with --annotations", file=root)
