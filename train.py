"""Train SSD300 with segmentation infusion on KAIST, evaluating as it goes.

Edit the constants, or give them as flags (`python train.py --batch-size 16`); `--experiment 19`
takes every constant of the recipe from row 19 of the lab book (engine/experiments.py), which
`python train.py --list` prints; `--runs` lists the runs so far.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from pathlib import Path

from engine.config import describe_config, model_arguments, pick, read_config, run_name
from kaist.files import check_flags, run_script

if __name__ == "__main__":  # before torch is imported, which takes seconds: --help and typos answer at once
    check_flags(lambda: read_config(__file__))

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import datasets
from engine import distributed
from engine.captured import CapturedStep, Step, capture_steps
from engine.loader import BatchLoader
from engine.monitor import MAX_NONFINITE_STEPS, StepMonitor
from engine.optim import OPTIMIZER_KEYS, GuardedStep, lr_factor, make_optimizer, set_lr, update_ema
from engine.run import Run
from kaist import demo
from kaist.annotations import PairSet, resolve_path
from kaist.frames import FRAME_KEYS, Frame, describe_videos, split_frames
from kaist.images import check_images
from kaist.miss_rate import GroundTruth, evaluate, load_ground_truth
from kaist.report import count_people, headline, report
from kaist.sources import KAIST, TEST_SET_KEYS, TRAIN_SET_KEYS, open_testing, open_training, overlap_warning
from model import make_network
from ssd.augment import Augmentation
from ssd.losses import CRITERION_KEYS, Criterion
from ssd.memory_plan import plan_batch
from ssd.pretrained import check_pretrained, load_pretrained
from utils import autocast, choose_device, choose_precision, compile_model, detect_frames, make_deterministic

# -------- data
DATA = "kaist"  # kaist, llvip, flir, cvc14, or a description, pairs.json (docs/your-data.md)
DATA_ROOT = "data/demo"  # KAIST root with images/; the demo set is drawn here if it is absent
TRAIN_LIST = "imageSets/train-all.txt"  # frames to train on: below DATA_ROOT, or any path
TEST_LIST = "imageSets/test-all.txt"  # frames to evaluate on; test-all-20.txt on KAIST
ANNOTATIONS = "auto"  # auto, bbgt, xml, xml-sanitized, paired, json, or a path: training boxes
TEST_ANNOTATIONS = "auto"  # the same for the test list: KAIST_annotation.json where there is one
VALIDATION = 0.0  # share of the training list, in whole videos, held out to choose the epoch
MIN_HEIGHT = 12.0  # lower persons are ignored in training, pixels
MARGIN = 5.0  # persons closer to the frame's border are ignored in training, pixels
LEARN = "person"  # whom annotations call: person, people (also person? and people), all (any word)
# -------- the run
EXPERIMENT = ""  # row of the lab book (--list) whose recipe replaces the constants here
NAME = ""  # of the run's folder; empty takes its row, or demo, and what differs
CHECKPOINTS = "checkpoints"  # a folder for each run goes here
SEED = 42  # of initial weights, order and augmentation
SAVE_MINUTES = 10.0  # minutes between checkpoints within an epoch; 0: only at its end
ON_NONFINITE = "stop"  # at a loss or gradient that is not finite: stop, or skip the step
MAX_BAD_FRAMES = 10  # frames that may turn unreadable under way and are left out; more end the run
# -------- machine
DEVICE = "auto"  # auto, cpu, cuda, cuda:1, mps
PRECISION = "auto"  # of the convolutions: fp32, bf16, or auto: bf16 where the machine has it
COMPILE = "auto"  # off; graphs: steps are recorded on CUDA; on: torch.compile, and graphs; auto: graphs
DETERMINISTIC = False  # torch's deterministic algorithms; see docs/robustness.md
WORKERS = 2  # loader processes, which make the batches
START_METHOD = "auto"  # how they start: fork, spawn, forkserver, or auto: as Python does here
CACHE = ""  # folder for decoded training frames (1.31 MB a pair), read instead of the JPEGs
# -------- model
NETWORK = "ssd300"  # ssd300, mlpd, insanet (both: INPUT_MODE halfway, BATCH_NORM, L1 loss, mean)
INPUT_MODE = "early"  # lwir, visible, mean (of both), early (4 channels), halfway (two streams)
INPUT_SIZE = (300, 300)  # height and width of the network's input, pixels
PIXEL_MEAN = (0.3465, 0.3219, 0.2842, 0.1598)  # of R, G, B and LWIR, from 0 to 1: subtracted, fills gaps
PIXEL_STD = (0.2358, 0.2265, 0.2274, 0.0813)  # divided by; both as published for KAIST's training frames
BATCH_NORM = True  # VGG16 with BatchNorm
WIDTH = 0.25  # width multiplier of every layer; 1.0 is VGG16
PRIORS = "pedestrian"  # ssd300 (VOC's), ssd300-coco, pedestrian (upright), multispectral (MLPD's)
CENTRES = "stride"  # of the priors: stride (where the maps' cells look) or even (as the log had them)
PRETRAINED = "none"  # none, imagenet (VGG16), coco (SSD300), or a file of published weights
LWIR_FILTERS = "sum"  # LWIR's from the published RGB filters: their sum, or mean (a third, as logged)
INFUSION = (1, 1, 0, 0, 0, 0)  # maps 38, 19, 10, 5, 3, 1 with a mask head: 1 (2 first: the streams' too)
INFUSION_CONV = False  # a 3x3 convolution before each head's 1x1
# -------- loss
LOC_LOSS = "smooth_l1"  # l1 or smooth_l1
LOC_REDUCTION = "sum"  # sum (over the positives' number, as in the paper) or mean (a quarter)
CONF_DIVISOR = "balanced"  # of the conf loss: positives (the paper's), or balanced for small batches
SEG_CELLS = "mean"  # a map's mask loss over its cells: mean or sum
SEG_MAPS = "sum"  # the mask losses over the maps: mean, sum, or uncertainty (learned weights)
SEG_BALANCE = "none"  # weights of a map's cells: none, share (of the persons'), height (SDS-RCNN's)
SEG_PERSON_SHARE = 0.2  # of the weight that a map's person cells have together; for SEG_BALANCE = "share"
SEG_WEIGHT = 1.0  # weight of the mask loss in the total
MASKS_FOLLOW = True  # masks follow the augmentation (rows 18 to 25 of the log: they did not)
OUT_OF_RANGE = "keep"  # persons no prior of a map matches, in its mask: keep, background, ignore
# -------- optimiser
OPTIMIZER = "adam"  # sgd (momentum 0.9) or adam
LR = 2e-3  # learning rate of the weights
BIAS_LR_FACTOR = 2.0  # biases learn this many times faster
WEIGHT_DECAY = 1e-5  # L2 penalty
SCHEDULE = "cosine"  # constant, step (x0.1 at 2/3, 5/6 of EPOCHS), step-mlpd (1/2, 9/10), cosine
BATCH_SIZE = 4  # frames a step
EPOCHS = 14  # passes over the training list
EMA_DECAY = 0.0  # evaluate and keep weights averaged over about 1 / (1 - this) steps; 0: off
# -------- augmentation
AUGMENT = True  # SSD augmentation; False only resizes
ZOOM_OUT = 1.0  # largest zoomed-out canvas, in frames a side
CROP_ASPECT = (0.8, 1.2)  # smallest and largest width / height of a crop, in the frame's own
MIN_INPUT_HEIGHT = 10.0  # persons that end up lower are ignored, pixels of the network's input
HUE_SATURATION = True  # distort hue and saturation of the visible image
LWIR_JITTER = True  # distort brightness and contrast of the LWIR image
JITTER = 0.0  # share of the samples distorted beyond SSD: colours, LWIR's gain and offset, blur, noise
COPY_PASTE = 0.5  # share of the frames into which people of other frames are pasted
MODALITY_DROPOUT = 0.0  # share of the samples that see one modality alone, the other blanked
CROP_APART = 0.0  # share of the samples whose modalities are cropped each by a window of its own
MIRROR_APART = 0.0  # share of the mirrored samples whose LWIR is not mirrored
SHIFT_LEFT = 0.0  # share of the samples that are moved up to 20 pixels to the left
# -------- evaluation
EVAL_EVERY = 7  # epochs between evaluations; the last epoch is always evaluated
MIN_SCORE = 0.01  # detections below this score are dropped
NMS_IOU = 0.45  # of two detections that overlap more, the lower-scored is dropped
MAX_BOXES = 200  # detections kept in a frame
TEST_FLIP = True  # detect in each frame and its mirror image, averaged: twice the time


def main() -> None:
    """Configuration, model, data, loss and optimiser, epochs, report."""
    config = configure()
    if config.deterministic:
        make_deterministic()
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    distributed.init_distributed(device, config.batch_size)  # joins torchrun's processes, if any
    run = Run(config, run_name(config), model_arguments(config))

    # Model. Published weights are read by one process; the others get them from it.
    torch.manual_seed(config.seed)
    model = make_network(**run.model_args)
    if distributed.is_main_process() and not run.resumes:
        load_pretrained(model, config.pretrained, config.lwir_filters)
    model.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False) if config.ema_decay else model  # is evaluated and kept

    # Data. The demo set is drawn if it is not there.
    if distributed.is_main_process() and config.data == KAIST:
        demo.open_root(config.data_root)
    distributed.barrier()
    root, ids, annotations = open_training(**pick(config, *TRAIN_SET_KEYS))
    config.lwir_range = root.lwir_range if isinstance(root, PairSet) else (0.0, 0.0)
    check_images(root, ids, config.input_mode)
    paired = config.network != "ssd300" or config.crop_apart + config.mirror_apart > 0  # a box a modality
    frames, held_out = split_frames(ids, annotations, pairs=paired, **pick(config, *FRAME_KEYS))
    run.notes += [f"the epoch is chosen on videos held out: {describe_videos(held_out)}"] if held_out else []
    test_root, test_set = open_testing(**pick(config, *TEST_SET_KEYS))
    run.notes += overlap_warning(root, frames, test_set)
    val_set = load_ground_truth(annotations, held_out) if held_out else test_set
    testing = pick(config, *datasets.TEST_LOADER_KEYS)
    test_loader = datasets.test_loader(test_root, test_set, model, **testing)
    val_loader = datasets.test_loader(root, val_set, model, **testing) if held_out else test_loader
    options = Augmentation(**pick(config, *datasets.AUGMENTATION_KEYS)) if config.augment else None
    dataset_kwargs = {**datasets.input_kwargs(model), **pick(config, *datasets.DATASET_KEYS)}
    pairs = datasets.KaistPairs(root, frames, augmentation=options, **dataset_kwargs)
    train_loader = datasets.training_loader(pairs, model, **pick(config, *datasets.TRAIN_LOADER_KEYS))

    # Loss and optimiser.
    heads = (model.priors, model.grids, model.infused_maps, model.n_logits)
    criterion = Criterion(*heads, **pick(config, *CRITERION_KEYS)).to(device)
    optimizer = make_optimizer(model, criterion, name=config.optimizer, **pick(config, *OPTIMIZER_KEYS))
    run.terms, run.planned_batch = criterion.terms, plan_batch(model, criterion, config.optimizer, precision)
    parts = {"model": ema, "optimizer": optimizer, "criterion": criterion}
    run.restore(parts if ema is model else {**parts, "raw_model": model})
    network = compile_model(distributed.wrap_ddp(model), config.compile)
    take_step = make_step(network, model, criterion, optimizer, precision)
    take_step = capture_steps(take_step, optimizer, config.compile, device)
    tested = compile_model(ema, config.compile)

    # Epochs. `with run` saves on Ctrl-C, SIGTERM and a failing loader; the same command goes on.
    if distributed.is_main_process():
        where = f"{device} in {str(precision).removeprefix('torch.')}"
        where += ", steps recorded as a CUDA graph" * isinstance(take_step, CapturedStep)
        print_banner(run, frames, annotations.source, test_set, model, where)
    detections = None
    detection = pick(config, "min_score", "nms_iou", "max_boxes", "test_flip") | {"watch": run.until_stopped}
    with run:
        for epoch in range(run.epoch, config.epochs):
            train_epoch(run, take_step, model, ema, optimizer, train_loader)
            distributed.average_statistics(model)  # of processes on CPUs; one evaluation is shared by all
            distributed.average_statistics(ema)
            scores = criterion.learned_weights()
            if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
                detections, mask_scores = detect_frames(tested, val_loader, precision, **detection)
                scores |= headline(evaluate(val_set, detections)) | mask_scores
            run.end_epoch(scores)
        if detections is None or held_out:
            chosen = run.best_epoch(ema) if held_out else tested
            detections, _ = detect_frames(chosen, test_loader, precision, **detection)
    if distributed.is_main_process():
        report(run.folder.name, test_set, detections, run.folder)
        print(run.summary())


def make_step(
    network: nn.Module, model: nn.Module, criterion: Criterion, optimizer: Optimizer, precision: torch.dtype
) -> Step:
    """A function that trains on a batch's images, boxes, labels and masks; `network` is `model`, wrapped.

    It returns the loss terms, (2, terms), averaged over the processes and of this one, and whether they
    and the gradient are finite.
    """
    guarded_step = GuardedStep(model, optimizer)

    def step(images: Tensor, boxes: Tensor, labels: Tensor, *masks: Tensor) -> tuple[Tensor, Tensor]:
        guarded_step.save_statistics()
        with autocast(images.device, precision):
            predictions = network(images)  # loc (N, P, 4), conf (N, P, 2), seg (N, 2, h, w) a map
        losses = criterion(predictions, boxes, labels, masks)  # (terms,), total first
        optimizer.zero_grad()
        losses[0].backward()
        distributed.average(p.grad for p in criterion.parameters())  # wrap_ddp does so for the network's
        mean_losses = distributed.all_reduce_mean(losses.detach())
        finite = guarded_step(mean_losses)  # moves nothing where a loss or gradient is not finite
        return torch.stack([mean_losses, losses.detach()]), finite

    return step


def train_epoch(
    run: Run, take_step: Step, model: nn.Module, ema: nn.Module, optimizer: Optimizer, loader: BatchLoader
) -> None:
    """The rest of the run's epoch, step by step; take_step is from `make_step`. InputError: too many losses
    or gradients in a row are not finite. What the step saw is in the run's folder, and `last.pt` is from
    before. Or more than MAX_BAD_FRAMES frames cannot be read any more."""
    model.train()
    config, total_steps = run.config, len(loader) * run.config.epochs
    batches = tqdm(
        loader.epoch(run.epoch, skip=run.step),
        initial=run.step,
        total=len(loader),
        desc=f"epoch {run.epoch + 1}/{config.epochs}",
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n}/{total}{postfix}",
        leave=False,
        disable=not distributed.is_main_process(),
    )
    with StepMonitor(run, MAX_NONFINITE_STEPS if config.on_nonfinite == "skip" else 1) as monitor:
        for step, batch in monitor.steps(batches):
            step += run.epoch * len(loader)
            set_lr(optimizer, config.lr * lr_factor(config.schedule, config.epochs, step, total_steps))
            batch = batch.to(model.priors.device)
            losses, finite = take_step(batch.images, batch.boxes, batch.labels, *batch.masks)
            update_ema(ema, model, config.ema_decay, step)
            monitor.add(losses, finite, batch.frame_ids)
            run.show_progress(batches, total_steps)


def configure(argv: list[str] | None = None) -> Namespace:
    """The run's configuration, as from `read_config`, of a network that can be built. InputError: an unknown
    row or flag, or values that cannot be used."""
    config = read_config(__file__, argv)
    with torch.device("meta"):  # shapes without values: quick
        model = make_network(**model_arguments(config))
    check_pretrained(config.pretrained, model, width=config.width, batch_norm=config.batch_norm)
    return config


def print_banner(
    run: Run, frames: list[Frame], source: Path, test_set: GroundTruth, model: nn.Module, where: str
) -> None:
    """What is about to be trained, in five lines, and what is unusual about it."""
    config, people = run.config, sum(frame.n_persons for frame in frames)
    for note in run.notes:
        print(note)
    lists = (resolve_path(Path(config.data_root), name) for name in (config.train_list, config.test_list))
    learned, tested = lists if config.data == KAIST else ("train", "test")
    print(describe_config(config, __file__))
    print(f"train: {len(frames)} frames, {people} people to learn ({learned}, {source})")
    print(f"test: {count_people(test_set)} ({tested}, {test_set.source})")
    (h, w), millions = model.size, sum(p.numel() for p in model.parameters()) / 1e6
    heads = f"{len(model.priors)} priors, masks on maps {[i + 1 for i in model.infused_maps]}"
    print(f"network: {model.input_mode} input of {h}x{w}, {millions:.2f} M parameters, {heads}")
    print(f"run: {run.folder}, epoch {run.epoch + 1} of {config.epochs}, on {where}; time: after 30 steps")


if __name__ == "__main__":
    run_script(lambda: distributed.run_distributed(main))
