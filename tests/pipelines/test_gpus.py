"""A worker per GPU, a slide at a time on each: seen by the slides themselves, in real processes."""

import itertools
import json
import subprocess
import sys

import pytest
import torch

from gigavim_pipelines.cluster import plan_local
from gigavim_pipelines.recipe import load_recipe

TASK = '''
"""A task that notes which GPU it saw, in which process, and when."""
import json, os, time
from pathlib import Path
from types import SimpleNamespace


def run(path, *, settings, stem, progress):
    began = time.time()
    time.sleep(0.3)
    facts = {
        "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "pid": os.getpid(),
        "threads": os.environ.get("OMP_NUM_THREADS"), "began": began, "ended": time.time(),
    }
    out = Path(settings.output.directory) / f"{stem}.json"
    out.write_text(json.dumps(facts))
    return SimpleNamespace(outputs={"facts": out}, summary={})
'''
GPUS = ("GPU-11111111", "GPU-22222222")


@pytest.fixture
def gpu_recipe(own_task):
    return own_task("ongpu", TASK)


@pytest.fixture
def two_gpus(monkeypatch):
    """torch counts two; what a slide is shown of them is decided by us."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(GPUS))


def seen(out):
    """What each slide noted, in order of time."""
    facts = [json.loads(path.read_text()) for path in out.glob("slides/*/*[0-9].json")]
    return sorted(facts, key=lambda fact: fact["began"])


def overlaps(facts):
    return any(
        one["ended"] > other["began"] for one, other in itertools.pairwise(facts)
    )  # fmt: skip


def test_each_worker_has_a_gpu_of_its_own_and_one_slide_on_it(
    run, gpu_recipe, two_gpus, make_slides, tmp_path
):
    slides = make_slides(**{f"s{number}": "fine" for number in range(10)})
    command = ("batch", gpu_recipe, slides, "-o", "out", "--recycle-after", 2)
    result = run(*command, "--set", "compute.threads=1")
    assert result.code == 0, result.err
    assert "2 workers" in result.err
    facts = seen(tmp_path / "out")
    assert len(facts) == 10
    by_gpu = {name: [fact for fact in facts if fact["gpu"] == name] for name in GPUS}
    assert sum(map(len, by_gpu.values())) == 10
    for mine in by_gpu.values():
        assert mine
        assert not overlaps(mine)
        # Workers that take the place of others take their GPU too.
        assert len({fact["pid"] for fact in mine}) > 1
    assert overlaps(facts)  # both at once
    assert {fact["threads"] for fact in facts} == {"1"}


@pytest.mark.parametrize(
    ("workers", "device", "expected"),
    [(0, "auto", GPUS), (1, "cuda", GPUS[:1]), (3, "auto", (*GPUS, GPUS[0])), (0, "cpu", ())],
)
def test_which_gpus_workers_get(two_gpus, monkeypatch, workers, device, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    recipe = load_recipe("segment").with_flags(
        batch={"workers": workers}, compute={"device": device}
    )
    plan = plan_local(recipe)
    assert plan.gpus == expected
    if expected:
        assert plan.workers == len(expected)
    assert plan_local(load_recipe("qc")).gpus == ()


def test_on_a_cluster_the_resource_keeps_slides_apart(run, gpu_recipe, make_slides, tmp_path):
    """A worker that was started with four threads and one `slide` runs a slide at a time."""
    from distributed import LocalCluster

    slides = make_slides(**{f"s{number}": "fine" for number in range(4)})
    with LocalCluster(n_workers=0, dashboard_address=":0", host="127.0.0.1") as cluster:
        worker = subprocess.Popen(
            [sys.executable, "-m", "distributed.cli.dask_worker", cluster.scheduler_address,
             "--nthreads", "4", "--resources", "slide=1", "--no-dashboard"],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            command = ("batch", gpu_recipe, slides, "-o", "out")
            result = run(*command, "--scheduler", cluster.scheduler_address)
        finally:
            worker.kill()
            worker.wait()
    assert result.code == 0, result.err
    facts = seen(tmp_path / "out")
    assert len(facts) == 4
    assert not overlaps(facts)
