"""The segmentation model: the encoder and a head."""

from torch import Tensor, nn

from gigavim.errors import ModelError
from gigavim.model.config import HeadKind
from gigavim.model.head_kinds import make_head
from gigavim.model.heads import stitch
from gigavim.model.sequence import without_class_tokens
from gigavim.model.vim import Vim, grid_places
from gigavim.tokens.order import ScanOrder


class SegmentationModel(nn.Module):
    """Encoder and head; what `gigavim.model.load_model` returns.

    Args:
        classes: of the logits.
        head: its kind. head_width: its channels, 0 for the default of its kind.
    """

    def __init__(
        self, encoder: Vim, classes: int, head: HeadKind = "linear", head_width: int = 0
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head_kind, self.head_width = head, head_width
        self.head = make_head(head, encoder.config, classes, head_width)

    def forward(
        self,
        images: Tensor,
        order: ScanOrder | None = None,
        *,
        origin_um: tuple[float, float] = (0.0, 0.0),
    ) -> Tensor:
        """Segment normalised images (B, 3, H, W): returns logits (B, classes, H, W).

        Args:
            images: float; H and W are patch_px plus a multiple of stride_px.
            order: how the patches stand in the sequence; row by row if absent.
            origin_um: (x, y) of the image's corner, for "sincos" positions; random in training.
        """
        config = self.encoder.config
        sides = images.shape[-2:]
        if any(s < config.patch_px or (s - config.patch_px) % config.stride_px for s in sides):
            raise ModelError(
                f"images of {sides[1]} x {sides[0]} px do not fit patches of {config.patch_px} px "
                f"every {config.stride_px} px: pad or crop them"
            )
        rows, cols = self.encoder.patch_embed.grid_hw(*sides)
        taps = SideSum(self)
        tokens = self.encoder.tokens(images, order=order, origin_um=origin_um)
        encoded = self.encoder.encode(tokens, on_stream=taps)
        grid = self.feature_grid(encoded, taps.total, (rows, cols), order)
        return self.logits(grid)

    def feature_grid(
        self,
        encoded: Tensor,
        side: Tensor | None,
        grid_hw: tuple[int, int],
        order: ScanOrder | None,
    ) -> Tensor:
        """Lay out what the head decodes: sequences (B, L, D) of a full grid in scan order.

        Returns:
            (B, rows, cols, feature_width)
        """
        features = self.head.features(encoded, side)
        features = without_class_tokens(features, self.encoder.config.class_token)
        if order is not None:
            place = grid_places(*grid_hw, order, features.device)
            features = features.index_select(1, place)
        return features.reshape(len(features), *grid_hw, -1)

    def logits(self, grid: Tensor) -> Tensor:
        """Decode a whole grid (B, rows, cols, feature_width): returns (B, classes, H, W)."""
        return stitch(
            self.head.decode(grid).flatten(1, 2),
            (grid.shape[1], grid.shape[2]),
            self.encoder.config.stride_px,
        )


class SideSum:
    """Adds up what a head's taps leave of the stream, while an encoder runs."""

    def __init__(self, model: SegmentationModel) -> None:
        self._head = model.head
        self.total: Tensor | None = None
        """(B, L, side_width)"""

    def __call__(self, place: int, stream: Tensor) -> None:
        """Note the stream (B, L, D) after `place` blocks."""
        if place in self._head.taps:
            side = self._head.side(place, stream)
            self.total = side if self.total is None else self.total + side
