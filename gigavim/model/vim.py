"""Vim: images to one token sequence, through the blocks, to features and logits."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gigavim.errors import ModelError
from gigavim.model.block import Block, RMSNorm, full_precision, pair_weights
from gigavim.model.config import VimConfig
from gigavim.model.embed import PatchEmbed
from gigavim.model.position import (
    LONGEST_TOKENS,
    SHORTEST_TOKENS,
    block_position,
    grid_position,
    split_table,
    wave_position,
)
from gigavim.model.sequence import class_slots, insert_class_tokens
from gigavim.tokens.order import ScanOrder, scan_cells
from gigavim_kernels.weights import BlockWeights

OnStream = Callable[[int, Tensor], None]
"""Told how many blocks are done, and the stream (B, L, D) then."""


class LayerTap(NamedTuple):
    """What a layer sees and adds; the second of "layer_pairs" sees the sequence end to start."""

    stream: Tensor
    """(B, L, D) before the layer."""
    branch: Tensor
    """(B, L, D) the mixer's output."""


class Vim(nn.Module):
    """The encoder, with the parameter names of the published code.

    Args:
        config: sizes and switches.
        published_init: initialise exactly as the published code, backward step sizes included.
        checkpoint_blocks: recompute each block in the backward pass instead of storing it.
    """

    pos_embed: Tensor
    cls_token: Tensor
    cls_token_head: Tensor
    cls_token_tail: Tensor

    def __init__(
        self, config: VimConfig, *, published_init: bool = False, checkpoint_blocks: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = checkpoint_blocks
        self.patch_embed = PatchEmbed(config)
        for name in _class_token_names(config):
            self.register_parameter(name, _small(1, 1, config.d_model))
        if config.position in ("grid", "block"):
            slots = config.grid_hw[0] * config.grid_hw[1] + config.class_tokens
            self.register_parameter("pos_embed", _small(1, slots, config.d_model))
        self.layers = nn.ModuleList(
            Block(config, published_init=published_init) for _ in range(config.depth)
        )
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.num_classes) if config.num_classes else None
        if self.head is not None:
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, *, order: ScanOrder | None = None) -> Tensor:
        """Classify normalised images (B, C, H, W): returns logits (B, num_classes).

        Without a classification head: the pooled features (B, D).
        """
        return self.classify(self.encode(self.tokens(images, order=order)))

    def classify(self, encoded: Tensor) -> Tensor:
        """Reduce final-normed tokens (B, L, D) to logits, or features where there is no head."""
        if self.head is None:
            return self.pool(encoded)
        if self.config.pooling == "max":  # as published: over the tokens' logits
            return cast(Tensor, self.head(encoded)).amax(1)
        return cast(Tensor, self.head(self.pool(encoded)))

    def tokens(
        self,
        images: Tensor,
        *,
        order: ScanOrder | None = None,
        origin_um: tuple[float, float] | Tensor = (0.0, 0.0),
        position: Tensor | None = None,
    ) -> Tensor:
        """Embed normalised images (B, C, H, W) as sequences (B, L, D), class tokens and all.

        Args:
            order: in which patches stand; row by row if absent.
            origin_um: (x, y) by which "sincos" places are shifted.
            position: what `patch_positions` returns, where it is known already.
        """
        if min(images.shape[-2:]) < self.config.patch_px:
            raise ModelError(
                f"an image of {images.shape[-1]} x {images.shape[-2]} px is smaller than "
                f"the model's patch of {self.config.patch_px} px"
            )
        grid = self.patch_embed(images)  # (B, rows, cols, D)
        rows, cols = grid.shape[1:3]
        patches = grid.flatten(1, 2)
        if order is not None:
            patches = patches[:, grid_cells(rows, cols, order, grid.device)]
        if position is None:
            position = self.patch_positions((rows, cols), order, origin_um=origin_um)
        own = self.class_rows().expand(len(images), -1, -1)
        return insert_class_tokens(patches + full_precision(position), own, self.config.class_token)

    def patch_positions(
        self,
        grid_hw: tuple[int, int],
        order: ScanOrder | None = None,
        *,
        origin_um: tuple[float, float] | Tensor = (0.0, 0.0),
    ) -> Tensor:
        """Return the position embedding (rows * cols, D) of a full grid's patches in scan order.

        Args:
            grid_hw: (rows, cols) of the grid.
            order: in which patches stand; row by row if absent.
            origin_um: (x, y) added to places of "sincos".
        """
        rows, cols = grid_hw
        cells = grid_cells(rows, cols, order, self.norm_f.weight.device)
        return self.position(cells // cols, cells % cols, grid_hw, origin_um=origin_um)

    def position(
        self,
        row: Tensor,
        col: Tensor,
        grid_hw: tuple[int, int],
        *,
        origin_um: tuple[float, float] | Tensor = (0.0, 0.0),
    ) -> Tensor:
        """Return the position embedding (n, D) of cells (row, col), (n,) int64 each, of a grid.

        Args:
            row, col: any cells, in any order.
            grid_hw: (rows, cols) of the whole grid.
            origin_um: (x, y) added to places of "sincos", a tensor (2,) too; random in training,
                zero for a slide.
        """
        config = self.config
        if config.position == "none":
            return self.norm_f.weight.new_zeros(len(row), config.d_model)
        if config.position == "sincos":
            assert config.token_um is not None
            y_um = (row.double() + 0.5) * config.token_um + origin_um[1]
            x_um = (col.double() + 0.5) * config.token_um + origin_um[0]
            shortest, longest = config.token_um * SHORTEST_TOKENS, config.token_um * LONGEST_TOKENS
            return wave_position(y_um, x_um, config.d_model, shortest, longest)
        table, _ = split_table(self.pos_embed, config.class_token)
        if config.position == "block":
            return block_position(table, config.grid_hw, row, col)
        return grid_position(table, config.grid_hw, row, col, grid_hw)

    def class_rows(self) -> Tensor:
        """Return the class tokens with their positions, (k, D) in order of place."""
        names = _class_token_names(self.config)
        if not names:
            return self.norm_f.weight.new_zeros(0, self.config.d_model)
        own = torch.cat([getattr(self, name)[0] for name in names])
        if self.config.position in ("grid", "block"):
            own = own + split_table(self.pos_embed, self.config.class_token)[1]
        return own

    def encode(self, tokens: Tensor, *, on_stream: OnStream | None = None) -> Tensor:
        """Run the blocks and the final norm over sequences (B, L, D): returns (B, L, D).

        Args:
            on_stream: called with 0 and the tokens, then with the number of blocks done and the
                stream (B, L, D) after each; "layer_pairs" are one block.
        """
        return self._run(tokens, None, on_stream)

    def encode_with_taps(self, tokens: Tensor) -> tuple[Tensor, list[LayerTap]]:
        """Do as `encode` does and return what every layer saw and added."""
        taps: list[LayerTap] = []
        return self._run(tokens, taps, None), taps

    def _run(
        self, stream: Tensor, taps: list[LayerTap] | None, on_stream: OnStream | None
    ) -> Tensor:
        notify: OnStream = on_stream or (lambda place, stream: None)
        notify(0, stream)
        if self.config.bidirectional == "layer_pairs":
            for place, (first, second) in enumerate(self._pairs()):
                along = self._branch(first, stream, taps)
                against = self._branch(second, stream.flip(1), taps).flip(1)
                stream = 2 * stream + along + against
                notify(place + 1, stream)
        else:
            for place, layer in enumerate(self.layers):
                stream = stream + self._branch(layer, stream, taps)
                notify(place + 1, stream)
        return cast(Tensor, self.norm_f(stream))

    def _branch(self, layer: nn.Module, stream: Tensor, taps: list[LayerTap] | None) -> Tensor:
        if self.checkpoint_blocks and torch.is_grad_enabled():
            branch = checkpoint(layer, stream, use_reentrant=False)
        else:
            branch = layer(stream)
        if taps is not None:
            taps.append(LayerTap(stream, branch))
        return cast(Tensor, branch)

    def _pairs(self) -> list[tuple[Block, Block]]:
        """Return the layers two by two; the published code leaves an odd last one unused."""
        layers = cast(list[Block], list(self.layers))
        return list(zip(layers[::2], layers[1::2], strict=False))

    def pool(self, encoded: Tensor) -> Tensor:
        """Reduce final-normed tokens (B, L, D) to features (B, D)."""
        match self.config.pooling:
            case "class":
                patches = encoded.shape[1] - self.config.class_tokens
                slots = class_slots(patches, self.config.class_token)
                return torch.stack([encoded[:, slot] for slot in slots]).mean(0)
            case "mean":
                return encoded.mean(1)
            case "max":
                return encoded.amax(1)
            case "last":
                return encoded[:, -1]

    def block_weights(self) -> list[BlockWeights]:
        """Return every block's weights as float32 tensors for the kernels, in order."""
        if self.config.bidirectional == "layer_pairs":
            return [pair_weights(first, second) for first, second in self._pairs()]
        return [cast(Block, layer).block_weights() for layer in self.layers]


@lru_cache(maxsize=64)
def grid_cells(
    rows: int, cols: int, order: ScanOrder | None, device: torch.device | None = None
) -> Tensor:
    """Return the flat cells (rows * cols,) int64 of a full grid in scan order; read only."""
    with torch.inference_mode(False):  # the next caller may want gradients
        if order is None:
            return torch.arange(rows * cols, device=device)
        return torch.from_numpy(scan_cells(np.ones((rows, cols), np.bool_), order)).to(device)


@lru_cache(maxsize=64)
def grid_places(
    rows: int, cols: int, order: ScanOrder | None, device: torch.device | None = None
) -> Tensor:
    """Return where in scan order the cells of a full grid are, (rows * cols,) int64; read only."""
    with torch.inference_mode(False):
        return torch.argsort(grid_cells(rows, cols, order, device))


def _class_token_names(config: VimConfig) -> tuple[str, ...]:
    if config.class_token == "double":
        return "cls_token_head", "cls_token_tail"
    return ("cls_token",) if config.class_tokens else ()


def _small(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02))
