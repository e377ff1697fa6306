"""The training step and detection on fake CUDA tensors, for each setting in the lab book; no GPU is needed.

A fake tensor has a shape, a dtype and a device, but no values. A step fails here if it mixes tensors of
two devices, or if the host would wait for the GPU: to read a value, to get a shape from values, or to
copy between host and device without `non_blocking`.

Not traced: autograd's engine, which needs a driver (`backward` walks the same nodes instead), the kernels
of the fused optimisers (their arguments must be on one device), and the numbers of candidates and boxes
of an image, for which detection does wait. Autocast is traced; values and rounding are not.
"""

import copy
from argparse import Namespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorDeviceMismatchError,
)
from torch.utils._pytree import tree_leaves

import datasets
from engine.config import ROOT, model_arguments, pick, read_constants, resolve_row
from engine.experiments import EXPERIMENTS
from engine.optim import GuardedStep, make_optimizer, update_ema
from model import INPUT_CHANNELS, make_network
from pseudo_gt import box_masks
from ssd import boxes as ssd_boxes
from ssd.losses import CRITERION_KEYS, Criterion
from tests.fake_cuda import CUDA, FusedKernels, backward, fake_cuda, on_fake_cuda
from utils import autocast, margin_histogram, predict

N, M = 2, 8
ssd_boxes.load_nms()  # registers the operator
CONSTANTS = {name: value for name, (value, _) in read_constants(ROOT / "train.py").items()}
# Constants on which the traced operations depend.
NETWORK = ("network", "input_mode", "batch_norm", "infusion", "infusion_conv")
TRAINING = (*NETWORK, *CRITERION_KEYS, "optimizer", "ema_decay")
DETECTION = (*NETWORK, "input_size", "priors", "centres", "test_flip")


class HostWaits(RuntimeError):
    """The host would wait for the device."""


class Watch(FusedKernels):
    """Raises HostWaits at a blocking copy between host and device; records the dtypes of convolutions."""

    def __init__(self):
        super().__init__()
        self.convolutions = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.torchvision.nms.default:  # the number of boxes kept depends on values
            return torch.arange(len(args[0]), device=args[0].device)
        if func is torch.ops.aten.convolution.default:
            self.convolutions.add(args[0].dtype)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        blocking = not kwargs.get("non_blocking", False)
        if func is torch.ops.aten._to_copy.default and args[0].device != out.device and blocking:
            raise HostWaits(f"a copy of {tuple(out.shape)} from {args[0].device} to {out.device}")
        if func is torch.ops.aten.copy_.default and args[0].device != args[1].device and not any(args[2:]):
            raise HostWaits(f"a copy of {tuple(out.shape)} from {args[1].device} to {args[0].device}")
        return out


def configuration(row, **changes):
    values = CONSTANTS | resolve_row(row) | {"width": 0.03} | changes
    return Namespace(**values)


def random_batch(model, config):
    """A batch as workers make it on the host, sent to the device as `train_epoch` sends it."""
    size = (N, INPUT_CHANNELS[config.input_mode], *config.input_size)
    images = torch.empty(size, dtype=torch.uint8)
    boxes, labels = torch.rand(N, M, 4), torch.ones(N, M, dtype=torch.int64)
    masks = box_masks(boxes, labels, [model.grids[i] for i in model.infused_maps])
    with Watch():
        batch = datasets.Batch(images, boxes, labels, masks, ["frame"] * N).to(CUDA)
    assert all(tensor.is_cuda for tensor in tree_leaves(batch[:4]))
    return batch


def parts_of(config):
    """Network and criterion of a configuration on fake CUDA; the network is traced at `width`."""
    with torch.device("meta"):
        model = make_network(**model_arguments(config))
        heads = (model.priors, model.grids, model.infused_maps, model.n_logits)
        criterion = Criterion(*heads, **pick(config, *CRITERION_KEYS))
    joined = on_fake_cuda(nn.ModuleList([model, criterion]))  # they share the priors
    return joined[0], joined[1]


def training_step(config, precision, model, criterion):
    """Trace the second training step; the first one, which may read a value, is not traced."""
    batch = random_batch(model, config)
    ema = copy.deepcopy(model).requires_grad_(False) if config.ema_decay else model
    steps = pick(config, "lr", "bias_lr_factor", "weight_decay")
    optimizer = make_optimizer(model, criterion, name=config.optimizer, **steps)
    guarded_step = GuardedStep(model.train(), optimizer)
    for parameter in (*model.parameters(), *criterion.parameters()):
        parameter.grad = torch.empty_like(parameter)
    with FusedKernels():
        optimizer.step()  # creates the momentum
    optimizer.zero_grad()
    with Watch() as watch:
        guarded_step.save_statistics()
        with autocast(CUDA, precision):
            predictions = model(batch.images)
        losses = criterion(predictions, batch.boxes, batch.labels, batch.masks)
        backward([losses[0]])
        finite = guarded_step(losses.detach())
        update_ema(ema, model, config.ema_decay, 5)
        recorded = torch.stack([losses.detach(), losses.detach()])
    assert recorded.shape == (2, len(criterion.terms)) and recorded.dtype == torch.float32
    assert recorded.is_cuda and finite.is_cuda
    assert watch.convolutions == {precision}
    for name, parameter in (*model.named_parameters(), *criterion.named_parameters()):
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name
        assert parameter.grad.dtype == torch.float32 and parameter.grad.is_cuda, name


def detection(config, precision, model, monkeypatch):
    """Trace detection in a batch as in `detect_frames`, with 50 candidates per image."""
    batch = random_batch(model, config)
    monkeypatch.setattr(ssd_boxes, "load_nms", lambda: torch.ops.torchvision.nms)
    with torch.no_grad(), Watch() as watch:
        predictions = predict(model.eval(), batch.images, precision, config.test_flip, with_masks=True)
        for logits, mask in zip(predictions.seg, batch.masks, strict=True):
            assert margin_histogram(logits, mask).is_cuda
        with monkeypatch.context() as patch:
            patch.setattr(FakeTensor, "tolist", lambda self: [50] * len(self))
            limits = pick(config, "min_score", "nms_iou", "max_boxes")
            found = ssd_boxes.detect(predictions, model.priors, **limits)
    assert watch.convolutions == {precision}
    assert [(b.shape, s.shape) for b, s in found] == [((50, 4), (50,))] * N
    assert all(t.is_cuda for t in tree_leaves(found))


def distinct_rows(names):
    """A small set of rows that covers, for each network, every value of these constants."""
    left = {}
    for row in EXPERIMENTS:
        config = configuration(row)
        left[row] = {(config.network, *item) for item in pick(config, *names).items()}
    chosen = []
    while any(left.values()):
        chosen.append(max(left, key=lambda row: len(left[row])))
        seen = left[chosen[-1]]
        left = {row: values - seen for row, values in left.items()}
    return chosen


@pytest.mark.parametrize("row", distinct_rows(TRAINING))
def test_training_does_not_wait_or_mix_devices(row):
    config = configuration(row)
    with fake_cuda():
        training_step(config, torch.bfloat16, *parts_of(config))


@pytest.mark.parametrize("row", distinct_rows(DETECTION))
def test_detection_does_not_wait_or_mix_devices(row, monkeypatch):
    config = configuration(row)
    with fake_cuda():
        detection(config, torch.bfloat16, parts_of(config)[0], monkeypatch)


class ReadInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float(gradient)


class TwoDevicesInBackward(ReadInBackward):
    @staticmethod
    def backward(ctx, gradient):
        return (gradient.expand(3) + torch.ones(3)).sum()


# What a loss goes through, and what is printed of it.
FAULTS = {
    "two devices": (lambda x: (x.expand(3) + torch.ones(3)).sum(), FakeTensorDeviceMismatchError),
    "two devices in backward": (TwoDevicesInBackward.apply, FakeTensorDeviceMismatchError),
    "a value read": (lambda x: x * x.item(), DataDependentOutputException),
    "a value branched on": (lambda x: x if x > 0 else -x, DataDependentOutputException),
    "a value read in backward": (ReadInBackward.apply, DataDependentOutputException),
    "a shape from values": (lambda x: x.expand(3)[x.expand(3) > 0].sum(), DynamicOutputShapeException),
    "a copy to the host": (lambda x: x + x.detach().cpu().to(CUDA, non_blocking=True), HostWaits),
    "a copy to the device": (lambda x: x + torch.zeros(()).to(CUDA), HostWaits),
    "numbers sent to the device": (lambda x: x * x.new_tensor([1.0, 2.0]).sum(), HostWaits),
    "a copy into the device's memory": (lambda x: x + torch.empty_like(x).copy_(torch.ones(())), HostWaits),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    config = configuration("demo", input_size=(257, 257))
    function, error = FAULTS[fault]
    with fake_cuda():
        model, criterion = parts_of(config)
        sound = criterion.multibox.forward

        def faulty(*arguments):
            loc, conf = sound(*arguments)
            return function(loc), conf

        monkeypatch.setattr(criterion.multibox, "forward", faulty)
        with pytest.raises(error):
            training_step(config, torch.bfloat16, model, criterion)


def test_a_buffer_left_on_the_host_is_found():
    config = configuration("demo", input_size=(257, 257))
    with fake_cuda():
        model, criterion = parts_of(config)
        criterion.multibox.priors = torch.empty(criterion.multibox.priors.shape)
        with pytest.raises(FakeTensorDeviceMismatchError):
            training_step(config, torch.bfloat16, model, criterion)


def test_convolutions_that_autocast_misses_are_found():
    config = configuration("demo", input_size=(257, 257))
    with fake_cuda(), pytest.raises(AssertionError):
        model, criterion = parts_of(config)
        model.to_conv4_3[0].forward = torch.autocast("cuda", enabled=False)(model.to_conv4_3[0].forward)
        training_step(config, torch.bfloat16, model, criterion)


# ------------------------------------------------------------------------ the walk through the graph


def test_the_walk_gives_the_gradients_of_autograd():
    """On a CPU, with values."""
    config = configuration("29", input_size=(257, 257))
    torch.manual_seed(0)
    model = make_network(**model_arguments(config)).train()
    heads = (model.priors, model.grids, model.infused_maps, model.n_logits)
    criterion = Criterion(*heads, **pick(config, *CRITERION_KEYS))
    images = torch.randint(256, (2, INPUT_CHANNELS[config.input_mode], 257, 257), dtype=torch.uint8)
    boxes, labels = torch.tensor([[[0.2, 0.2, 0.4, 0.8]]] * 2), torch.ones(2, 1, dtype=torch.int64)
    masks = box_masks(boxes, labels, [model.grids[i] for i in model.infused_maps])
    parameters = [*model.parameters(), *criterion.parameters()]
    loss = criterion(model(images), boxes, labels, masks)[0]
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    backward([loss], torch.device("cpu"))
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
