"""README and docs: commands, flags and files exist, links work, and the quoted output is current."""

import contextlib
import functools
import importlib.util
import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import detect
import eval as eval_script
import train
from engine import config, run
from engine.experiments import EXPERIMENTS, Row
from kaist.files import InputError
from tests.pair_trees import draw_own

PROJECT = Path(__file__).parent.parent
PAGES = sorted([PROJECT / "README.md", *PROJECT.glob("docs/**/*.md")])
NAMES = [str(page.relative_to(PROJECT)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"bash", "python", "text", "bibtex"}
# Upper-case words in backticks that are not constants of train.py.
OTHER_WORDS = {"OMP_NUM_THREADS", "KAIST_REFERENCE", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "BASE"}


def fences(page):
    """(language, text) of every fenced block of a page."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def prose(page):
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page):
    """The text between single backticks in a page's prose."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page):
    """Every command of a page as a list of words, from its bash blocks and from backticks in its prose."""
    texts = [text for language, text in fences(page) if language == "bash"]
    texts += [span for span in spans(page) if re.match(r"(\w+=\S+ )*python ", span)]
    found = []
    for text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            if re.match(r"[A-Z_]+=\$\(.*\)$", line):  # a shell variable set to a program's output
                continue
            for part in re.split(r"&&|\|", re.sub(r"(^|\s)#.*", "", line)):
                words = shlex.split(part)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words = words[1:]
                if words:
                    found.append(words)
    return found


def project_command(words):
    """(module, its arguments) of one of the project's commands; None for pip and pytest.

    For `torchrun` these are of the script that it starts. Its own flags are checked too.
    """
    if words[0] == "srun":
        words = words[1:]
    if words[0] == "torchrun":
        words = [re.sub(r"^\$SLURM_NNODES$", "2", word) for word in words]
        started = get_args_parser().parse_args(words[1:])
        words = ["python", started.training_script, *started.training_script_args]
    if words[0] != "python":
        assert words[0] == "pip", f"unknown program: {words}"
        return None
    if words[1:3] == ["-m", "pytest"] or words[1] == "-c":
        return None
    if words[1] == "-m":
        return words[2], words[3:]
    assert (PROJECT / words[1]).is_file(), f"no such script: {words[1]}"
    return Path(words[1]).stem, words[2:]


@functools.cache
def flags(module):
    """The flags in a command's --help; for a study also those of train.py, which it passes on."""
    main = importlib.import_module(module).main
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [f"{module}.py", "--help"])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code
    known = set(re.findall(r"--[a-z][a-z-]*", printed.getvalue()))
    if module == "train":
        known |= {"--list"}  # handled before the flags are parsed
    return known | flags("train") if module == "tools.study" else known


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist_and_know_their_flags(page):
    for words in commands(page):
        command = project_command(words)
        if command is None:
            continue
        module, arguments = command
        given = [word.partition("=")[0] for word in arguments if word.startswith("--")]
        unknown = set(given) - flags(module)
        assert not unknown, f"{' '.join(words)}: no flag {', '.join(unknown)}"
        for flag, value in zip(arguments, arguments[1:], strict=False):
            if flag == "--experiment" and value not in ("51",):  # the example row that is added
                assert value in EXPERIMENTS, f"{' '.join(words)}: no such row"


def test_commands_were_found():
    """The test above checks more than 20 commands."""
    assert len([c for page in PAGES for c in commands(page) if project_command(c)]) > 20


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_code_blocks_name_their_language(page):
    assert {language for language, _ in fences(page)} <= LANGUAGES
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(fences(page))


def slug(heading):
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"[^\w\- ]", "", heading.lower())
    return text.replace(" ", "-")


def anchors(page):
    """The anchors of a page's headings."""
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_work(page):
    """Links to files and anchors of the project exist. Web addresses are not checked."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        assert file.is_relative_to(PROJECT)
        if anchor:
            assert anchor in anchors(file), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_flags_named_exist(page):
    """Flags in the prose without a command belong to some command."""
    known = {"--help", "--nproc-per-node", "--standalone"}
    known |= {"--nnodes", "--rdzv-endpoint", "--max-restarts", "--requeue"}
    named = {span.split(" ")[0] for span in spans(page) if span.startswith("--")}
    for module in (
        "train",
        "eval",
        "detect",
        "tools.check_data",
        "tools.convert",
        "tools.priors",
        "tools.study",
        "tools.benchmark",
        "tools.export",
    ):
        known |= flags(module)
    assert not named - known


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_and_constants_named_exist(page):
    constants = {name.upper() for name in config.read_constants(PROJECT / "train.py")}
    for span in spans(page):
        if re.fullmatch(r"[\w/.]+\.py", span):
            assert (PROJECT / span).is_file(), f"`{span}`: no such file"
        name = re.match(r"[A-Z]+(_[A-Z]+)*\b", span)
        if name and name[0] == span.split(" ")[0] and not (PROJECT / span).exists():
            assert name[0] in constants | OTHER_WORDS, f"`{span}`: no such constant"


def test_every_page_is_reached_from_the_readme():
    seen, waiting = set(), [PROJECT / "README.md"]
    while waiting:
        page = waiting.pop()
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)", prose(page))
        waiting += [p for p in ((page.parent / link).resolve() for link in links) if p not in seen]
    assert set(PAGES) <= seen


def test_readme_is_short():
    assert len((PROJECT / "README.md").read_text(encoding="utf-8").splitlines()) <= 155


def test_the_example_row_can_be_trained(monkeypatch):
    """The README's example row for the lab book resolves to the changes it names."""
    text = next(text for language, text in fences(PROJECT / "README.md") if language == "python")
    row = eval(f"{{{text}}}", {"Row": Row})
    assert row.keys() == {"51"}
    assert not row.keys() & EXPERIMENTS.keys()  # the example is not a row of the lab book
    monkeypatch.setattr(config, "EXPERIMENTS", EXPERIMENTS | row)
    resolved, parent = config.resolve_row("51"), config.resolve_row("40")
    changed = {key for key in parent if parent[key] != resolved[key]}
    assert changed == {"batch_size", "ema_decay"}
    assert "51" in config.lab_book_table()


def miniature(folder, monkeypatch):
    """Make the folder the current one and the project's, with a demo row of a narrow network."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(config, "ROOT", folder)
    small = {"width": 0.0625, "batch_size": 2, "epochs": 2, "eval_every": 4}
    for name, steps in (("WARM_UP_STEPS", 2), ("TIMED_STEPS", 4)):  # the expected time is printed after these
        monkeypatch.setattr(run, name, steps)
    text = Path(train.__file__).read_text()
    for name, value in {**small, "workers": 0}.items():
        text = re.sub(rf"^{name.upper()} = [\d.]+", f"{name.upper()} = {value}", text, flags=re.MULTILINE)
    (folder / "train.py").write_text(text)
    monkeypatch.setattr(train, "__file__", str(folder / "train.py"))
    row = EXPERIMENTS["demo"]
    monkeypatch.setitem(EXPERIMENTS, "demo", row._replace(changes=row.changes | small))


def test_the_quick_start_of_your_data(tmp_path, monkeypatch, capsys, undrawn):
    """The five commands of docs/your-data.md run as written, from a folder of pairs to an ONNX file."""
    miniature(tmp_path, monkeypatch)
    pairs = draw_own(tmp_path / "mine", height=60)
    page = PROJECT / "docs/your-data.md"
    text = next(t for _, t in fences(page) if t.startswith("{"))
    given = json.loads(pairs.read_text())
    assert json.loads(text).keys() == given.keys()
    pairs.write_text(text)
    section = page.read_text(encoding="utf-8").partition("## Quick start\n")[2]
    printed = []
    for line in next(text for language, text in FENCE.findall(section) if language == "bash").splitlines():
        module, arguments = project_command(shlex.split(line))
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        try:
            assert not importlib.import_module(module).main(), line
        except InputError as error:
            assert module == "tools.export" and "pip install onnx onnxscript onnxruntime" in str(error)
        printed.append(capsys.readouterr().out)
    assert len(printed) == 5
    assert "no fault found" in printed[0]
    assert "4 frames, 4 people to train on" in printed[1] and "4 frames, 4 people count" in printed[1]
    assert "miss rate, Reasonable" in printed[2] and re.search(
        r"^COCO \(%\) .*: AP [\d.]+, AP50 ", printed[2], re.M
    )
    assert (tmp_path / "detections/000.png").is_file()
    if importlib.util.find_spec("onnxruntime"):
        assert "4 frames: boxes differ " in printed[4] and len(list(tmp_path.glob("*.onnx"))) == 1


@pytest.fixture
def result_files(demo_root, tmp_path, monkeypatch):
    """The current folder, with the files in the examples of README and docs/evaluation.md."""
    shutil.copy(demo_root / "KAIST_annotation.json", tmp_path)
    for name in ("mine.txt", "result.txt"):
        (tmp_path / name).write_text("1,100,200,40,100,0.9\n6,300,200,40,100,0.5\n")
    entry = '{"image_id": 0, "category_id": 1, "bbox": [100, 200, 40, 100], "score": 0.9}'
    (tmp_path / "theirs.json").write_text(f"[{entry}]")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readmes_evaluation_of_result_files(result_files, monkeypatch, capsys, undrawn):
    words = next(w for w in commands(PROJECT / "README.md") if w[1:3] == ["eval.py", "--detections"])
    monkeypatch.setattr(sys, "argv", words[1:])
    eval_script.main()
    printed = capsys.readouterr().out
    assert "miss rate, Reasonable" in printed and "mine" in printed and "theirs" in printed
    assert (result_files / "miss_rate.png").is_file()


def test_the_evaluation_from_python(result_files, capsys):
    blocks = fences(PROJECT / "docs/evaluation.md")
    exec(next(text for language, text in blocks if language == "python"), {})
    assert 0 <= float(capsys.readouterr().out) <= 1


# ------------------------------------------------------------------- the first hour


HOUR = PROJECT / "docs/first-hour.md"


@pytest.fixture
def clone(demo_root, tmp_path, monkeypatch, undrawn):
    """The current folder, a miniature of the page's: a narrow network, few frames."""
    miniature(tmp_path, monkeypatch)
    monkeypatch.setattr(detect, "MAX_LISTED", 1)  # the page's folders have more images than detect.py lists

    lists = {"data/demo": {}, "kaist": {"train-all-02": "train-all", "test-all-20": "test-all"}}
    lists["kaist-mini"] = {"pairs": "test-all", "lwir-train": "train-all", "lwir-test": "test-day"}
    for root, names in lists.items():
        shutil.copytree(demo_root, root)
        texts = {new: Path(root, f"imageSets/{old}.txt").read_text() for new, old in names.items()}
        if names:
            shutil.rmtree(Path(root, "imageSets"))
            Path(root, "imageSets").mkdir()
        for name, text in texts.items():
            Path(root, f"imageSets/{name}.txt").write_text(text)
    Path("kaist-mini/KAIST_annotation.json").unlink()
    for path in Path("kaist-mini/annotations").rglob("*.txt"):
        beside = Path("kaist-mini/annotations-xml-new", *path.parts[2:]).with_suffix(".xml")
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text("<annotation></annotation>")
    for video in Path("kaist-mini/images").glob("set0[0-5]/*"):
        shutil.rmtree(video / "visible")
    shutil.copy(demo_root / "KAIST_annotation.json", ".")
    for name in ("MLPD", "MBNet"):
        Path(f"{name}_result.txt").write_text("1,100,200,40,100,0.9\n6,300,200,40,100,0.5\n")
    return tmp_path


def skeleton(line):
    """A line of output without numbers, and without words that depend on them."""
    line = re.sub(r"(\d[\d.,:]*|–)(e[-+]\d+)?", "#", line)
    line = re.sub(r"person\b|people\b", "people", re.sub(r"counts\b", "count", line))
    return " ".join(line.replace("bfloat#", "float#").replace("-#", "#").split())


def test_the_first_hour(clone, monkeypatch, capsys):
    """Every command of the page runs and prints the lines that the page quotes, except for the numbers."""
    printed = {}
    blocks = fences(HOUR)
    for (language, text), following in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if language != "bash":
            continue
        for line in text.replace("\\\n", " ").replace("/data/kaist", "kaist").splitlines():
            words = shlex.split(line, comments=True)
            if words[1] == "-c":
                exec(words[2], {})
                continue
            module, arguments = project_command(words)
            if "--kaist" in arguments and module == "train":  # a row of full size
                arguments += ["--width", "0.0625", "--pretrained", "none", "--epochs", "1"]
            monkeypatch.setattr(sys, "argv", [words[1], *arguments])
            with contextlib.suppress(SystemExit):  # --runs ends the program
                importlib.import_module(module).main()
        output = capsys.readouterr()
        printed[text] = {skeleton(line) for line in (output.out + output.err).splitlines()}
        if following[0] == "text":
            kept = [line for line in following[1].splitlines() if not re.match(r"  x |.*( minus |…)", line)]
            assert not [line for line in kept if skeleton(line) not in printed[text]], f"after {text}"
    assert len(printed) > 8
