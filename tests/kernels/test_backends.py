"""The choice of backend and precision."""

import subprocess
import sys

import pytest
import torch

from gigavim_kernels import backends


@pytest.fixture
def without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    backends.unusable.cache_clear()
    yield
    monkeypatch.undo()
    backends.unusable.cache_clear()


def test_cpu_runs_numba_where_it_is_installed():
    pytest.importorskip("numba")
    assert backends.backend_name("cpu") == "numba"


def test_other_devices_run_torch():
    assert backends.backend_name("meta") == "torch"


def test_torch_takes_over_without_numba(without_numba, random_block, specified_block, swept):
    assert backends.backend_name("cpu") == "torch"
    block, stream = random_block(), torch.randn(30, 32)
    kernel = backends.prepare_block(block, device="cpu", precision="fp32")
    torch.testing.assert_close(
        swept(kernel, stream, [11]).double(), specified_block(block, stream), rtol=1e-4, atol=1e-4
    )


def test_precision_follows_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert backends.resolve_precision("auto", "cpu") == "bf16"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert backends.resolve_precision("auto", "cpu") == "fp32"
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert backends.resolve_precision("auto", "cpu") == "fp32"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_explicit_precision_stands(precision):
    assert backends.resolve_precision(precision, "cpu") == precision


def test_unknown_precision_is_refused(random_block):
    with pytest.raises(ValueError, match="'fp16'"):
        backends.resolve_precision("fp16", "cpu")
    with pytest.raises(ValueError, match="'auto'"):
        backends.prepare_block(random_block(), device="cpu", precision="auto")


def test_importing_the_package_imports_neither_numba_nor_torch():
    code = "import sys, gigavim_kernels; print({'numba', 'torch'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
