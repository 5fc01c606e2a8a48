"""The encoder's forward pass for training, on the fastest kernels that have gradients.

On a CPU the decay rates of a channel's states stay tied, A_n = n A_1, as they are initialised: a
single exponential per channel and token then serves all sixteen states.
"""

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from gigavim.model.block import Block
from gigavim.model.config import VimConfig
from gigavim.model.heads import Part, stitch
from gigavim.model.segmentation import SegmentationModel
from gigavim.model.vim import OnStream, Vim
from gigavim.model.windows import Window, windows
from gigavim_kernels.backends import backend_name
from gigavim_kernels.naive import spread_rates

log = logging.getLogger(__name__)

SLIDE_TOKENS = 16_384
"""Side of the ground over which canvases are strewn, where positions are in micrometres."""


class LayerKernel(NamedTuple):
    """What adds a layer to the stream, with gradients."""

    add: Callable[[Block, Tensor, Tensor | None, bool, int | None], Tensor]
    """(layer, stream (B, L, D), keep (B,) or None, tied, chunk) to the stream with the layer's
    branch, times keep, added."""
    recomputes: bool = False
    """Whether it keeps nothing for the gradients but the stream."""
    ties: bool = False
    """Whether the decay rates of a channel's states are tied, asked or not."""


def encode(
    encoder: Vim,
    tokens: Tensor,
    *,
    every: int = 1,
    drop_path: float = 0.0,
    generator: Generator | None = None,
    recompute: bool = False,
    tied: bool = False,
    on_stream: OnStream | None = None,
    stops: Collection[int] = (),
    group: int = 1,
    chunk: int | None = None,
) -> Tensor:
    """Return what `encoder.encode` returns for sequences (B, L, D), with gradients.

    Args:
        every: use every n-th layer only, for the cheap first part of a training.
        drop_path: the rate at which a sequence skips the last layer; less for earlier ones.
        generator: draws the layers that are skipped, on the device of the tokens.
        recompute: keep only the stream before each layer, and compute the rest once more in the
            backward pass; GPUs always do.
        tied: keep the decay rates of a channel's states in the ratio 1 : 2 : ... : N, which CPUs
            scan much faster; on a CPU they are always kept so.
        on_stream: as of `encoder.encode`; what layers are left out is not skipped in its count.
        stops: the counts that `on_stream` must be told of where layers are grouped.
        group: keep only the stream before every so many layers, or fewer at stops, and compute the
            rest twice more in the backward pass; `on_stream` is told at the ends of groups.
        chunk: tokens of a layer at once, on GPUs; by size if absent.
    """
    config = encoder.config
    kernel = layer_kernel(tokens.device, config.d_state, config.d_model, tied)

    def added(layer: Block, stream: Tensor, keep: Tensor | None) -> Tensor:
        if recompute and torch.is_grad_enabled() and not kernel.recomputes:
            again = checkpoint(kernel.add, layer, stream, keep, tied, chunk, use_reentrant=False)
            return cast(Tensor, again)
        return kernel.add(layer, stream, keep, tied, chunk)

    paired = config.bidirectional == "layer_pairs"
    layers = cast(list[Block], list(encoder.layers))
    blocks = len(layers) // (1 + paired)
    firsts = range(0, blocks * (1 + paired), (1 + paired) * every)
    steps = [layers[i : i + 1 + paired] for i in firsts]
    keeps = (
        [None] * len(steps)
        if drop_path <= 0 or not torch.is_grad_enabled()
        else [
            _kept(tokens, drop_path * place / max(1, len(steps) - 1), generator)
            for place in range(len(steps))
        ]
    )

    def run(stream: Tensor, places: range) -> Tensor:
        for place in places:
            step, keep = steps[place], keeps[place]
            if paired:  # both see one stream, the second from its end, and their sums are added
                flipped = added(step[1], stream.flip(1), keep).flip(1)
                stream = added(step[0], stream, keep) + flipped
            else:
                stream = added(step[0], stream, keep)
        return stream

    tell: OnStream = on_stream or (lambda done, stream: None)
    stream = tokens
    tell(0, stream)
    for places in _groups(len(steps), group, every, stops):
        if len(places) > 1 and torch.is_grad_enabled():
            again = checkpoint(run, stream, places, use_reentrant=False, preserve_rng_state=False)
            stream = cast(Tensor, again)
        else:
            stream = run(stream, places)
        for done in range(places[-1] * every, min(places.stop * every, blocks)):
            tell(done + 1, stream)
    return cast(Tensor, encoder.norm_f(stream))


def decode(model: SegmentationModel, grid: Tensor, strip_rows: int | None = None) -> Tensor:
    """Do as `model.logits` does; with `strip_rows` a strip at a time, computed again backwards.

    Args:
        grid: (B, rows, cols, feature_width).
    """
    if strip_rows is None or not torch.is_grad_enabled():
        return model.logits(grid)
    head, (rows, cols) = model.head, grid.shape[1:3]
    context = head.survey_grid(grid)

    def strip(seen: Tensor, window: Window, context: Tensor | None) -> Tensor:
        part = Part(window.top_seen, window.left_seen, (rows, cols), context)
        return head.decode(seen, None, part)[:, *window.inner]

    strips = []
    for top in range(0, rows, strip_rows):
        whole = (top, min(top + strip_rows, rows))
        for window in windows(whole, (rows, cols), halo=head.halo, cols_at_once=cols):
            seen = grid[:, *window.seen]
            again = checkpoint(
                strip, seen, window, context, use_reentrant=False, preserve_rng_state=False
            )
            strips.append(cast(Tensor, again))
    logits = torch.cat(strips, 1)
    return stitch(logits.flatten(1, 2), (rows, cols), model.encoder.config.stride_px)


def random_origin(
    config: VimConfig, device: torch.device, generator: Generator | None
) -> Tensor | tuple[float, float]:
    """Where the corner of a batch's canvases lies, (x, y) um, for positions in micrometres.

    Somewhere on a slide: canvases are small, and places far from the corner would be new to a model
    that had only seen canvases. Without a generator it is the corner.
    """
    if config.token_um is None or generator is None:
        return (0.0, 0.0)
    drawn = torch.rand(2, generator=generator, device=device, dtype=torch.float64)
    return drawn * (SLIDE_TOKENS * config.token_um)


def _kept(tokens: Tensor, rate: float, generator: Generator | None) -> Tensor | None:
    """Which sequences a layer is used for, as factors (B,); None for all."""
    if rate <= 0:
        return None
    draw = torch.rand(len(tokens), generator=generator, device=tokens.device)
    return (draw >= rate) / (1 - rate)


def _groups(steps: int, group: int, every: int, stops: Collection[int]) -> Iterator[range]:
    """Cut so many steps of `every` layers into groups that end where `stops` says, too."""
    start = 0
    for end in range(1, steps + 1):
        told = range((end - 1) * every + 1, end * every + 1)
        if end - start == group or end == steps or any(stop in told for stop in stops):
            yield range(start, end)
            start = end


@cache
def layer_kernel(device: torch.device, states: int, d_model: int, tied: bool) -> LayerKernel:
    """Choose the kernels for a device; where there are none, the model's own plain torch."""
    if device.type == "cpu" and states == 16 and d_model % 8 == 0:
        if backend_name(device) == "numba":
            return LayerKernel(_add_on_cpu, ties=True)
    elif device.type == "cuda" and backend_name(device) == "triton":
        from gigavim_kernels import selftest

        check = selftest.check_branch(device, d_model, states, tied=tied)
        if check.ok:
            return LayerKernel(_add_on_gpu, recomputes=True)
        log.warning(
            "%s: off by %.1e on %s: plain torch trains, ten times slower",
            check.name,
            check.error,
            torch.cuda.get_device_name(device),
        )
    return LayerKernel(_add_plainly)


def tied_rate(A: Tensor) -> Tensor:
    """Fit rate (E,) such that A (E, N) is about n * rate; the states share its gradient."""
    ratio = spread_rates(A.new_ones(1), A.shape[1])
    return -torch.exp(torch.log(-A / ratio).mean(1))


@torch.no_grad()
def silence_odd_layers(encoder: Vim) -> None:
    """Let every second layer add nothing at first, so that it can join a trained encoder later."""
    for layer in list(encoder.layers)[1::2]:
        cast(Block, layer).mixer.out_proj.weight.zero_()


def _add_plainly(
    layer: Block, stream: Tensor, keep: Tensor | None, _tied: bool, _chunk: int | None
) -> Tensor:
    branch = cast(Tensor, layer(stream))
    return stream + (branch if keep is None else branch * keep[:, None, None])


def _add_on_gpu(
    layer: Block, stream: Tensor, keep: Tensor | None, tied: bool, chunk: int | None
) -> Tensor:
    from gigavim_kernels.cuda.branch import vim_branch
    from gigavim_kernels.cuda.directions import stack

    mixer = layer.mixer
    directions = mixer.directions()
    if tied:
        directions = tuple(replace(d, A=tied_rate(d.A)[:, None]) for d in directions)
    out_proj = mixer.out_proj.weight
    return vim_branch(
        stream.float(),
        layer.norm.weight,
        layer.norm.eps,
        mixer.in_proj.weight,
        out_proj * mixer.scale if mixer.scale != 1 else out_proj,
        stack(directions),
        keep=keep,
        half=torch.is_autocast_enabled(stream.device.type),
        chunk=chunk,
    )


def _add_on_cpu(
    layer: Block, stream: Tensor, keep: Tensor | None, _tied: bool, _chunk: int | None
) -> Tensor:
    from gigavim_kernels.cpu.training import scan as kernels

    mixer = layer.mixer
    inner, gate = mixer.in_proj(layer.norm(stream)).chunk(2, -1)  # (B, L, E) each
    total = stream.new_zeros(())
    for d in mixer.directions():
        u = kernels.causal_conv(inner, d.conv_weight, d.conv_bias, reverse=d.reverse_conv)
        rank, states = d.dt_weight.shape[1], d.A.shape[1]
        low, B, C = torch.split(F.linear(u, d.x_proj), [rank, states, states], -1)
        dt = F.linear(low, d.dt_weight)
        total = total + kernels.selective_scan(
            u, dt, tied_rate(d.A), B, C, d.D, gate, d.dt_bias, reverse=d.reverse
        )
    branch: Tensor = mixer.out_proj(total * mixer.scale if mixer.scale != 1 else total).to(
        stream.dtype
    )
    return stream + (branch if keep is None else branch * keep[:, None, None])
