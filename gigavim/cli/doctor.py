"""`gigavim doctor`: what is installed here, what will run, and whether it computes right."""

import importlib.metadata
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from gigavim.cli import options
from gigavim.errors import GigavimError

if TYPE_CHECKING:
    import torch

PACKAGES = (
    *("torch", "triton", "numba", "numpy", "zarr", "dask", "tifffile", "imagecodecs"),
    *("openslide-python", "openslide-bin", "rasterio", "shapely"),
)


@click.command("doctor")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--full", is_flag=True, help="Also scan 12 million tokens (a GPU with 60 GB).")
@options.as_json
@options.verbosity
def command(device: str, full: bool, as_json: bool) -> int:
    """Say what will run on this machine, and check it against the specification.

    Prints versions, the devices, which backend runs and why; then computes a small block with every
    backend and compares it with plain float64. Exit code 1 if something is off.

    \b
    Examples:
      gigavim doctor
      gigavim doctor --device cuda --full
    """
    from gigavim.engine.devices import resolve_device

    chosen = resolve_device(device)
    if full:
        _need_memory(chosen)
    facts: dict[str, Any] = {
        "versions": versions(),
        "machine": machine(),
        "device": str(chosen),
        "backends": dict(backends(chosen)),
        "checks": [],
    }
    if not as_json:
        click.echo("\n".join(_describe(facts)))
    from gigavim_kernels import selftest

    for check in selftest.run(chosen, full=full):
        facts["checks"].append({"name": check.name, "error": check.error, "ok": check.ok})
        if not as_json:
            verdict = "ok" if check.ok else "WRONG"
            click.echo(f"  {check.name:<40} {check.error:8.1e}  {verdict}  (limit {check.limit:g})")
    wrong = [check["name"] for check in facts["checks"] if not check["ok"]]
    if as_json:
        import orjson

        click.echo(orjson.dumps(facts).decode())
    elif wrong:
        click.echo(
            f"{len(wrong)} of {len(facts['checks'])} checks failed: results of this device cannot"
            " be trusted. Run with --device cpu, and report this output.",
            err=True,
        )
    return 1 if wrong else 0


def versions() -> dict[str, str]:
    """What is installed, by name; what is not is left out."""
    from gigavim import __version__

    found = {"gigavim": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    import openslide

    found["openslide"] = openslide.__library_version__
    return found


def machine() -> dict[str, Any]:
    """Cores, memory and GPUs."""
    import psutil
    import torch

    from gigavim.engine.devices import usable_cores

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append({"name": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)})
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": usable_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpus,
        "torch_cuda": torch.version.cuda or torch.version.hip,
    }


def backends(device: "torch.device") -> Iterator[tuple[str, str]]:
    """The device's backends, the best first, and what is to be said of each."""
    from gigavim_kernels import backends

    runs = backends.backend_name(device)
    for name in backends.choices(device):
        reason = backends.unusable(name)
        if name == runs:
            precision = backends.resolve_precision("auto", device)
            yield name, f"runs, by default with {precision} products"
        elif reason is not None:
            yield name, f"cannot run: {reason}"
        else:
            yield name, "could run; slower"


def _describe(facts: dict[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    here = facts["machine"]
    yield f"{here['platform']}, {here['cores']} cores, {here['memory_gb']} GB of memory"
    for gpu in here["gpus"]:
        yield f"GPU: {gpu['name']}, {gpu['memory_gb']} GB"
    if not here["gpus"]:
        build = here["torch_cuda"]
        why = f"none that torch (CUDA {build}) sees" if build else "this torch is built for CPUs"
        yield f"GPU: {why}"
    yield f"on {facts['device']}:"
    for name, text in facts["backends"].items():
        yield f"  {name:<8} {text}"
    yield "relative errors against float64:"


def _need_memory(device: "torch.device") -> None:
    """Refuse `--full` where it cannot fit.

    Raises:
        GigavimError: the device is no GPU, or too small a one.
    """
    import torch

    from gigavim_kernels.selftest import HUGE_BYTES

    if device.type != "cuda":
        raise GigavimError(f"--full checks long sequences on a GPU, and {device} is none.")
    free, _total = torch.cuda.mem_get_info(device)
    if free < HUGE_BYTES:
        raise GigavimError(
            f"--full takes {HUGE_BYTES / 1e9:.0f} GB of GPU memory and {free / 1e9:.0f} GB are"
            f" free on {device}: leave it out, or choose another --device."
        )
