"""MLPD, INSANet and the SSD tutorial's SSD300 implemented independently from their published names.

Each is one function of a state dictionary and an image, without modules.
"""

import itertools
import math

import torch
import torch.nn.functional as F

BLOCKS = (2, 2, 3, 3, 3)
MULTISPECTRAL_HEADS = ("conv4_3", "conv6", "conv7", "conv8", "conv9", "conv10")
TUTORIAL_HEADS = ("conv4_3", "conv7", "conv8_2", "conv9_2", "conv10_2", "conv11_2")


def multispectral(state, x):
    """(P, 4) offsets and (P, 3) logits of one normalised image x (1, 4, H, W)."""

    def conv(x, name, suffix="", **kwargs):
        layer = f"base.{name}{suffix}"
        x = F.conv2d(x, state[f"{layer}.weight"], state.get(f"{layer}.bias"), **kwargs)
        norm = f"base.{name}_bn{suffix}"
        if f"{norm}.weight" in state:
            values = [state[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
            x = F.batch_norm(x, *values)
        return x.relu()

    def block(x, i, suffix=""):
        for j in range(BLOCKS[i - 1]):
            x = conv(x, f"conv{i}_{j + 1}", suffix, padding=1)
        return x

    def to_conv3_3(x, suffix):
        x = F.max_pool2d(block(x, 1, suffix), 2)
        return block(F.max_pool2d(block(x, 2, suffix), 2), 3, suffix)

    def pool4(x):
        return F.max_pool2d(x, 3, 1, 1)

    def further(x):
        maps = [x]
        x = F.max_pool2d(block(x, 5), 2, ceil_mode=True)
        maps.append(conv(conv(x, "conv6_1", padding=1), "conv6_2"))
        for i in range(7, 11):
            x = conv(maps[-1], f"conv{i}_1", stride=2 if i < 9 else 1)
            maps.append(conv(x, f"conv{i}_2", padding=1))
        return maps

    visible, lwir = to_conv3_3(x[:, :3], "_vis"), to_conv3_3(x[:, 3:], "_lwir")
    if "base.feat_1.weight" in state:
        streams = [
            further(pool4(block(F.max_pool2d(x, 2), 4, suffix)))
            for x, suffix in ((visible, "_vis"), (lwir, "_lwir"))
        ]
        maps = [
            conv(torch.cat(pair, 1), f"feat_{i}", padding=1)
            for i, pair in enumerate(zip(*streams, strict=True), 1)
        ]
    else:
        visible, lwir = conv(visible, "conv1x1", "_vis"), conv(lwir, "conv1x1", "_lwir")
        tokens = [x[0].permute(1, 2, 0) for x in (visible, lwir)]
        for i in range(2):
            tokens = attention_round(state, f"base.insa.insa.{i}", tokens, shifted=i == 1)
        x = (tokens[0] + tokens[1]).permute(2, 0, 1)[None] / 2
        maps = further(pool4(block(F.max_pool2d(x, 2), 4)))
    length = maps[0].square().sum(1, keepdim=True).sqrt()
    maps[0] = maps[0] / length * state["base.rescale_factors"]
    return heads(state, MULTISPECTRAL_HEADS, maps, 3)


def heads(state, names, maps, n_logits):
    """Offsets (P, 4) and logits (P, n_logits) of the heads on six maps."""
    found = []
    for kind, n in (("loc", 4), ("cl", n_logits)):
        parts = []
        for name, x in zip(names, maps, strict=True):
            layer = f"pred_convs.{kind}_{name}"
            x = F.conv2d(x, state[f"{layer}.weight"], state[f"{layer}.bias"], padding=1)
            parts.append(x[0].permute(1, 2, 0).reshape(-1, n))
        found.append(torch.cat(parts))
    return found


def attention_round(state, name, tokens, shifted):
    """Both streams (H, W, C) after intra and inter attention, window by window."""
    height, width, channels = tokens[0].shape
    h, w = height // 16, width // 16
    up, left = (h // 2, w // 2) if shifted else (0, 0)

    def attend(part, x, source):
        q, k, v = (
            value @ state[f"{name}.{part}.{key}_emb.weight"].T
            for key, value in (("q", x), ("k", source), ("v", source))
        )
        out = torch.zeros_like(x)
        for row, column in itertools.product(range(16), range(16)):
            # The places of a window of the shifted map, where they lie in the map itself.
            places = [
                ((row * h + a + up), (column * w + b + left))
                for a, b in itertools.product(range(h), range(w))
            ]
            beyond = torch.tensor([(r >= height) * 2 + (c >= width) for r, c in places])
            r, c = torch.tensor([(r % height, c % width) for r, c in places]).T
            logits = q[r, c] @ k[r, c].T / math.sqrt(channels)
            logits = logits - 100 * (beyond[:, None] != beyond[None])
            out[r, c] = logits.softmax(1) @ v[r, c]
        return normalise(f"{part}.norm", out @ state[f"{name}.{part}.fc.weight"].T)

    def normalise(key, x):
        weight, bias = state[f"{name}.{key}.weight"], state[f"{name}.{key}.bias"]
        return F.layer_norm(x, (channels,), weight, bias)

    renewed = []
    for own, other in (tokens, tokens[::-1]):
        own = own + attend("intra_attn", own, own)
        found = attend("inter_attn", own, other)
        hidden = torch.cat([own, found], -1) @ state[f"{name}.inter_attn.mlp.0.weight"].T
        hidden = F.gelu(hidden) @ state[f"{name}.inter_attn.mlp.2.weight"].T
        renewed.append(own + normalise("inter_attn.ffn_norm", hidden))
    return renewed


def tutorial(state, x):
    """(P, 4) offsets and (P, 2) logits of one normalised image x (1, C, 300, 300)."""

    def conv(x, name, **kwargs):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.conv2d(x, weight, bias, **kwargs).relu()

    for i, n in enumerate(BLOCKS, 1):
        for j in range(n):
            x = conv(x, f"base.conv{i}_{j + 1}", padding=1)
        if i == 4:
            conv4_3 = x
        x = F.max_pool2d(x, 2, ceil_mode=True) if i < 5 else F.max_pool2d(x, 3, 1, 1)
    x = conv(conv(x, "base.conv6", padding=6, dilation=6), "base.conv7")
    norm = conv4_3.square().sum(1, keepdim=True).sqrt()
    maps = [conv4_3 / norm * state["rescale_factors"], x]
    for i in range(8, 12):
        kwargs = {"stride": 2, "padding": 1} if i < 10 else {}
        maps.append(conv(conv(maps[-1], f"aux_convs.conv{i}_1"), f"aux_convs.conv{i}_2", **kwargs))
    return heads(state, TUTORIAL_HEADS, maps, 2)


def tutorial_priors():
    """(8732, 4) cxcywh fractions in the tutorial's order."""
    scales = (0.1, 0.2, 0.375, 0.55, 0.725, 0.9)
    few, many = (1.0, 2.0, 0.5), (1.0, 2.0, 3.0, 0.5, 0.333)
    priors = []
    for k, (side, ratios) in enumerate(
        zip((38, 19, 10, 5, 3, 1), (few, many, many, many, few, few), strict=True)
    ):
        for i, j in itertools.product(range(side), range(side)):
            cx, cy = (j + 0.5) / side, (i + 0.5) / side
            for ratio in ratios:
                root = math.sqrt(ratio)
                priors.append((cx, cy, scales[k] * root, scales[k] / root))
                if ratio == 1.0:
                    extra = math.sqrt(scales[k] * scales[k + 1]) if k < 5 else 1.0
                    priors.append((cx, cy, extra, extra))
    return torch.tensor(priors).clamp(0, 1)


def decode(offsets, priors):
    """Decode offsets to cxcywh boxes, as in the tutorial."""
    centre = offsets[:, :2] * priors[:, 2:] / 10 + priors[:, :2]
    return torch.cat([centre, (offsets[:, 2:] / 5).exp() * priors[:, 2:]], 1)


def random_state(names_and_shapes, seed=0):
    """Random tensors of given names and shapes, scaled so that features do not vanish."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in names_and_shapes.items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            value = torch.zeros(shape, dtype=torch.int64)
        elif name.endswith("rescale_factors"):
            value = 20 + value
        elif len(shape) > 1:
            value = value * math.sqrt(2 / math.prod(shape[1:]))
        elif name.endswith("bias") or name.endswith("running_mean"):
            value = value / 20
        else:
            value = 1 + value.clamp(-2, 2) / 4
        state[name] = value
    return state
