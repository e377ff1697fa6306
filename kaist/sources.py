"""Where a run's frames come from: a KAIST root, or another set of pairs. Runs without torch."""

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
from kaist.pair_sets import NAMED_SETS, find_lwir_range, open_pairs

KAIST = "kaist"  # what DATA says of a KAIST root
# What is taken from a configuration: by open_training and open_testing.
TRAIN_SET_KEYS = ("data", "data_root", "train_list", "annotations", "input_mode")
TEST_SET_KEYS = ("data", "data_root", "test_list", "test_annotations", "lwir_range")
# What a full KAIST is trained and tested on: the constants of its list and annotations, and the lists
# under their published names, the longest first.
SPLITS = {
    "train": ("train_list", "annotations", [f"imageSets/train-all-{n}.txt" for n in ("02", "04", "20")]),
    "test": ("test_list", "test_annotations", ["imageSets/test-all-20.txt"]),
}


def open_training(
    data: str, data_root: str | Path, *, train_list: str, annotations: str, input_mode: str
) -> tuple[Path | PairSet, list[str], Annotations | PairSet]:
    """Where to read the images of the frames to train on, the frames' ids, and their annotations.

    Args:
        data: DATA, "kaist", another name in `pair_sets.NAMED_SETS`, or the path of a description.
        data_root, train_list, annotations, input_mode: the constants. Of a KAIST root's paired
            annotations the visible boxes are read for visible input alone.
    """
    if data != KAIST:
        pairs = open_pairs(data, pairs_root(data, data_root), "train")
        pairs = replace(pairs, lwir_range=find_lwir_range(pairs))
        if pairs.lwir_range[1]:
            print("LWIR of {:g} … {:g} become 0 … 255, what lies beyond is clipped".format(*pairs.lwir_range))
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
    """Where to read the images of the frames to test on, and the frames' people; a demo set is drawn.

    Args:
        data, data_root: as of `open_training`; test_list, test_annotations: the constants.
        lwir_range: that of the frames that were trained on.
    """
    if data != KAIST:
        pairs = open_pairs(data, pairs_root(data, data_root), "test")
        pairs = replace(pairs, lwir_range=tuple(lwir_range))
        return pairs, load_ground_truth(pairs, pairs.frames)
    from kaist.demo import open_root  # here, because it takes Pillow

    root = open_root(data_root)
    frame_ids = read_image_list(resolve_path(root, test_list))
    where = root if test_annotations == "auto" else open_annotations(root, test_annotations, "lwir")
    return root, load_ground_truth(where, frame_ids)


def overlap_warning(root: Path | PairSet, frames: Sequence[Frame], test_set: GroundTruth) -> list[str]:
    """A warning of frames, of the same ids and images, that are to train (images in `root`) and to test."""
    shared = {frame.id for frame in frames} & set(test_set.frames)
    if isinstance(root, PairSet) and test_set.pairs:
        theirs = test_set.pairs.images
        shared = {i for i in shared if root.images[i]["visible"] == theirs[i]["visible"]}
    return [f"warning: {len(shared)} frames are in both the training and the test list"] if shared else []


def dataset_name(data: str) -> str:
    """What a set of pairs is called: by its own name, or the folder of its description."""
    return Path(data).parent.name or data


def pairs_root(data: str, data_root: str | Path) -> Path | None:
    """Where the paths of a set begin: DATA_ROOT for a named one, else its description's own folder."""
    return Path(data_root) if data in NAMED_SETS else None


def find_kaist(root: Path, given: Mapping[str, str] = {}, kinds: Iterable[str] = SPLITS) -> dict[str, str]:
    """The constants that train and test on a full KAIST: its root, lists and annotations.

    To test it takes KAIST_annotation.json, to train the first form that annotates every frame of the
    list. A part that is not there is refused by its name.

    given: values of constants that are chosen already; kinds: those of `SPLITS` that are wanted.
    """
    parts = {"data_root": str(root)}
    if not root.is_dir() or ("train" in kinds and not (root / "images").is_dir()):
        problem = "no images/ here" if root.is_dir() else "no such folder"
        raise InputError(problem, "name the folder that holds KAIST's images/", file=root)
    for kind in kinds:
        list_name, annotations_name, lists = SPLITS[kind]
        there = [name for name in lists if (root / name).is_file()]
        if not there and list_name not in given:
            remedy = f"put one there, or name a list by --{list_name.replace('_', '-')}"
            raise InputError(f"no {' and no '.join(lists)} here", remedy, file=root)
        parts[list_name] = given.get(list_name) or there[0]
        if annotations_name in given:
            continue
        if kind == "train":
            frame_ids = read_image_list(resolve_path(root, parts[list_name]))
            parts[annotations_name] = complete_form(root, frame_ids)
        elif found := find_form_paths(root, "json"):
            parts[annotations_name] = str(found[0].relative_to(root))
        else:
            problem = f"no {JSON_NAME} here, the improved annotations that papers test on"
            remedy = "put it there, or choose others by --test-annotations (eval.py: --annotations)"
            raise InputError(problem, remedy, file=root)
    return parts


def complete_form(root: Path, frame_ids: Sequence[str]) -> str:
    """The first form of annotations that has a file for every one of these frames."""
    holds = {}
    for form, [folder, *_] in FORM_PATHS.items():
        if form != "json":
            annotations = Annotations(root / folder, form, "lwir")
            holds[folder] = sum(os.path.exists(annotations.path(frame_id)) for frame_id in frame_ids)
            if holds[folder] == len(frame_ids):
                return form
    found = ", ".join(f"{folder}/ {n}" for folder, n in holds.items())
    problem = f"no folder annotates all {len(frame_ids)} frames to train on ({found})"
    raise InputError(problem, "complete one, or name others by --annotations", file=root)
