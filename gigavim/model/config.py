"""The shape of a Vim encoder: every switch of the published code that changes its numbers."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from gigavim.errors import ModelError

ClassToken = Literal["none", "head", "middle", "double"]
Pooling = Literal["class", "mean", "max", "last"]
Bidirectional = Literal["v2", "v1", "none", "layer_pairs"]
HeadKind = Literal["linear", "fpn", "upernet", "segmenter"]
"""Decoders of segmentation models; see `gigavim.model.head_kinds`."""
Position = Literal["grid", "block", "sincos", "none"]

CLASS_TOKENS: dict[ClassToken, int] = {"none": 0, "head": 1, "middle": 1, "double": 2}
"""How many class tokens a sequence holds."""

_POSITIVE = ("d_model", "depth", "d_state", "d_conv", "expand", "patch_px", "stride_px")


@dataclass(frozen=True, slots=True)
class VimConfig:
    """Sizes and switches of a Vim encoder (arXiv 2401.09417 as published in code).

    Raises `ModelError` for values that make no model.
    """

    d_model: int
    depth: int
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    """Rank of the step size projection; ceil(d_model / 16) if absent."""
    patch_px: int = 16
    stride_px: int = 16
    """Distance of neighbouring patches; less than `patch_px` makes them overlap."""
    in_channels: int = 3
    class_token: ClassToken = "middle"
    pooling: Pooling = "class"
    """What the class logits are made from; "class" needs a class token, the others have none."""
    bidirectional: Bidirectional = "v2"
    divide_out: bool = True
    """Halve the sum of the two directions ("div2"); "v2" only, as published."""
    position: Position = "grid"
    """Learned over the whole grid, learned per block of the grid, fixed 2-D waves, or none."""
    grid_hw: tuple[int, int] = (14, 14)
    """(rows, cols) of the learned position table: the training grid, or one block."""
    token_um: float | None = None
    """Distance of neighbouring tokens in micrometres at the training resolution; "sincos" only."""
    norm_eps: float = 1e-5
    num_classes: int = 0
    """Outputs of the classification head; 0 leaves it out."""

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_switches()

    @property
    def d_inner(self) -> int:
        """Channels of the scan."""
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """`dt_rank` with its default filled in."""
        return self.dt_rank if self.dt_rank is not None else math.ceil(self.d_model / 16)

    @property
    def class_tokens(self) -> int:
        """Class tokens in a sequence."""
        return CLASS_TOKENS[self.class_token]

    def _check_sizes(self) -> None:
        for name in _POSITIVE:
            _require(_is_count(getattr(self, name), 1), name, getattr(self, name), "1 or more")
        _require(_is_count(self.in_channels, 1), "in_channels", self.in_channels, "1 or more")
        _require(_is_count(self.num_classes, 0), "num_classes", self.num_classes, "0 or more")
        if self.dt_rank is not None:
            _require(_is_count(self.dt_rank, 1), "dt_rank", self.dt_rank, "1 or more")
        grid_ok = isinstance(self.grid_hw, tuple) and len(self.grid_hw) == 2
        grid_ok = grid_ok and all(_is_count(side, 1) for side in self.grid_hw)
        _require(grid_ok, "grid_hw", self.grid_hw, "(rows, cols), each 1 or more")
        eps_ok = math.isfinite(self.norm_eps) and self.norm_eps > 0
        _require(eps_ok, "norm_eps", self.norm_eps, "a small positive number")
        stride_ok = self.stride_px <= self.patch_px
        _require(stride_ok, "stride_px", self.stride_px, f"at most patch_px ({self.patch_px})")

    def _check_switches(self) -> None:
        choices = {
            "class_token": ClassToken,
            "pooling": Pooling,
            "bidirectional": Bidirectional,
            "position": Position,
        }
        for name, kind in choices.items():
            allowed = get_args(kind)
            _require(getattr(self, name) in allowed, name, getattr(self, name), f"of {allowed}")
        if (self.pooling == "class") != (self.class_token != "none"):
            raise ModelError(
                f"a model with class_token={self.class_token!r} cannot have "
                f"pooling={self.pooling!r}: pooling 'class' goes with a class token, and only there"
            )
        if self.position == "sincos":
            um_ok = self.token_um is not None and 0 < self.token_um < math.inf
            _require(um_ok, "token_um", self.token_um, "a length, as position 'sincos' is in um")
            wide = self.d_model % 4 == 0
            _require(wide, "d_model", self.d_model, "a multiple of 4 for position 'sincos'")
        elif self.token_um is not None:
            raise ModelError(
                f"token_um has no meaning with position {self.position!r}: leave it out"
            )
        if self.bidirectional == "layer_pairs":
            _require(self.depth >= 2, "depth", self.depth, "2 or more with layer pairs")


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _require(ok: bool, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise ModelError(f"model setting {name} = {value!r} makes no sense: it must be {wanted}")
