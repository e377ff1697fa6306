"""Published files: whole modules are read without running code. The files are made here from classes with the
published names."""

import os
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from kaist.files import InputError
from model import SSD300
from ssd.boxes import decode
from ssd.multispectral import MLPD, INSANet
from ssd.published import load_published, published_names, read_published
from tests.ssd import published_networks


def make(network=MLPD, **changes):
    arguments = {"width": 0.0625, "infusion": (0,) * 6, "infusion_conv": False}
    if network is SSD300:
        arguments |= {"input_mode": "lwir", "batch_norm": False, "prior_set": "ssd300", "size": (300, 300)}
    else:
        arguments |= {"prior_set": "multispectral", "size": (128, 192)}
    return network(**(arguments | changes))


def published_state(model, seed=0):
    """A random state with a model's published names."""
    own = model.state_dict()
    shapes = {theirs: tuple(own[ours].shape) for ours, theirs in published_names(model).items()}
    for key, shape in shapes.items():
        if key.endswith("rescale_factors"):
            shapes[key] = (1, *shape, 1, 1)
    return published_networks.random_state(shapes, seed)


@pytest.fixture
def author(monkeypatch):
    """Creates classes in an author's modules, which are removed after the test."""

    def make_class(module, name, base=nn.Module):
        if module not in sys.modules or not hasattr(sys.modules[module], "of_the_author"):
            monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
            sys.modules[module].of_the_author = True
        if hasattr(sys.modules[module], name):
            return getattr(sys.modules[module], name)
        made = type(name, (base,), {"__module__": module, "__qualname__": name})
        setattr(sys.modules[module], name, made)
        return made

    return make_class


def whole_module(author, state, top="SSD300"):
    """A module of the author's classes whose state dictionary is `state`."""
    classes = {"": ("model", top), "base.insa": ("insa", "INSA")}
    norms = {key.rpartition(".")[0] for key in state if key.endswith("running_var")}
    modules = {"": author(*classes[""])()}
    for key, value in state.items():
        path, _, name = key.rpartition(".")
        place = ""
        for part in path.split(".") if path else []:
            inner = f"{place}.{part}".strip(".")
            if inner not in modules:
                if inner in norms:
                    modules[inner] = nn.BatchNorm2d(len(state[f"{inner}.weight"]))
                else:
                    modules[inner] = author(*classes.get(inner, ("model", "Part")))()
                modules[place].add_module(part, modules[inner])
            place = inner
        if isinstance(modules[place], nn.BatchNorm2d):
            getattr(modules[place], name).data.copy_(value)
        else:
            modules[place].register_parameter(name, nn.Parameter(value))
    modules[""].add_module("act", nn.Sequential(nn.ReLU(), nn.GELU(), nn.MaxPool2d(2)))
    modules[""].priors_cxcy = torch.ones(3, 4)  # a plain attribute, no buffer
    modules[""].device = torch.device("cpu")
    return modules[""]


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("network", [MLPD, INSANet])
def test_a_whole_module_beside_its_optimizer_is_read(network, parallel, author, tmp_path):
    model = make(network)
    state = published_state(model)
    module = whole_module(author, state, "SSD300" if network is MLPD else "INSANet")
    optimizer = torch.optim.SGD(module.parameters(), 1e-4, momentum=0.9)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    saved = nn.DataParallel(module) if parallel else module
    path = tmp_path / "checkpoint_ssd300.pth.tar"
    torch.save({"epoch": 9, "model": saved, "optimizer": optimizer, "loss": 0.5}, path)
    read = read_published(path)
    assert same(read, state)
    load_published(model, read, path)
    x = torch.randn(1, 4, 128, 192, generator=torch.manual_seed(0))
    with torch.inference_mode():
        loc, conf, _ = model.eval().predict(x, with_masks=False)
        offsets, logits = published_networks.multispectral(state, x)
    assert torch.allclose(loc[0], offsets, atol=1e-3) and torch.allclose(conf[0], logits, atol=1e-3)


def test_a_module_or_a_state_alone_is_read(author, tmp_path):
    state = published_state(make())
    module = whole_module(author, state)
    path = tmp_path / "file.pth"
    for content in (
        module,
        state,
        {"model": state},
        {"state_dict": module},
        {f"module.{k}": v for k, v in state.items()},
    ):
        torch.save(content, path)
        assert same(read_published(path), state)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert same(read_published(path), state)


def test_nothing_of_the_file_runs(author, tmp_path):
    """Neither the author's classes nor functions named in their pickles are called."""
    calls = []

    def watch(name):
        return lambda self, *arguments: calls.append(name) or object.__new__(type(self))

    traced = author("model", "Traced")
    for name in ("__init__", "__setstate__", "__getattr__", "__call__", "forward"):
        setattr(traced, name, watch(name))
    traced.__new__ = staticmethod(lambda cls, *_: calls.append("__new__") or object.__new__(cls))
    module = whole_module(author, published_state(make()))
    module._modules["traced"] = object.__new__(traced)
    path = tmp_path / "file.pth"
    torch.save({"model": module}, path)
    calls.clear()
    assert same(read_published(path), published_state(make()))
    assert not calls
    torch.load(path, weights_only=False)
    assert calls  # so the trap is a real one


class Attack:
    """An object whose pickle runs code when loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["beside", "inside", "alone"])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "posix.system"),
        (eval, "eval"),
        (os.makedirs, "os.makedirs"),
        (torch.hub.load, "torch.hub.load"),
    ],
)
def test_a_file_that_would_run_code_is_refused(function, name, place, author, tmp_path):
    mark = tmp_path / "attacked"
    if function is eval:
        attack = Attack(eval, f"open({str(mark)!r}, 'w')")
    else:
        attack = Attack(function, f"touch {mark}" if function is os.system else str(mark))
    module = whole_module(author, published_state(make()))
    if place == "inside":
        module.extra = attack
    path = tmp_path / "file.pth"
    torch.save(
        {"model": module, "optimizer": attack} if place == "beside" else [module, attack][place == "alone"],
        path,
    )
    with pytest.raises(
        InputError, match=rf"file.pth: .*it contains {name}, which is code; none was run"
    ) as refusal:
        read_published(path)
    assert not mark.exists() and "\n" not in str(refusal.value)


def test_a_module_that_contains_itself_is_read(author, tmp_path):
    state = published_state(make())
    module = whole_module(author, state)
    module._modules["base"]._modules["again"] = module
    path = tmp_path / "file.pth"
    torch.save(module, path)
    assert same(read_published(path), state)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": 5}, "not a state dictionary of tensors"),
        ({"epoch": 3, "state": {}}, "not a state dictionary of tensors"),
        ([1, 2], "not a state dictionary of tensors"),
    ],
)
def test_a_file_without_a_network_is_rejected(content, message, tmp_path):
    path = tmp_path / "file.pth"
    torch.save(content, path)
    with pytest.raises(InputError, match=f"file.pth: {message}"):
        read_published(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="file.pth: not a readable weights file"):
        read_published(path)
    with pytest.raises(InputError, match="nowhere.pth: weights file not found"):
        read_published(tmp_path / "nowhere.pth")


def test_the_error_names_the_first_missing_tensor():
    state, path = published_state(make()), Path("file.pth")
    lacking = {key: value for key, value in state.items() if "feat_3" not in key}
    with pytest.raises(
        InputError, match=r"file.pth: it lacks base.feat_3.weight and so is not MLPD \(5 of \d+"
    ):
        load_published(make(), lacking, path)
    insanet = published_state(make(INSANet))
    with pytest.raises(
        InputError, match="it lacks base.conv4_1_vis.weight and so is not MLPD .*, but INSANet"
    ):
        load_published(make(), insanet, path)
    with pytest.raises(
        InputError, match=r"base.conv1_1_vis.weight has shape \(8, 3, 3, 3\).*needs \(16, 3, 3, 3\)"
    ):
        load_published(make(width=0.25), state, path)
    with pytest.raises(
        InputError, match="it lacks base.conv1_1.weight and so is not the SSD tutorial's SSD300"
    ):
        load_published(make(SSD300), state, path)


def test_segmentation_heads_are_not_changed():
    model = make(infusion=(1, 0, 0, 0, 0, 1))
    before = [p.clone() for p in model.seg_heads.parameters()]
    load_published(model, published_state(make()), Path("file.pth"))
    assert all(map(torch.equal, before, model.seg_heads.parameters()))


@pytest.mark.parametrize("input_mode", ["lwir", "visible", "early"])
def test_the_tutorials_network_predicts_the_same_boxes(input_mode, author, tmp_path):
    model = make(SSD300, input_mode=input_mode).eval()
    state = published_state(model)
    state["rescale_factors"] = state["rescale_factors"] / 20
    path = tmp_path / "checkpoint_ssd300.pth.tar"
    torch.save({"epoch": 1, "model": whole_module(author, state)}, path)
    load_published(model, read_published(path), path)
    channels = {"lwir": 1, "visible": 3, "early": 4}[input_mode]
    x = torch.randn(1, channels, 300, 300, generator=torch.manual_seed(0))
    with torch.inference_mode():
        loc, conf, _ = model.predict(x, with_masks=False)
        offsets, logits = published_networks.tutorial(state, x)
    priors = published_networks.tutorial_priors()
    # Which of their priors is which of ours: that of the same cell and the nearest shape.
    order, first = [], 0
    for own in model.map_priors():
        cells = own[:, :2].unique(dim=0).shape[0]
        ours, theirs = own.view(cells, -1, 4), priors[first : first + len(own)].view(cells, -1, 4)
        assert torch.allclose(ours[:, 0, :2], theirs[:, 0, :2], atol=1e-6)
        nearest = torch.cdist(ours[0, :, 2:], theirs[0, :, 2:]).argmin(1)
        assert sorted(nearest.tolist()) == list(range(ours.shape[1]))
        order.append((torch.arange(cells)[:, None] * ours.shape[1] + nearest + first).flatten())
        first += len(own)
    order = torch.cat(order)
    assert torch.allclose(conf[0], logits[order], atol=1e-4 * logits.std())
    wanted = published_networks.decode(offsets[order], priors[order])
    reach = offsets[order][:, 2:].amax(1) < 15
    found = decode(loc[0], model.priors)
    assert reach.float().mean() > 0.5
    assert torch.allclose(found[reach], wanted[reach], rtol=1e-3, atol=1e-4)


def test_the_tutorials_network_needs_its_priors_and_input():
    state = published_state(make(SSD300))
    with pytest.raises(InputError, match="they need PRIORS = ssd300"):
        load_published(make(SSD300, prior_set="pedestrian"), state, Path("file.pth"))
    with pytest.raises(InputError, match=r"base.conv1_1.weight has shape \(8, 1, 3, 3\).*check INPUT_MODE"):
        load_published(make(SSD300, input_mode="early"), state, Path("file.pth"))
