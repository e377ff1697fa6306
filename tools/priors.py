"""Count the persons that sets of priors match, and derive the pedestrian set.

    python -m tools.priors                                # training persons of the demo set
    python -m tools.priors --data-root /data/kaist --image-list imageSets/train-all-02.txt
    python -m tools.priors --annotations /data/annotations-xml-new --image-list all
    python -m tools.priors --priors pedestrian --sizes 300x375 512x640
    python -m tools.priors … --derive 8                   # prints the pedestrian set as code

A person that no prior overlaps by an IoU of at least 0.5 has one positive only, its forced best match.
"""

import itertools
import re
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.config import find_folder
from engine.validation import CHOICES
from kaist.annotations import FRAME_SIZE, Annotations, open_annotations, read_image_list, resolve_path
from kaist.demo import open_root
from kaist.files import InputError, OneLineParser, check_folders, out_path, run_script, write_atomically
from kaist.frames import load_frames
from kaist.report import markdown_table

MATCH_IOU = 0.5  # minimum IoU of a positive
HEIGHT_BANDS = {"all": (0, np.inf), "< 55 px": (0, 55), "55 to 115": (55, 115), ">= 115": (115, np.inf)}
WIDTH_RANGE = (0.5, 3.0)  # widths of the derived priors on a map, in cells
LABEL_FILE = re.compile(r"(set\d\d)[/_](V\d{3})[/_](?:visible/|lwir/)?(I\d{5})\.(?:xml|txt)$")


def main() -> None:
    """Print the table and draw the curves, or print a derived set."""
    arguments = parse_arguments()
    persons = read_persons(arguments)
    if arguments.derive:
        print(derive(persons, arguments.derive, arguments.sizes[0]))
        return
    heights = persons[:, 3] * FRAME_SIZE[1]  # pixels
    setups = itertools.product(arguments.priors, arguments.sizes)
    coverages = [coverage(persons, name, size, arguments.centres) for name, size in setups]
    print(coverage_table(coverages, heights))
    write_atomically(arguments.out, lambda path: draw_coverage(coverages, heights, path))
    print(f"\ncoverage over height: {arguments.out}")


def parse_arguments() -> Namespace:
    """Parse the command line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add, names = parser.add_argument, CHOICES["priors"]
    add("--data-root", default="data/demo", help="KAIST root (default: the demo set)")
    text = "image list, a path below the root or any path; all: every annotated frame (%(default)s)"
    add("--image-list", default="imageSets/train-all.txt", help=text)
    add("--annotations", default="auto", help="a form, as for train.py, or a path (%(default)s)")
    add("--priors", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    sizes, text = [(300, 300), (512, 640)], "input sizes (default: 300x300 512x640)"
    add("--sizes", nargs="+", type=input_size, default=sizes, metavar="HxW", help=text)
    add("--centres", choices=CHOICES["centres"], default="stride", help="centres of the priors (%(default)s)")
    add("--min-height", type=float, default=12.0, help="minimum height of persons, pixels (%(default)s)")
    add("--margin", type=float, default=5.0, help="their minimum distance from the border (%(default)s)")
    add("--derive", type=int, default=0, metavar="K", help="print a set of K heights for the first size")
    add("--out", type=out_path(".png"), default=Path("priors.png"), help="file of the curves (%(default)s)")
    arguments = parser.parse_args()
    if arguments.derive == 1 or arguments.derive < 0:
        parser.error("--derive takes a number of heights, at least 2")
    check_folders(arguments.out)
    return arguments


def input_size(text: str) -> tuple[int, int]:
    """Parse "300x375" to (height, width)."""
    from ssd.boxes import feature_map_sizes  # imported in functions, because torch takes seconds

    height, width = map(int, text.split("x"))
    feature_map_sizes((height, width))
    return height, width


def read_persons(arguments: Namespace) -> np.ndarray:
    """Read the training persons, at least one: (n, 4) cxcywh fractions of the frame."""
    root = Path(arguments.data_root)
    if not Path(arguments.annotations).exists():
        root = open_root(find_folder(root))
    annotations = open_annotations(root, arguments.annotations, "lwir")
    if arguments.image_list == "all":
        frame_ids = annotated_ids(annotations)
    else:
        frame_ids = read_image_list(resolve_path(root, arguments.image_list))
    frames = load_frames(frame_ids, annotations, min_height=arguments.min_height, margin=arguments.margin)
    low, high = np.split(np.concatenate([np.zeros((0, 4)), *(frame.persons for frame in frames)]), 2, axis=1)
    if not len(low):
        raise InputError("no person in these frames", "choose another list", file=annotations.source)
    limits = f"at least {arguments.min_height:g} px high and {arguments.margin:g} px inside the frame"
    print(f"{len(low):,} persons {limits}, in {len(frames):,} frames of {annotations.source}\n")
    return np.concatenate([(low + high) / 2, high - low], axis=1) / (FRAME_SIZE * 2)


def annotated_ids(annotations: Annotations) -> list[str]:
    """Return the ids of all annotated frames."""
    if annotations.frames:
        return list(annotations.frames)
    paths = (path.as_posix() for path in annotations.source.rglob("*"))
    return sorted({"/".join(match.groups()) for match in map(LABEL_FILE.search, paths) if match})


class Coverage(NamedTuple):
    """Match of persons by a set of priors; size: (height, width) of the input; best_iou: (n,)."""

    name: str
    size: tuple[int, int]
    n_priors: int
    best_iou: np.ndarray


def coverage(persons: np.ndarray, name: str, size: tuple[int, int], centres: str) -> Coverage:
    """Match persons (n, 4) cxcywh fractions with the priors of a set, for an input of (height, width)."""
    from ssd.boxes import make_grids, prior_shapes

    shapes, grids = prior_shapes(name), make_grids(size, centres)
    n_priors = sum(grid.h * grid.w * len(s) for grid, s in zip(grids, shapes, strict=True))
    return Coverage(name, size, n_priors, best_overlaps(persons, shapes, grids))


def best_overlaps(persons: np.ndarray, shapes: list[list[tuple]], grids: list[tuple]) -> np.ndarray:
    """Return the IoU of each person with its best prior, (n,).

    Among priors of one shape, the IoU decreases with the distance from the person along either axis.
    The best one is therefore in the cell that contains the person's centre, and only this cell is tested.

    Args:
        persons: (n, 4) cxcywh fractions of the input.
        shapes, grids: one for each map, as from `prior_shapes` and `make_grids`.
    """
    centre, size = persons[:, None, :2], persons[:, None, 2:]
    best = np.zeros(len(persons))
    for map_shapes, (h, w, dy, dx, _) in zip(shapes, grids, strict=True):
        step = np.array([dx, dy])
        cell = np.clip(np.floor(centre / step), 0, np.array([w, h]) - 1)
        distance = np.abs(centre - (cell + 0.5) * step)
        prior = np.minimum(map_shapes, 1.0)
        overlap = np.minimum(np.minimum(size, prior), (size + prior) / 2 - distance).clip(0).prod(2)
        best = np.maximum(best, (overlap / (size.prod(2) + prior.prod(1) - overlap)).max(1))
    return best


def coverage_table(coverages: list[Coverage], heights: np.ndarray) -> str:
    """Format the share of matched persons and their mean best IoU, by height, as a Markdown table."""
    bands = {name: (heights >= low) & (heights < high) for name, (low, high) in HEIGHT_BANDS.items()}

    def cell(best: np.ndarray) -> str:
        return f"{100 * np.mean(best >= MATCH_IOU):.1f} ({np.mean(best):.2f})" if len(best) else "–"

    head = ["% of persons matched (mean best IoU)", "input", "priors"]
    head += [f"{name} ({inside.sum():,})" for name, inside in bands.items()]
    rows = [
        [f"`{name}`", "{}x{}".format(*size), f"{n_priors:,}", *(cell(best[band]) for band in bands.values())]
        for name, size, n_priors, best in coverages
    ]
    return markdown_table(head, rows)


def draw_coverage(coverages: list[Coverage], heights: np.ndarray, path: Path) -> None:
    """Draw the share of matched persons over their height, and a histogram of the heights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axis = figure.subplots()
    edges = np.geomspace(max(heights.min(), 1), heights.max() + 1, 31)
    counts = np.histogram(heights, edges)[0]
    axis.stairs(counts / counts.max(), edges, fill=True, color="0.9", label="persons (scaled)")
    centres, filled = np.sqrt(edges[1:] * edges[:-1]), counts > 0
    names, sizes = ([*dict.fromkeys(values)] for values in zip(*(c[:2] for c in coverages), strict=True))
    for name, size, _, best in coverages:
        hits = np.histogram(heights[best >= MATCH_IOU], edges)[0]
        colour, dashes = f"C{names.index(name)}", ("-", "--", ":", "-.")[sizes.index(size) % 4]
        label = f"{name}, {'{}x{}'.format(*size)}: {100 * hits.sum() / counts.sum():.1f}%"
        axis.plot(centres[filled], hits[filled] / counts[filled], dashes, color=colour, label=label)
    axis.axvline(55, color="0.6", linewidth=0.8, label="55 px: Reasonable")
    axis.set(xscale="log", xlabel="person height, pixels of the 640x512 frame")
    axis.set(ylim=(0, 1.02), ylabel="persons with a prior of IoU >= 0.5")
    axis.set_title(f"Share of {len(heights):,} persons that a prior matches")
    ticks = [tick for tick in (15, 20, 30, 55, 80, 115, 200, 400) if edges[0] <= tick <= edges[-1]]
    axis.set_xticks(ticks, map(str, ticks))
    axis.set_xticks([], minor=True)
    figure.legend(fontsize="small", loc="outside lower center", ncols=2)
    figure.savefig(path, format="png", dpi=100)


def derive(persons: np.ndarray, count: int, size: tuple[int, int]) -> str:
    """Derive a set of upright priors; return its code for `prior_shapes` and the share of persons matched."""
    from ssd.boxes import make_grids

    ratio, heights = derive_heights(persons, count, size)
    shapes = [[(ratio * h, h) for h in map_heights] for map_heights in heights]
    best = best_overlaps(persons, shapes, make_grids(size, "stride"))
    rows = "\n".join(f"            {tuple(map_heights)}," for map_heights in heights)
    in_frame, matched = ratio * FRAME_SIZE[0] / FRAME_SIZE[1], 100 * np.mean(best >= MATCH_IOU)
    return (
        f"width/height {ratio:g} in fractions of the input, {in_frame:.2f} in the frame; "
        f"{matched:.1f}% of the persons matched\n\n        heights = (\n{rows}\n        )\n"
        f"        return [[({ratio:g} * h, h) for h in map_heights] for map_heights in heights]"
    )


def derive_heights(persons: np.ndarray, count: int, size: tuple[int, int]) -> tuple[float, list[list[float]]]:
    """Return the width/height of priors for upright persons, and their heights on each map, all in fractions.

    The ratio is the persons' median. The heights are a geometric series from the persons' first percentile
    to the whole frame, because crops enlarge persons up to that. A map has the priors whose width is in
    `WIDTH_RANGE`, so that neighbouring maps, which have different centres, share some. The finest map also
    has all narrower priors. A map without any has the largest one.

    Args:
        persons: (n, 4) cxcywh fractions of the frame.
        count: number of heights; size: (height, width) of the input.
    """
    from ssd.boxes import feature_map_sizes

    ratio = round(float(np.median(persons[:, 2] / persons[:, 3])), 2)
    lowest = np.percentile(persons[:, 3], 1)
    heights = [round(float(h), 3) for h in np.geomspace(lowest, 1, count)]
    maps = []
    for i, (_, columns) in enumerate(feature_map_sizes(size)):
        widths = [ratio * h * columns for h in heights]
        fits = [w < WIDTH_RANGE[1] and (w >= WIDTH_RANGE[0] or i == 0) for w in widths]
        maps.append([h for h, fit in zip(heights, fits, strict=True) if fit] or heights[-1:])
    return ratio, maps


if __name__ == "__main__":
    run_script(main)
