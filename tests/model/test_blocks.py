"""Blocks: weights for the kernels, initial values, recomputation, half precision."""

import pytest
import torch
import torch.nn.functional as F

from gigavim.model.config import VimConfig
from gigavim.model.registry import REGISTRY
from gigavim.model.vim import Vim
from gigavim_kernels.naive import causal_conv, selective_scan
from gigavim_kernels.weights import BlockWeights

VARIANTS = {
    "v2": {"bidirectional": "v2"},
    "v2-undivided": {"bidirectional": "v2", "divide_out": False},
    "v1": {"bidirectional": "v1"},
    "none": {"bidirectional": "none"},
    "layer-pairs": {"bidirectional": "layer_pairs", "depth": 4},
    "layer-pairs-odd": {"bidirectional": "layer_pairs", "depth": 5},
    "sizes": {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 7, "norm_eps": 1e-3},
}


def _model(**changes) -> Vim:
    settings = {"d_model": 24, "depth": 2, "patch_px": 8, "stride_px": 8, "grid_hw": (3, 3)}
    torch.manual_seed(7)
    model = Vim(VimConfig(**(settings | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _apply(weights: BlockWeights, stream: torch.Tensor) -> torch.Tensor:
    """What a BlockWeights means, step by step."""
    total = weights.stream_scale * stream
    for branch in weights.branches:
        normed = stream / (stream.pow(2).mean(-1, keepdim=True) + branch.norm_eps).sqrt()
        x, z = F.linear(normed * branch.norm_weight.double(), branch.in_proj.double()).chunk(2, -1)
        summed = 0
        for d in branch.directions:
            conv = d.conv_weight.double(), d.conv_bias.double()
            u = causal_conv(x, *conv, reverse=d.reverse_conv)
            rank, states = d.dt_weight.shape[1], d.A.shape[1]
            low, B, C = F.linear(u, d.x_proj.double()).split([rank, states, states], -1)
            dt = F.linear(low, d.dt_weight.double())
            skip, bias = d.D.double(), d.dt_bias.double()
            scanned = selective_scan(u, dt, d.A.double(), B, C, skip, z, bias, reverse=d.reverse)
            summed = summed + scanned.y
        total = total + F.linear(summed * branch.scale, branch.out_proj.double())
    return total


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("length", [1, 2, 37])
def test_weights_for_kernels_are_the_module(changes, length):
    model = _model(**changes)
    tokens = torch.randn(2, length, 24)
    stream = tokens.double()
    blocks = model.block_weights()
    for block in blocks:
        stream = _apply(block, stream)
    wanted = F.rms_norm(stream, (24,), model.norm_f.weight.double(), model.norm_f.eps)
    found = model.encode(tokens)
    assert found.dtype == torch.float32
    assert ((found - wanted).abs().max() / wanted.abs().max()).item() < 1e-5


def test_weights_for_kernels_are_copies_of_their_own():
    model = _model()
    before = model.block_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    branch = before[0].branches[0]
    tensors = [branch.norm_weight, branch.in_proj, branch.out_proj]
    for d in branch.directions:
        tensors += [d.conv_weight, d.conv_bias, d.x_proj, d.dt_weight, d.dt_bias, d.A, d.D]
    for tensor in tensors:
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert tensor.abs().max() > 0


def test_steps_start_in_a_plausible_range_in_both_directions():
    torch.manual_seed(0)
    mixer = Vim(REGISTRY["vim-nano"]).layers[3].mixer
    for name in ("dt_proj", "dt_proj_b"):
        steps = F.softplus(getattr(mixer, name).bias)
        assert 1e-4 <= steps.min() < 3e-3
        assert 0.03 < steps.max() <= 0.1001


def test_the_published_start_can_be_had():
    mixer = Vim(REGISTRY["vim-nano"], published_init=True).layers[3].mixer
    assert not mixer.dt_proj_b.bias.any()
    assert F.softplus(mixer.dt_proj.bias).max() <= 0.1001
    assert torch.allclose(mixer.A_b_log[5], torch.arange(1.0, 17).log())
    assert (mixer.D_b == 1).all()


def test_autocast_keeps_the_stream_in_float32_and_the_result_near():
    model = _model()
    tokens = torch.randn(1, 50, 24)
    wanted = model.encode(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found, taps = model.encode_with_taps(tokens)
    assert all(tap.stream.dtype == torch.float32 for tap in taps)
    assert (found - wanted).abs().max() < 0.1
    found.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.layers.parameters())


@pytest.mark.parametrize(
    ("name", "parameters", "without_head"),
    [
        ("vim-tiny", 7_148_008, 6_955_008),
        ("vim-tiny-stride8", 7_250_344, 7_057_344),
        ("vim-small", 25_796_584, 25_411_584),
        ("vim-small-stride8", 26_001_256, 25_616_256),
        ("vim-base", 97_598_440, 96_829_440),
    ],
)
def test_sizes_have_the_published_parameter_counts(name, parameters, without_head):
    with torch.device("meta"):
        model = Vim(REGISTRY[name])
    assert sum(p.numel() for p in model.parameters()) == parameters
    head = sum(p.numel() for p in model.head.parameters())
    assert parameters - head == without_head


def test_nano_has_about_a_million_parameters():
    with torch.device("meta"):
        model = Vim(REGISTRY["vim-nano"])
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 1.2e6


def test_state_dict_has_the_published_names():
    with torch.device("meta"):
        names = set(Vim(REGISTRY["vim-tiny"]).state_dict())
    assert len(names) == 415
    mixer = "A_log D A_b_log D_b in_proj.weight out_proj.weight dt_proj.weight dt_proj.bias"
    mixer += " conv1d.weight conv1d.bias x_proj.weight conv1d_b.weight conv1d_b.bias"
    mixer += " x_proj_b.weight dt_proj_b.weight dt_proj_b.bias"
    assert {f"layers.23.mixer.{name}" for name in mixer.split()} <= names
    others = "cls_token pos_embed norm_f.weight head.weight head.bias layers.0.norm.weight"
    assert set(others.split()) <= names
