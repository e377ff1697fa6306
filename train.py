"""Train SSD300 with segmentation infusion on KAIST, evaluating as it goes.

Edit the constants, or give them as flags (`python train.py --batch-size 16`); `--experiment 19`
takes every constant of the recipe from row 19 of the lab book (experiments.py), which
`python train.py --list` prints.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from datasets import DeviceLoader, Frame, frame_loader, load_frames, make_loader
from engine.config import lab_book, model_arguments, read_config, refuse, run_name
from engine.distributed import (
    all_reduce_mean,
    average_gradients,
    barrier,
    broadcast_object,
    close_distributed,
    init_distributed,
    is_main_process,
    rank,
    wrap_ddp,
)
from engine.loader import BatchLoader
from engine.monitor import MAX_SKIPS, StepLog
from engine.optim import MovingAverage, gradient_norm, lr_factor, make_optimizer, set_lr, update
from engine.run import Run
from kaist import demo as demo_data
from kaist.annotations import Annotations, find_annotations, find_file, read_image_list
from kaist.files import InputError, run_script
from kaist.images import check_images
from kaist.miss_rate import GroundTruth, evaluate, load_ground_truth, open_test_set
from kaist.report import headline, report
from model import SSD300
from ssd.boxes import feature_map_sizes
from ssd.losses import Criterion
from ssd.pretrained import check_pretrained, load_pretrained
from utils import autocast, choose_device, choose_precision, detect_frames, make_deterministic

# Where things are, and which machine runs them.
DATA_ROOT = "data/demo"  # KAIST root with images/; the demo set is drawn here if it is absent
TRAIN_LIST = "imageSets/train-all.txt"  # frames to train on: below DATA_ROOT, or any path
TEST_LIST = "imageSets/test-all.txt"  # frames to evaluate on; test-all-20.txt on KAIST
ANNOTATIONS = "auto"  # auto, bbgt, xml, xml-sanitized, paired, json, or a path: training boxes
TEST_ANNOTATIONS = "auto"  # the same for the test list: KAIST_annotation.json where there is one
CHECKPOINTS = "checkpoints"  # a folder for each run goes here
NAME = ""  # of the run's folder; empty takes the name of its row, or "custom"
ON_NONFINITE = "stop"  # at a loss or gradient that is not finite: stop, or skip the step
EXPERIMENT = ""  # row of the lab book (--list) whose recipe replaces the constants below
DEVICE = "auto"  # auto, cpu, cuda, cuda:1, mps
PRECISION = "auto"  # of the convolutions: fp32, bf16, or auto: bf16 where the machine has it
WORKERS = 2  # loader processes
START_METHOD = "auto"  # how they start: fork, spawn, forkserver, or auto: as Python does here
LOADER = "auto"  # who makes batches: workers, device (needs CACHE), or auto: a GPU if it can
COMPILE = "auto"  # torch.compile for the training step's network: on, off, or auto: on CUDA
MAX_BAD_FRAMES = 10  # frames that may turn unreadable under way and are left out; more end the run
CACHE = ""  # folder for decoded training frames (1.31 MB a pair), read instead of the JPEGs
SAVE_MINUTES = 10.0  # minutes between checkpoints within an epoch; 0: only at its end
DETERMINISTIC = False  # torch's deterministic algorithms; see the README on what repeats exactly
# The recipe: what an experiment is made of.
SEED = 42  # of initial weights, order and augmentation
INPUT_MODE = "early"  # lwir, visible, mean (of both), early (4 channels), halfway (two streams)
INPUT_SIZE = (300, 300)  # height and width of the network's input, pixels
BATCH_NORM = True  # VGG16 with BatchNorm
WIDTH = 0.125  # width multiplier of every layer; 1.0 is VGG16
PRIORS = "pedestrian"  # ssd300 (the paper's for VOC), ssd300-coco (smaller), pedestrian (upright)
PRETRAINED = "none"  # none, imagenet (VGG16), coco (SSD300), or a torchvision state file's path
INFUSION = (1, 1, 0, 0, 0, 0)  # feature maps 38, 19, 10, 5, 3, 1 with a segmentation head: 1
INFUSION_CONV = False  # a 3x3 convolution before each head's 1x1
SEG_CELLS = "mean"  # a map's mask loss over its cells: mean or sum
SEG_MAPS = "sum"  # the mask losses over the maps: mean, sum, or uncertainty (learned weights)
SEG_WEIGHT = 1.0  # weight of the mask loss in the total
MASKS_FOLLOW = True  # masks follow the augmentation (rows 18 to 25 of the log: they did not)
OUT_OF_RANGE = "keep"  # persons no prior of a map matches, in its mask: keep, background, ignore
LOC_LOSS = "smooth_l1"  # l1 or smooth_l1
LOC_REDUCTION = "sum"  # sum (over the positives' number, as in the paper) or mean (a quarter)
OPTIMIZER = "adam"  # sgd (momentum 0.9) or adam
LR = 2e-3  # learning rate of the weights
BIAS_LR_FACTOR = 2.0  # biases learn this many times faster
WEIGHT_DECAY = 1e-5  # L2 penalty
EMA_DECAY = 0.0  # evaluate and keep weights averaged over about 1 / (1 - this) steps; 0: off
SCHEDULE = "cosine"  # constant, step (x0.1 at 2/3 and 5/6 of the epochs), cosine (with warm-up)
BATCH_SIZE = 8  # frames a step
EPOCHS = 16  # passes over the training list
VALIDATION = 0.0  # share of the training list held out to choose the best epoch
AUGMENT = True  # SSD augmentation; False only resizes
ZOOM_OUT = 1.5  # largest zoomed-out canvas, in frames a side
HUE_SATURATION = True  # distort hue and saturation of the visible image
LWIR_JITTER = True  # distort brightness and contrast of the LWIR image
COPY_PASTE = 0.0  # share of the frames into which people of other frames are pasted
MODALITY_DROPOUT = 0.0  # share of the samples that see one modality alone, the other blanked
MIN_HEIGHT = 12.0  # lower persons are ignored in training, pixels
MARGIN = 5.0  # persons closer to the frame's border are ignored in training, pixels
EVAL_EVERY = 8  # epochs between evaluations; the last epoch is always evaluated
MIN_SCORE = 0.01  # detections below this score are dropped
NMS_IOU = 0.45  # of two detections that overlap more, the lower-scored is dropped
MAX_BOXES = 200  # detections kept in a frame
TEST_FLIP = False  # detect in each frame and its mirror image, averaged: twice the time


def main() -> None:
    """Data, model, loss, optimiser, resume, epochs, report."""
    if sys.argv[1:] == ["--list"]:
        print(lab_book())
        return
    config = configure()
    if config["deterministic"]:
        make_deterministic()
    device = choose_device(config["device"])
    precision = choose_precision(config["precision"], device)
    device = init_distributed(device, config["batch_size"])
    run = Run(config, run_name(config), model_arguments(config)) if is_main_process() else None
    run = broadcast_object(run)

    if is_main_process():
        demo_data.open_root(config["data_root"])
    barrier()
    frames, held_out = read_training_frames(config)
    people = open_test_set(Path(config["data_root"]), config["test_list"], config["test_annotations"])
    test = watched = open_evaluation(people, config, device)
    if held_out:  # they choose the best epoch instead of the test list
        people = load_ground_truth(training_annotations(config), held_out)
        watched = open_evaluation(people, config, device)

    torch.manual_seed(config["seed"])
    model = SSD300(**run.model_args)
    if is_main_process() and not run.resumes:
        load_pretrained(model, config["pretrained"])  # the others get them from this process
    model.to(device, memory_format=torch.channels_last)
    loader = make_loader(config, frames, model, device)
    terms = ("loc_loss", "loc_reduction", "seg_cells", "seg_maps", "seg_weight")
    criterion = Criterion(model.priors, model.infused_maps, **{name: config[name] for name in terms}).to(
        device
    )
    optimizer = make_optimizer(model, criterion, config)
    average = MovingAverage(model, config["ema_decay"])
    run.restore(
        {"model": average.model, "optimizer": optimizer, "criterion": criterion}
        | ({"raw_model": model} if average.model is not model else {})
    )
    run.terms = criterion.terms
    network = wrap_ddp(model)
    if config["compile"] == "on" or (config["compile"] == "auto" and device.type == "cuda"):
        network = torch.compile(network, dynamic=False)

    if is_main_process():
        run.begin()
        print(f"{len(test.people.frames)} test frames, people of {test.people.source}")
        print(
            f"{run.folder}: {len(frames)} frames, {len(loader)} steps an epoch, on {device} in "
            f"{str(precision).removeprefix('torch.')}, from epoch {run.epoch + 1}, "
            f"step {run.step + 1}"
        )
    detections = None
    try:
        while run.epoch < config["epochs"]:
            train_epoch(run, network, average, loader, criterion, optimizer, device, precision)
            scores = criterion.learned_weights()
            if (run.epoch + 1) % config["eval_every"] == 0 or run.epoch + 1 == config["epochs"]:
                detections, mask_ious = detect_frames(
                    average.model, watched.loader, device, precision, config
                )
                scores |= headline(evaluate(watched.people, detections)) | mask_ious
            with run.undivided():
                run.end_epoch(scores, is_main_process())
    except BaseException:
        if is_main_process() and run.whole:
            run.save()
            print(f"\nsaved; the same command goes on from epoch {run.epoch + 1}, step {run.step + 1}")
        raise
    if detections is None or watched is not test:
        detections, _ = detect_frames(average.model, test.loader, device, precision, config)
    if is_main_process():
        report(run.folder.name, test.people, detections, run.folder)
    close_distributed()


class Evaluation(NamedTuple):
    """What the network is evaluated on: people, and batches of their frames."""

    people: GroundTruth
    loader: BatchLoader


def train_epoch(
    run: Run,
    network: nn.Module,
    average: MovingAverage,
    loader: BatchLoader | DeviceLoader,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    precision: torch.dtype,
) -> None:
    """The rest of the run's epoch, step by step.

    Raises:
        InputError: a loss or a gradient is not finite, and ON_NONFINITE does not say to go on, or
            `MAX_SKIPS` steps in a row were not. What the step saw is in the run's folder, and
            `last.pt` is from before.
        BadFrames: more than MAX_BAD_FRAMES frames cannot be read any more.
    """
    network.train()
    config, total_steps = run.config, len(loader) * run.config["epochs"]
    skips = config["on_nonfinite"] == "skip"
    first_step = run.epoch * len(loader) + run.step
    bar = tqdm(
        loader.epoch(run.epoch, skip=run.step),
        initial=run.step,
        total=len(loader),
        desc=f"epoch {run.epoch + 1}/{config['epochs']}",
        unit="step",
        disable=not is_main_process(),
    )
    with StepLog(run, rank(), patience=MAX_SKIPS if skips else 1) as log:
        for step, batch in enumerate(bar, first_step):
            if batch is None:  # none of its frames could be read
                log.flush()
                with run.undivided():
                    run.add_step(None, 0.0)
                continue
            set_lr(optimizer, config, lr_factor(config, step, total_steps))
            batch = batch.to(device)
            before = [buffer.clone() for buffer in network.buffers()] if skips else []
            # Undivided from here, because BatchNorm's statistics move in the forward pass.
            with run.undivided():
                with autocast(device, precision):
                    predictions = network(batch.images)
                losses = criterion(predictions, batch.boxes, batch.labels, batch.masks)
                batch_losses = all_reduce_mean(losses.detach())
                optimizer.zero_grad()
                losses[0].backward()
                average_gradients(criterion)
                finite = batch_losses.isfinite().all() & gradient_norm(optimizer).isfinite()
                update(optimizer, finite)
                if skips:  # BatchNorm's statistics have seen what must not be
                    for buffer, value in zip(network.buffers(), before, strict=True):
                        buffer.copy_(torch.where(finite, buffer, value))
                average.update(step)
                log.add(torch.stack([batch_losses, losses.detach()]), finite, batch.frame_ids)
            if is_main_process() and run.is_due():
                log.flush()
                run.save()
            if run.step:
                show_progress(bar, run, optimizer, total_steps - step - 1)


def show_progress(bar: tqdm, run: Run, optimizer: torch.optim.Optimizer, steps_left: int) -> None:
    """Mean losses so far, learning rate, speed and the whole run's ETA behind the bar."""
    _, loc, conf, seg, *_ = run.mean_losses().values()
    speed = run.step * run.config["batch_size"] / max(run.seconds, 1e-9)
    left = tqdm.format_interval(steps_left * run.seconds / run.step)
    bar.set_postfix_str(
        f"loc {loc:.2f} conf {conf:.2f} seg {seg:.2f} lr {optimizer.param_groups[0]['lr']:.1e} "
        f"{speed:.1f} images/s, run ends in {left}",
        refresh=False,
    )


# ------------------------------------------------------------------------------ configuration


def configure(argv: list[str] | None = None) -> dict[str, Any]:
    """The run's configuration, as from `read_config`, of a network that can be built.

    Raises:
        InputError: an unknown row or flag, or values that cannot be used.
    """
    config = read_config(__file__, __doc__, argv)
    check_pretrained(config["pretrained"], width=config["width"], batch_norm=config["batch_norm"])
    feature_map_sizes(config["input_size"])
    return config


# ------------------------------------------------------------------------------ data


def read_training_frames(config: dict[str, Any]) -> tuple[list[Frame], list[str]]:
    """The frames to train on, and the ids of those held out for validation (maybe none)."""
    root = Path(config["data_root"])
    frame_ids = read_image_list(find_file(root, config["train_list"]))
    annotations = training_annotations(config)
    check_images(root, frame_ids, config["input_mode"])
    frames = load_frames(frame_ids, annotations, min_height=config["min_height"], margin=config["margin"])
    order = np.random.default_rng(config["seed"]).permutation(len(frames))
    held_out = {int(i) for i in order[: round(config["validation"] * len(frames))]}
    if bool(held_out) != bool(config["validation"]):
        refuse("validation", config["validation"], f"of {len(frames)} frames it holds out none")
    kept = [frame for i, frame in enumerate(frames) if i not in held_out]
    if not any((frame.labels == 1).any() for frame in kept):
        raise InputError(
            "no frame of the training list holds a person to learn",
            "check TRAIN_LIST, VALIDATION, ANNOTATIONS and MIN_HEIGHT",
            file=annotations.source,
        )
    return kept, [frames[i].id for i in sorted(held_out)]


def training_annotations(config: dict[str, Any]) -> Annotations:
    """What ANNOTATIONS names; of paired annotations the visible boxes only for visible input."""
    modality = "visible" if config["input_mode"] == "visible" else "lwir"
    return find_annotations(Path(config["data_root"]), config["annotations"], modality)


def open_evaluation(ground_truth: GroundTruth, config: dict[str, Any], device: torch.device) -> Evaluation:
    """Prepare to evaluate on some people's frames, after a look at their images."""
    root = Path(config["data_root"])
    return Evaluation(ground_truth, frame_loader(root, ground_truth, config, device))


if __name__ == "__main__":
    run_script(main)
