"""The order of imports: strictly downward, and no folder imports a top-level file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
# From the top down; members of one entry may not import each other.
ORDER = [
    {"tools"},
    {"train", "eval", "detect"},
    {"utils"},
    {"model", "datasets"},
    {"ssd", "pseudo_gt"},
    {"engine"},
    {"kaist"},
]
FLOOR = {room: i for i, rooms in enumerate(ORDER) for room in rooms}
FOLDERS = {"tools", "ssd", "engine", "kaist"}


def project_files():
    """Module name -> path, of every Python file outside of tests/."""
    paths = [*PROJECT.glob("*.py"), *(p for f in FOLDERS for p in PROJECT.glob(f"{f}/**/*.py"))]
    return {".".join(p.relative_to(PROJECT).with_suffix("").parts): p for p in paths}


def imported(path, modules):
    """The project's modules that a file imports anywhere, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & modules.keys()) or {node.module}
    return {name for name in found if name.split(".")[0] in FLOOR}


def test_imports_go_downward():
    modules = project_files()
    arrows = {(m, name) for m, path in modules.items() for name in imported(path, modules)}
    assert len(arrows) > 50  # the files were read
    wrong = []
    for importer, name in arrows:
        room, other = importer.split(".")[0], name.split(".")[0]
        if room != other and FLOOR[room] >= FLOOR[other]:
            wrong.append(f"{importer} imports {name}")
    assert not wrong


def test_no_circle_of_files():
    modules = project_files()
    below = {m: imported(path, modules) - {m} for m, path in modules.items()}
    done = set()

    def visit(module, trail):
        assert module not in trail, f"a circle: {' -> '.join([*trail, module])}"
        if module not in done:
            for other in below.get(module, ()):
                visit(other, [*trail, module])
            done.add(module)

    for module in modules:
        visit(module, [])


@pytest.mark.skipif(not (PROJECT / ".git").exists(), reason="git knows which files are tracked")
def test_the_top_level_is_the_users_list():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    top = {name.split("/")[0] for name in tracked if name}
    assert {name for name in top if not name.startswith(".")} == {
        *("train.py", "eval.py", "detect.py", "model.py", "datasets.py", "pseudo_gt.py"),
        *("utils.py", "checkpoints", "README.md", "requirements.txt", "LICENSE"),
        *("pyproject.toml", "kaist", "ssd", "engine", "tools", "docs", "tests"),
    }


def test_kaist_evaluates_without_torch_pillow_and_matplotlib(tmp_path):
    """With numpy alone, in a process in which nothing else can be imported."""
    detections = tmp_path / "result.txt"
    detections.write_text("1,100,100,40,100,0.9\n")
    folder = tmp_path / "annotations" / "set06" / "V000"
    folder.mkdir(parents=True)
    row = "person 100 100 40 100 0 0 0 0 0 0 0"
    (folder / "I00019.txt").write_text(f"% bbGt version=3\n{row}\n")
    script = f"""
import sys
for name in ("torch", "torchvision", "PIL", "matplotlib", "tqdm"):
    sys.modules[name] = None
import engine.config, kaist, kaist.images, kaist.report
values = engine.config.resolve_row("demo") | {{"experiment": "", "data_root": "data/demo", "lr": 0.5}}
assert engine.config.describe_changes(values) == "LR 0.5"
gt = kaist.load_ground_truth({str(tmp_path)!r}, ["set06/V000/I00019"])
results = kaist.evaluate(gt, kaist.read_detections({str(detections)!r}, gt.frames))
print(results["Reasonable-all"].miss_rate)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-6


def test_sizes():
    """train.py under 300 lines, other files 400 at most; all together 13,875, wanted are 10,000."""
    lines = {m: len(p.read_text(encoding="utf-8").splitlines()) for m, p in project_files().items()}
    assert lines["train"] <= 300
    assert not {m: n for m, n in lines.items() if n > 400}
    assert sum(lines.values()) <= 13_875


def test_no_command_waits_for_torchvision_or_dynamo():
    """Torchvision's models and torch's compiler take two seconds each to import; few runs need them."""
    script = """
import sys, train, eval, detect
arguments = {"input_mode": "halfway", "batch_norm": True, "width": 0.03, "prior_set": "ssd300"}
arguments |= {"size": (300, 300), "infusion": (1, 1, 0, 0, 0, 0), "infusion_conv": True}
from model import build_model, make_network
weights = make_network(**arguments).state_dict()
build_model({"model_args": arguments, "model": weights})
print([m for m in ("torchvision", "torch._dynamo") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
