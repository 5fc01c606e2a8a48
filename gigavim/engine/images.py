"""Batches of small images through an encoder, on the fastest kernels of a device."""

import torch
from torch import Tensor

from gigavim.model.vim import Vim
from gigavim.tokens.order import ScanOrder
from gigavim_kernels.backends import Precision, prepare_block, resolve_precision


class ImageEncoder:
    """An encoder made ready on a device for images that are a sequence each.

    A slide is no image in this sense: see `gigavim.engine.sweep`, which cuts its one sequence.

    Args:
        encoder: stays where it is; its weights are copied to the device.
        device: where images are encoded.
        precision: of matrix products, "auto", "fp32" or "bf16"; stream and scan are float32.
    """

    def __init__(
        self, encoder: Vim, *, device: torch.device | str = "cpu", precision: str = "auto"
    ) -> None:
        self.device = torch.device(device)
        self.precision: Precision = resolve_precision(precision, self.device)
        self._encoder = encoder
        self._kernels = [
            prepare_block(block, device=self.device, precision=self.precision)
            for block in encoder.block_weights()
        ]

    @torch.no_grad()
    def encode(self, tokens: Tensor) -> Tensor:
        """Do what `Vim.encode` does with sequences (B, L, D): returns (B, L, D) float32."""
        stream = tokens.to(self.device, torch.float32, copy=True).contiguous()
        for kernel in self._kernels:
            kernel.apply(stream)
        norm = self._encoder.norm_f
        return torch.nn.functional.rms_norm(
            stream, stream.shape[-1:], norm.weight.to(self.device), norm.eps
        )

    @torch.no_grad()
    def __call__(self, images: Tensor, *, order: ScanOrder | None = None) -> Tensor:
        """Do what `Vim.forward` does with normalised images (B, C, H, W)."""
        tokens = self._encoder.tokens(images.to(self._encoder.norm_f.weight.device), order=order)
        return self._encoder.classify(self.encode(tokens).to(tokens.device))
