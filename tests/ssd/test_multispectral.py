"""MLPD and INSANet: compared with their authors' outputs and with independent implementations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kaist.files import InputError
from kaist.frames import LWIR, VISIBLE
from ssd.multispectral import MLPD, INSANet
from ssd.published import load_published, published_names
from tests.ssd import published_networks

NETWORKS = pytest.mark.parametrize("network", [MLPD, INSANet])


def make(network, **changes):
    arguments = {
        "width": 0.0625,
        "infusion": (0,) * 6,
        "infusion_conv": False,
        "prior_set": "multispectral",
        "size": (128, 192),
    }
    return network(**(arguments | changes))


def published_shapes(model):
    """The published names of a network's tensors, with their shapes."""
    own = model.state_dict()
    shapes = {theirs: tuple(own[ours].shape) for ours, theirs in published_names(model).items()}
    return shapes | {"base.rescale_factors": (1, len(own["conv4_3_norm.scale"]), 1, 1)}


@pytest.mark.parametrize(("network", "name"), [(MLPD, "mlpd"), (INSANet, "insanet")])
def test_outputs_are_those_of_the_published_network(network, name, published, by_rule):
    model = make(network, width=1.0, size=(512, 640)).eval()
    keys = json.loads((published / f"{name}.keys.json").read_text())
    shapes = {key: tuple(shape) for key, shape in keys.items()}
    assert published_shapes(model) == shapes
    state = {
        key: torch.from_numpy(np.asarray(by_rule.tensor_by_rule(key, shape, 1)))
        for key, shape in shapes.items()
    }
    load_published(model, state, Path("by_rule"))
    with torch.inference_mode():
        loc, conf, _ = model(torch.from_numpy(by_rule.input_by_rule(1))[None])
    expected = np.load(published / f"{name}.npz")
    index = expected["prior_index"]
    priors = model.priors.double().numpy()
    assert np.abs(priors[index] - expected["priors"]).max() < 1e-6
    assert np.allclose(priors.sum(0), expected["priors_sum"], rtol=1e-6)
    ends = np.cumsum([len(p) for p in model.map_priors()])
    assert ends[-1] == 41760
    own_map = np.searchsorted(ends, index, side="right")
    for ours, theirs, sums in ((loc, "locs", "loc"), (conf, "scores", "score")):
        ours = ours[0].double().numpy()
        spread = np.stack([part.std(0) for part in np.split(ours, ends[:-1])])
        assert (np.abs(ours[index] - expected[theirs]) < 1e-4 * spread[own_map]).all()
        scale = np.sqrt(len(ours) * expected[f"{sums}_square_sum"])
        assert (np.abs(ours.sum(0) - expected[f"{sums}_sum"]) < 1e-5 * scale).all()
        assert np.allclose((ours**2).sum(0), expected[f"{sums}_square_sum"], rtol=1e-5)


@NETWORKS
def test_narrow_networks_equal_the_independent_implementations(network):
    model = make(network).eval()
    state = published_networks.random_state(published_shapes(model))
    load_published(model, state, Path("random"))
    x = torch.randn(1, 4, 128, 192, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        loc, conf, _ = model.predict(x, with_masks=False)
        offsets, logits = published_networks.multispectral(state, x)
    assert (loc[0] - offsets).abs().max() < 1e-4 * offsets.std()
    assert (conf[0] - logits).abs().max() < 1e-4 * logits.std()


def test_shared_layers_see_one_stream_after_the_other_in_training():
    model = make(MLPD).train()
    images = torch.randint(256, (2, 4, 128, 192), dtype=torch.uint8)
    seen = []
    norm = model.stages[0][1]
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    model(images)
    assert len(seen) == 2 and len(seen[0]) == len(seen[1]) == 2
    means = [x.mean((0, 2, 3)) for x in seen]
    assert torch.allclose(norm.running_mean, 0.1 * (0.9 * means[0] + means[1]), atol=1e-5)
    assert {int(m.num_batches_tracked) for m in model.stages.modules() if isinstance(m, nn.BatchNorm2d)} == {
        2
    }
    assert {int(join[1].num_batches_tracked) for join in model.joins} == {1}


@NETWORKS
def test_a_streams_masks_give_gradients_to_that_stream_only(network):
    torch.manual_seed(0)
    model = make(network, infusion=(2, 0, 0, 0, 0, 0)).train()
    assert model.infused_maps == [0, 6, 7] and [g.modality for g in model.grids[6:]] == [VISIBLE, LWIR]
    images = torch.randint(256, (1, 4, 128, 192), dtype=torch.uint8)
    seg = model(images).seg
    assert [s.shape[2:] for s in seg] == [model.grids[i][:2] for i in model.infused_maps]
    assert seg[1].shape[2:] == ((16, 24) if network is MLPD else (32, 48))
    for i, own, other in ((1, model.visible, model.lwir), (2, model.lwir, model.visible)):
        parameters = own[0].weight, other[0].weight
        gradients = torch.autograd.grad(seg[i].sum(), parameters, retain_graph=True, allow_unused=True)
        assert gradients[0].abs().sum() > 0 and gradients[1] is None
    plain = make(network, infusion=(1, 0, 0, 0, 0, 0)).state_dict()
    assert set(model.state_dict()) - set(plain) == {
        f"seg_heads.{i}.0.{n}" for i in (1, 2) for n in ("weight", "bias")
    }


@NETWORKS
def test_bfloat16_and_channels_last_change_little(network):
    torch.manual_seed(0)
    model = make(network, width=0.125).eval()
    images = torch.randint(256, (1, 4, 128, 192), dtype=torch.uint8)
    with torch.inference_mode():
        plain = model(images)
        model.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            short = model(images.contiguous(memory_format=torch.channels_last))
    for a, b in zip(plain[:2], short[:2], strict=True):
        assert b.dtype == torch.float32 and (a - b).abs().mean() < 0.05 * a.std()


@NETWORKS
def test_priors_fit_the_feature_maps_of_any_size(network):
    model = make(network, size=(192, 320), prior_set="pedestrian").eval()
    images = torch.zeros((1, 4, 192, 320), dtype=torch.uint8)
    *maps, visible, lwir = model.feature_maps(model.normalise(images))
    assert [tuple(m.shape[2:]) for m in maps] == model.map_sizes and visible.shape == lwir.shape
    loc, conf, seg = model(images)
    assert loc.shape == (1, len(model.priors), 4) and conf.shape == (1, len(model.priors), 3)
    assert seg == [] and sum(map(len, model.map_priors())) == len(model.priors)


def test_published_priors_by_hand():
    priors = make(MLPD, size=(512, 640)).priors
    assert torch.allclose(priors[0, :2], torch.tensor([0.5 / 80, 0.5 / 64]))
    pixels = priors[:6, 2:] * torch.tensor([640.0, 512.0])
    assert torch.allclose(pixels[0], torch.tensor([40 / 2**0.5, 40 * 2**0.5]))  # half as wide
    assert torch.allclose(pixels[:3, 1] / pixels[0, 1], torch.tensor([1, 1.259921, 1.587401]))
    assert torch.allclose(pixels[3], torch.tensor([40.0, 40.0]))
    assert priors[-1, 3] > 1.1  # 571 pixels: not clipped


def test_input_that_does_not_divide_into_windows_is_refused():
    with pytest.raises(InputError, match=r"INPUT_SIZE = \(300, 300\) .* multiples of 64"):
        make(INSANet, size=(300, 300))
    make(MLPD, size=(300, 300))
