"""Shared by train.py, eval.py and detect.py: devices, precision, the network over frames."""

from __future__ import annotations

import ctypes
import os
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine.checkpoint import load_checkpoint
from engine.config import checkpoint_config, model_arguments, read_config
from engine.distributed import all_reduce_sum, gather, is_main_process
from engine.loader import BatchLoader
from kaist.files import InputError
from kaist.results import Detections, join_frames
from model import SSD300, build_model, make_network, predict_mirrored
from ssd.augment import whole_frame
from ssd.boxes import Predictions, detect
from ssd.losses import IGNORE, PERSON
from ssd.published import load_published, read_published, tutorial_input_mode

MAX_MARGIN, MARGIN_BINS = 16.0, 4096  # of the mask logits whose average precision is measured


def choose_device(name: str) -> torch.device:
    """The device a name stands for; "auto" takes a GPU (CUDA, then Apple's) where there is one.

    Sets what makes the device fast for this whole process. InputError: the device is not there.
    """
    if name == "auto":
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        name = next(kind for kind, is_there in there.items() if is_there)
    try:
        if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
            raise RuntimeError("it is none of cpu, cuda and mps")
        device = torch.device(name)
        if device.type == "cuda":  # each of torchrun's processes has the GPU of its local rank
            alone = os.environ.get("WORLD_SIZE", "1") == "1"
            device = torch.device("cuda", device.index or 0 if alone else int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"DEVICE = {name!r} cannot be used ({reason})", "try auto") from None
    if device.type == "cuda":
        # Shapes stay: the fastest kernel is worth a search, but it may be another one each time.
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        tune_malloc()
    return device


def tune_malloc() -> None:
    """Have glibc keep freed memory for the next step; a no-op with other C libraries.

    Memory that glibc returns to the system has to be mapped and zeroed again, page by page. That
    is about a tenth of a training step's time. 32 MiB is as far as glibc's own threshold grows.
    Larger blocks are taken from what is kept where they fit, which holds the peak down.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # as malloc.h numbers them
    mallopt(m_trim_threshold, -1)
    mallopt(m_mmap_threshold, 32 * 2**20)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype that convolutions run in: "fp32", "bf16", or "auto".

    "auto" is bfloat16 (by autocast; weights and losses stay float32) where the device has
    instructions for it, a CPU with AMX or AVX512-BF16 included, else float32.
    """
    has_bf16 = name == "bf16"
    if name == "auto" and device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto" and device.type == "cpu":
        abilities = getattr(torch.cpu, "get_capabilities", dict)()  # a torch too old to tell has none
        has_bf16 = abilities.get("amx_bf16") or abilities.get("avx512_bf16")
    return torch.bfloat16 if has_bf16 else torch.float32


def make_deterministic() -> None:
    """Have torch choose algorithms whose result is the same every time, and warn where it has none.

    To be called before the device is used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads such memory
    torch.backends.cudnn.benchmark = False


def compile_model(model: nn.Module, choice: str) -> nn.Module:
    """The network as COMPILE has it: by torch.compile ("on") or as it is."""
    return torch.compile(model, dynamic=False) if choice == "on" else model


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The context in which the network runs in `precision`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision != torch.float32)


def open_network(
    path: Path, device: torch.device, experiment: str = "", **changes: Any
) -> tuple[SSD300, Namespace, int | None]:
    """A checkpoint's network on a device, its configuration with `changes`, and its epochs, if known.

    Says which weights these are, and warns where they are not finite. With `experiment`, a row of the lab
    book, the file is not a checkpoint, but its author's own of that row's network. InputError: the file is
    neither, or its content does not fit together.
    """
    checkpoint = published_checkpoint(path, experiment) if experiment else load_checkpoint(path)
    config, epoch = checkpoint_config(checkpoint, path, **changes), checkpoint.get("epoch")
    print(f"weights of {path}" + ("" if epoch is None else f", epoch {epoch} of {config.epochs}"))
    model = build_model(checkpoint).to(device, memory_format=torch.channels_last).eval()
    finite = [bool(value.sum().isfinite()) for value in model.state_dict().values()]
    if not all(finite):
        broken = f"{finite.count(False)} of {len(finite)} tensors"
        print(f"warning: these weights are not finite ({broken}): what they find means nothing")
    return model, config, epoch


def published_checkpoint(path: Path, experiment: str) -> dict[str, Any]:
    """What a checkpoint of a row's network would hold if its weights were those of an author's file.
    InputError: there is no such row, or the file is not of its network."""
    config = read_config(str(Path(__file__).with_name("train.py")), ["--experiment", experiment])
    state = read_published(path)
    config.input_mode = tutorial_input_mode(state, config.input_mode)
    model = make_network(**model_arguments(config))
    load_published(model, state, path)
    return {"config": vars(config), "model_args": model_arguments(config), "model": model.state_dict()}


def detect_frames(
    model: SSD300,
    loader: BatchLoader,
    precision: torch.dtype,
    *,
    test_flip: bool = False,
    watch: Callable[[Iterable], Iterable] = iter,
    **nms_settings: float,
) -> tuple[Detections, dict[str, float]]:
    """Detections of every frame of a loader, and how well the mask heads know where people are.

    Args:
        model: as it is or compiled, see `compile_model`.
        loader: in each process of its share of every batch; the detections of all come back.
        test_flip: average over each frame and its mirror image.
        watch: hands on the batches and may end them by an exception, as `Run.until_stopped`.
        nms_settings: min_score, nms_iou and max_boxes, as of `ssd.boxes.detect`.

    Returns:
        The detections, in xywh pixels of their frames; and "ap_map1", … of each infused map:
        the average precision of its mask head over the cells of all frames, see
        `average_precision`. NaN where no cell is a person's.
    """
    device, was_training, compiled = model.priors.device, model.training, hasattr(model, "_orig_mod")
    model.eval()
    found, frame_sizes, n_full = [], [], 0
    sizes = {frame.id: frame.size for frame in loader.loader.dataset.frames}
    cells = torch.zeros(len(model.infused_maps), 2, MARGIN_BINS, dtype=torch.int64, device=device)
    shown = {"desc": "detecting", "leave": False, "disable": not is_main_process()}
    bar = tqdm(loader.epoch(0), total=len(loader), **shown)
    with torch.inference_mode():
        for batch in watch(bar):
            if batch is None:  # the last one has no frame for this process
                continue
            images = batch.images.to(device, non_blocking=True)
            n, n_full = len(images), max(n_full, len(images))
            if compiled:  # a graph is of one shape: the last batch is filled up
                images = torch.cat([images, images[:1].expand(n_full - n, -1, -1, -1)])
            loc, conf, seg = predict(model, images, precision, test_flip, with_masks=True)
            for i, (logits, mask) in enumerate(zip(seg, batch.masks, strict=True)):
                cells[i] += margin_histogram(logits[:n], mask.to(device, non_blocking=True))
            found += detect(Predictions(loc[:n], conf[:n], []), model.priors, **nms_settings)
            frame_sizes += [sizes[frame_id] for frame_id in batch.frame_ids]
    model.train(was_training)
    shares = gather([to_pixels(*own, size) for own, size in zip(found, frame_sizes, strict=True)])
    in_turns = (shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares))))
    detections = join_frames(in_turns)
    names = [f"ap_map{i + 1}" for i in model.infused_maps]
    return detections, dict(zip(names, map(average_precision, all_reduce_sum(cells).cpu()), strict=True))


def margin_histogram(logits: Tensor, mask: Tensor) -> Tensor:
    """(2, MARGIN_BINS) int64: how many background and person cells have a margin of each bin.

    The margin is the person's logit less the background's, from -MAX_MARGIN to MAX_MARGIN, of
    weights that are not finite 0. Ignored cells are left out.

    Args:
        logits: (N, 2, h, w) of background and person; mask: (N, h, w) as from `box_masks`.
    """
    margin = (logits[:, 1] - logits[:, 0]).nan_to_num().clamp(-MAX_MARGIN, MAX_MARGIN)
    place = ((margin / MAX_MARGIN + 1) / 2 * (MARGIN_BINS - 1)).round().long()
    kind = torch.where(mask == IGNORE, 2, (mask == PERSON).long())
    # A sum, because a GPU would be waited for by bincount and by an index of some cells.
    cells = torch.zeros(3 * MARGIN_BINS, dtype=torch.int64, device=mask.device)
    cells.scatter_add_(0, (place + MARGIN_BINS * kind).flatten(), torch.ones_like(kind).flatten())
    return cells.view(3, MARGIN_BINS)[:2]


def average_precision(cells: Tensor) -> float:
    """Area under precision over recall of a `margin_histogram`; chance is the share of person cells.

    Each bin of cells adds what recall it gains, times the precision of it and all higher bins.
    """
    background, person = cells.double().flip(1)
    precision = person.cumsum(0) / (person + background).cumsum(0).clamp(min=1)
    return ((person * precision).sum() / person.sum()).item()


def predict(
    model: SSD300, images: Tensor, precision: torch.dtype, test_flip: bool, with_masks: bool = False
) -> Predictions:
    """Forward pass of (N, C, H, W) uint8 images; with `test_flip` loc and conf are averaged with those of
    the mirror images."""
    with autocast(images.device, precision):
        predictions = model(images, with_masks)
        if test_flip:
            mirrored = predict_mirrored(model, images)
            loc, conf = ((a + b) / 2 for a, b in zip(predictions[:2], mirrored[:2], strict=True))
            predictions = Predictions(loc, conf, predictions.seg)
    return predictions


def detect_image(
    model: SSD300,
    frame: np.ndarray,
    precision: torch.dtype,
    *,
    test_flip: bool = False,
    **nms_settings: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (k, 4) xywh pixels and scores (k,), best first, of one frame.

    Args:
        frame: (h, w, C) uint8, as from `read_frame`.
        test_flip, nms_settings: as of `detect_frames`.
    """
    height, width, channels = frame.shape
    image = whole_frame(channels, model.size, (width, height)).apply(frame).unsqueeze(0)
    with torch.inference_mode():
        predictions = predict(model, image.to(model.priors.device), precision, test_flip)
    [(boxes, scores)] = detect(predictions, model.priors, **nms_settings)
    return to_pixels(boxes, scores, (width, height))


def to_pixels(boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """xyxy fractions (k, 4) and scores (k,) as float64 xywh pixels of a frame of (width, height).

    Boxes that clipping to the frame left with no area worth writing down are left out.
    """
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).cpu().double().numpy()
    boxes = boxes * (*size, *size)
    keep = (boxes[:, 2:] >= 0.01).all(1)
    return boxes[keep], scores.cpu().double().numpy()[keep]
