"""Batches of small images through an encoder, on the fastest kernels of a device."""

import torch
from torch import Tensor

from gigavim.engine.replay import Replayed
from gigavim.model.vim import OnStream, Vim
from gigavim.tokens.order import ScanOrder
from gigavim_kernels.backends import Precision, prepare_block, resolve_precision

PART_ELEMENTS = 40_000_000
"""Tokens times d_model of images that are encoded together: 208,000 tokens of Vim-Ti, which take
about 1.2 GB."""
RECORDED_ELEMENTS = 27_000_000
"""Over more, the kernels take longer than telling a GPU of them, and a copy of the input counts."""


class ImageEncoder:
    """An encoder made ready on a device for images that are a sequence each.

    A slide is no image in this sense: see `gigavim.engine.sweep`, which cuts its one sequence.

    Args:
        encoder: stays where it is; its weights are copied to the device.
        device: where images are encoded.
        precision: of matrix products, "auto", "fp32" or "bf16"; stream and scan are float32.
        threads: CPU threads; all if absent.
    """

    def __init__(
        self,
        encoder: Vim,
        *,
        device: torch.device | str = "cpu",
        precision: str = "auto",
        threads: int | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.precision: Precision = resolve_precision(precision, self.device)
        self._encoder = encoder
        self._kernels = [
            prepare_block(block, device=self.device, precision=self.precision, threads=threads)
            for block in encoder.block_weights()
        ]
        self._norm_weight = encoder.norm_f.weight.detach().to(self.device)
        self._replayed = Replayed(self._encoded, largest=RECORDED_ELEMENTS)
        self._placed: tuple[object, Tensor] | None = None

    @torch.no_grad()
    def encode(self, tokens: Tensor, *, on_stream: OnStream | None = None) -> Tensor:
        """Do what `Vim.encode` does with sequences (B, L, D): returns (B, L, D) float32.

        The stream that `on_stream` is told of changes after the call.
        """
        tokens = tokens.to(self.device, torch.float32).contiguous()
        if on_stream is not None:
            return self._encoded(tokens.clone(), on_stream)
        parts = [self._replayed(part.clone()) for part in _parts(tokens)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _encoded(self, stream: Tensor, on_stream: OnStream | None = None) -> Tensor:
        """The final-normed tokens of a stream, which the blocks change in place."""
        notify: OnStream = on_stream or (lambda done, stream: None)
        notify(0, stream)
        for done, kernel in enumerate(self._kernels, 1):
            kernel.apply(stream)
            notify(done, stream)
        eps = self._encoder.norm_f.eps
        return torch.nn.functional.rms_norm(stream, stream.shape[-1:], self._norm_weight, eps)

    @torch.no_grad()
    def features(self, images: Tensor, *, order: ScanOrder | None = None) -> Tensor:
        """Embed and encode normalised images (B, C, H, W): (B, L, D) float32 on the device."""
        home = self._encoder.norm_f.weight.device
        half = self.precision == "bf16" and home.type == "cuda"
        found = []
        for part in torch.split(images, self._images_at_once(images)):
            position = self._position(part.shape[2], part.shape[3], order)
            with torch.autocast(home.type, torch.bfloat16, enabled=half):
                tokens = self._encoder.tokens(part.to(home), order=order, position=position)
            stream = tokens.to(self.device, torch.float32).contiguous()
            found.append(self._replayed(stream))
        return found[0] if len(found) == 1 else torch.cat(found)

    @torch.no_grad()
    def __call__(self, images: Tensor, *, order: ScanOrder | None = None) -> Tensor:
        """Do what `Vim.forward` does with normalised images (B, C, H, W)."""
        found = self.features(images, order=order)
        return self._encoder.classify(found.to(self._encoder.norm_f.weight.device))

    def _position(self, height_px: int, width_px: int, order: ScanOrder | None) -> Tensor:
        """The patches' position embedding, the last one kept: on a GPU it takes as long as a block.

        It is that of the weights when it was first asked for.
        """
        key = (height_px, width_px, order)
        if self._placed is None or self._placed[0] != key:
            grid_hw = self._encoder.patch_embed.grid_hw(height_px, width_px)
            self._placed = key, self._encoder.patch_positions(grid_hw, order)
        return self._placed[1]

    def _images_at_once(self, images: Tensor) -> int:
        rows, cols = self._encoder.patch_embed.grid_hw(*images.shape[2:])
        config = self._encoder.config
        return _at_once(len(images), (rows * cols + config.class_tokens) * config.d_model)


def _parts(tokens: Tensor) -> tuple[Tensor, ...]:
    """Sequences (B, L, D) in parts that are encoded together."""
    return torch.split(tokens, _at_once(len(tokens), tokens[:1].numel()))


def _at_once(count: int, elements: int) -> int:
    """How many of `count` sequences of so many elements to take at once, about as many each time.

    Of `PART_ELEMENTS` at most, but one at least.
    """
    most = max(1, PART_ELEMENTS // max(1, elements))
    parts = max(1, -(-count // most))
    return max(1, -(-count // parts))
