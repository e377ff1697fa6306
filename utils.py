"""What train.py, eval.py and detect.py share: devices, precision, and detection in frames."""

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

MAX_MARGIN, MARGIN_BINS = 16.0, 4096  # range and bins of the histogram of mask logits


def choose_device(name: str, training: bool = False) -> torch.device:
    """Choose and set up a device; "auto" is CUDA if available, else Apple's MPS, else the CPU.

    Args:
        training: whether cuDNN searches for its fastest kernels, which takes many seconds.

    Raises:
        InputError: The device is not available.
    """
    if name == "auto":
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        name = next(kind for kind, is_available in available.items() if is_available)
    try:
        if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
            raise RuntimeError("the choices are cpu, cuda and mps")
        device = torch.device(name)
        if device.type == "cuda":  # torchrun gives each process the GPU of its local rank
            is_single = os.environ.get("WORLD_SIZE", "1") == "1"
            device = torch.device("cuda", device.index or 0 if is_single else int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"DEVICE = {name!r} cannot be used ({reason})", "try auto") from None
    if device.type == "cuda":
        # The kernels found may differ from run to run.
        torch.backends.cudnn.benchmark = training and not torch.are_deterministic_algorithms_enabled()
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        tune_malloc()
    return device


def tune_malloc() -> None:
    """Make glibc keep freed memory for the next step; does nothing with other C libraries.

    Memory that glibc returns to the system must be mapped and zeroed again, page by page. This
    takes about a tenth of a training step. 32 MiB is the largest value of glibc's dynamic threshold.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # from malloc.h
    mallopt(m_trim_threshold, -1)
    mallopt(m_mmap_threshold, 32 * 2**20)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The autocast dtype of a precision: "fp32", "bf16", or "auto". Weights and losses stay float32.

    "auto" is bfloat16 if the device has instructions for it (on a CPU: AMX or AVX512-BF16), else float32.
    """
    has_bf16 = name == "bf16"
    if name == "auto" and device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto" and device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older torch lacks the function
        has_bf16 = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if has_bf16 else torch.float32


def make_deterministic() -> None:
    """Make torch use deterministic algorithms, and warn if an operation has none.

    Must be called before the device is used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # this project never reads such memory
    torch.backends.cudnn.benchmark = False


def compile_model(model: nn.Module, choice: str) -> nn.Module:
    """The network, compiled by torch.compile if `choice` is "on".

    SyncBatchNorm reads values on the host, at which a graph breaks in each layer: it is not compiled.
    """
    has_sync = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    return torch.compile(model, dynamic=False) if choice == "on" and not has_sync else model


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The autocast context for a precision from `choose_precision`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision != torch.float32)


def open_network(
    path: Path, device: torch.device, experiment: str = "", **changes: Any
) -> tuple[SSD300, Namespace, int | None]:
    """Load a checkpoint's network onto a device; also print its path, and warn if weights are not finite.

    Args:
        path: a checkpoint, or with `experiment` an author's file of published weights.
        experiment: the row of the lab book that has the network of the published weights.
        changes: values that replace those of the checkpoint's configuration.

    Returns:
        The network in eval mode, its configuration, and its number of epochs (None if unknown).

    Raises:
        InputError: The file is not of this kind, or its content is inconsistent.
    """
    checkpoint = published_checkpoint(path, experiment) if experiment else load_checkpoint(path)
    config, epoch = checkpoint_config(checkpoint, path, **changes), checkpoint.get("epoch")
    print(f"weights of {path}" + ("" if epoch is None else f", epoch {epoch} of {config.epochs}"))
    model = build_model(checkpoint).to(device, memory_format=torch.channels_last).eval()
    finite = [bool(value.sum().isfinite()) for value in model.state_dict().values()]
    if not all(finite):
        broken = f"{finite.count(False)} of {len(finite)} tensors"
        print(f"warning: these weights are not finite ({broken}): the detections are meaningless")
    return model, config, epoch


def published_checkpoint(path: Path, experiment: str) -> dict[str, Any]:
    """A checkpoint's content, made from a row of the lab book and an author's file of its weights."""
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
    iterate: Callable[[Iterable], Iterable] = iter,
    **nms_settings: float,
) -> tuple[Detections, dict[str, float]]:
    """Detections in all frames of a loader, and the average precision of the mask heads.

    Args:
        model: the network, compiled or not.
        loader: gives each process its part of every batch; the results of all processes are gathered.
        test_flip: average over each frame and its mirror image.
        iterate: yields the batches it is given; it may raise an exception, see `Run.until_stopped`.
        nms_settings: min_score, nms_iou and max_boxes, see `ssd.boxes.detect`.

    Returns:
        The detections, in xywh pixels of their frames. For each infused map "ap_map1", …: the
        `average_precision` of its mask head over the cells of all frames, NaN without person cells.
    """
    device, was_training = model.priors.device, model.training
    fixed_shape = hasattr(model, "_orig_mod") or device.type == "cuda"
    model.eval()
    detections, frame_sizes, full_batch = [], [], 0
    sizes = {frame.id: frame.size for frame in loader.loader.dataset.frames}
    cells = torch.zeros(len(model.infused_maps), 2, MARGIN_BINS, dtype=torch.int64, device=device)
    bar = tqdm(loader.epoch(0), "detecting", len(loader), leave=False, disable=not is_main_process())
    with torch.inference_mode():
        for batch in iterate(bar):
            if batch is None:  # the last batch may have no frame for this process
                continue
            images = batch.images.to(device, non_blocking=True)
            n, full_batch = len(images), max(full_batch, len(images))
            if fixed_shape:  # pad the last batch: compiling, or cuDNN's search, would start again
                images = torch.cat([images, images[:1].expand(full_batch - n, -1, -1, -1)])
            loc, conf, seg = predict(model, images, precision, test_flip, with_masks=True)
            for i, (logits, mask) in enumerate(zip(seg, batch.masks, strict=True)):
                cells[i] += margin_histogram(logits[:n], mask.to(device, non_blocking=True))
            detections += detect(Predictions(loc[:n], conf[:n], []), model.priors, **nms_settings)
            frame_sizes += [sizes[frame_id] for frame_id in batch.frame_ids]
    model.train(was_training)
    by_rank = gather([to_pixels(*found, size) for found, size in zip(detections, frame_sizes, strict=True)])
    # Process r has frames r, r + n, r + 2 n, … of n processes.
    in_order = (by_rank[i % len(by_rank)][i // len(by_rank)] for i in range(sum(map(len, by_rank))))
    names = [f"ap_map{i + 1}" for i in model.infused_maps]
    precisions = map(average_precision, all_reduce_sum(cells).cpu())
    return join_frames(in_order), dict(zip(names, precisions, strict=True))


def margin_histogram(logits: Tensor, mask: Tensor) -> Tensor:
    """Histograms of the margins of background and person cells, (2, MARGIN_BINS) int64.

    The margin is the person's logit minus the background's, clamped to ±MAX_MARGIN; NaN counts as 0.
    Ignored cells are left out.

    Args:
        logits: (N, 2, h, w), background and person.
        mask: (N, h, w) int64, see `box_masks`.
    """
    margin = (logits[:, 1] - logits[:, 0]).nan_to_num().clamp(-MAX_MARGIN, MAX_MARGIN)
    bins = ((margin / MAX_MARGIN + 1) / 2 * (MARGIN_BINS - 1)).round().long()
    label = torch.where(mask == IGNORE, 2, (mask == PERSON).long())
    # scatter_add_, because bincount and boolean indexing make the host wait for a GPU.
    cells = torch.zeros(3 * MARGIN_BINS, dtype=torch.int64, device=mask.device)
    cells.scatter_add_(0, (bins + MARGIN_BINS * label).flatten(), torch.ones_like(label).flatten())
    return cells.view(3, MARGIN_BINS)[:2]


def average_precision(cells: Tensor) -> float:
    """Area under the precision-recall curve of a `margin_histogram`.

    Each bin adds its recall times the precision of all cells in it and in higher bins. A random
    classifier gets the fraction of person cells.
    """
    background, person = cells.double().flip(1)
    precision = person.cumsum(0) / (person + background).cumsum(0).clamp(min=1)
    return ((person * precision).sum() / person.sum()).item()


def predict(
    model: SSD300, images: Tensor, precision: torch.dtype, test_flip: bool, with_masks: bool = False
) -> Predictions:
    """Forward pass of (N, C, H, W) uint8 images; `test_flip` averages loc and conf over mirror images."""
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
    """Boxes (k, 4) xywh pixels and scores (k,) in one frame, best first.

    Args:
        frame: (h, w, C) uint8, see `read_frame`.
        test_flip, nms_settings: see `detect_frames`.
    """
    height, width, channels = frame.shape
    image = whole_frame(channels, model.size, (width, height)).apply(frame).unsqueeze(0)
    with torch.inference_mode():
        predictions = predict(model, image.to(model.priors.device), precision, test_flip)
    [(boxes, scores)] = detect(predictions, model.priors, **nms_settings)
    return to_pixels(boxes, scores, (width, height))


def to_pixels(boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Convert xyxy fractions (k, 4) and scores (k,) to float64; xywh pixels of a (width, height) frame.

    Boxes with a side below 0.01 pixels, which clipping can leave, are dropped.
    """
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).cpu().double().numpy()
    boxes = boxes * (*size, *size)
    keep = (boxes[:, 2:] >= 0.01).all(1)
    return boxes[keep], scores.cpu().double().numpy()[keep]
