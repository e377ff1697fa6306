"""Draw augmented training samples with their boxes and the mask of every feature map.

The picture shows at a glance whether boxes and masks follow the augmentation of the images.

    python -m tools.show_masks
    python -m tools.show_masks --annotations paired --crop-apart 0.5 --mirror-apart 0.5
"""

from argparse import Namespace
from pathlib import Path

from engine.config import find_folder, parse_flags, pick, read_constants
from engine.validation import check_config
from kaist.files import InputError, check_flags, run_script, write_atomically

if __name__ == "__main__":  # before importing torch, which takes seconds
    check_flags(lambda: parse_flags(__doc__.splitlines()[0], read_constants(__file__), None))

import torch

from datasets import AUGMENTATION_KEYS, Batch, Collate, KaistPairs
from kaist.annotations import open_annotations, read_image_list, resolve_path
from kaist.demo import open_root
from kaist.frames import BOTH, LWIR, VISIBLE, Frame, indices_in_videos, load_frames
from kaist.images import check_images
from model import INPUT_CHANNELS
from ssd.augment import Augmentation, mean_colour
from ssd.boxes import feature_map_sizes

DATA_ROOT = "data/demo"  # KAIST root; the demo set is created here if it is missing
IMAGE_LIST = "imageSets/train-all.txt"  # frames to show: a path below DATA_ROOT, or any path
ANNOTATIONS = "auto"  # auto, bbgt, xml, xml-sanitized, paired or json
INPUT_MODE = "early"  # modalities to show: lwir, visible or early (both)
ZOOM_OUT = 4.0  # maximum zoom-out factor; 1.0: no zoom-out
CROP_APART = 0.0  # share of the samples whose two modalities are cropped by different windows
MIRROR_APART = 0.0  # share of the mirrored samples whose LWIR is not mirrored
SHIFT_LEFT = 0.0  # share of the samples that are moved up to 20 pixels to the left
LEARN = "person"  # labels shown as persons: person, people (also person? and people), all (any label)
MASKS_FOLLOW = True  # False: masks of the unaugmented frame, the mistake in rows 18 to 25 of the lab book
SAMPLES = 5  # rows of the picture, each with a random frame and a random augmentation
SEED = 0  # random seed of the frames and the augmentation
OUT = "pseudo_gt.png"  # file of the picture


def main() -> None:
    """Draw random samples of an image list."""
    constants = read_constants(__file__)
    config = {name: value for name, (value, _) in constants.items()}
    config |= parse_flags(__doc__.splitlines()[0], constants, None)
    check_config(config)
    config = Namespace(**config)
    root = open_root(find_folder(config.data_root))
    frame_ids = read_image_list(resolve_path(root, config.image_list))
    order = torch.randperm(len(frame_ids), generator=torch.manual_seed(config.seed))
    annotations = open_annotations(root, config.annotations, "lwir")
    kwargs = {"min_height": 12, "margin": 5, "learn": config.learn, "pairs": config.input_mode == "early"}
    frames = load_frames([frame_ids[i] for i in order], annotations, **kwargs)
    frames = alternate_videos([frame for frame in frames if frame.n_persons])[: config.samples]
    if not frames:
        raise InputError("no frame has a person to show", "choose another IMAGE_LIST", file=root)
    check_images(root, [frame.id for frame in frames], config.input_mode)
    options = Augmentation(**{key: value for key, value in vars(config).items() if key in AUGMENTATION_KEYS})
    filler = mean_colour(INPUT_CHANNELS[config.input_mode])
    kwargs = {"input_size": (300, 300), "filler": filler, "augmentation": options}
    dataset = KaistPairs(root, frames, **kwargs, **pick(config, "input_mode", "masks_follow", "seed"))
    batch, bad = Collate(feature_map_sizes((300, 300)))([dataset[0, i] for i in range(len(frames))])
    if bad:
        raise bad[0].error
    write_atomically(Path(config.out), lambda path: draw_masks(batch, path))
    print(f"{config.out}: {len(frames)} augmented samples; ignored objects are red, all others are persons")


def alternate_videos(frames: list[Frame]) -> list[Frame]:
    """Reorder frames: the first of each video, then the second of each, and so on."""
    indices = indices_in_videos(frame.id for frame in frames)
    return [frames[i] for i in sorted(range(len(frames)), key=indices.__getitem__)]


def draw_masks(batch: Batch, path: Path) -> None:
    """Draw one row for each sample: its images with boxes, then the mask of every feature map."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    panels = {"visible": ([0, 1, 2], VISIBLE), "LWIR": ([3], LWIR)}
    if batch.images.shape[1] != 4:
        panels = {"LWIR": ([0], BOTH)} if batch.images.shape[1] == 1 else {"visible": ([0, 1, 2], BOTH)}
    colours = {-1: "tab:red", VISIBLE: "deepskyblue", LWIR: "orange", BOTH: "limegreen"}  # by label
    legend = {"ignored": "tab:red", "background": "0.85", "person": "limegreen"}
    cells = ListedColormap([*legend.values()])
    columns, n = len(panels) + len(batch.masks), len(batch.images)
    figure = Figure(figsize=(2 * columns, 2.15 * n + 0.5), layout="constrained")
    axes = figure.subplots(n, columns, squeeze=False)
    for row, image, boxes, labels, frame_id, *masks in zip(
        axes, batch.images, batch.boxes, batch.labels, batch.frame_ids, *batch.masks, strict=True
    ):
        height, width = image.shape[1:]
        for axis, (title, (channels, modality)) in zip(row, panels.items(), strict=False):
            axis.imshow(image[channels].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
            axis.set_title(title)
            for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist(), strict=True):
                if label & modality:  # the label -1 of ignored objects has all bits
                    corner, size = (x0 * width, y0 * height), ((x1 - x0) * width, (y1 - y0) * height)
                    axis.add_patch(Rectangle(corner, *size, fill=False, color=colours[label], linewidth=1.5))
        row[0].set_title(f"{frame_id}\n{row[0].get_title()}")
        for axis, mask in zip(row[len(panels) :], masks, strict=True):
            axis.imshow(mask.numpy(), cmap=cells, vmin=-1, vmax=1)
            axis.set_title("mask {} x {}".format(*mask.shape))
        for axis in row:
            axis.set_axis_off()
    figure.suptitle(f"{n} augmented training samples, and the target mask of each feature map", fontsize=14)
    if (batch.labels[..., None] == torch.tensor([VISIBLE, LWIR])).any():  # objects seen in one modality
        legend = {"person in visible": colours[VISIBLE], "person in LWIR": colours[LWIR]} | legend
    patches = [Patch(color=colour, label=name) for name, colour in legend.items()]
    figure.legend(handles=patches[::-1], loc="outside lower center", ncols=5, fontsize="large")
    figure.savefig(path, format="png", dpi=100)


if __name__ == "__main__":
    run_script(main)
