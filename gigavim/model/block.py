"""The Vim block: RMSNorm and the bidirectional mixer, with the published parameter names."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigavim.model.config import VimConfig
from gigavim_kernels.chunked import selective_scan
from gigavim_kernels.naive import causal_conv
from gigavim_kernels.weights import BlockWeights, Branch, Direction

# Step sizes at initialisation: log-uniform in this range, never below the floor (arXiv 2312.00752).
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., width), in float32 where autocast has left less."""
        return F.rms_norm(full_precision(x), self.weight.shape, self.weight, self.eps)

    def bound(self) -> float:
        """No number that `forward` gives is larger, whatever it is given: of x^2 / mean(x^2) a
        single number has at most the whole width."""
        return math.sqrt(len(self.weight)) * float(self.weight.detach().abs().max())


class Mixer(nn.Module):
    """in_proj, one or two scans, gate, sum, out_proj.

    Sizes: D = d_model, E = d_inner, N = d_state, R = rank, K = d_conv.
    """

    A_log: Tensor
    D: Tensor
    A_b_log: Tensor
    D_b: Tensor

    def __init__(self, config: VimConfig, *, published_init: bool = False) -> None:
        super().__init__()
        self.config = config
        d_inner = config.d_inner
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=False)
        self._add_direction("")
        if config.bidirectional == "v2":
            self._add_direction("_b")
        elif config.bidirectional == "v1":
            self.A_b_log = nn.Parameter(self.A_log.detach().clone())
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=False)
        self._init_weights(published_init)

    def _add_direction(self, suffix: str) -> None:
        """Make one direction's parameters; the published names end in _b for the backward one."""
        config, d_inner = self.config, self.config.d_inner
        conv = nn.Conv1d(d_inner, d_inner, config.d_conv, groups=d_inner)
        self.add_module(f"conv1d{suffix}", conv)
        width = config.rank + 2 * config.d_state
        self.add_module(f"x_proj{suffix}", nn.Linear(d_inner, width, bias=False))
        self.add_module(f"dt_proj{suffix}", nn.Linear(config.rank, d_inner))
        states = torch.arange(1.0, config.d_state + 1).log().repeat(d_inner, 1)  # (E, N)
        self.register_parameter(f"A{suffix}_log", nn.Parameter(states))
        self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(d_inner)))

    @torch.no_grad()
    def _init_weights(self, published: bool) -> None:
        """Initialise steps and output; the published code leaves out the backward step's bias.

        It starts at softplus(0) = 0.69 there, 7 to 700 times the forward steps.
        """
        _init_step(self._linear("dt_proj"))
        if self.config.bidirectional == "v2":
            if published:
                self._linear("dt_proj_b").bias.zero_()
            else:
                _init_step(self._linear("dt_proj_b"))
        self.out_proj.weight /= math.sqrt(self.config.depth)

    def _linear(self, name: str) -> nn.Linear:
        module = self.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def directions(self) -> tuple[Direction, ...]:
        """Return the scans' weights, views of the parameters in their dtype."""
        forward = self._direction("", self.A_log, self.D, reverse=False)
        match self.config.bidirectional:
            case "v2":
                backward = self._direction("_b", self.A_b_log, self.D_b, reverse=True)
            case "v1":
                backward = self._direction("", self.A_b_log, self.D, reverse=True, conv=False)
            case _:
                return (forward,)
        return forward, backward

    def _direction(
        self, suffix: str, A_log: Tensor, D: Tensor, *, reverse: bool, conv: bool | None = None
    ) -> Direction:
        convolution = self.get_submodule(f"conv1d{suffix}")
        assert isinstance(convolution, nn.Conv1d)
        assert convolution.bias is not None
        step = self._linear(f"dt_proj{suffix}")
        return Direction(
            conv_weight=convolution.weight[:, 0],
            conv_bias=convolution.bias,
            x_proj=self._linear(f"x_proj{suffix}").weight,
            dt_weight=step.weight,
            dt_bias=step.bias,
            A=-torch.exp(A_log),
            D=D,
            reverse=reverse,
            reverse_conv=reverse if conv is None else conv,
        )

    @property
    def scale(self) -> float:
        """Factor on the sum of directions; the published code halves "v2" only."""
        return 0.5 if self.config.divide_out and self.config.bidirectional == "v2" else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens (B, L, D) along the sequence: returns (B, L, D)."""
        inner, gate = self.in_proj(x).chunk(2, -1)  # (B, L, E) each
        outputs = [_scan(direction, inner, gate) for direction in self.directions()]
        total = outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1]
        out: Tensor = self.out_proj(total * self.scale if self.scale != 1 else total)
        return out


class Block(nn.Module):
    """One layer: the branch Mixer(RMSNorm(stream)), which the encoder adds to the stream."""

    def __init__(self, config: VimConfig, *, published_init: bool = False) -> None:
        super().__init__()
        self.mixer = Mixer(config, published_init=published_init)
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, stream: Tensor) -> Tensor:
        """Compute the branch (B, L, D) of a stream (B, L, D), in the stream's dtype."""
        branch: Tensor = self.mixer(self.norm(stream))
        return branch.to(stream.dtype)

    def branch(self, *, flipped: bool = False) -> Branch:
        """Return the weights as float32 tensors of their own; `flipped` runs it end to start."""
        return Branch(
            norm_weight=_plain(self.norm.weight),
            norm_eps=self.norm.eps,
            in_proj=_plain(self.mixer.in_proj.weight),
            out_proj=_plain(self.mixer.out_proj.weight),
            directions=tuple(_plain_direction(d, flipped) for d in self.mixer.directions()),
            scale=self.mixer.scale,
        )

    def block_weights(self) -> BlockWeights:
        """Return the weights of the layer as a block of one branch."""
        return BlockWeights((self.branch(),))


def pair_weights(first: Block, second: Block) -> BlockWeights:
    """Return two layers of "layer_pairs" as one block: both see one stream, the second flipped.

    Their streams are summed too, so that the pair doubles it (Vim's `if_bidirectional`).
    """
    return BlockWeights((first.branch(), second.branch(flipped=True)), stream_scale=2.0)


def _scan(direction: Direction, inner: Tensor, gate: Tensor) -> Tensor:
    """Run one direction on (B, L, E) with its gate: returns (B, L, E), the scan in float32."""
    u = causal_conv(
        inner, direction.conv_weight, direction.conv_bias, reverse=direction.reverse_conv
    )
    rank, states = direction.dt_weight.shape[1], direction.states
    low = F.linear(u, direction.x_proj)
    dt_low, B, C = low[..., :rank], low[..., rank : rank + states], low[..., rank + states :]
    dt = F.linear(dt_low, direction.dt_weight)  # (B, L, E), before bias and softplus
    return selective_scan(
        full_precision(u),
        full_precision(dt),
        direction.A,
        full_precision(B),
        full_precision(C),
        direction.D,
        full_precision(gate),
        direction.dt_bias,
        reverse=direction.reverse,
    ).y


def _init_step(linear: nn.Linear) -> None:
    """Initialise a step size projection so that softplus(bias) is a plausible step."""
    nn.init.uniform_(linear.weight, -(linear.in_features**-0.5), linear.in_features**-0.5)
    low, high = math.log(DT_MIN), math.log(DT_MAX)
    step = torch.empty_like(linear.bias).uniform_(low, high).exp().clamp(min=DT_FLOOR)
    linear.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


def full_precision(x: Tensor) -> Tensor:
    """Lift the half precisions that autocast leaves to float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _plain(x: Tensor) -> Tensor:
    return x.detach().float().clone(memory_format=torch.contiguous_format)


def _plain_direction(direction: Direction, flipped: bool) -> Direction:
    return Direction(
        conv_weight=_plain(direction.conv_weight),
        conv_bias=_plain(direction.conv_bias),
        x_proj=_plain(direction.x_proj),
        dt_weight=_plain(direction.dt_weight),
        dt_bias=_plain(direction.dt_bias),
        A=_plain(direction.A),
        D=_plain(direction.D),
        reverse=direction.reverse != flipped,
        reverse_conv=direction.reverse_conv != flipped,
    )
