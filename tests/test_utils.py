"""Average precision of masks, the choice of devices, and what is compiled."""

import math

import numpy as np
import pytest
import torch

from utils import average_precision, choose_device, compile_model, make_deterministic, margin_histogram


def as_logits(margins):
    margins = torch.tensor(margins).view(1, 1, 1, -1)
    return torch.cat([torch.zeros_like(margins), margins], dim=1)


def test_average_precision_by_hand():
    """Persons are at ranks 1 and 3 of four cells; an ignored cell has the highest logit."""
    mask = torch.tensor([[[1, 0, 1, 0, -1]]])
    cells = margin_histogram(as_logits([3.0, 2.0, 1.0, -1.0, 9.0]), mask)
    assert cells.sum(1).tolist() == [2, 2]
    assert average_precision(cells) == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert math.isnan(average_precision(margin_histogram(as_logits([1.0]), torch.tensor([[[0]]]))))
    broken = margin_histogram(as_logits([math.nan, math.inf, -math.inf]), torch.tensor([[[1, 0, 0]]]))
    assert broken.sum(1).tolist() == [2, 1] and average_precision(broken) == pytest.approx(1 / 2)


def test_average_precision_needs_no_cell_above_one_half():
    """With few person cells, a good ranking may have no probability above 0.5."""
    g = torch.Generator().manual_seed(0)
    mask = (torch.rand(8, 38, 38, generator=g) < 0.01).long()
    margin = torch.randn(8, 38, 38, generator=g) - 8 + 3 * mask
    ap = average_precision(margin_histogram(torch.stack([-margin / 2, margin / 2], dim=1), mask))
    order = np.argsort(-margin.flatten().numpy(), kind="stable")
    hits = mask.flatten().numpy()[order]
    exact = (np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits == 1].mean()
    assert (margin < 0).all() and 0.3 < exact < 0.9 and ap == pytest.approx(exact, abs=0.01)
    shuffled = mask.flatten()[torch.randperm(mask.numel(), generator=g)].view_as(mask)
    chance = average_precision(margin_histogram(torch.stack([-margin / 2, margin / 2], dim=1), shuffled))
    assert chance < 0.04


def test_each_process_has_its_gpu_and_cudnn_is_deterministic_on_request(monkeypatch):
    """With a fake GPU. cuDNN benchmarking, which may choose other kernels each time, is off."""
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert str(choose_device("cuda:1")) == "cuda:1" and not torch.backends.cudnn.benchmark
    assert str(choose_device("cuda:1", training=True)) == "cuda:1" and torch.backends.cudnn.benchmark
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(choose_device("cuda")) == "cuda:3" and [*map(str, taken)] == ["cuda:1", "cuda:1", "cuda:3"]
    make_deterministic()
    try:
        choose_device("cuda", training=True)
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)


def test_sync_batch_norm_is_not_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: "compiled")
    plain, synced = torch.nn.BatchNorm2d(1), torch.nn.SyncBatchNorm(1)
    assert compile_model(plain, "on") == "compiled"
    assert compile_model(plain, "off") is plain and compile_model(synced, "on") is synced
