"""A checkpoint's network as one file for other programs.

    python -m tools.export --checkpoint checkpoints/26 --format onnx --evaluate

writes 26.onnx. It takes 8-bit frames of any size and gives boxes in the frame's pixels: normalisation,
resizing, network, decoding and NMS are inside. The file is run at once on some frames, beside PyTorch.
`--format pt2` is the same compiled for this machine by PyTorch's AOTInductor, `--format safetensors` the
weights alone. docs/deploy.md shows their use.
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
from utils import detect_image, open_network

CHECKPOINTS = "checkpoints"  # where the newest finished run is looked for
FRAMES = 8  # of the test list, on which a file is compared with PyTorch
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": (), "safetensors": ("safetensors",)}

Runner = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


def main() -> None:
    """Write the file, compare it with PyTorch, and evaluate both where that is asked for."""
    arguments = parse_arguments()
    path = choose_checkpoint(arguments.checkpoint, find_folder(CHECKPOINTS))
    changes = {} if arguments.min_score is None else {"min_score": arguments.min_score}
    changes |= {"test_flip": False} if arguments.no_flip else {}
    device = torch.device("cpu")
    model, config, epoch = open_network(path, device, arguments.experiment, **changes)
    out = arguments.out or Path(f"{path.resolve().parent.name}.{arguments.format}")
    about = describe(model, config, path, epoch)
    if arguments.format == "safetensors":
        save_weights(out, model, about)
        return
    if arguments.raw:
        n_priors = len(model.priors)
        about["outputs"] = f"boxes (n, {n_priors}, 4): x0, y0, x1, y1; scores (n, {n_priors})"
    settings = pick(config, "min_score", "nms_iou", "max_boxes")
    mirrored = predict_mirrored if config.test_flip else None
    plain = Deployable(model, **settings, raw=arguments.raw, predict_mirrored=mirrored).eval()
    network = copy.deepcopy(plain)
    if arguments.half:
        to_half(network.model)
    save, open_file = {"onnx": (save_onnx, open_onnx), "pt2": (save_pt2, open_pt2)}[arguments.format]
    names = MODALITIES[config.input_mode]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's and torchvision's use of torch
        write_atomically(out, lambda beside: save(beside, trace(network, names), names, about))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {about['inputs']} -> {about['outputs']}")
    run = open_file(out)
    if arguments.images:
        compare(run, plain, given_frames(arguments.images, config))
        return
    root, test_set = open_testing(**pick(config, *TEST_SET_KEYS))
    ids = test_set.frames if arguments.evaluate else test_set.frames[:FRAMES]

    def read() -> Iterator[np.ndarray]:
        for frame_id in tqdm(ids, leave=False):
            yield read_frame(root, frame_id, config.input_mode)

    found = compare(run, plain, map(split_frame, read()))
    if arguments.evaluate:
        how = {**settings, "test_flip": config.test_flip}
        plainly = [detect_image(model, frame, torch.float32, **how) for frame in read()]
        scores = [score(str(path), test_set, join_frames(plainly))]
        corners = (own.astype(np.float64) for own in found)
        boxes = ((np.hstack([own[:, :2], own[:, 2:4] - own[:, :2]]), own[:, 4]) for own in corners)
        scores.append(score(str(out), test_set, join_frames(boxes)))
        print(headline_table(scores))


def parse_arguments() -> Namespace:
    """The command line.

    Raises:
        InputError: flags that cannot be used, or not together, or a package that they need is missing.
    """
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("images", nargs="*", type=Path, help="frames to compare on (default: some of the test list)")
    add("--checkpoint", type=Path, help="a checkpoint or a run's folder (default: the newest finished run)")
    whose = "the checkpoint is its author's file of this row's network (docs/published.md)"
    add("--experiment", default="", metavar="ROW", help=whose)
    add("--format", choices=PACKAGES, default="onnx", help="of the file (%(default)s)")
    add("--out", type=out_path(), metavar="FILE", help="(default: the run's name in the current folder)")
    add("--min-score", type=float, help="boxes up to this score are left out (default: the checkpoint's)")
    add("--raw", action="store_true", help="all decoded boxes and scores: NMS is left to the program")
    add("--no-flip", action="store_true", help="do not average over mirror images, in half the time")
    add("--half", action="store_true", help="convolutions in half precision")
    add("--evaluate", action="store_true", help="the file's miss rate beside the checkpoint's")
    arguments = parser.parse_args()
    if arguments.evaluate and (arguments.raw or arguments.images or arguments.format == "safetensors"):
        parser.error("--evaluate runs a whole network over the test list: no --raw, images or safetensors")
    if arguments.format == "safetensors" and (arguments.raw or arguments.half or arguments.images):
        parser.error("safetensors are the weights alone: no --raw, --half or images")
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
    """What a file says of itself."""
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


def save_weights(path: Path, model: Detector, about: dict[str, str]) -> None:
    """Write a network's state dict as safetensors with `about` as the metadata, and compare it bit for bit.

    Raises:
        InputError: the file cannot be written, or has other weights.
    """
    from safetensors.torch import load_file, save

    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, lambda beside: beside.write_bytes(save(weights, about)))
    if save(load_file(path)) != save(weights):
        raise InputError("it reads back as other weights", "write it to another disk", file=path)
    print(f"{path}: {len(weights)} tensors, read back bit for bit")


def trace(network: Deployable, names: Sequence[str]) -> ExportedProgram:
    """The network's graph, for any number of frames of any size."""
    import torchvision  # noqa: F401 (it tells torch.export the shape of what NMS gives)

    channels = {"visible": 3, "lwir": 1}
    frames = tuple(torch.zeros(2, 512, 640, channels[name], dtype=torch.uint8) for name in names)
    n = Dim("n")
    shapes = tuple({0: n, 1: Dim(f"{name}_height"), 2: Dim(f"{name}_width")} for name in names)
    with torch.no_grad():
        return torch.export.export(network, frames, dynamic_shapes=(shapes,))


def save_onnx(path: Path, program: ExportedProgram, names: Sequence[str], about: dict[str, str]) -> None:
    """Write a graph as ONNX, with what it says of itself as its metadata."""
    outputs = ["boxes", "scores" if "scores" in about["outputs"] else "count"]
    onnx = torch.onnx.export(
        program, dynamo=True, input_names=list(names), output_names=outputs, verbose=False
    )
    onnx.model.metadata_props.update(about)
    onnx.save(path)


def open_onnx(path: Path) -> Runner:
    """A function that runs an ONNX file on frames, with torch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return lambda frames: session.run(None, dict(zip(names, frames, strict=True)))


def save_pt2(path: Path, program: ExportedProgram, _: Sequence[str], about: dict[str, str]) -> None:
    """Compile a graph for this machine's processor."""
    from torch._inductor import aoti_compile_and_package

    with tempfile.TemporaryDirectory() as folder:
        package, settings = f"{folder}/network.pt2", {"aot_inductor.metadata": about}
        aoti_compile_and_package(program, package_path=package, inductor_configs=settings)
        shutil.copyfile(package, path)


def open_pt2(path: Path) -> Runner:
    """A function that runs a compiled package on frames."""
    from torch._inductor import aoti_load_package

    load_nms()
    with tempfile.TemporaryDirectory() as folder:
        network = aoti_load_package(shutil.copyfile(path, f"{folder}/network.pt2"))
    return lambda frames: [x.numpy() for x in network(*map(torch.from_numpy, frames))]


def given_frames(images: Sequence[Path], config: Namespace) -> Iterator[list[np.ndarray]]:
    """The modalities of each frame that images belong to, as the file takes them."""
    names = MODALITIES[config.input_mode]
    for pair in find_pairs(list_images(images, []), config, []):
        if pair.keys() >= set(names):
            views = (load_image(pair[name], name, config.lwir_range) for name in names)
            yield [np.array(view).reshape(1, view.height, view.width, -1) for view in views]


def split_frame(frame: np.ndarray) -> list[np.ndarray]:
    """The modalities (1, h, w, c) of a frame (h, w, C), visible first."""
    parts = np.split(frame, [3], axis=2) if frame.shape[2] == 4 else [frame]
    return [np.ascontiguousarray(part[None]) for part in parts]


def compare(run: Runner, network: Deployable, frames: Iterator[list[np.ndarray]]) -> list[np.ndarray]:
    """Run a file and PyTorch on frames in turns, and tell their largest differences and median times.

    Returns:
        What the file finds in each frame, (k, 5), see `rows`.
    """
    found, differences, times = [], [], []
    for inputs in frames:
        start = time.perf_counter()
        with torch.inference_mode():
            wanted = [x.numpy() for x in network(*map(torch.from_numpy, inputs))]
        between = time.perf_counter()
        found.append(rows(run(inputs)))
        times.append((time.perf_counter() - between, between - start))
        differences.append(difference(found[-1], rows(wanted)))
    if not found:
        raise InputError("there is no frame to compare on", "name images of both modalities")
    n_alone, pixels, scores = zip(*differences, strict=True)
    words = f"{max(pixels):.2g} pixels and {max(scores):.2g} in score from PyTorch's at most"
    print(f"{len(found)} frames: boxes are {words}")
    if any(n_alone):
        print(f"note: {sum(n_alone)} boxes of about {sum(map(len, found))} are found by one of both alone")
    own, plain = 1000 * np.median(times, axis=0)
    print(f"median time of a frame: {own:.1f} ms, PyTorch {plain:.1f} ms ({torch.get_num_threads()} threads)")
    return found


def rows(outputs: Sequence[np.ndarray]) -> np.ndarray:
    """(k, 5) x0, y0, x1, y1, score of the first frame of a network's outputs."""
    boxes, other = outputs
    return np.column_stack([boxes[0], other[0]]) if boxes.shape[2] == 4 else boxes[0, : other[0]]


def difference(found: np.ndarray, wanted: np.ndarray) -> tuple[int, float, float]:
    """Of boxes (k, 5), see `rows`: how many have no box of the other side within a pixel, as where an
    overlap is as good as the threshold of NMS; and the largest difference of a coordinate and a score
    of the others.

    All boxes of a raw network stand in one order.
    """
    if len(found) == len(wanted) > 1000:
        gaps = np.abs(found - wanted).max(0)
        return 0, gaps[:4].max(), gaps[4]
    gaps = np.abs(found[:, None] - wanted)
    distance, scores = gaps[..., :4].max(2), gaps[..., 4]
    paired = distance <= 1
    n_alone = np.count_nonzero(~paired.any(0)) + np.count_nonzero(~paired.any(1))
    return n_alone, distance[paired].max(initial=0), scores[paired].max(initial=0)


if __name__ == "__main__":
    run_script(main)
