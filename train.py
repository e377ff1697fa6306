"""Train SSD300 with segmentation infusion on KAIST, and evaluate it during training.

Every constant in this file is also a flag: `python train.py --batch-size 16`. `--experiment 19` uses the
constants of row 19 of the lab book (engine/experiments.py). `--list` prints the lab book, and
`--runs` prints the runs so far.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from pathlib import Path

from engine.config import DETECT_KEYS, describe_config, model_arguments, pick, read_config, run_name
from kaist.files import check_flags, run_script

if __name__ == "__main__":  # before torch is imported, which takes seconds, so that --help is quick
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
from kaist.report import describe_test_set, headline, report
from kaist.sources import KAIST, TEST_SET_KEYS, TRAIN_SET_KEYS, open_testing, open_training, overlap_warning
from model import make_network
from ssd.augment import Augmentation
from ssd.losses import CRITERION_KEYS, Criterion
from ssd.memory_plan import plan_batch
from ssd.pretrained import check_pretrained, load_pretrained
from utils import autocast, choose_device, choose_precision, compile_model, detect_frames, make_deterministic

# -------- data
DATA = "kaist"  # data set: kaist, llvip, flir, cvc14, or the path of a pairs.json (docs/your-data.md)
DATA_ROOT = "data/demo"  # folder with images/; if it does not exist, the demo set is generated there
TRAIN_LIST = "imageSets/train-all.txt"  # image list to train on: relative to DATA_ROOT, or any path
TEST_LIST = "imageSets/test-all.txt"  # image list to evaluate on; KAIST's is imageSets/test-all-20.txt
ANNOTATIONS = "auto"  # training annotations: auto, bbgt, xml, xml-sanitized, paired, json, or a path
TEST_ANNOTATIONS = "auto"  # test annotations, with the same choices; auto prefers KAIST_annotation.json
VALIDATION = 0.0  # fraction of the training list, in whole videos, held out to choose the best epoch
MIN_HEIGHT = 12.0  # persons shorter than this are ignored in training (pixels)
MARGIN = 5.0  # persons closer than this to the frame's border are ignored in training (pixels)
LEARN = "person"  # labels to train on: person, people (person, person? and people), all (any label)
# -------- run
EXPERIMENT = ""  # row of the lab book (--list) whose values replace the constants in this file
NAME = ""  # name of the run's folder; if empty, it is made from the row and the changed constants
CHECKPOINTS = "checkpoints"  # parent folder of all run folders
SEED = 42  # random seed of the initial weights, the order of the frames and the augmentation
SAVE_MINUTES = 10.0  # minutes between checkpoints within an epoch; 0: save only after each epoch
ON_NONFINITE = "stop"  # if the loss or a gradient is not finite: stop, or skip the step
MAX_BAD_FRAMES = 10  # unreadable frames that are skipped during training; more stop the run
# -------- machine
DEVICE = "auto"  # auto, cpu, cuda, cuda:1, mps
PRECISION = "auto"  # precision of the network: fp32, bf16, or auto (bf16 if the hardware supports it)
COMPILE = "auto"  # off, graphs (training steps as CUDA graphs), on (torch.compile too), auto (graphs)
DETERMINISTIC = False  # use torch's deterministic algorithms; see docs/robustness.md
WORKERS = 2  # data loader processes
START_METHOD = "auto"  # start method of these processes: fork, spawn, forkserver, or auto (Python's default)
CACHE = ""  # folder for decoded training frames (1.31 MB per pair), read instead of the image files
# -------- model
NETWORK = "ssd300"  # ssd300; mlpd and insanet need INPUT_MODE halfway, LOC_LOSS l1, LOC_REDUCTION mean
INPUT_MODE = "early"  # lwir, visible, mean (average of both), early (4 channels), halfway (two streams)
INPUT_SIZE = (300, 300)  # height and width of the network's input (pixels)
PIXEL_MEAN = (0.3465, 0.3219, 0.2842, 0.1598)  # normalisation mean of R, G, B, LWIR (0 to 1); fill colour
PIXEL_STD = (0.2358, 0.2265, 0.2274, 0.0813)  # standard deviation; both as published for KAIST's training set
BATCH_NORM = True  # use BatchNorm in VGG16
WIDTH = 0.25  # width multiplier of every layer; 1.0 is VGG16
PRIORS = "pedestrian"  # prior set: ssd300 (VOC), ssd300-coco, pedestrian (upright), multispectral (MLPD)
CENTRES = "stride"  # prior centres: stride (as in torchvision) or even (as in the logged experiments)
PRETRAINED = "none"  # initial weights: none, imagenet (VGG16), coco (SSD300), or a file of published weights
LWIR_FILTERS = "sum"  # pretrained LWIR filters: sum or mean of the RGB filters (logged experiments: mean)
INFUSION = (1, 1, 0, 0, 0, 0)  # 1: a mask head on this map (38, 19, 10, 5, 3, 1); 2: on each stream too
INFUSION_CONV = False  # add a 3x3 convolution before the 1x1 convolution of each mask head
# -------- loss
LOC_LOSS = "smooth_l1"  # box regression loss: l1 or smooth_l1
LOC_REDUCTION = "sum"  # reduction of the box loss over the 4 offsets: sum (SSD paper) or mean (a quarter)
CONF_DIVISOR = "balanced"  # divisor of the conf loss: positives (SSD paper) or balanced (for small batches)
SEG_CELLS = "mean"  # reduction of the mask loss over the cells of a map: mean or sum
SEG_MAPS = "sum"  # reduction of the mask loss over the maps: mean, sum, or uncertainty (learned weights)
SEG_BALANCE = "none"  # cell weights in the mask loss: none, share (SEG_PERSON_SHARE), height (SDS-RCNN)
SEG_PERSON_SHARE = 0.2  # fraction of a map's total weight on person cells, if SEG_BALANCE is share
SEG_WEIGHT = 1.0  # weight of the mask loss in the total loss
MASKS_FOLLOW = True  # make masks from the augmented boxes; False: from the original ones (rows 18 to 25)
OUT_OF_RANGE = "keep"  # mask label of persons that match no prior of the map: keep, background, ignore
# -------- optimiser
OPTIMIZER = "adam"  # sgd (momentum 0.9) or adam
LR = 2e-3  # learning rate
BIAS_LR_FACTOR = 2.0  # learning rate of the biases, as a multiple of LR
WEIGHT_DECAY = 1e-5  # L2 penalty
SCHEDULE = "cosine"  # constant, step (x0.1 at 2/3, 5/6 of EPOCHS), step-mlpd (1/2, 9/10), cosine (warm-up)
BATCH_SIZE = 4  # frames per step
EPOCHS = 14  # passes over the training list
EMA_DECAY = 0.0  # decay of the weights' moving average, which is evaluated and saved; 0: no averaging
# -------- augmentation
AUGMENT = True  # use SSD's augmentation; False only resizes
ZOOM_OUT = 1.0  # maximum zoom-out factor; 1.0: no zoom-out
CROP_ASPECT = (0.8, 1.2)  # minimum and maximum aspect ratio of a crop, relative to the frame's
MIN_INPUT_HEIGHT = 10.0  # persons shorter than this after augmentation are ignored (pixels of the input)
HUE_SATURATION = True  # randomly change hue and saturation of the visible image
LWIR_JITTER = True  # randomly change brightness and contrast of the LWIR image
JITTER = 0.0  # probability of each extra distortion: colours, LWIR gain and offset, blur, noise
COPY_PASTE = 0.5  # probability that persons from another frame are pasted into a frame
MODALITY_DROPOUT = 0.0  # probability that one of the two modalities is blanked
CROP_APART = 0.0  # probability that the two modalities are cropped separately
MIRROR_APART = 0.0  # probability that the LWIR image of a mirrored frame is not mirrored
SHIFT_LEFT = 0.0  # probability that a frame is shifted left by up to 20 pixels
# -------- evaluation
EVAL_EVERY = 7  # epochs between evaluations; the last epoch is always evaluated
MIN_SCORE = 0.01  # detections with lower scores are dropped
NMS_IOU = 0.45  # IoU threshold of non-maximum suppression
MAX_BOXES = 200  # maximum number of detections per frame
TEST_FLIP = True  # average the predictions of a frame and its mirror image; takes twice the time


def main() -> None:
    """Train a model: configuration, model, data, loss and optimiser, epochs, report."""
    config = configure()
    if config.deterministic:
        make_deterministic()
    device = choose_device(config.device, training=True)
    precision = choose_precision(config.precision, device)
    distributed.init_distributed(device, config.batch_size)  # does nothing without torchrun
    run = Run(config, run_name(config), model_arguments(config))  # a new run, or one to resume

    # Model. The main process loads the pretrained weights; the others receive them in wrap_ddp.
    torch.manual_seed(config.seed)
    model = make_network(**run.model_args)
    if distributed.is_main_process() and not run.resumes:
        load_pretrained(model, config.pretrained, config.lwir_filters)
    model.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False) if config.ema_decay else model  # is evaluated and saved

    # Data. The demo set is generated if it does not exist.
    if distributed.is_main_process() and config.data == KAIST:
        demo.open_root(config.data_root)
    distributed.barrier()
    root, ids, annotations = open_training(**pick(config, *TRAIN_SET_KEYS))
    config.lwir_range = root.lwir_range if isinstance(root, PairSet) else (0.0, 0.0)
    check_images(root, ids, config.input_mode)
    paired = config.network != "ssd300" or config.crop_apart + config.mirror_apart > 0  # boxes per modality
    frames, held_out = split_frames(ids, annotations, pairs=paired, **pick(config, *FRAME_KEYS))
    if held_out:
        run.notes.append(f"the best epoch is chosen on held-out videos: {describe_videos(held_out)}")
    test_root, test_set = open_testing(**pick(config, *TEST_SET_KEYS))
    run.notes += overlap_warning(root, frames, test_set)
    val_set = load_ground_truth(annotations, held_out) if held_out else test_set
    test_kwargs = pick(config, *datasets.TEST_LOADER_KEYS)
    test_loader = datasets.test_loader(test_root, test_set, model, **test_kwargs)
    val_loader = datasets.test_loader(root, val_set, model, **test_kwargs) if held_out else test_loader
    augmentation = Augmentation(**pick(config, *datasets.AUGMENTATION_KEYS)) if config.augment else None
    dataset_kwargs = {**datasets.input_kwargs(model), **pick(config, *datasets.DATASET_KEYS)}
    train_set = datasets.KaistPairs(root, frames, augmentation=augmentation, **dataset_kwargs)
    train_loader = datasets.training_loader(train_set, model, **pick(config, *datasets.TRAIN_LOADER_KEYS))

    # Loss and optimiser, in the state of the last checkpoint if the run resumes.
    heads = (model.priors, model.grids, model.infused_maps, model.n_logits)
    criterion = Criterion(*heads, **pick(config, *CRITERION_KEYS)).to(device)
    optimizer = make_optimizer(model, criterion, name=config.optimizer, **pick(config, *OPTIMIZER_KEYS))
    run.terms, run.planned_batch = criterion.terms, plan_batch(model, criterion, config.optimizer, precision)
    parts = {"model": ema, "optimizer": optimizer, "criterion": criterion}
    run.restore(parts if ema is model else {**parts, "raw_model": model})
    wrapped = compile_model(distributed.wrap_ddp(model), config.compile)
    take_step = make_step(wrapped, model, criterion, optimizer, precision)
    take_step = capture_steps(take_step, optimizer, config.compile, device)
    eval_model = compile_model(ema, config.compile)

    # Epochs. `with run` saves a checkpoint on Ctrl-C, SIGTERM or a loader error; the same command resumes.
    if distributed.is_main_process():
        machine = f"{device} in {str(precision).removeprefix('torch.')}"
        machine += ", steps recorded as a CUDA graph" * isinstance(take_step, CapturedStep)
        is_compiled = hasattr(wrapped, "_orig_mod")
        machine += ", not compiled because of SyncBatchNorm" * (config.compile == "on" and not is_compiled)
        print_banner(run, frames, annotations.source, test_set, model, machine)
    detections = None
    detect_kwargs = pick(config, *DETECT_KEYS) | {"iterate": run.until_stopped}
    with run:
        for epoch in range(run.epoch, config.epochs):
            train_epoch(run, take_step, model, ema, optimizer, train_loader)
            distributed.average_statistics(model)  # BatchNorm's, which differ between CPU processes
            distributed.average_statistics(ema)
            scores = criterion.learned_weights()
            if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
                detections, mask_scores = detect_frames(eval_model, val_loader, precision, **detect_kwargs)
                scores |= headline(evaluate(val_set, detections)) | mask_scores
            run.end_epoch(scores)
        if detections is None or held_out:  # the test list was not evaluated after the last epoch
            final_model = run.best_epoch(ema) if held_out else eval_model
            detections, _ = detect_frames(final_model, test_loader, precision, **detect_kwargs)
    if distributed.is_main_process():
        report(run.folder.name, test_set, detections, run.folder)
        print(run.summary())


def make_step(
    wrapped: nn.Module, model: nn.Module, criterion: Criterion, optimizer: Optimizer, precision: torch.dtype
) -> Step:
    """Make a function that trains on a batch; `wrapped` is `model` after DDP and torch.compile.

    The function takes the batch's images, boxes, labels and masks. It returns (2, terms) loss terms, the
    means over the processes and this process's, and whether all losses and gradients were finite.
    """
    guarded_step = GuardedStep(model, optimizer)

    def step(images: Tensor, boxes: Tensor, labels: Tensor, *masks: Tensor) -> tuple[Tensor, Tensor]:
        guarded_step.save_statistics()
        with autocast(images.device, precision):
            predictions = wrapped(images)  # loc (N, P, 4), conf (N, P, 2), seg (N, 2, h, w) for each map
        losses = criterion(predictions, boxes, labels, masks)  # (terms,), the total first
        optimizer.zero_grad()
        losses[0].backward()
        distributed.average(p.grad for p in criterion.parameters())  # DDP averages those of the model
        mean_losses = distributed.all_reduce_mean(losses.detach())
        finite = guarded_step(mean_losses)  # updates nothing if a loss or gradient is not finite
        return torch.stack([mean_losses, losses.detach()]), finite

    return step


def train_epoch(
    run: Run, take_step: Step, model: nn.Module, ema: nn.Module, optimizer: Optimizer, loader: BatchLoader
) -> None:
    """Train for the rest of the run's current epoch; `take_step` is from `make_step`.

    Raises:
        InputError: Too many steps in a row were not finite, or too many frames cannot be read.
    """
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
    """Read the configuration as `read_config` does, and check that its network can be built.

    Raises:
        InputError: A row or flag is unknown, or a value cannot be used.
    """
    config = read_config(__file__, argv)
    with torch.device("meta"):  # shapes without values: quick
        model = make_network(**model_arguments(config))
    check_pretrained(config.pretrained, model, width=config.width, batch_norm=config.batch_norm)
    return config


def print_banner(
    run: Run, frames: list[Frame], source: Path, test_set: GroundTruth, model: nn.Module, machine: str
) -> None:
    """Print the run's notes and five lines: constants, training set, test set, network, run."""
    config, n_persons = run.config, sum(frame.n_persons for frame in frames)
    lists = (resolve_path(Path(config.data_root), name) for name in (config.train_list, config.test_list))
    train_list, test_list = lists if config.data == KAIST else ("train", "test")
    print(*run.notes, describe_config(config, __file__), sep="\n")
    print(f"train: {len(frames)} frames, {n_persons} people to train on ({train_list}, {source})")
    print(f"test: {describe_test_set(test_set)} ({test_list}, {test_set.source})")
    (h, w), millions = model.size, sum(p.numel() for p in model.parameters()) / 1e6
    heads = f"{len(model.priors)} priors, masks on maps {[i + 1 for i in model.infused_maps]}"
    print(f"network: {model.input_mode} input of {h}x{w}, {millions:.2f} M parameters, {heads}")
    print(f"run: {run.folder}, epoch {run.epoch + 1} of {config.epochs}, on {machine}")


if __name__ == "__main__":
    run_script(lambda: distributed.run_distributed(main))
