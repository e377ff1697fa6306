"""Export the network of a checkpoint to one file for other programs.

    python -m tools.export --checkpoint checkpoints/26 --format onnx --evaluate

writes 26.onnx. The file takes 8-bit frames of any size and returns boxes in the frame's pixels. It includes
normalisation, resizing, decoding and NMS. Its output is compared with PyTorch's on some frames.
`--format pt2` compiles the same graph for this machine with PyTorch's AOTInductor. `--format safetensors`
writes the weights only. See docs/deploy.md.
"""

import copy
import importlib.util
import json
import shutil
import subprocess
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.export import Dim, ExportedProgram
from tqdm import tqdm

from detect import find_pairs, list_images
from engine.checkpoint import choose_checkpoint
from engine.config import ROOT, check_experiment, find_folder, model_arguments, pick
from kaist.annotations import MODALITIES
from kaist.files import InputError, OneLineParser, check_folders, out_path, run_script, write_atomically
from kaist.images import load_image, read_frame
from kaist.report import headline_table, score
from kaist.results import join_frames
from kaist.sources import TEST_SET_KEYS, open_testing
from model import predict_mirrored
from ssd.boxes import load_nms
from ssd.deployable import Deployable, to_half
from ssd.layers import Detector
from tools.safetensors import read_safetensors, to_safetensors
from utils import detect_image, open_network

CHECKPOINTS = "checkpoints"  # folder of the runs
N_COMPARED = 8  # frames of the test list on which a file is compared with PyTorch
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": (), "safetensors": ()}

Runner = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


def main() -> None:
    """Write the file, compare it with PyTorch, and evaluate both with --evaluate."""
    arguments = parse_arguments()
    path = choose_checkpoint(arguments.checkpoint, find_folder(CHECKPOINTS))
    changes = {} if arguments.min_score is None else {"min_score": arguments.min_score}
    changes |= {"test_flip": False} if arguments.no_flip else {}
    model, config, epoch = open_network(path, torch.device("cpu"), arguments.experiment, **changes)
    out = arguments.out or Path(f"{path.resolve().parent.name}.{arguments.format}")
    metadata = describe(model, config, path, epoch)
    if arguments.format == "safetensors":
        save_weights(out, model, metadata)
        return
    if arguments.raw:
        n_priors = len(model.priors)
        metadata["outputs"] = f"boxes (n, {n_priors}, 4): x0, y0, x1, y1; scores (n, {n_priors})"
    settings = pick(config, "min_score", "nms_iou", "max_boxes")
    mirrored = predict_mirrored if config.test_flip else None
    network = Deployable(model, **settings, raw=arguments.raw, predict_mirrored=mirrored).eval()
    exported = copy.deepcopy(network)
    if arguments.half:
        to_half(exported.model)
    run = save_graph(out, exported, MODALITIES[config.input_mode], metadata)
    if arguments.images:
        compare(run, network, read_images(arguments.images, config))
        return
    root, test_set = open_testing(**pick(config, *TEST_SET_KEYS))
    frame_ids = test_set.frames if arguments.evaluate else test_set.frames[:N_COMPARED]

    def read() -> Iterator[np.ndarray]:
        for frame_id in tqdm(frame_ids, leave=False):
            yield read_frame(root, frame_id, config.input_mode)

    found = compare(run, network, map(split_frame, read()))
    if arguments.evaluate:
        settings["test_flip"] = config.test_flip
        reference = [detect_image(model, frame, torch.float32, **settings) for frame in read()]
        scores = [score(str(path), test_set, join_frames(reference))]
        corners = (boxes.astype(np.float64) for boxes in found)
        xywh = ((np.hstack([box[:, :2], box[:, 2:4] - box[:, :2]]), box[:, 4]) for box in corners)
        scores.append(score(str(out), test_set, join_frames(xywh)))
        print(headline_table(scores))


def parse_arguments() -> Namespace:
    """Parse the command line.

    Raises:
        InputError: flags that cannot be used together, or a missing package.
    """
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("images", nargs="*", type=Path, help="frames to compare on (default: some of the test list)")
    add("--checkpoint", type=Path, help="checkpoint or folder of a run (default: the newest finished run)")
    text = "--checkpoint is an author's file of weights for this row's network (docs/published.md)"
    add("--experiment", default="", metavar="ROW", help=text)
    add("--format", choices=PACKAGES, default="onnx", help="file format (%(default)s)")
    add("--out", type=out_path(), metavar="FILE", help="output file (default: the run's name)")
    add("--min-score", type=float, help="drop boxes with at most this score (default: the checkpoint's)")
    add("--raw", action="store_true", help="output all decoded boxes and scores, without NMS")
    add("--no-flip", action="store_true", help="do not average over mirror images: half the time")
    add("--half", action="store_true", help="convolutions in half precision")
    add("--evaluate", action="store_true", help="print the miss rates of the file and the checkpoint")
    arguments = parser.parse_args()
    if arguments.evaluate and (arguments.raw or arguments.images or arguments.format == "safetensors"):
        parser.error("--evaluate cannot be combined with --raw, images or --format safetensors")
    if arguments.format == "safetensors" and (arguments.raw or arguments.half or arguments.images):
        parser.error("--format safetensors cannot be combined with --raw, --half or images")
    if arguments.out and arguments.out.suffix.lower() != f".{arguments.format}":
        parser.error(f"--out {arguments.out} does not end in .{arguments.format}")
    if arguments.min_score is not None and not 0 <= arguments.min_score <= 1:
        parser.error(f"--min-score {arguments.min_score} is not a number from 0 to 1")
    check_folders(arguments.out)
    check_experiment(parser, arguments)
    packages = PACKAGES[arguments.format]
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        problem = f"--format {arguments.format} needs {', '.join(missing)}"
        raise InputError(problem, f"pip install {' '.join(packages)}")
    return arguments


def describe(model: Detector, config: Namespace, path: Path, epoch: int | None) -> dict[str, str]:
    """Return the metadata of a file: its input, output, thresholds and origin."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    channels = {"visible": "3: R, G, B", "lwir": "1"}
    inputs = [f"{m} (n, height, width, {channels[m]}) uint8" for m in MODALITIES[config.input_mode]]
    return {
        "classes": "person",
        "inputs": ", ".join(inputs),
        "outputs": f"boxes (n, {config.max_boxes}, 5): x0, y0, x1, y1, score; count (n,)",
        **{name: str(value) for name, value in pick(config, "min_score", "nms_iou", "max_boxes").items()},
        "model_args": json.dumps(model_arguments(config)),
        "mirror_images": "averaged over" if config.test_flip else "not looked at",
        "input_size": "{}x{}".format(*model.size[::-1]),
        "checkpoint": f"{path.resolve().parent.name}/{path.name}, epoch {epoch}",
        "commit": commit or "unknown",
        "torch": torch.__version__,
    }


def save_weights(path: Path, model: Detector, metadata: dict[str, str]) -> None:
    """Write the state dict as safetensors, and compare the file with it bit for bit."""
    content = to_safetensors(model.state_dict(), metadata)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    tensors, metadata = read_safetensors(path)
    if to_safetensors(tensors, metadata) != content:
        raise InputError("the written file has other weights", "write it to another disk", file=path)
    print(f"{path}: {len(tensors)} tensors, read back bit for bit")


def save_graph(
    path: Path, network: Deployable, modalities: Sequence[str], metadata: dict[str, str]
) -> Runner:
    """Write a network in the format that the path ends in, and return a function that runs the file."""
    save, load = (save_onnx, load_onnx) if path.suffix.lower() == ".onnx" else (save_pt2, load_pt2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from torch and torchvision
        program = trace(network, modalities)
        write_atomically(path, lambda temporary: save(temporary, program, modalities, metadata))
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    print(f"{path}: {size}, {metadata['inputs']} -> {metadata['outputs']}")
    return load(path)


def trace(network: Deployable, modalities: Sequence[str]) -> ExportedProgram:
    """Return the graph of a network, for any number of frames of any size."""
    import torchvision  # noqa: F401 (it registers the output shape of NMS with torch.export)

    channels = {"visible": 3, "lwir": 1}
    frames = tuple(torch.zeros(2, 512, 640, channels[m], dtype=torch.uint8) for m in modalities)
    n = Dim("n")
    shapes = tuple({0: n, 1: Dim(f"{m}_height"), 2: Dim(f"{m}_width")} for m in modalities)
    with torch.no_grad():
        return torch.export.export(network, frames, dynamic_shapes=(shapes,))


def save_onnx(path: Path, program: ExportedProgram, inputs: Sequence[str], metadata: dict[str, str]) -> None:
    """Write a graph as ONNX."""
    outputs = ["boxes", "scores" if "scores" in metadata["outputs"] else "count"]
    onnx = torch.onnx.export(
        program, dynamo=True, input_names=list(inputs), output_names=outputs, verbose=False
    )
    onnx.model.metadata_props.update(metadata)
    onnx.save(path)


def load_onnx(path: Path) -> Runner:
    """Return a function that runs an ONNX file on frames, with torch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return lambda frames: session.run(None, dict(zip(names, frames, strict=True)))


def save_pt2(path: Path, program: ExportedProgram, _: Sequence[str], metadata: dict[str, str]) -> None:
    """Compile a graph for the processor of this machine."""
    from torch._inductor import aoti_compile_and_package

    with tempfile.TemporaryDirectory() as folder:
        package, settings = f"{folder}/network.pt2", {"aot_inductor.metadata": metadata}
        aoti_compile_and_package(program, package_path=package, inductor_configs=settings)
        shutil.copyfile(package, path)


def load_pt2(path: Path) -> Runner:
    """Return a function that runs a compiled package on frames."""
    from torch._inductor import aoti_load_package

    load_nms()
    with tempfile.TemporaryDirectory() as folder:
        network = aoti_load_package(shutil.copyfile(path, f"{folder}/network.pt2"))
    return lambda frames: [x.numpy() for x in network(*map(torch.from_numpy, frames))]


def read_images(paths: Sequence[Path], config: Namespace) -> Iterator[list[np.ndarray]]:
    """Yield the frames of images or folders, as in detect.py, each as its modalities (1, h, w, c) uint8."""
    modalities = MODALITIES[config.input_mode]
    for pair in find_pairs(list_images(paths, []), config, []):
        if pair.keys() >= set(modalities):
            images = (load_image(pair[m], m, config.lwir_range) for m in modalities)
            yield [np.array(image).reshape(1, image.height, image.width, -1) for image in images]
        else:
            print(f"note: {next(iter(pair.values()))} is left out, because the other modality is missing")


def split_frame(frame: np.ndarray) -> list[np.ndarray]:
    """Split a frame (h, w, C) into its modalities (1, h, w, c), visible first."""
    parts = np.split(frame, [3], axis=2) if frame.shape[2] == 4 else [frame]
    return [np.ascontiguousarray(part[None]) for part in parts]


def compare(run: Runner, network: Deployable, frames: Iterator[list[np.ndarray]]) -> list[np.ndarray]:
    """Run a file and PyTorch on each frame, and print the largest differences and the median times.

    Returns:
        The file's boxes in each frame, (k, 5), see `first_boxes`.
    """
    found, differences, times = [], [], []
    for inputs in frames:
        start = time.perf_counter()
        with torch.inference_mode():
            expected = [x.numpy() for x in network(*map(torch.from_numpy, inputs))]
        middle = time.perf_counter()
        found.append(first_boxes(run(inputs)))
        times.append((time.perf_counter() - middle, middle - start))
        differences.append(difference(found[-1], first_boxes(expected)))
    if not found:
        raise InputError("there is no frame to compare on", "name images of both modalities")
    n_unpaired, pixels, scores = zip(*differences, strict=True)
    gap = f"{max(pixels):.2g} pixels and {max(scores):.2g} in score"
    print(f"{len(found)} frames: boxes differ from PyTorch's by at most {gap}")
    if any(n_unpaired):
        n_boxes = sum(map(len, found))
        print(f"note: {sum(n_unpaired)} of about {n_boxes} boxes are found by only one of the two")
    file_ms, torch_ms = 1000 * np.median(times, axis=0)
    n_threads = torch.get_num_threads()
    print(f"median time per frame: {file_ms:.1f} ms, PyTorch {torch_ms:.1f} ms ({n_threads} threads)")
    return found


def first_boxes(outputs: Sequence[np.ndarray]) -> np.ndarray:
    """Return the boxes in the first frame of a network's outputs, (k, 5) x0, y0, x1, y1, score."""
    boxes, other = outputs
    return np.column_stack([boxes[0], other[0]]) if boxes.shape[2] == 4 else boxes[0, : other[0]]


def difference(found: np.ndarray, expected: np.ndarray) -> tuple[int, float, float]:
    """Compare two sets of boxes (k, 5), see `first_boxes`. Those of a raw network are in the same order.

    Returns:
        The number of boxes without a counterpart within a pixel, because rounding changed what NMS keeps;
        the largest difference of a coordinate and of a score among the others.
    """
    if len(found) == len(expected) > 1000:
        gaps = np.abs(found - expected).max(0)
        return 0, gaps[:4].max(), gaps[4]
    gaps = np.abs(found[:, None] - expected)
    distance, score_gaps = gaps[..., :4].max(2), gaps[..., 4]
    paired = distance <= 1
    n_unpaired = np.count_nonzero(~paired.any(0)) + np.count_nonzero(~paired.any(1))
    return n_unpaired, distance[paired].max(initial=0), score_gaps[paired].max(initial=0)


if __name__ == "__main__":
    run_script(main)
