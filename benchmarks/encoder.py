"""Whole encoders over batches of images: `python -m benchmarks.encoder [--json F] [--plot F]`.

Vim-Ti through our kernels beside DeiT-Ti of timm with fused attention (what torch chooses:
FlashAttention on recent GPUs) and with plain attention, bfloat16, images a second and peak memory
above weights and input, at the sizes of the paper's first figure; then Vim-Ti over one long
sequence. Vim-Ti comes twice: with decay rates in the ratio that they are initialised with, which
our models keep ("tied"), and with rates that have left it, as published weights have ("free").
Medians between device events. On a CPU, `--quick` runs all of it at toy sizes: a test of
this script.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels import machine, median_seconds, table, vim_tiny
from gigavim.engine.images import ImageEncoder
from gigavim.engine.sequence import TokenSequence
from gigavim.engine.sweep import sweep_block
from gigavim_kernels.backends import prepare_block
from gigavim_kernels.block import BlockKernel

PATCH_PX = 16
SIZES = ((224, 128), (512, 64), (1248, 32), (2048, 8), (4096, 2))
"""Side of an image in pixels, images in a batch."""
LENGTHS = (65_536, 1_048_576)
QUICK_SIZES, QUICK_LENGTHS = ((32, 2),), (40,)
MOST_PLAIN_PX = 2048
"""Plain attention holds a matrix of tokens by tokens per head: no GPU has the memory for more."""

Run = Callable[[Tensor], object]


def vim(device: torch.device, *, tied: bool) -> Run:
    """Vim-Ti's tokens and blocks: what the peers' `forward_features` does."""
    model = vim_tiny(tied=tied).to(device)
    return ImageEncoder(model, device=device, precision="bf16").features


def deit(device: torch.device, side_px: int, *, fused: bool) -> Run | None:
    """DeiT-Ti at a size, or None where timm is not installed."""
    try:
        import timm
    except ImportError:
        return None
    model: nn.Module = timm.create_model(
        "deit_tiny_patch16_224", img_size=side_px, num_classes=0, pretrained=False
    )
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    model = model.eval().to(device, torch.bfloat16)

    def run(images: Tensor) -> object:
        return model(images.to(torch.bfloat16))

    return run


def measured(run: Run, images: Tensor) -> dict[str, float]:
    """Images a second and gigabytes at the peak, above what was there before."""
    device = images.device
    before = peak = 0
    with torch.inference_mode():
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        for _ in range(3):  # the first compiles, the second may be recorded: its memory counts
            run(images)
        if device.type == "cuda":  # before the timer takes memory of its own
            peak = torch.cuda.max_memory_allocated() - before
        seconds = median_seconds(lambda: run(images))
    return {"images/s": len(images) / seconds, "peak GB": peak / 1e9}


def compare(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Iterator[dict[str, Any]]:
    """One row per size and encoder."""
    for side_px, batch in sizes:
        images = torch.randn(batch, 3, side_px, side_px, device=device)
        peers: dict[str, Run | None] = {
            "Vim-Ti tied": vim(device, tied=True),
            "Vim-Ti free": vim(device, tied=False),
            "DeiT-Ti fused": deit(device, side_px, fused=True),
            "DeiT-Ti plain": deit(device, side_px, fused=False),
        }
        ours: list[float] = []
        for name, run in peers.items():
            row: dict[str, Any] = {"image": f"{side_px} px x {batch}", "encoder": name}
            if run is None:
                yield {**row, "note": "timm is not installed"}
                continue
            if name == "DeiT-Ti plain" and side_px > MOST_PLAIN_PX:
                yield {**row, "note": "left out: more memory than there is"}
                continue
            row |= measured(run, images)
            if name.startswith("Vim"):
                ours.append(row["images/s"])
            tied, free = ours[0], ours[-1]
            yield row | {
                "tied / this": tied / row["images/s"],
                "free / this": free / row["images/s"],
            }


def long_sequences(lengths: tuple[int, ...], device: torch.device) -> Iterator[dict[str, Any]]:
    """Vim-Ti over one sequence, swept in chunks as a slide is; the stream counts as memory."""
    for tied, length in itertools.product((True, False), lengths):
        model = vim_tiny(tied=tied)
        kernels = [
            prepare_block(block, device=device, precision="bf16") for block in model.block_weights()
        ]
        for chunk in (kernels[0].chunk, length) if length > kernels[0].chunk else (length,):
            found = _swept(kernels, length, model.config.d_model, chunk, device)
            yield {
                "rates": "tied" if tied else "free",
                "tokens": length,
                "chunk": chunk,
                "ns per token and block": found["seconds"] / length / len(kernels) * 1e9,
                "bytes per token at the peak": found["peak"] / length,
            }


def _swept(
    kernels: list[BlockKernel], length: int, width: int, chunk: int, device: torch.device
) -> dict[str, float]:
    """Seconds of a sweep of all blocks and bytes at its peak."""
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with TokenSequence(length, width, location="device", device=device) as sequence:
        sequence.rows(0, length).normal_()

        def run() -> None:
            for kernel in kernels:
                sweep_block(sequence, kernel, device=device, chunk=chunk)

        seconds = median_seconds(run)
    peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
    return {"seconds": seconds, "peak": peak}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The paper's first figure: images a second and memory against the size."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, key in zip(axes, ("images/s", "peak GB")):
        for name in dict.fromkeys(row["encoder"] for row in rows):
            points = [
                (int(row["image"].split()[0]), row[key])
                for row in rows
                if row["encoder"] == name and key in row
            ]
            if points:
                axis.plot(*zip(*points), marker="o", label=name)
        axis.set(xlabel="side of an image, px", ylabel=key, xscale="log", yscale="log")
        axis.minorticks_off()
        sides = sorted({int(row["image"].split()[0]) for row in rows})
        axis.set_xticks(sides, [str(side) for side in sides])
        axis.grid(visible=True, alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--plot", type=Path, help="draw the comparison (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    results: dict[str, Any] = {"machine": machine(device)}
    print(json.dumps(results["machine"], indent=1))
    sizes, lengths = (QUICK_SIZES, QUICK_LENGTHS) if options.quick else (SIZES, LENGTHS)
    for title, rows in (
        ("Encoders over images, bfloat16", compare(sizes, device)),
        ("Vim-Ti over one sequence, bfloat16", long_sequences(lengths, device)),
    ):
        results[title] = []
        for row in rows:
            results[title].append(row)
            if options.json is not None:
                options.json.write_text(json.dumps(results, indent=1) + "\n")
        table(title, results[title])
    if options.plot is not None:
        plot(results["Encoders over images, bfloat16"], options.plot)


if __name__ == "__main__":
    main()
