"""How fast the encoder runs on a CPU: `python -m benchmarks.cpu [--json FILE] [--runs N]`.

Whole sweeps over one sequence (both passes, all blocks), in tokens per second, beside

- naive: the same encoder with the specification's token loop, one block of it at 16,384 tokens;
- linear: the encoder's matrix products alone, both directions, nothing recomputed;
- attention: a network of DeiT-Ti's shape with torch's own attention, at two lengths;

and the peak memory of a process against the length of its sequence. All times are the best of
several runs: a busy machine slows some runs, and none is ever too fast.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigavim.engine.sequence import TokenSequence
from gigavim.engine.sweep import sweep
from gigavim.model.registry import REGISTRY
from gigavim.model.vim import Vim
from gigavim_kernels import naive
from gigavim_kernels.backends import Precision, backend_name, resolve_precision
from gigavim_kernels.weights import BlockWeights

MODELS = ("vim-tiny", "vim-nano")
LENGTHS = {"vim-tiny": 16_384, "vim-nano": 65_536}
NAIVE_TOKENS = 16_384
ATTENTION_TOKENS = (1_024, 16_384)
MEMORY_TOKENS = (16_384, 65_536, 262_144, 524_288)
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
Rates = dict[str, float]
"""Tokens per second by what was measured."""


def best_seconds(work: Callable[[], object], runs: int) -> float:
    """Return the shortest of several runs, after one that warms up."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def blocks_of(model: str) -> list[BlockWeights]:
    torch.manual_seed(0)
    encoder = Vim(REGISTRY[model])
    if model != "vim-nano":
        # Published weights have a decay rate per state; ours keep the initial 1 : 2 : ... : 16,
        # which the scan knows how to use.
        for name, parameter in encoder.named_parameters():
            if name.endswith("_log"):
                parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder.block_weights()


def random_sequence(length: int, width: int) -> TokenSequence:
    sequence = TokenSequence(length, width)
    sequence.rows(0, length).normal_(generator=torch.Generator().manual_seed(0))
    return sequence


def sweep_rate(model: str, length: int, precision: Precision, runs: int) -> float:
    blocks = blocks_of(model)

    def work() -> None:
        with random_sequence(length, REGISTRY[model].d_model) as sequence:
            sweep(sequence, blocks, device="cpu", precision=precision)

    return length / best_seconds(work, runs)


def naive_rate(model: str, runs: int) -> float:
    """Time one block and scale to the depth: all blocks cost the same."""
    blocks = blocks_of(model)
    branch = blocks[0].branches[0]
    stream = torch.randn(NAIVE_TOKENS, branch.norm_weight.shape[0])

    def work() -> None:
        normed = F.rms_norm(stream, stream.shape[-1:], branch.norm_weight, branch.norm_eps)
        x, z = F.linear(normed, branch.in_proj)[None].chunk(2, 2)  # (1, L, E)
        total = torch.zeros_like(x)
        for d in branch.directions:
            c = naive.causal_conv(x, d.conv_weight, d.conv_bias, reverse=d.reverse_conv)
            rank, states = d.dt_weight.shape[1], d.A.shape[1]
            projected = F.linear(c, d.x_proj)
            dt, B, C = torch.split_with_sizes(projected, (rank, states, states), 2)
            delta = F.linear(dt, d.dt_weight)
            scan = naive.selective_scan(c, delta, d.A, B, C, d.D, z, d.dt_bias, reverse=d.reverse)
            total += scan.y
        F.linear(branch.scale * total[0], branch.out_proj)

    with torch.inference_mode():
        return NAIVE_TOKENS / (best_seconds(work, runs) * len(blocks))


def linear_rate(model: str, precision: Precision, runs: int, rows: int = 4096) -> float:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    blocks = blocks_of(model)
    branch = blocks[0].branches[0]
    weights = [branch.in_proj, branch.out_proj]
    for d in branch.directions:
        weights += [d.x_proj, d.dt_weight]
    operands = [
        (torch.randn(rows, w.shape[1]).to(dtype), w.to(dtype).T.contiguous()) for w in weights
    ]
    outputs = [torch.empty(rows, w.shape[1], dtype=dtype) for _, w in operands]

    def work() -> None:
        for (left, right), out in zip(operands, outputs):
            torch.mm(left, right, out=out)

    return rows / (best_seconds(work, 5 * runs) * len(blocks))


class AttentionLayer(nn.Module):
    """A layer of DeiT-Ti's shape: D = 192, three heads, an MLP of four times the width."""

    def __init__(self, width: int = 192, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, D)."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))  # (B, H, L, D / H)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        mlp: Tensor = self.mlp(self.norm2(x))
        return x + mlp


def attention_rate(length: int, precision: Precision, runs: int) -> float:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    network = nn.Sequential(*(AttentionLayer() for _ in range(12))).to(dtype)
    tokens = torch.randn(1, length, 192, dtype=dtype)
    with torch.inference_mode():
        return length / best_seconds(lambda: network(tokens), runs)


def peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage would count the parent's peak in
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_peak(model: str, length: int) -> Rates:
    """Return what a sweep adds to the peak of a process that has done a short one."""
    blocks = blocks_of(model)[:2]
    precision = resolve_precision("auto", "cpu")
    width = REGISTRY[model].d_model
    for tokens in (MEMORY_TOKENS[0], length):
        before = peak_bytes()
        with random_sequence(tokens, width) as sequence:
            sweep(sequence, blocks, device="cpu", precision=precision)
    added, stream = peak_bytes() - before, (length - MEMORY_TOKENS[0]) * width * 4
    return {
        "tokens": length,
        "peak_mb": peak_bytes() / 1e6,
        "bytes_per_token_beyond_stream": (added - stream) / length,
    }


def memory_rows(model: str, lengths: tuple[int, ...]) -> list[Rates]:
    rows = []
    for length in lengths:
        command = [sys.executable, "-m", "benchmarks.cpu", "--peak", model, str(length)]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(found.stdout))
    return rows


def machine() -> dict[str, Any]:
    """Return what the figures depend on, with the rate of large matrix products."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    name = next((line for line in text.splitlines() if line.startswith("model name")), "")
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
        out = torch.empty(1024, 1024, dtype=dtype)
        seconds = best_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 10)  # type: ignore[misc]
        rates[f"gemm_{str(dtype).removeprefix('torch.')}_gflops"] = 2 * 1024**3 / seconds / 1e9
    return {
        "cpu": name.partition(":")[2].strip() or platform.processor(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "backend": backend_name("cpu"),
        "precision": resolve_precision("auto", "cpu"),
        **rates,
    }


def encoder_rates(quick: bool, runs: int) -> dict[str, Rates]:
    rates: dict[str, Rates] = {}
    precisions: tuple[Precision, ...] = ("bf16", "fp32")
    for model in MODELS:
        length = LENGTHS[model] // (4 if quick else 1)
        rates[model] = {"naive fp32": naive_rate(model, runs)}
        for precision in precisions:
            rates[model][f"linear {precision}"] = linear_rate(model, precision, runs)
            rates[model][f"sweep {precision}"] = sweep_rate(model, length, precision, runs)
        for precision in precisions:
            ratio = rates[model][f"sweep {precision}"] / rates[model]["naive fp32"]
            rates[model][f"sweep {precision} / naive"] = ratio
    for tokens in ATTENTION_TOKENS:
        row = rates[f"{tokens} tokens"] = {}
        for precision in precisions:
            row[f"attention {precision}"] = attention_rate(tokens, precision, runs)
            row[f"vim-tiny {precision}"] = sweep_rate("vim-tiny", tokens, precision, runs)
    return rates


def show(title: str, values: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, value in values.items():
        print(f"  {name:32}", f"{value:>14,.1f}" if isinstance(value, float) else value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--quick", action="store_true", help="shorter sequences, one run each")
    parser.add_argument("--runs", type=int, help="of each, the best counts [default: 3]")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(json.dumps(measure_peak(arguments.peak[0], int(arguments.peak[1]))))
        return
    report: dict[str, Any] = {"machine": machine()}
    show("machine", report["machine"])
    report["tokens_per_second"] = encoder_rates(
        arguments.quick, arguments.runs or (1 if arguments.quick else 3)
    )
    for title, rates in report["tokens_per_second"].items():
        show(f"{title}, tokens/s", rates)
    report["memory"] = {}
    for model in MODELS:
        rows = memory_rows(model, MEMORY_TOKENS[1 : 3 if arguments.quick else None])
        report["memory"][model] = rows
        for row in rows:
            show(f"{model}, memory", row)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
