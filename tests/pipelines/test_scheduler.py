"""Clusters that run already: `--scheduler tcp://...`."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from gigavim_pipelines.cluster import LocalPlan, local_client, slots

DASK = [sys.executable, "-m", "distributed.cli.dask_"]


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def start(tmp_path):
    """Start a program; it is ended with the test."""
    running = []

    def start(*arguments):
        process = subprocess.Popen(
            [str(argument) for argument in arguments], cwd=tmp_path,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def start_cluster(start, port):
    def start_cluster():
        address = f"tcp://127.0.0.1:{port}"
        scheduler = start(
            sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1",
            "--port", port, "--no-dashboard",
        )  # fmt: skip
        start(
            sys.executable, "-m", "distributed.cli.dask_worker", address, "--nworkers", 2,
            "--nthreads", 1, "--no-dashboard",
        )  # fmt: skip
        return scheduler, address

    return start_cluster


def test_slides_run_on_a_cluster_that_runs_already(
    run, faulty, make_slides, start_cluster, tmp_path
):
    slides = make_slides(a="fine", b="fine", c="fine", d=f"slow 0.5 {tmp_path}", crash="segfault")
    _, address = start_cluster()
    result = run("batch", faulty, slides, "-o", "out", "--scheduler", address, "--json")
    assert result.code == 3, result.err
    told = json.loads(result.out)
    assert told["done"] == 4
    assert [slide["reason"] for slide in told["failed"]] == ["crash"]
    # Not once for every time that dask would have given it out anew.
    assert result.err.count("crash: will be tried again") == 1


def test_a_lost_scheduler_ends_the_run_and_resume_works(
    run, faulty, make_slides, start, start_cluster, tmp_path
):
    slides = make_slides(a="fine", b=f"slow 60 {tmp_path}")
    scheduler, address = start_cluster()
    command = [sys.executable, "-c", "from gigavim.cli.main import main; main()", "batch", faulty]
    environment = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "2s"}
    first = start(
        "env", *(f"{key}={value}" for key, value in environment.items()),
        *command, slides, "-o", "out", "--scheduler", address,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("b.*")) or not (tmp_path / "out/slides/a").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    scheduler.kill()
    assert first.wait(60) == 1
    (slides / "b.svs").write_text("fine")
    result = run("batch", faulty, slides, "-o", "out", "--workers", 1)
    assert result.code == 0
    assert "1 to do, 1 done before" in result.err


def test_every_worker_has_its_gpu_and_its_threads():
    plan = LocalPlan(workers=2, threads=3, memory_bytes=10**9, gpus=("0", "3"))
    with local_client(plan) as client:
        assert slots(client) == 2
        gpus = sorted(client.run(os.getenv, "CUDA_VISIBLE_DEVICES").values())
        threads = list(client.run(os.getenv, "OMP_NUM_THREADS").values())
    assert gpus == ["0", "3"]
    assert threads == ["3", "3"]
