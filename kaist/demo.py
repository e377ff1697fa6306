"""Renders the demo and streets sets: visible and LWIR frames of streets, in KAIST's exact layout.

    python -m kaist.demo --root data/demo

The folder's name chooses the set:
    demo-shifted: the demo set with the visible camera shifted by some pixels in each video. It has paired
        annotations, with boxes for each modality. Everything else is the same as in the demo set.
    streets, streets-without-crowds, streets-without-haze: see `kaist.render_streets` and docs/streets.md.
    any other name: the demo set, see `kaist.render_demo`.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from kaist import render_demo, render_streets
from kaist.annotations import DEMO_ROOT, FRAME_SIZE, JSON_NAME, time_of_day
from kaist.files import (
    InputError,
    OneLineParser,
    make_folder,
    read_text,
    run_script,
    write_atomically,
    write_text,
)
from kaist.labels import coco_content, read_labels
from kaist.render_streets import World
from kaist.sprites import RenderedFrame

SHIFTED_ROOT = Path("data/demo-shifted")
WORLDS = {
    "streets": World(),
    "streets-without-crowds": World(crowds=False),
    "streets-without-haze": World(haze=False),
}
STREETS_ROOTS = tuple(DEMO_ROOT.with_name(name) for name in WORLDS)
RECIPE = "recipe.txt"  # describes the set, so that only the same set is continued after an interruption
FRAME_SECONDS = 0.12  # approximate time of one CPU core to render a frame


class DrawnSet(NamedTuple):
    """Settings of a set."""

    seed: int = 4
    train_frames: int = 480  # in set00-05
    test_frames: int = 180  # in set06-11
    world: World | None = None  # options of a streets set, None for a demo set
    paired: bool = False  # shift the visible camera, and annotate each modality


# Sets by the name of their folder; any other name is the demo set.
SETS = {SHIFTED_ROOT.name: DrawnSet(paired=True)}
SETS |= {name: DrawnSet(20, 3600, 240, world) for name, world in WORLDS.items()}


def draw_set(root: Path, *, progress: bool = True, **changes: int | None) -> None:
    """Render the set that the name of `root` chooses; frames that are there already are kept.

    The same seed gives the same bytes with any number of processes.

    Args:
        root: a folder that is absent, empty, or contains a part of this set.
        progress: print the expected time and show a progress bar.
        changes: seed, train_frames and test_frames; None keeps the set's own.

    Raises:
        InputError: root contains something else or cannot be written, or there are too few frames.
    """
    settings = SETS.get(root.name, DrawnSet())
    settings = settings._replace(**{name: value for name, value in changes.items() if value is not None})
    if min(settings.train_frames, settings.test_frames) < 6 or settings.seed < 0:
        problem = "each of the 12 sets needs at least one frame, and the seed cannot be negative"
        raise InputError(problem, "ask for 6 or more frames, and a seed from 0 up")
    recipe, render, jobs = plan_jobs(settings)
    check_root(root, recipe)
    last = "lwir" * settings.paired  # the annotations that are written last
    left = {job: ids for job, ids in jobs.items() if not all(text_path(root, i, last).exists() for i in ids)}
    n_frames = sum(map(len, left.values()))
    n_workers = min(os.cpu_count() or 1, 61)  # Windows allows no more
    if progress:
        expected = tqdm.format_interval(n_frames * FRAME_SECONDS / n_workers)
        print(f"rendering {n_frames} frames in {root}: about {expected} in {n_workers} processes")
        if settings.world:
            print("the row streets then trains on them for about an hour on two cores")
    try:
        make_folder(root)
        write_text(root / RECIPE, recipe)
        with (
            ProcessPoolExecutor(n_workers, initializer=init_worker) as pool,
            tqdm(total=n_frames, unit="frame", disable=not progress) as bar,
        ):
            drawn = pool.map(partial(draw_job, root, render), left)
            for frame_ids, _ in zip(left.values(), drawn, strict=True):
                bar.update(len(frame_ids))
        write_lists(root, [*itertools.chain(*jobs.values())], settings.paired)
    except OSError as error:
        problem = f"the set cannot be written ({error.strerror or error})"
        raise InputError(problem, "free some space or choose another folder", file=root) from error


def plan_jobs(settings: DrawnSet) -> tuple[str, Callable[..., Iterator[RenderedFrame]], dict]:
    """The set's description, the function that renders a job, and the jobs: arguments -> frame ids."""
    totals, jobs = (settings.train_frames, settings.test_frames), {}
    counts = [total // 6 + (k < total % 6) for total in totals for k in range(6)]
    if settings.world:
        jobs = {(k, i): [render_streets.frame_id(k, i)] for k in range(12) for i in range(counts[k])}
        render = partial(render_streets.render_frame, settings.world, settings.seed)
        return f"seed {settings.seed}, {settings.world}\n", render, jobs
    for set_id, count in enumerate(counts):
        for video, start in enumerate(range(0, count, render_demo.FRAMES_PER_VIDEO)):
            n = min(render_demo.FRAMES_PER_VIDEO, count - start)
            jobs[set_id, video, n] = [render_demo.frame_id(set_id, video, frame) for frame in range(n)]
    recipe = "seed {}, demo set of {} and {} frames\n".format(settings.seed, *totals)
    return recipe, partial(render_demo.render_video, settings.seed, settings.paired), jobs


def check_root(root: Path, recipe: str) -> None:
    """Refuse a folder that contains anything but an unfinished set of this recipe."""
    path = root / RECIPE
    found = read_text(path) if path.exists() else ""
    names = {path.name for path in root.iterdir()} if root.is_dir() else set()
    # Another process that starts at the same time writes its recipe to a temporary file first.
    others = [name for name in names if not name.startswith(f".{RECIPE}")]
    if root.is_file() or (found != recipe and others):
        raise InputError("the folder contains other files", "remove it or choose another folder", file=root)
    if JSON_NAME in names:
        raise InputError("this set is complete already", "remove it to render it again", file=root)


def draw_job(root: Path, render: Callable[..., Iterator[RenderedFrame]], job: tuple[int, ...]) -> None:
    """Render and write a job's frames, each frame's annotations last."""
    for frame_id, images, objects_of in render(*job):
        video, name = frame_id.rsplit("/", 1)
        for modality, (image, quality) in images.items():
            make_folder(root / "images" / video / modality)
            save = partial(image.save, format="JPEG", quality=quality)
            write_atomically(root / "images" / video / modality / f"{name}.jpg", save)
        for modality, objects in objects_of.items():
            path = text_path(root, frame_id, modality)
            make_folder(path.parent)
            lines = [f"{label} {' '.join(map(str, box))} {occ} 0 0 0 0 0 0" for label, box, occ in objects]
            write_text(path, "\n".join(["% bbGt version=3", *lines]) + "\n")


def text_path(root: Path, frame_id: str, modality: str) -> Path:
    """The annotation file of a frame; modality: "visible" or "lwir" of paired annotations, else ""."""
    video, name = frame_id.rsplit("/", 1)
    folder = root / "annotations_paired" / video / modality if modality else root / "annotations" / video
    return folder / f"{name}.txt"


def write_lists(root: Path, frame_ids: Sequence[str], paired: bool) -> None:
    """Write imageSets/ and the test frames' KAIST_annotation.json."""
    make_folder(root / "imageSets")
    train, test = ([i for i in frame_ids if (i < "set06") == is_train] for is_train in (True, False))
    lists = {"train-all": train, "test-all": test}
    if root.name in WORLDS:
        lists["train-quarter"] = train[::4]
    for time in ("day", "night"):
        lists[f"test-{time}"] = [i for i in test if time_of_day(i) == time]
    for name, ids in lists.items():
        write_text(root / "imageSets" / f"{name}.txt", "\n".join(ids) + "\n")
    images = []
    for frame_id in test:
        rows = read_labels(text_path(root, frame_id, "lwir" * paired), "bbgt")
        rows = [row._replace(ignore=row.label != "person") for row in rows]
        images.append((frame_id, FRAME_SIZE, rows))
    info = {"dataset": "a set in KAIST's layout, drawn by python -m kaist.demo"}
    content = {"info": info, **coco_content(images, "im_name")}
    write_text(root / JSON_NAME, json.dumps(content, indent=1) + "\n")


def init_worker() -> None:
    """Let a worker process ignore SIGINT, and exit when its parent does, even if that is killed."""

    def exit_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def open_root(name: str | Path) -> Path:
    """Return the folder of a KAIST root; one of the repository's synthetic sets is rendered if it is missing.

    Raises:
        InputError: any other folder is missing.
    """
    repository = Path(__file__).parents[1]
    root, drawn = Path(name), [repository / path for path in (DEMO_ROOT, SHIFTED_ROOT, *STREETS_ROOTS)]
    if Path(os.path.abspath(root)) in drawn:
        if not (root / JSON_NAME).is_file():
            draw_set(root)
    elif not root.is_dir():
        remedy = f"set DATA_ROOT (--data-root) to KAIST's folder, or to {drawn[0]} for the demo set"
        raise InputError("no such folder", remedy, file=root)
    return root


def streets_note(data_root: str | Path) -> str:
    """A note on networks trained on a streets set; "" for any other `data_root`."""
    if Path(*Path(data_root).parts[-2:]) not in STREETS_ROOTS:
        return ""
    found = "found 22 or 23 of 32 people in 8 real pairs at one false positive per image (docs/streets.md)"
    return f"note: this network was trained on synthetic frames only; three such networks {found}"


def main() -> None:
    """Render a set into the folder that the command line names."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    names = ", ".join(path.name for path in (SHIFTED_ROOT, *STREETS_ROOTS))
    text = f"folder; the name chooses the set: {names}"
    parser.add_argument("--root", type=Path, default=DEMO_ROOT, help=text)
    for flag in ("--train-frames", "--test-frames", "--seed"):
        parser.add_argument(flag, type=int)
    draw_set(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_script(main)
