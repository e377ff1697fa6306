"""How fast this project is on this machine, against the plain way of doing the same.

    python -m tools.benchmark --quick                 # under three minutes on two cores
    python -m tools.benchmark --only loss detect      # some rows
    python -m tools.benchmark --device cuda           # the rows of a GPU
    python -m tools.benchmark --growth                # how cost grows with people, batch, frames
    python -m tools.benchmark --rows                  # detection by every row of the lab book

A row is two functions that do the same work, run in turns; the table shows the medians. Where
both have to agree, that is checked before they are timed. The references are torchvision's, or the
plain way of reference.py.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import ssd300_vgg16
from torchvision.ops import box_convert

from datasets import Collate, DeviceLoader, KaistPairs
from engine.config import OneLineParser, model_arguments, resolve_row
from engine.experiments import EXPERIMENTS
from kaist.annotations import image_path, open_annotations, read_image_list
from kaist.demo import draw_demo
from kaist.files import run_script
from kaist.frames import load_frames
from kaist.images import cache_frames, read_frame
from kaist.miss_rate import SETUPS, evaluate, load_ground_truth
from kaist.results import read_detections
from model import SSD300
from ssd.augment import Augmentation, mean_colour
from ssd.boxes import Predictions, detect
from ssd.losses import MultiBoxLoss
from tools.reference import plain_detect, plain_miss_rates, plain_multibox_loss, recipe_sample
from tools.timing import Apart, Bench, Row, faster, interleave, lap, share
from tools.workloads import (
    LIMITS,
    MODEL,
    added_memory,
    describe_machine,
    draw_annotations,
    keeping,
    our_image,
    our_loss,
    our_step,
    random_objects,
    random_predictions,
    synthetic_result,
    torchvision_image,
    torchvision_step,
    trunk_step,
)
from utils import choose_device, choose_precision, detect_image, make_deterministic

KAIST_FRAMES = 25_086  # of the training set, cleaned of none


def start(make: Callable[..., Callable], device: torch.device, *arguments: object) -> Callable:
    """What make(device, …) gives, on a CPU in a process of its own: what ours asks of the C
    library's allocator (`tune_malloc`) is not for its rivals."""
    return Apart(make, device, *arguments) if device.type == "cpu" else make(device, *arguments)


# ------------------------------------------------------------------------------ training step


def bench_step(bench: Bench) -> Iterator[Row]:
    """The whole training step, and how much of it is not convolution."""
    on_gpu = bench.device.type == "cuda"
    n = 32 if on_gpu else 2 if bench.quick else 8
    reference = start(torchvision_step, bench.device, n)
    for precision in dict.fromkeys([bench.precision, torch.float32]):
        name = "bf16" if precision == torch.bfloat16 else "fp32"
        ours = start(keeping, bench.device, our_step, precision, n)
        trunk = start(keeping, bench.device, trunk_step, precision, n)
        ours, bare, theirs = interleave(bench, ours, trunk, reference)
        work = f"training step with masks, batch {n}, {name}"
        if on_gpu:
            work += f" ({1e3 * n / ours:.0f} images/s)"
        yield faster(work, ours, theirs, "torchvision fp32", 2.5 if name == "bf16" else 1.1)
        yield share(
            f"all of the step that is not convolution, {name}",
            f"{ours:.4g} ms",
            f"bare trunk: {bare:.4g} ms",
            ours / bare,
            1.05,
        )


def bench_deterministic(bench: Bench) -> Iterator[Row]:
    """What --deterministic costs a training step, of the demo's width on a CPU."""
    width = 1.0 if bench.device.type == "cuda" else 0.125
    step = our_step(bench.device, bench.precision, 8, width=width, batch_norm=True)

    def same_numbers() -> None:
        make_deterministic()
        step()
        torch.use_deterministic_algorithms(False)

    ours, usual = interleave(bench, same_numbers, step)
    yield share(
        f"training step, --deterministic, width {width:g}, batch 8",
        f"{ours:.4g} ms",
        f"without: {usual:.4g} ms",
        ours / usual,
        1.1,
    )


def bench_training(bench: Bench) -> Iterator[Row]:
    """Training on a GPU, data included."""
    if bench.device.type == "cuda":
        yield from training_rows(bench, n=32, width=1.0, n_frames=256, workers=8)


def training_rows(bench: Bench, n: int, width: float, n_frames: int, workers: int) -> Iterator[Row]:
    """Images a second from the frame cache to the updated weights, the share of what the bare
    convolutions reach, and what the parts take by themselves."""
    root = bench.folder / "training"
    draw_demo(root, train_frames=n_frames, test_frames=6, progress=False)
    ids = read_image_list(root / "imageSets/train-all.txt")
    frames = load_frames(ids, open_annotations(root), min_height=12, margin=5)
    pairs = KaistPairs(
        root,
        frames,
        input_mode="early",
        input_size=(300, 300),
        filler=mean_colour(4),
        augmentation=Augmentation(),
        masks_follow=True,
        seed=0,
        cache=cache_frames(root / "cache", root, ids, "early"),
    )
    model = SSD300(**(MODEL | {"width": width})).to(bench.device).train()
    maps = [model.map_sizes[i] for i in model.infused_maps]
    loader = DeviceLoader(pairs, batch_size=n, workers=workers, map_sizes=maps, device=bench.device)
    batches = (batch for epoch in itertools.count() for batch in loader.epoch(epoch))
    batch = next(batches)
    predictions, loss = model(batch.images), our_loss(model)
    outputs = [*predictions[:2], *predictions.seg]
    loss(predictions, batch).backward(retain_graph=True)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, fused=bench.device.type == "cuda")

    step, bare, data, losses, update = interleave(
        bench,
        our_step(bench.device, bench.precision, n, batches, width=width),
        trunk_step(bench.device, bench.precision, n, width=width),
        lambda: next(batches),
        lambda: torch.autograd.grad(loss(predictions, batch), outputs),
        optimizer.step,
    )
    yield Row(
        f"training end to end, batch {n}",
        f"{1e3 * n / step:.0f} images/s",
        f"bare trunk: {1e3 * n / bare:.0f} images/s",
        f"{bare / step:.2f} of it",
        ">= 0.46",
        bare / step >= 0.46,
    )
    for name, value in (("data and augmentation", data), ("losses", losses), ("update", update)):
        yield Row(
            f"{name} alone", f"{value:.3g} ms", f"step: {step:.4g} ms", f"{value / step:.3f} of it", "", None
        )


def bench_memory(bench: Bench) -> Iterator[Row]:
    """Peak memory that a step of batch 8 adds, each in a process of its own."""
    if bench.quick:
        return
    ours = Apart(keeping, bench.device, added_memory, our_step, bench.precision, 8)() / 2**20
    theirs = Apart(added_memory, bench.device, torchvision_step, 8)() / 2**20
    yield share(
        "memory added by a batch-8 step",
        f"{ours:.0f} MB",
        f"torchvision: {theirs:.0f} MB",
        ours / theirs,
        0.8,
    )


# --------------------------------------------------------------------- loss, detection


def bench_loss(bench: Bench) -> Iterator[Row]:
    """The multibox loss, forward and backward, for a batch of 32."""
    priors = SSD300(**(MODEL | {"width": 0.01})).priors.to(bench.device)
    loss = MultiBoxLoss(priors, loc_loss="smooth_l1", loc_reduction="sum").to(bench.device)

    def backward(loss: Callable, predictions: Predictions, *rest: Tensor) -> tuple[Tensor, ...]:
        value = loss(predictions, *rest)
        value = value if isinstance(value, Tensor) else sum(value)
        return value, *torch.autograd.grad(value, predictions[:2])

    for people, target in ((3, 6.0), (20, 4.0)):
        objects = random_objects(32, people, bench.device)
        predictions = random_predictions(32, 0.0, bench.device)
        predictions = Predictions(*(x.requires_grad_() for x in predictions[:2]), [])
        ours = partial(backward, loss, predictions, *objects)
        plain = partial(backward, plain_multibox_loss, predictions, *objects, priors)
        for mine, theirs in zip(ours(), plain(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)
        yield faster(
            f"multibox loss and gradient, batch 32, {people} people",
            *interleave(bench, ours, plain),
            "plain",
            20 if bench.device.type == "cuda" else target,
        )


def bench_detect(bench: Bench) -> Iterator[Row]:
    """Decoding and NMS of a batch of 8 down to 200 boxes."""
    priors = SSD300(**(MODEL | {"width": 0.01})).priors.to(bench.device)
    ssd = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=2, score_thresh=0.01)
    anchors = [300 * box_convert(priors, "cxcywh", "xyxy")] * 8
    for mean, loop_target, target in ((-3.6, 400.0, 1.1), (-8.94, 10.0, 2.0)):
        predictions = random_predictions(8, mean, bench.device)
        candidates = torch.sigmoid(predictions.conf[..., 1] - predictions.conf[..., 0]) >= 0.01
        outputs = {"bbox_regression": predictions.loc, "cls_logits": predictions.conf}

        ours = partial(detect, predictions, priors, **LIMITS)
        loop = partial(plain_detect, predictions, priors, **LIMITS)
        torchvisions = partial(ssd.postprocess_detections, outputs, anchors, [(300, 300)] * 8)
        for mine, theirs in zip(ours(), loop(), strict=True):
            assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
        mine, theirs, slow = interleave(bench, ours, torchvisions, loop)
        work = f"decode + NMS, batch 8, {candidates.sum() // 8} candidates each"
        yield faster(work, mine, theirs, "torchvision", target)
        yield faster(work, mine, slow, "loop", loop_target)


def bench_image(bench: Bench) -> Iterator[Row]:
    """One visible image's file to boxes."""
    ids = read_image_list(bench.demo / "imageSets/test-all.txt")
    path = image_path(bench.demo, ids[0], "visible")
    reference = start(torchvision_image, bench.device, path)
    for precision in dict.fromkeys([bench.precision, torch.float32]):
        name, target = ("bf16", 2.2) if precision == torch.bfloat16 else ("fp32", 1.2)
        ours = start(keeping, bench.device, our_image, precision, path)
        yield faster(
            f"one image, file to boxes, {name}", *interleave(bench, ours, reference), "torchvision", target
        )


# ------------------------------------------------------------------------------ data


def bench_sample(bench: Bench) -> Iterator[Row]:
    """One augmented training sample, from files and from the frame cache, on one thread."""
    ids = read_image_list(bench.demo / "imageSets/train-all.txt")
    frames = load_frames(ids, open_annotations(bench.demo), min_height=12, margin=5)
    frames = [frame for frame in frames if (frame.labels == 1).any()]
    cache = cache_frames(bench.folder / "cache", bench.demo, ids, "early")
    collate = Collate([(38, 38), (19, 19)])
    recipe = recipe_sample(bench.demo)
    epochs = iter(range(10**9))

    def ours(cache=None) -> Callable:
        dataset = KaistPairs(
            bench.demo,
            frames,
            input_mode="early",
            input_size=(300, 300),
            filler=mean_colour(4),
            augmentation=Augmentation(),
            masks_follow=True,
            seed=0,
            cache=cache,
        )

        def samples() -> None:
            epoch = next(epochs)
            collate([dataset[epoch, i] for i in range(len(frames))])

        return samples

    def recipes() -> None:
        for frame in frames:
            recipe(frame)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = interleave(bench, ours(), ours(cache), recipes)
    torch.set_num_threads(threads)
    files, cached, theirs = (value / len(frames) for value in times)
    yield faster("training sample from JPEG pair, one thread", files, theirs, "v2 recipe", 7)
    yield faster("training sample from frame cache", cached, theirs, "v2 recipe", 14)


def bench_evaluation(bench: Bench) -> Iterator[Row]:
    """Reading a result file and all nine setups; KAIST's real ones where KAIST_REFERENCE is."""
    work = "evaluation, 9 setups, 2,252 frames"
    if "KAIST_REFERENCE" in os.environ:
        reference = Path(os.environ["KAIST_REFERENCE"])
        people = load_ground_truth(reference / "annotations/KAIST_annotation.json")
        path = reference / "results/MSDS-RCNN_result.txt"
        work += f", {path.stem}"
    else:
        people, path = synthetic_result(bench.folder, 2252)

    def ours() -> dict[str, float]:
        results = evaluate(people, read_detections(path, people.frames))
        return {name: result.miss_rate for name, result in results.items()}

    plain = partial(plain_miss_rates, path, people, SETUPS)
    mine, theirs = ours(), plain()
    assert np.allclose([mine[name] for name in SETUPS], [theirs[name] for name in SETUPS])
    yield faster(work, *interleave(bench, ours, plain), "plain", 30)


def seconds_to_read(folder: Path, n: int) -> tuple[float, float]:
    """Seconds to read n annotation files, and to read them again when they are remembered."""
    ids = draw_annotations(folder, n)
    annotations = open_annotations(folder, "bbgt")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")

    def read() -> None:
        load_frames(ids, annotations, min_height=12, margin=5)

    return lap(read, torch.device("cpu")), lap(read, torch.device("cpu"))


def bench_annotations(bench: Bench) -> Iterator[Row]:
    """Reading the whole training set's annotations."""
    if not bench.quick:
        times = seconds_to_read(bench.folder / "tree", KAIST_FRAMES)
        for how, seconds, limit in zip(("reading", "remembering"), times, (5, 0.5), strict=True):
            yield Row(
                f"{how} {KAIST_FRAMES:,} annotation files",
                f"{seconds:.3g} s",
                "",
                "",
                f"<= {limit} s",
                seconds <= limit,
            )


BENCHMARKS = {
    "loss": bench_loss,
    "detect": bench_detect,
    "sample": bench_sample,
    "evaluation": bench_evaluation,
    "annotations": bench_annotations,
    "image": bench_image,
    "step": bench_step,
    "training": bench_training,
    "deterministic": bench_deterministic,
    "memory": bench_memory,
}


# ------------------------------------------------------------------------------ growth


def growth(bench: Bench) -> Iterator[str]:
    """Lines of a table: how cost grows along four axes; the demo's width on a CPU."""
    width = 1.0 if bench.device.type == "cuda" else 0.125
    model = SSD300(**(MODEL | {"width": 0.01}))
    loss = MultiBoxLoss(model.priors, loc_loss="smooth_l1", loc_reduction="sum").to(bench.device)
    predictions = random_predictions(8, 0.0, bench.device)
    for people in (0, 1, 3, 10, 30, 100, 200):
        objects = random_objects(8, people, bench.device)
        [value] = interleave(bench, lambda o=objects: loss(predictions, *o))
        yield f"| people a frame | {people} | {value:.4g} ms | multibox loss, batch 8 |"
    for n in (1, 4, 16, 64):
        [value] = interleave(bench, our_step(bench.device, bench.precision, n, width=width))
        yield f"| batch | {n} | {value:.4g} ms | step, {value / n:.3g} ms an image |"
    for side in (300, 512, 1024):
        changes = {"width": width, "size": (side, side)}
        [value] = interleave(bench, our_step(bench.device, bench.precision, 1, **changes))
        per_pixel = 1e6 * value / side**2
        yield f"| input side | {side} | {value:.4g} ms | step, {per_pixel:.3g} ns a pixel |"
    for n in (100, 1000, 10_000, 100_000):
        read, remembered = seconds_to_read(bench.folder / f"tree-{n}", n)
        people, path = synthetic_result(bench.folder, n)
        start = time.perf_counter()
        evaluate(people, read_detections(path, people.frames))
        scoring = time.perf_counter() - start
        yield (
            f"| frames | {n} | {read:.3g} s, {remembered:.3g} s, {scoring:.3g} s "
            "| annotations: read, remembered; evaluation |"
        )


# ------------------------------------------------------------------------------ lab book


def row_detector(bench: Bench, config: dict[str, Any], frame_id: str) -> Callable[[], object]:
    """Detection by a row's network with random weights, of which few priors say person."""
    model = SSD300(**model_arguments(Namespace(**config))).to(bench.device, memory_format=torch.channels_last)
    for head in model.eval().conf_heads:
        torch.nn.init.constant_(head.bias[::2], 4.0)

    def run() -> object:
        frame = read_frame(bench.demo, frame_id, config["input_mode"])
        nms_settings = {name: config[name] for name in ("min_score", "nms_iou", "max_boxes")}
        return detect_image(model, frame, bench.precision, test_flip=config["test_flip"], **nms_settings)

    return run


def detect_rows(bench: Bench) -> Iterator[str]:
    """Lines of a table: one image or pair, files to boxes, by every network of the lab book at full
    width, against row 26's. Rows that differ in training alone share a line."""
    networks: dict[str, list[str]] = {}
    configs = {name: resolve_row(name) | {"width": 1.0} for name in EXPERIMENTS}
    for name, config in configs.items():
        words = [config["input_mode"], "{}x{}".format(*config["input_size"]), config["priors"]]
        words += ["BatchNorm"] * config["batch_norm"] + ["test flip"] * config["test_flip"]
        networks.setdefault(", ".join(words), []).append(name)
    ids = read_image_list(bench.demo / "imageSets/test-all.txt")
    functions = [row_detector(bench, configs[names[0]], ids[0]) for names in networks.values()]
    times = interleave(bench, *functions)
    [reference] = [t for t, names in zip(times, networks.values(), strict=True) if "26" in names]
    for (network, names), value in zip(networks.items(), times, strict=True):
        yield f"| {', '.join(names)} | {network} | {value:.4g} ms | {value / reference:.2f} |"


# ------------------------------------------------------------------------------ the script


def main() -> None:
    arguments = parse_arguments()
    device = choose_device(arguments.device)
    precision = choose_precision("auto", device)
    torch.manual_seed(0)
    print(describe_machine(device, precision), end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        seconds = 0.5 if arguments.growth else 2.0 if arguments.quick else 8.0
        rounds = 1 if arguments.growth else 3
        bench = Bench(device, precision, Path(folder), arguments.quick, seconds, rounds)
        if arguments.growth:
            print("| axis | value | cost | of |\n|---|---|---|---|")
            for line in growth(bench):
                print(line, flush=True)
            return
        if arguments.rows:
            print("| rows | network | detect | of row 26 |\n|---|---|---|---|")
            for line in detect_rows(bench):
                print(line, flush=True)
            return
        print("| work | ours | reference | ratio | target | |\n|---|---|---|---|---|---|")
        for name in arguments.only or BENCHMARKS:
            for row in BENCHMARKS[name](bench):
                print(row, flush=True)


def parse_arguments() -> Namespace:
    """The command line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="under three minutes on two cores")
    add("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    add("--device", default="cpu", help="cpu, cuda (default: %(default)s)")
    add("--growth", action="store_true", help="how cost grows, instead of the table")
    add("--rows", action="store_true", help="detection by every row of the lab book, instead")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
