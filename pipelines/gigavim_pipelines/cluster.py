"""Where slides are worked on: workers of this machine, or a dask cluster that runs already."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gigavim import __version__
from gigavim.engine.memory import DEFAULT_SHARE, available_memory, parse_bytes
from gigavim.errors import ResourceError
from gigavim_pipelines.recipe import Recipe

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger(f"gigavim.{__name__}")

SLOT = "slide"
"""The dask resource of which a slide takes one, where workers declare it."""
CORES_PER_WORKER = 4
LEAST_WORKER_BYTES = 2_000_000_000
"""With less than this for each, fewer workers are started."""
_DASK: dict[str, Any] = {
    # A worker holds nothing but its slide: there is nothing to spill, and one that waits for
    # memory that its own libraries cache would wait for ever.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.95,
    # A slide's death is judged by what it leaves behind, not by how often dask saw it.
    "distributed.scheduler.allowed-failures": 0,
    # A worker that is lost again, or still starting, this long after it was lost would be given
    # up with its nanny: on a busy machine, one after the other, all of them.
    "distributed.deploy.lost-worker-timeout": "1000 days",
}


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """The workers to start on this machine."""

    workers: int
    threads: int
    """CPU threads of the encoder in each."""
    memory_bytes: int
    """Beyond which a worker is replaced."""
    gpus: tuple[str, ...] = ()
    """One worker each, as CUDA_VISIBLE_DEVICES names them; empty: no GPUs."""


def plan_local(recipe: Recipe) -> LocalPlan:
    """Decide on workers: one per GPU where the recipe's network may use them, else by cores.

    Raises:
        SettingsError: `batch.worker_memory` is no size, or the device named is not there.
    """
    from gigavim.engine.devices import resolve_device, usable_cores

    batch, cores = recipe.batch, usable_cores()
    if recipe.uses_model and recipe.compute.device != "auto":
        resolve_device(recipe.compute.device)
    gpus = _gpus(recipe) if recipe.uses_model else ()
    memory = int(DEFAULT_SHARE * available_memory())
    workers = batch.workers or len(gpus)
    if not workers:
        by_memory = memory // LEAST_WORKER_BYTES
        workers = max(1, min(cores // CORES_PER_WORKER, by_memory))
    gpus = tuple(gpus[number % len(gpus)] for number in range(workers)) if gpus else ()
    each = memory // workers if batch.worker_memory == "auto" else parse_bytes(batch.worker_memory)
    threads = recipe.compute.threads or max(1, cores // workers)
    return LocalPlan(workers, threads, each, gpus)


def within(recipe: Recipe, plan: LocalPlan) -> Recipe:
    """The recipe with threads and memory of a worker's share, where it leaves them open."""
    memory = str(int(DEFAULT_SHARE * plan.memory_bytes))
    return recipe.with_flags(
        compute={
            "threads": plan.threads,
            "max_memory": memory if recipe.compute.max_memory == "auto" else None,
        },
        tokens={"num_workers": recipe.tokens.num_workers or plan.threads},
    )


@contextmanager
def local_client(plan: LocalPlan, *, dashboard: str | None = None) -> Iterator["Client"]:
    """A client of workers on this machine: each a process under a nanny that replaces it.

    Args:
        plan: the workers.
        dashboard: where dask shows its dashboard, such as ":8787"; None for nowhere.

    Raises:
        ResourceError: they do not start.
    """
    import dask
    from distributed import Client, Nanny, Scheduler, SpecCluster

    config = dict(_DASK)
    quiet = not log.isEnabledFor(logging.INFO)
    if quiet:
        config["logging"] = dict.fromkeys(_hush(), "critical")
    options: dict[str, Any] = {"nthreads": 1, "memory_limit": plan.memory_bytes}
    options |= {"resources": {SLOT: 1}, "silence_logs": logging.CRITICAL if quiet else None}
    workers = {
        number: {"cls": Nanny, "options": {**options, "env": environment}}
        for number, environment in enumerate(_environments(plan))
    }
    scheduler = {
        "cls": Scheduler,
        "options": {
            "dashboard": dashboard is not None,
            # Also where there is none dask opens a port, and warns if the usual one is taken.
            "dashboard_address": dashboard or ":0",
            "host": "127.0.0.1",
        },
    }
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(config))
        try:
            cluster = SpecCluster(workers=workers, scheduler=scheduler, name="gigavim")
            stack.enter_context(cluster)
            client = stack.enter_context(Client(cluster))
        # What dask makes of any error at all.
        except (OSError, RuntimeError, ValueError) as error:
            where = f" Is {dashboard} an address of this machine?" if dashboard else ""
            raise ResourceError(
                f"workers cannot be started on this machine: {error}.{where} The same command with"
                " -v says more."
            ) from error
        yield client


@contextmanager
def remote_client(address: str) -> Iterator["Client"]:
    """A client of a scheduler that runs elsewhere, "tcp://host:8786".

    Raises:
        ResourceError: it cannot be reached, or has other versions.
    """
    from distributed import Client

    if not log.isEnabledFor(logging.INFO):
        _hush()
    try:
        client = Client(address)
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"{address}: no dask scheduler answers there ({error}). Start one with `dask scheduler`"
            " and workers with `dask worker ADDRESS --nthreads 1`, or leave --scheduler out."
        ) from error
    with client:
        _greet(client, address)
        yield client


def _greet(client: "Client", address: str) -> None:
    """Find out before the first slide whether the workers know what they will be asked.

    Raises:
        ResourceError: they do not, or are of another version than we are.
    """
    try:
        versions = client.run(_version)
    # Whatever the worker's import machinery raises.
    except Exception as error:
        raise ResourceError(
            f"{address}: its workers cannot import gigavim ({error}); install it there."
        ) from error
    others = {found for found in versions.values() if found != __version__}
    if others:
        raise ResourceError(
            f"{address}: its workers have gigavim {', '.join(sorted(others))}, this is"
            f" {__version__}; install the same."
        )


def _version() -> str:
    return __version__


def _hush() -> list[str]:
    """Silence dask here, which tells of every worker lost; return the names of its loggers.

    What becomes of slides is told by ourselves; -v lets dask speak.
    """
    names = ["distributed", "tornado", *logging.root.manager.loggerDict]
    loud = [name for name in names if name.split(".")[0] in ("distributed", "tornado")]
    for name in loud:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return loud


def slots(client: "Client") -> int:
    """How many slides the workers that are there can process at once."""
    return len(client.scheduler_info(n_workers=-1)["workers"])


def resources(client: "Client") -> dict[str, float] | None:
    """What a slide takes of a worker: a slot, where workers have them."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return {SLOT: 1} if any(SLOT in worker["resources"] for worker in workers) else None


def _environments(plan: LocalPlan) -> Iterator[dict[str, str]]:
    """Variables of each worker: its GPU, and threads of libraries that are told in no other way."""
    threads = {
        name: str(plan.threads)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }
    for number in range(plan.workers):
        gpu = {"CUDA_VISIBLE_DEVICES": plan.gpus[number]} if plan.gpus else {}
        yield {**threads, **gpu}


def _gpus(recipe: Recipe) -> tuple[str, ...]:
    """This machine's GPUs that the recipe may use, by the names CUDA_VISIBLE_DEVICES takes."""
    if recipe.compute.device not in ("auto", "cuda"):
        return ()
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return tuple(name.strip() for name in named.split(","))[:count]
    return tuple(str(number) for number in range(count))
