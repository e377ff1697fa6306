"""A leaderboard of published detectors with confidence intervals, from folders of their result files.

    python -m tools.leaderboard results --annotations KAIST_annotation.json

writes docs/leaderboard.md and its figure. Result files in `SOURCES` are listed by their detector's name,
others by their file name. The result files are not part of this project.
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

# Name of a result file -> name of the detector, its paper, who published the file.
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
SUBSETS = {
    **{f"Scale={name}": name for name in ("near", "medium", "far")},
    **{f"Occ={name}": f"{name.replace('none', 'no')} occlusion" for name in ("none", "partial", "heavy")},
}  # evaluation setup -> table column


def main() -> None:
    """Evaluate the files and write the page and its figure."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folders", nargs="+", type=Path, help="folders of result files (.txt or .json)")
    add("--annotations", type=Path, required=True, help="KAIST_annotation.json")
    add("--only-published", action="store_true", help="leave out result files of unknown detectors")
    add("--resamples", type=int, default=2000, help="bootstrap resamples (%(default)s)")
    add("--out", type=out_path(), default=Path("docs/leaderboard.md"), help="Markdown page (%(default)s)")
    add("--figure", type=out_path(".png"), default=Path("docs/figures/leaderboard.png"), help="(%(default)s)")
    arguments = parser.parse_args()
    if not 1 <= arguments.resamples <= MAX_RESAMPLES:
        parser.error(f"--resamples must be a number from 1 to {MAX_RESAMPLES}")
    check_folders(arguments.out, arguments.figure)
    ground_truth = load_ground_truth(arguments.annotations)
    results = read_all(arguments.folders, ground_truth, arguments.only_published)
    scores = [score(name, ground_truth, d, arguments.resamples) for name, d in results.items()]
    scores = sort_by_miss_rate(scores)
    headline = {key: SETUPS[key] for key in HEADLINE}
    kwargs = {"resamples": arguments.resamples, "by_video": True}
    by_video = {name: bootstrap(ground_truth, d, headline, **kwargs) for name, d in results.items()}
    write_atomically(arguments.figure, lambda path: plot(scores, by_video, path))
    figure = Path(os.path.relpath(arguments.figure, arguments.out.parent)).as_posix()
    write_text(arguments.out, page(scores, by_video, ground_truth, figure))
    for s in scores:
        for note in s.notes:
            print(f"warning: {s.name}: {note}")
    print(f"{len(scores)} detectors: {arguments.out}, {arguments.figure}")


def read_all(folders: Sequence[Path], gt: GroundTruth, only_published: bool) -> dict[str, Detections]:
    """Read result files: detector -> detections; .txt is preferred to .json. InputError: two files have the
    same detector, or there are none."""
    known, files = {name for name, *_ in SOURCES.values()}, {}
    for folder in folders:
        by_stem = {path.stem: path for suffix in ("json", "txt") for path in folder.glob(f"*.{suffix}")}
        for stem, path in sorted(by_stem.items()):
            if stem.endswith((".frames", "reference")) or (only_published and stem not in SOURCES):
                continue
            name = SOURCES.get(stem, (stem,))[0]
            if name in files or (name in known and stem not in SOURCES):
                raise InputError(f"another detector is called {name}", "rename this file", file=path)
            files[name] = path
    if not files:
        raise InputError("no result files found", "pass folders of .txt or .json files", file=folders[0])
    return {name: read_detections(path, gt.frames) for name, path in files.items()}


def page(
    scores: Sequence[Scores], by_video: dict[str, dict[str, np.ndarray]], gt: GroundTruth, figure: str
) -> str:
    """The page in Markdown; by_video: detector -> setup -> miss rates of resampled videos."""
    n_frames, n_videos = len(gt.frames), len({*map(video_of, gt.frames)})
    best, published = scores[0], {name: [paper, source] for name, paper, source in SOURCES.values()}
    rates, bounds, gaps = [], [], []
    for s in scores:
        results = [protocol[key] for protocol in (s.official, s.leaderboard) for key in HEADLINE]
        rates.append([s.name, *(percent(result.miss_rate) for result in results)])
        samples = [of_unit[key] for key in HEADLINE for of_unit in (s.samples, by_video[s.name])]
        bounds.append([s.name, *map(format_interval, samples)])
        gap = percent(s.official[MAIN].miss_rate - best.official[MAIN].miss_rate)
        samples = [s.samples[MAIN] - best.samples[MAIN], by_video[s.name][MAIN] - by_video[best.name][MAIN]]
        verdict = "yes" if differs(samples[1]) else "by frames only" if differs(samples[0]) else "no"
        gaps.append([s.name, gap, *map(format_interval, samples), verdict])
    pairs = list(combinations(scores, 2))
    differ_by_frame = sum(differs(a.samples[MAIN] - b.samples[MAIN]) for a, b in pairs)
    differ_by_video = sum(differs(by_video[a.name][MAIN] - by_video[b.name][MAIN]) for a, b in pairs)
    subsets = [[s.name, *(percent(s.official[key].miss_rate) for key in SUBSETS)] for s in scores]
    subsets.append(["persons", *(str(best.official[key].n_positive) for key in SUBSETS)])
    sources = [[s.name, *published.get(s.name, "––")] for s in scores]
    times, n_persons = list(HEADLINE.values()), best.official[MAIN].n_positive
    n_resamples, n_pairs = len(best.samples[MAIN]), len(pairs)
    gap_head = ["detector", f"behind {best.name}", "95% by frames", "95% by videos", "significant"]
    return f"""# Published detectors on KAIST, with confidence intervals

Written by `python -m tools.leaderboard FOLDER --annotations KAIST_annotation.json --only-published`
from the detectors' own result files, with the improved annotations of the test list:
{n_frames} frames of {n_videos} videos, with {n_persons} persons in the Reasonable setup.
Miss rates are in per cent; lower is better. *Official* is the benchmark's own tool. *Leaderboard* is
the script behind the public tables, which ignores the persons of frames without detections.

![Curves, and the confidence intervals of each detector]({figure})

{markdown_table(["detector", *(f"{kind} {t}" for kind in ("official", "leaderboard") for t in times)], rates)}

## Confidence intervals

95% intervals of the official rate by {n_resamples} bootstrap resamples of the frames, and of whole videos.
Neighbouring frames show the same persons, so the intervals over videos are the more reliable ones.

{markdown_table(["detector", *(f"{t}, by {unit}" for t in times for unit in ("frames", "videos"))], bounds)}

## Differences between detectors

Differences from {best.name} in percentage points, both detectors on the same resamples. They are significant
where the interval over videos excludes zero. Of all {n_pairs} pairs of detectors, {differ_by_video} differ
significantly over videos, and {differ_by_frame} over frames. There is no correction for the number of pairs.

{markdown_table(gap_head, gaps[1:])}

## By distance and occlusion

Near is 115 pixels high or more, medium 45 to 115, far up to 45, all without occlusion.

{markdown_table(["detector", *SUBSETS.values()], subsets)}

## Sources of the result files

{markdown_table(["detector", "paper", "result file from"], sources)}
"""


def plot(scores: Sequence[Scores], by_video: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Plot the curves of all frames, and the confidence intervals over frames and videos."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 2 + 0.35 * len(scores)), layout="constrained")
    curves, forest = figure.subplots(1, 2)
    plot_curves(curves, scores, MAIN)
    curves.legend().remove()  # the other panel names the detectors by colour
    for i, s in enumerate(scores):
        colour = f"C{i % 10}"
        for samples, width in ((by_video[s.name][MAIN], 1.5), (s.samples[MAIN], 5)):
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
