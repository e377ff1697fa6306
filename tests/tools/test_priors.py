"""tools.priors: coverage against a brute-force reference, and the derived pedestrian set."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert, box_iou

from kaist.annotations import open_annotations
from kaist.files import InputError
from ssd.boxes import make_grids, make_priors, prior_shapes
from tools import priors

XML = """<annotation><object><name>{}</name><bndbox><x>{}</x><y>{}</y><w>{}</w><h>{}</h></bndbox>
<occlusion>0</occlusion></object></annotation>"""


def random_persons(n):
    rng = np.random.default_rng(0)
    height = rng.uniform(0.03, 1.0, n)
    size = np.stack([height * rng.uniform(0.2, 0.7, n), height], axis=1)
    return np.concatenate([size / 2 + rng.random((n, 2)) * (1 - size), size], axis=1)


@pytest.mark.parametrize("name", ["ssd300", "pedestrian"])
@pytest.mark.parametrize("size", [(300, 300), (300, 375)])
@pytest.mark.parametrize("centres", ["even", "stride"])
def test_best_overlaps_are_those_of_all_priors(name, size, centres):
    persons = random_persons(200)
    shapes, grids = prior_shapes(name), make_grids(size, centres)
    all_priors = box_convert(make_priors(grids, shapes), "cxcywh", "xyxy")
    corners = box_convert(torch.from_numpy(persons), "cxcywh", "xyxy")
    overlaps = box_iou(corners, all_priors.double())
    found = priors.best_overlaps(persons, shapes, grids)
    assert np.allclose(found, overlaps.amax(1).numpy(), atol=1e-6)
    assert priors.coverage(persons, name, size, centres).n_priors == len(all_priors)


def test_table_by_hand():
    found = [priors.Coverage("x", (300, 375), 7, np.array([0.5, 0.3, 0.1, 0.7]))]
    heights = np.array([54.9, 55, 115, 200])
    *_, line = priors.coverage_table(found, heights).splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["`x`", "300x375", "7", "50.0 (0.40)", "100.0 (0.50)", "0.0 (0.30)", "50.0 (0.40)"]


def test_derived_set_by_hand():
    persons = np.array([[0.5, 0.5, 0.05, 0.1]] * 3 + [[0.5, 0.5, 0.1, 0.2]])
    ratio, heights = priors.derive_heights(persons, 2, (300, 300))
    # Half as wide as high: height 0.1 is 1.9 cells wide on the 38x38 map, 0.95 on the 19x19 and 0.5 on the
    # 10x10; height 1.0 is 5 cells wide on the 10x10 map, 2.5 on the 5x5, 1.5 on the 3x3 and 0.5 on the 1x1.
    assert ratio == 0.5
    assert heights == [[0.1], [0.1], [0.1], [1.0], [1.0], [1.0]]


def test_the_pedestrian_set_follows_from_the_real_annotations(reference, tmp_path):
    archive = reference / "annotations/annotations-xml-new_set00-05.tar.xz"
    if not archive.exists():
        pytest.skip("no archive of the training annotations")
    frames = reference / "imageSets/train-all-20.txt"
    names = "".join(f"annotations-xml-new/{line}.xml\n" for line in frames.read_text().split())
    subprocess.run(["tar", "xJf", archive, "-C", tmp_path, "-T", "-"], input=names, text=True, check=True)
    persons = priors.read_persons(
        Namespace(data_root=tmp_path, annotations="auto", image_list=str(frames), min_height=12.0, margin=5.0)
    )
    assert len(persons) == 1955
    ratio, derived = priors.derive_heights(persons, 8, (300, 300))
    assert ratio == pytest.approx(0.35, abs=0.01)  # from a tenth of the frames
    for map_heights, stored in zip(derived, prior_shapes("pedestrian"), strict=True):
        assert map_heights == pytest.approx([h for _, h in stored], abs=0.005)
    matched = [
        (priors.coverage(persons, name, (300, 300), "even").best_iou >= 0.5).mean()
        for name in ("ssd300", "pedestrian")
    ]
    assert matched[0] < 0.65 and matched[1] > 0.93


@pytest.mark.parametrize("layout", ["set00/V000/I00007.xml", "visible"])
def test_every_annotated_frame_of_a_bare_folder(tmp_path, layout, capsys):
    folder = tmp_path / "anything"
    path = folder / layout
    if layout == "visible":
        path = folder / "set00/V000/lwir/I00007.txt"
        text = "% bbGt version=3\nperson 100 100 40 100\npeople 300 100 40 100\n"
    else:
        text = XML.format("person", 100, 100, 40, 100)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert priors.annotated_ids(open_annotations(folder)) == ["set00/V000/I00007"]
    arguments = Namespace(
        data_root="nowhere", annotations=str(folder), image_list="all", min_height=12.0, margin=5.0
    )
    persons = priors.read_persons(arguments)
    assert np.allclose(persons, [[120 / 640, 150 / 512, 40 / 640, 100 / 512]])
    arguments.min_height = 101.0
    with pytest.raises(InputError, match="no person in these frames"):
        priors.read_persons(arguments)


def test_the_script_prints_its_table_and_draws(demo_root, tmp_path, monkeypatch, capsys):
    flags = ["--data-root", str(demo_root), "--sizes", "300x375"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["priors.py", *flags])
    priors.main()
    assert capsys.readouterr().out.count("| `pedestrian` | 300x375 |") == 1
    assert Path("priors.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sizes", "300"], "invalid input_size value"),
        (["--derive", "1"], "at least 2"),
        (["--sizes", "100x100"], "INPUT_SIZE"),
        (["--priors", "vgg"], "invalid choice"),
    ],
)
def test_bad_flags_are_refused(flags, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["priors.py", *flags])
    with pytest.raises(InputError, match=message):
        priors.parse_arguments()


@pytest.mark.parametrize("tool", ["priors", "show_masks"])
def test_help_does_not_wait_for_torch(tool):
    script = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['tool', '--help']; "
    script += f"runpy.run_module('tools.{tool}', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--data-root" in done.stdout, done.stderr
