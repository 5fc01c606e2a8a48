"""How fast and how exact the GPU kernels are: `python -m benchmarks.kernels [--json FILE]`.

Three tables: the scan (ours, the same scan in plain torch, mamba-ssm where it is installed), the
parts of a Vim block, and checks at sizes that tests are too small for: a sweep on the GPU against
the CPU in float32, and a scan of 12 million tokens, whose offsets pass 2^32, against windows of it
recomputed in float64. Times are medians over many launches between device events.

Without a GPU, `TRITON_INTERPRET=1 python -m benchmarks.kernels --quick` runs all of it at toy sizes
in Triton's interpreter: a test of this script, not of speed.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import triton
from torch import Tensor

from gigavim.engine.sequence import TokenSequence
from gigavim.engine.sweep import sweep_block
from gigavim.model.registry import REGISTRY
from gigavim.model.vim import Vim
from gigavim_kernels import chunked, selftest
from gigavim_kernels.backends import Precision, backend_name, prepare_block
from gigavim_kernels.block import BlockKernel
from gigavim_kernels.cuda import ops
from gigavim_kernels.cuda.block import CudaBlock
from gigavim_kernels.cuda.plan import multiprocessors, plan_scan
from gigavim_kernels.cuda.scan import join, scan, scan_states
from gigavim_kernels.torch_block import TorchBlock
from gigavim_kernels.weights import BlockWeights

E, N = 384, 16
SPECIAL_UNITS = 16
"""Exponentials that a multiprocessor of an NVIDIA GPU evaluates in a clock."""


@dataclass(frozen=True)
class Sizes:
    """What is run."""

    scans: tuple[tuple[int, int], ...]
    """(B, L) of the scans timed."""
    long: int
    """Tokens of one long sequence."""
    huge: int
    swept: int
    torch_limit: int
    """Tokens up to which plain torch is timed."""


FULL = Sizes(
    ((64, 1_024), (32, 6_084), (1, 65_536), (1, 1_048_576)), 1_048_576, 12_000_000, 6_000, 262_144
)
QUICK = Sizes(((1, 3), (1, 67)), 20, 130, 10, 100)


def median_seconds(work: Callable[[], object]) -> float:
    """Time a call on the GPU, or roughly in the interpreter."""
    if torch.cuda.is_available():
        found = triton.testing.do_bench(work, warmup=50, rep=300, return_mode="median")
        return float(found) / 1e3
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def scan_arguments(
    batch: int, length: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Inputs as a trained Vim has them: steps around 0.01 to 0.3, decays from none to total.

    The rates are in the ratio that the first of them may stand for; given whole, that is not used.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    return {
        "x": normal(batch, length, E),
        "dt": normal(batch, length, E),
        "A": -torch.arange(1.0, N + 1, device=device).repeat(E, 1),
        "B": normal(batch, length, N),
        "C": normal(batch, length, N),
        "D": torch.ones(E, device=device),
        "z": normal(batch, length, E),
        "dt_bias": torch.full((E,), -3.0, device=device),
    }


Scan = Callable[..., Any]


def peer_scan() -> Scan | None:
    """Return mamba-ssm's scan under our names and layout, or None where it is not installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None

    def run(**given: Tensor) -> tuple[Tensor]:
        rows = {n: given[n].mT for n in ("x", "dt", "B", "C", "z")}
        y = selective_scan_fn(
            rows["x"], rows["dt"], given["A"], rows["B"], rows["C"], given["D"],
            z=rows["z"], delta_bias=given["dt_bias"], delta_softplus=True,
        )  # fmt: skip
        return (y,)

    return run


def channels_first(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layout mamba-ssm wants, seen through our shapes: no copy is timed."""
    return {n: t.mT.contiguous().mT if t.dim() == 3 else t for n, t in given.items()}


def time_scans(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    rows: dict[str, tuple[Scan | None, int]] = {
        "gigavim, tied rates": (ops.selective_scan, 1 << 60),
        "gigavim": (ops.selective_scan, 1 << 60),
        "plain torch": (chunked.selective_scan, sizes.torch_limit),
        "mamba-ssm": (peer_scan(), 1 << 60),
    }
    for batch, length in sizes.scans:
        given = scan_arguments(batch, length, device)
        for name, (run, limit) in rows.items():
            row: dict[str, Any] = {"what": f"{batch} x {length:,}", "by": name}
            tokens = batch * length
            if run is None or tokens > limit:
                yield {**row, "note": "not installed" if run is None else "left out: too slow"}
                continue
            inputs = channels_first(given) if name == "mamba-ssm" else given
            if "tied" in name:
                inputs = given | {"A": given["A"][:, :1].contiguous()}
            forward = median_seconds(lambda run=run, inputs=inputs: run(**inputs))
            leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
            both = median_seconds(lambda run=run, leaves=leaves: forward_backward(run, leaves))
            yield {**row, "forward": forward / tokens * 1e9, "both": both / tokens * 1e9}


def forward_backward(run: Scan, leaves: dict[str, Tensor]) -> None:
    y = run(**leaves)[0]
    torch.autograd.grad(y, list(leaves.values()), y.detach())


def time_chunks(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """The plan's chunk length against shorter and longer ones, and the passes by themselves."""
    for batch, length in sizes.scans:
        drawn = scan_arguments(batch, length, device)
        given = {n: drawn[n][None] for n in ("x", "dt", "A", "dt_bias")}
        given["bc"] = join(drawn["B"], drawn["C"])[None]
        gated = given | {"D": drawn["D"][None], "z": drawn["z"]}
        chosen = plan_scan(batch, length, E, N, multiprocessors=multiprocessors(device)).chunk
        row: dict[str, Any] = {"what": f"{batch} x {length:,}", "chunk": chosen}
        for factor in (0.125, 0.25, 0.5, 0.75, 1, 2):
            chunk = max(1, int(chosen * factor))
            taken = median_seconds(lambda g=gated, c=chunk: scan(**g, reverse=[False], chunk=c))
            row[f"x {factor:g}"] = taken / batch / length * 1e9
        taken = median_seconds(lambda g=gated: scan(**g, reverse=[False], mark=True))
        row["marked"] = taken / batch / length * 1e9
        taken = median_seconds(lambda g=given: scan_states(**g, reverse=[False]))
        row["states only"] = taken / batch / length * 1e9
        yield row


def vim_tiny(*, tied: bool) -> Vim:
    """Vim-Ti of random weights; if not tied, the decay rates of every state go their own way."""
    model = Vim(REGISTRY["vim-tiny"]).eval()
    if not tied:
        for name, parameter in model.named_parameters():
            if name.endswith("_log"):
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def time_block(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """One block of Vim-Ti over one long sequence, by a sweep and in a single chunk."""
    for tied, precision in itertools.product((True, False), ("bf16", "fp32")):
        block = vim_tiny(tied=tied).block_weights()[0]
        kernel = prepare_block(block, device=device, precision=precision)
        for chunk in (kernel.chunk, sizes.long):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            with TokenSequence(
                sizes.long, block.branches[0].out_proj.shape[0], location="device", device=device
            ) as sequence:
                sequence.rows(0, sizes.long).normal_()
                before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
                taken = [
                    synchronized_seconds(
                        lambda k=kernel, s=sequence, c=chunk: sweep_block(
                            s, k, device=device, chunk=c
                        )
                    )
                    for _ in range(8 if torch.cuda.is_available() else 1)
                ]
                peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            yield {
                "what": f"Vim-Ti block, {'tied' if tied else 'free'} rates, {precision}, "
                f"chunk {chunk:,}",
                "ns per token": statistics.median(taken[1:] or taken) / sizes.long * 1e9,
                "bytes per token": (peak - before) / sizes.long,
            }


def synchronized_seconds(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def check_sweep(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """Vim-Ti over one sequence in odd chunks, against the CPU in float32."""
    torch.manual_seed(0)
    blocks = Vim(REGISTRY["vim-tiny"]).block_weights()[: 24 if device.type == "cuda" else 1]
    width = blocks[0].branches[0].out_proj.shape[0]
    start = torch.randn(sizes.swept, width)

    def swept(make: Callable[[BlockWeights], BlockKernel], where: str, chunk: int | None) -> Tensor:
        device = torch.device(where)
        with TokenSequence(sizes.swept, width, location="device", device=device) as sequence:
            sequence.rows(0, sizes.swept).copy_(start)
            for block in blocks:
                sweep_block(sequence, make(block), device=device, chunk=chunk)
            return sequence.rows(0, sizes.swept).cpu().clone()

    cpu = torch.device("cpu")
    expected = swept(lambda b: TorchBlock(b, device=cpu, precision="fp32"), "cpu", None)
    for precision in get_args(Precision):
        for chunk in (None, sizes.swept // 3 + 1):
            found = swept(
                lambda b, p=precision: CudaBlock(b, device=device, precision=p), device.type, chunk
            )
            yield {
                "what": f"sweep, {precision}, chunk {chunk}",
                "relative error": selftest.relative_error(found - start, expected - start),
            }


def check_huge(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """Windows of a scan whose offsets pass 2^32."""
    short = {"warm": 100, "window": 20} if sizes.huge < 10_000 else {}
    for check in selftest.check_offsets(device, sizes.huge, **short):
        yield {"what": check.name, "relative error": check.error}


def table(title: str, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print(f"\n{title}\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = (row.get(name, "") for name in columns)
        print("|", " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells), "|")


def machine(device: torch.device) -> dict[str, Any]:
    count = multiprocessors(device)
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "backend": backend_name(device),
        "multiprocessors": count,
    }
    if device.type == "cuda":
        clock = (
            float(triton.runtime.driver.active.utils.get_device_properties(0)["sm_clock_rate"])
            * 1e3
        )  # kHz
        found["device"] = torch.cuda.get_device_name(device)
        found["floor, ns per token and exponential pass"] = (
            E * N / (SPECIAL_UNITS * count * clock) * 1e9
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = QUICK if options.quick else FULL
    torch.manual_seed(0)
    parts = {
        "Scan, one direction, E 384, N 16, bf16: ns per token": (time_scans,),
        "Scan forward by chunk length: ns per token": (time_chunks,),
        "Block of Vim-Ti, one sequence": (time_block,),
        "Errors (bf16 rows are rounded to 8 bits)": (check_huge, check_sweep),
    }
    results: dict[str, Any] = {"machine": machine(device), "sizes": asdict(sizes)}
    print(json.dumps(results["machine"], indent=1))
    for title, makers in parts.items():
        results[title] = [row for make in makers for row in make(sizes, device)]
        table(title, results[title])
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
