"""Draws the demo sets: paired street scenes, visible and LWIR, in KAIST's exact layout.

Each video is a street of its own (sprites.py); figures walk through it from frame to frame and
are annotated as on KAIST: persons, crowds, cyclists, unsure figures, and how far each is covered.

    python -m kaist.demo --root data/demo

A set can be drawn `shifted`: the visible camera of each video looks some pixels aside, and the set has
paired annotations, each modality's boxes, instead of those of LWIR alone. All else is as without.
The streets sets, of which every frame is a street of its own, are drawn by render_streets.py.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kaist.annotations import FRAME_HEIGHT, FRAME_SIZE, FRAME_WIDTH, JSON_NAME, time_of_day
from kaist.files import InputError, OneLineParser, make_folder, read_text, run_script, write_text
from kaist.labels import coco_content, read_labels
from kaist.render_streets import ROOTS, World, draw_frame, frame_id, save_frame, text_path
from kaist.sprites import (
    FOCAL,
    PARTS,
    ROAD,
    SCENE_WIDTH,
    Canvas,
    Figure,
    Street,
    build_street,
    draw_figure,
    paint,
)

ROOT, SHIFTED_ROOT = Path("data/demo"), Path("data/demo-shifted")
STREETS_ROOTS = tuple(ROOT.with_name(place) for place in ROOTS)
RECIPE = "recipe.txt"  # says in a half drawn set what it is to become
MAX_ASIDE = 10  # pixels to either side that a shifted video's visible camera looks aside
FRAME_SECONDS = 0.12  # of a core, about, that drawing a frame takes
FRAMES_PER_VIDEO = 8  # a second lies between two of them
CROWD_SIZES = (1, 2, 3, 4, 5, 6, 8, 11)  # people in a frame that is not empty,
CROWD_SHARES = (0.33, 0.27, 0.17, 0.09, 0.06, 0.04, 0.03, 0.01)  # and how often
KINDS, KIND_SHARES = ("person", "people", "cyclist", "person?"), (0.85, 0.05, 0.05, 0.05)
EMPTY_AND_HEIGHT = ((0.34, 55), (0.08, 62))  # test, train: share of empty frames; median in pixels


def newcomers(rng: np.random.Generator, street: Street, pan: float, median: float) -> list[Figure]:
    """A person, cyclist or unsure figure alone, or a crowd: a group shares one label and box."""
    kind, hides = str(rng.choice(KINDS, p=KIND_SHARES)), rng.random() < 0.2
    low, high = {"people": (32, 70), "person?": (22, 34)}.get(kind, (27, 235))  # pixels tall
    x = z = 0.0
    while not in_view(street, x, z, pan, hides):
        z = FOCAL * 1.7 / np.clip(median * np.exp(rng.normal(0, 0.5)), low, high)
        x = (rng.uniform(-310, 310) + pan) / FOCAL * z
        if hides:  # half behind something, as seen from here
            prop, outer = street.props[rng.integers(len(street.props))], rng.choice([-1, 1])
            edge = (0.9 if prop.end > prop.z else 0.2) + rng.uniform(-0.1, 0.3)
            z = prop.end + rng.uniform(0.4, 3.0)
            x = (prop.x + outer * np.sign(prop.x) * edge) * z / (prop.z if outer > 0 else prop.end)
    pace = rng.uniform(0.7, 1.5) * (2.5 if kind == "cyclist" else 0.1 if hides else 1)
    ahead, aside = rng.choice([-1, 1]) * pace, 0.1 * pace * rng.normal()
    across = rng.random() < (0.8 if abs(x) < ROAD else 0.6)
    group = []
    for _ in range(rng.integers(4, 8) if kind == "people" else 1):
        move = (ahead, aside) if across else (aside, ahead)
        body = rng.uniform(0, 2 * np.pi), rng.normal(1.7, 0.07), rng.uniform(1, 1.35)
        paints = {part: paint(rng, part, street.night) for part in PARTS}
        group.append(Figure(kind, x, z, *move, *body, *(rng.random(2) < (0.3, 0.3)), paints))
        x, z = x + rng.uniform(0.3, 0.6), z + rng.uniform(-0.6, 0.8)
    return group


def in_view(street: Street, x: float, z: float, pan: float, hides: bool = True) -> bool:
    """Whether that place is near, in the frame, in no car and, unless it hides, behind none."""
    if not 4.9 < z < 55 or abs(x) > 7.6 or abs(FOCAL * x / z - pan) > 325:
        return False
    cars = [car for car in street.props if car.z < car.end and car.z - 0.4 < z]
    if any(z < car.end + 0.4 and abs(x - car.x) < 1.4 for car in cars):
        return False
    edges = ((x / z * along - car.x) for car in cars for along in (car.z, car.end))
    return hides or all(abs(edge) > 1.2 for edge in edges)


def walk(
    rng: np.random.Generator, street: Street, pans: np.ndarray, empty: float, median: float
) -> Iterator[list[list[Figure]]]:
    """Yields each frame's groups; for a share `empty` of the video, in one stretch, there are none.

    pans: pixels the camera looks to the right in each frame; median: people's height in pixels.
    """
    quiet = min(int(empty * len(pans) + rng.random()), len(pans) - 1)
    start, groups = rng.integers(1, len(pans) - quiet + 1), []
    for frame, pan in enumerate(pans):
        for figure in sum(groups, []):
            figure.x, figure.z = figure.x + figure.vx, figure.z + figure.vz
            figure.phase += 2
        groups = [g for g in groups if all(in_view(street, f.x, f.z, pan) for f in g)]
        wanted = 0 if start <= frame < start + quiet else rng.choice(CROWD_SIZES, p=CROWD_SHARES)
        wanted = wanted if frame else max(wanted, 3)  # a video opens with something to see
        groups = groups[:wanted]
        while len(groups) < wanted:
            group = newcomers(rng, street, pan, median)
            ways = [abs(f.x / f.z - group[0].x / group[0].z) for f in sum(groups, [])]
            if FOCAL * min(ways, default=1) > 30 or rng.random() < 0.1:  # mostly beside the others
                groups.append(group)
        yield groups


def compose(
    street: Street, groups: list[list[Figure]], pan: int, aside: int = 0
) -> tuple[np.ndarray, list[tuple], list[tuple | None]]:
    """One frame before its cameras' noise; the visible one looks so many pixels `aside` of the other.

    Returns the scene (FRAME_HEIGHT, FRAME_WIDTH, 4) float32; for each group that can be seen
    (label, box xywh in LWIR pixels, occlusion 0, 1 or 2); and its box in visible pixels, None for a
    group that is outside of that frame.
    """
    scene, left = street.background.copy(), (SCENE_WIDTH - FRAME_WIDTH) // 2 + pan
    owner, view = np.full(scene.shape[:2], -1, np.int16), slice(left, left + FRAME_WIDTH)
    masks, in_visible = np.zeros((2, len(groups), *scene.shape[:2]), bool)
    things = [(prop.z, -1, prop) for prop in street.props]
    for index, figure in ((i, figure) for i, group in enumerate(groups) for figure in group):
        beside = [c.z for c in street.props if c.z < figure.z < c.end and abs(figure.x) < abs(c.x)]
        things.append((min([figure.z, *beside]), index, draw_figure(figure, street.camera)))
        if figure.kind == "person?":  # too faint to be sure of
            things[-1][2].pixels *= 0.6
            things[-1][2].alpha *= 0.6
    for depth, index, sprite in sorted(things, key=lambda thing: (-thing[0], -thing[1])):
        shift = round(street.parallax * (0.5 + 8 / depth))
        if index >= 0 and not street.night:
            x, y = street.camera.see(sprite.x + 0.2, 0, sprite.z)
            metre = FOCAL / sprite.z
            shadow = Canvas((x - metre, y - 0.1 * metre, x + metre, y + 0.1 * metre + 2))
            shadow.ellipse((x, y), 0.55 * metre, 0.07 * metre, (0, 0, 0, 0))
            shadow = shadow.sprite()
            shadow.alpha *= 0.5
            shadow.paste(scene, slice(0, 3), shift)
        shown, part = sprite.paste(scene, slice(0, 3), shift, street.light)
        there, here = sprite.paste(scene, slice(3, 4), 0)
        solid = sprite.alpha[here][..., 0] > 0.4
        owner[there][solid] = index
        if index >= 0:
            masks[index][there] |= solid
            in_visible[index][shown] |= sprite.alpha[part][..., 0] > 0.4
    marks, boxes, visible = [], [], slice(view.start + aside, view.stop + aside)
    for index, (group, mask) in enumerate(zip(groups, masks[:, :, view], strict=True)):
        box = box_around(mask)
        seen = np.mean(owner[:, view][mask] == index) if box else 0
        if seen > 0.04:
            occlusion = 0 if seen > 0.9 else 1 if seen > 0.5 else 2
            marks.append((group[0].kind, box, occlusion))
            boxes.append(box_around(in_visible[index, :, visible]))
    scene[..., :3] += street.glow
    if aside:
        return np.concatenate([scene[:, visible, :3], scene[:, view, 3:]], axis=2), marks, boxes
    return scene[:, view], marks, boxes


def box_around(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """The xywh box of a mask (h, w), or None where it is narrower than four columns."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(columns) <= 3:
        return None
    return tuple(map(int, (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)))


def draw_video(root: Path, seed: int, paired: bool, set_id: int, video: int, frames: int) -> None:
    """Draws and writes one video."""
    from PIL import Image, ImageFilter

    rng = np.random.default_rng([seed, set_id, video])
    night = set_id % 6 >= 3
    empty, median = EMPTY_AND_HEIGHT[set_id < 6]
    street = build_street(rng, night)
    pans = np.round(60 * np.sin(rng.uniform(0, 6.3) + 0.25 * np.arange(frames))).astype(int)
    gain, grit = rng.uniform(0.9, 1.12), rng.uniform(5, 9) if night else 2.5
    noise = rng.standard_normal((FRAME_HEIGHT + 64, FRAME_WIDTH + 64, 4), np.float32)
    noise *= np.float32([grit, grit, grit, 1.8])
    generator = np.random.default_rng([seed, set_id, video, 1])  # of its own: all else is drawn as ever
    aside = int(generator.integers(-MAX_ASIDE, MAX_ASIDE + 1)) if paired else 0
    for frame, groups in enumerate(walk(rng, street, pans, empty, median)):
        scene, marks, in_visible = compose(street, groups, int(pans[frame]), aside)
        y, x = rng.integers(64, size=2)
        scene += noise[y : y + FRAME_HEIGHT, x : x + FRAME_WIDTH]
        scene[..., 3] *= gain
        pixels = np.clip(scene, 0, 255).astype(np.uint8)
        lwir = Image.fromarray(pixels[..., 3]).filter(ImageFilter.GaussianBlur(0.8)).convert("RGB")
        pictures = {"visible": (Image.fromarray(pixels[..., :3]), 90), "lwir": (lwir, 90)}
        boxes = {"": marks}
        if paired:
            both = zip(marks, in_visible, strict=True)
            boxes = {"visible": [(mark[0], box, mark[2]) for mark, box in both if box], "lwir": marks}
        save_frame(root, video_frame(set_id, video, frame), pictures, boxes)


def video_frame(set_id: int, video: int, frame: int) -> str:
    """The id of a video's frame: I00000, I00019, I00039, …"""
    return f"set{set_id:02}/V{video:03}/I{max(0, 20 * frame - 1):05}"


class DrawnSet(NamedTuple):
    """What is drawn: frames over set00-05 and over set06-11; the world of a streets set, None of a demo set;
    paired: annotations of each modality, whose cameras look aside of each other."""

    seed: int = 4
    train_frames: int = 480
    test_frames: int = 180
    world: World | None = None
    paired: bool = False


# By their folders' names; a folder of any other name is a demo set.
SETS = {SHIFTED_ROOT.name: DrawnSet(paired=True)}
SETS |= {name: DrawnSet(20, 3600, 240, world) for name, world in ROOTS.items()}


def draw_set(root: Path, *, progress: bool = True, **changes: int | None) -> None:
    """Draws the set that belongs at `root` by its name, see `SETS`, or what it lacks. The same seed gives the
    same bytes, however many processors draw.

    Args:
        root: a folder that is absent, empty, or holds this set half drawn.
        progress: whether to say how long it will take, and to show a bar.
        changes: seed, train_frames and test_frames; None: the set's own.

    Raises:
        InputError: root holds something else or cannot be written, or there are too few frames.
    """
    from tqdm import tqdm

    own = SETS.get(root.name, DrawnSet())
    own = own._replace(**{name: value for name, value in changes.items() if value is not None})
    if min(own.train_frames, own.test_frames) < 6 or own.seed < 0:
        raise InputError("each of the set's 12 sets needs a frame", "ask for 6 or more, and a seed from 0 up")
    recipe, draw, jobs = plan(root, own)
    check_place(root, recipe)
    kind = "lwir" * own.paired
    left = {job: ids for job, ids in jobs.items() if not all(text_path(root, i, kind).exists() for i in ids)}
    n_frames, workers = sum(map(len, left.values())), min(os.cpu_count() or 1, 61)  # Windows has no more
    if progress:
        expected = tqdm.format_interval(n_frames * FRAME_SECONDS / workers)
        print(f"drawing {n_frames} frames at {root}: about {expected} in {workers} processes")
        if own.world:
            print("the row streets then trains on them for about an hour on two cores")
    try:
        make_folder(root)
        write_text(root / RECIPE, recipe)
        with (
            ProcessPoolExecutor(workers, initializer=begin_drawing) as pool,
            tqdm(total=n_frames, unit="frame", disable=not progress) as bar,
        ):
            for ids, _ in zip(left.values(), pool.map(draw, *zip(*left, strict=True)), strict=True):
                bar.update(len(ids))
        write_lists(root, [*itertools.chain(*jobs.values())], own.paired)
    except OSError as error:
        problem = f"the set cannot be written ({error.strerror or error})"
        raise InputError(problem, "make room or name another root", file=root) from error


def plan(root: Path, own: DrawnSet) -> tuple[str, Callable[..., None], dict[tuple[int, ...], list[str]]]:
    """A set's recipe in words; what draws a job; and the jobs, with the ids of the frames of each."""
    totals, jobs = (own.train_frames, own.test_frames), {}
    counts = [total // 6 + (k < total % 6) for total in totals for k in range(6)]
    if own.world:
        jobs = {(k, number): [frame_id(k, number)] for k in range(12) for number in range(counts[k])}
        return f"seed {own.seed}, {own.world}\n", partial(draw_frame, root, own.world, own.seed), jobs
    for set_id, count in enumerate(counts):
        for video, start in enumerate(range(0, count, FRAMES_PER_VIDEO)):
            n = min(FRAMES_PER_VIDEO, count - start)
            jobs[set_id, video, n] = [video_frame(set_id, video, frame) for frame in range(n)]
    recipe = "seed {}, demo set of {} and {} frames\n".format(own.seed, *totals)
    return recipe, partial(draw_video, root, own.seed, own.paired), jobs


def check_place(root: Path, recipe: str) -> None:
    """Refuse a folder that holds anything but a set of this recipe, half drawn."""
    note = root / RECIPE
    held = read_text(note) if note.exists() else ""
    names = {path.name for path in root.iterdir()} if root.is_dir() else set()
    others = [name for name in names if not name.startswith(f".{RECIPE}")]  # another process may begin too
    if root.is_file() or (held != recipe and others):
        raise InputError("the place is taken by other files", "remove it or name another", file=root)
    if JSON_NAME in names:
        raise InputError("this set is drawn already", "remove it to draw it anew", file=root)


def write_lists(root: Path, ids: list[str], paired: bool) -> None:
    """Writes imageSets/ and, for the test frames, KAIST_annotation.json."""
    make_folder(root / "imageSets")
    train, test = ([own for own in ids if (own < "set06") == is_train] for is_train in (True, False))
    lists = {"train-all": train, "test-all": test}
    if root.name in ROOTS:
        lists["train-quarter"] = train[::4]
    for time in ("day", "night"):
        lists[f"test-{time}"] = [own for own in test if time_of_day(own) == time]
    for name, frames in lists.items():
        write_text(root / "imageSets" / f"{name}.txt", "\n".join(frames) + "\n")
    images = []
    for own in test:
        rows = read_labels(text_path(root, own, "lwir" * paired), "bbgt")
        rows = [row._replace(ignore=row.label != "person") for row in rows]
        images.append((own, FRAME_SIZE, rows))
    info = {"dataset": "a set in KAIST's layout, drawn by python -m kaist.demo"}
    content = {"info": info, **coco_content(images, "im_name")}
    write_text(root / JSON_NAME, json.dumps(content, indent=1) + "\n")


def begin_drawing() -> None:
    """In a drawing process: leave Ctrl-C to its parent, and end with it, even if that is killed."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()


def open_root(name: str | Path) -> Path:
    """A KAIST root named by a constant; a demo set of the repository is drawn if it is the one missing.

    Raises:
        InputError: any other folder that is not there.
    """
    root, own = Path(name), [Path(__file__).parents[1] / p for p in (ROOT, SHIFTED_ROOT, *STREETS_ROOTS)]
    if Path(os.path.abspath(root)) in own:
        if not (root / JSON_NAME).is_file():
            draw_set(root)
    elif not root.is_dir():
        remedy = f"set DATA_ROOT (--data-root) to KAIST's folder, or to {own[0]} for a drawn one"
        raise InputError("no such folder", remedy, file=root)
    return root


def streets_note(data_root: str | Path) -> str:
    """What to know of a network that was trained at `data_root`, where that is the streets set; else ""."""
    if Path(*Path(data_root).parts[-2:]) not in STREETS_ROOTS:
        return ""
    found = "found 22 or 23 of 32 people in 8 real pairs at one false positive a frame (docs/streets.md)"
    return f"note: this network has seen drawings alone, and no photograph; three like it {found}"


def main() -> None:
    """Draws a set where the command line says."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    sets = ", ".join(place.name for place in (SHIFTED_ROOT, *STREETS_ROOTS))
    parser.add_argument("--root", type=Path, default=ROOT, help=f"a folder, called {sets} for those sets")
    for flag in ("--train-frames", "--test-frames", "--seed"):
        parser.add_argument(flag, type=int)
    draw_set(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_script(main)
