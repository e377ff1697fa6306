"""A leaderboard of published detectors with intervals, from a folder of their result files.

    python -m tools.leaderboard results --annotations KAIST_annotation.json

writes docs/leaderboard.md and its figure. Every file of `SOURCES` that is found in the folders stands in
it under its detector's name; other result files under their own. The files are not part of this project.
"""

import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from kaist.bootstrap import MAX_RESAMPLES, bootstrap, interval
from kaist.files import (
    InputError,
    OneLineParser,
    check_folders,
    out_path,
    run_script,
    write_atomically,
    write_text,
)
from kaist.frames import video_of
from kaist.miss_rate import SETUPS, GroundTruth, load_ground_truth
from kaist.report import (
    HEADLINE,
    MAIN,
    Scores,
    differs,
    format_interval,
    markdown_table,
    percent,
    plot_curves,
    score,
    sort_by_miss_rate,
)
from kaist.results import Detections, read_detections

# A result file's name -> the detector, its paper, and who published the file.
MLPD_LIST, TFDET_LIST = "with MLPD's evaluation script", "TFDet's repository (Apache-2.0)"
SOURCES = {
    "MSDS-RCNN_result": ("MSDS-RCNN", "Li et al., BMVC 2018", MLPD_LIST),
    "MBNet_result": ("MBNet", "Zhou et al., ECCV 2020", MLPD_LIST),
    "CFR_det-test-all": ("CFR", "Zhang et al., ICIP 2020", "its authors (MIT)"),
    "GAFF_det-test-all": ("GAFF", "Zhang et al., WACV 2021", "its authors (MIT)"),
    "MLPD_result": ("MLPD", "Kim et al., RA-L 2021", "its authors"),
    "DCMNet_result": ("DCMNet", "Xie et al., ACM MM 2022", TFDET_LIST),
    "LG-FAPF_result": ("LG-FAPF", "Cao et al., Information Fusion 2022", TFDET_LIST),
    "probEn_result": ("ProbEn", "Chen et al., ECCV 2022", TFDET_LIST),
    "TFDet_epoch_3-test-all": ("TFDet", "Zhang et al., arXiv 2023", f"{TFDET_LIST}, epoch 3"),
    "INSANet_result": ("INSANet", "Lee et al., Sensors 2024", "its authors"),
}
PARTS = {
    **{f"Scale={name}": name for name in ("near", "medium", "far")},
    **{f"Occ={name}": f"{name.replace('none', 'no')} occlusion" for name in ("none", "partial", "heavy")},
}  # setup -> column


def main() -> None:
    """Evaluate the files and write the page and its figure."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folders", nargs="+", type=Path, help="folders of result files")
    add("--annotations", type=Path, required=True, help="KAIST_annotation.json")
    add("--only-published", action="store_true", help="leave out files that are not of a known detector")
    add("--resamples", type=int, default=2000, help="of frames, and of videos (%(default)s)")
    add("--out", type=out_path(), default=Path("docs/leaderboard.md"), help="the page (%(default)s)")
    add("--figure", type=out_path(".png"), default=Path("docs/figures/leaderboard.png"), help="(%(default)s)")
    arguments = parser.parse_args()
    if not 1 <= arguments.resamples <= MAX_RESAMPLES:
        parser.error(f"--resamples takes a number from 1 to {MAX_RESAMPLES}")
    check_folders(arguments.out, arguments.figure)
    people = load_ground_truth(arguments.annotations)
    found = read_all(arguments.folders, people, arguments.only_published)
    scores = sort_by_miss_rate([score(name, people, d, arguments.resamples) for name, d in found.items()])
    headline = {key: SETUPS[key] for key in HEADLINE}
    settings = {"resamples": arguments.resamples, "by_video": True}
    videos = {name: bootstrap(people, d, headline, **settings) for name, d in found.items()}
    write_atomically(arguments.figure, lambda beside: draw(scores, videos, beside))
    place = os.path.relpath(arguments.figure, arguments.out.parent)
    write_text(arguments.out, page(scores, videos, people, Path(place).as_posix()))
    for s in scores:
        for note in s.notes:
            print(f"warning: {s.name}: {note}")
    print(f"{len(scores)} detectors: {arguments.out}, {arguments.figure}")


def read_all(folders: Sequence[Path], people: GroundTruth, only_published: bool) -> dict[str, Detections]:
    """Detector -> detections; of one in two forms the text file. InputError: two are of one detector."""
    known, files = {name for name, *_ in SOURCES.values()}, {}
    for folder in folders:
        own = {path.stem: path for form in ("json", "txt") for path in folder.glob(f"*.{form}")}
        for stem, path in sorted(own.items()):
            if stem.endswith((".frames", "reference")) or (only_published and stem not in SOURCES):
                continue
            name = SOURCES.get(stem, (stem,))[0]
            if name in files or (name in known and stem not in SOURCES):
                raise InputError(f"another detector is called {name}", "rename this file", file=path)
            files[name] = path
    if not files:
        raise InputError("no result files in it", "name folders with .txt or .json results", file=folders[0])
    return {name: read_detections(path, people.frames) for name, path in files.items()}


def page(
    scores: Sequence[Scores], videos: dict[str, dict[str, np.ndarray]], people: GroundTruth, figure: str
) -> str:
    """The page's Markdown; videos: detector -> setup -> samples over videos."""
    n_frames, n_videos = len(people.frames), len({*map(video_of, people.frames)})
    best, published = scores[0], {name: [paper, source] for name, paper, source in SOURCES.values()}
    rates, bounds, gaps = [], [], []
    for s in scores:
        results = [protocol[key] for protocol in (s.official, s.leaderboard) for key in HEADLINE]
        rates.append([s.name, *(percent(result.miss_rate) for result in results)])
        kinds = [samples[key] for key in HEADLINE for samples in (s.samples, videos[s.name])]
        bounds.append([s.name, *map(format_interval, kinds)])
        gap = percent(s.official[MAIN].miss_rate - best.official[MAIN].miss_rate)
        kinds = [s.samples[MAIN] - best.samples[MAIN], videos[s.name][MAIN] - videos[best.name][MAIN]]
        shown = "shown" if differs(kinds[1]) else "by frames alone" if differs(kinds[0]) else "noise"
        gaps.append([s.name, gap, *map(format_interval, kinds), shown])
    pairs = list(combinations(scores, 2))
    by_frame = sum(differs(a.samples[MAIN] - b.samples[MAIN]) for a, b in pairs)
    by_video = sum(differs(videos[a.name][MAIN] - videos[b.name][MAIN]) for a, b in pairs)
    parts = [[s.name, *(percent(s.official[key].miss_rate) for key in PARTS)] for s in scores]
    parts.append(["people", *(str(best.official[key].n_positive) for key in PARTS)])
    origins = [[s.name, *published.get(s.name, "––")] for s in scores]
    times, n_people = list(HEADLINE.values()), best.official[MAIN].n_positive
    n_resamples, n_pairs = len(best.samples[MAIN]), len(pairs)
    return f"""# Published detectors on KAIST, with intervals

Made by `python -m tools.leaderboard FOLDER --annotations KAIST_annotation.json --only-published`
from the detectors' own result files, on the improved annotations of the test list:
{n_frames} frames of {n_videos} videos, in which {n_people} people count under Reasonable.
Miss rates in per cent, lower is better. *Official* is the benchmark's own tool; *leaderboard* is
the script behind the public tables, which drops the people of frames without detections.

![curves, and the intervals of each detector]({figure})

{markdown_table(["detector", *(f"{kind} {t}" for kind in ("official", "leaderboard") for t in times)], rates)}

## How sure each rate is

95% intervals of the official rate by {n_resamples} resamples of the frames, and of whole videos. Neighbouring
frames show the same people, so that the intervals over videos are the ones to believe.

{markdown_table(["detector", *(f"{t}, by {unit}" for t in times for unit in ("frames", "videos"))], bounds)}

## Which gaps are shown

Differences from {best.name} in points, both detectors on the same resamples: *shown* where the interval over
videos leaves out zero. Of all {n_pairs} pairs of detectors it does in {by_video}, and over frames in
{by_frame}. There is no correction for the number of pairs.

{markdown_table(["detector", f"behind {best.name}", "95% by frames", "95% by videos", "gap"], gaps[1:])}

## By distance and occlusion

Near is 115 pixels high or more, medium 45 to 115, far up to 45, all without occlusion.

{markdown_table(["detector", *PARTS.values()], parts)}

## Where the files come from

{markdown_table(["detector", "paper", "result file from"], origins)}
"""


def draw(scores: Sequence[Scores], videos: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """The curves of all frames, and a forest plot of the intervals over frames and videos."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 2 + 0.35 * len(scores)), layout="constrained")
    curves, forest = figure.subplots(1, 2)
    plot_curves(curves, scores, MAIN)
    curves.legend().remove()  # the other panel tells the colours
    for i, s in enumerate(scores):
        colour = f"C{i % 10}"
        for samples, width in ((videos[s.name][MAIN], 1.5), (s.samples[MAIN], 5)):
            forest.plot(interval(samples), (i, i), color=colour, linewidth=width, solid_capstyle="butt")
        forest.plot(s.official[MAIN].miss_rate, i, "o", color="white", markeredgecolor=colour, markersize=7)
    forest.set_yticks(range(len(scores)), [f"{s.name} {percent(s.official[MAIN].miss_rate)}" for s in scores])
    forest.set(ylim=(len(scores) - 0.5, -0.5), xlim=(0, None), xlabel="miss rate, Reasonable, official")
    forest.set(title="95% intervals: over frames (thick) and over videos (thin)")
    forest.xaxis.set_major_formatter("{x:.0%}")
    forest.grid(axis="x", alpha=0.3)
    figure.savefig(path, format="png", dpi=110)


if __name__ == "__main__":
    run_script(main)
