import mmap
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gigavim.engine import sequence as sequence_module
from gigavim.engine.sequence import TokenSequence
from gigavim.errors import OutputError, ResourceError

LOCATIONS = ("ram", "disk", "device")


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(0, 3000),
    width=st.integers(1, 40),
    location=st.sampled_from(LOCATIONS),
    seed=st.integers(0, 99),
)
def test_rows_scattered_in_any_order_come_back(length, width, location, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(length, width, generator=generator)
    order = torch.randperm(length, generator=generator)
    with TokenSequence(length, width, location=location) as sequence:
        sequence.scatter(order, rows)
        sequence.release(0, length)
        assert torch.equal(sequence.gather(order), rows)
        assert torch.equal(sequence.rows(0, length)[order], rows)
        assert sequence.rows(0, length).is_contiguous()


@pytest.mark.parametrize("location", LOCATIONS)
def test_rows_are_writable_views(location):
    with TokenSequence(10, 4, location=location) as sequence:
        sequence.rows(0, 10).zero_()
        sequence.rows(3, 5).fill_(7)
        sequence.release(3, 5)
        assert sequence.rows(0, 10).sum() == 2 * 4 * 7
        loaded = sequence.load(2, 4, torch.device("cpu"))
        loaded += 1
        sequence.store(2, loaded)
        assert sequence.gather(torch.tensor([2, 3])).tolist() == [[1] * 4, [8] * 4]


@pytest.mark.parametrize("location", LOCATIONS)
def test_rows_outside_the_sequence_are_refused(location):
    with TokenSequence(10, 4, location=location) as sequence:
        for start, stop in ((-1, 3), (5, 11), (6, 5)):
            with pytest.raises(IndexError):
                sequence.rows(start, stop)
        with pytest.raises((IndexError, RuntimeError)):
            sequence.gather(torch.tensor([10]))
        with pytest.raises((IndexError, RuntimeError)):
            sequence.scatter(torch.tensor([10]), torch.zeros(1, 4))
    assert len(sequence) == 0


def test_the_scratch_file_has_no_name(tmp_path):
    with TokenSequence(1000, 8, location="disk", scratch_dir=tmp_path) as sequence:
        sequence.rows(0, 1000).fill_(1)
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_closing_gives_the_disk_space_back(tmp_path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    sequence = TokenSequence(1000, 256, location="disk", scratch_dir=tmp_path)
    assert str(tmp_path) in maps.read_text()
    sequence.close()
    # A file without a name goes when nothing maps or holds it.
    assert str(tmp_path) not in maps.read_text()
    held = [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    assert not any(str(tmp_path) in name for name in held)


def test_a_missing_scratch_folder_is_named(tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(OutputError, match=r"missing.*choose another"):
        TokenSequence(10, 4, location="disk", scratch_dir=missing)


def test_more_disk_than_there_is_fails_at_once(tmp_path):
    with pytest.raises(ResourceError, match="no room for a scratch file"):
        TokenSequence(10**12, 1024, location="disk", scratch_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fallocate", [True, False])
def test_a_full_disk_is_an_error_and_not_a_crash(fallocate):
    code = f"""
    import os, resource
    from gigavim.engine.sequence import TokenSequence
    from gigavim.errors import ResourceError
    if not {fallocate}:
        del os.posix_fallocate
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    with TokenSequence(1000, 256, location="disk") as small:
        small.rows(0, 1000).fill_(1)
    try:
        TokenSequence(100_000, 256, location="disk")
    except ResourceError as error:
        print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "no room for a scratch file of 102 MB" in done.stdout


@pytest.mark.parametrize("fallocate", [True, False])
def test_disk_space_is_set_aside_before_it_is_written(tmp_path, monkeypatch, fallocate):
    if not fallocate:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    size = (40 << 20) + 12
    with (tmp_path / "scratch").open("w+b") as file:
        sequence_module._reserve(file, size)
        os.fsync(file.fileno())
        status = os.fstat(file.fileno())
    assert status.st_size == size
    assert status.st_blocks * 512 >= size


def test_more_memory_than_can_be_addressed_is_a_resource_error():
    with pytest.raises(ResourceError, match="use a larger mpp"):
        TokenSequence(2**50, 1024)


def test_scattering_over_a_mapped_file_keeps_memory_small(monkeypatch):
    monkeypatch.setattr(sequence_module, "RELEASE_BYTES", 1 << 20)
    length, width = 200_000, 64  # 51 MB
    with TokenSequence(length, width, location="disk") as sequence:
        order = torch.randperm(length)
        before = mapped_bytes()
        for part in order.split(100):
            sequence.scatter(part, part[:, None].expand(-1, width).float())
            assert mapped_bytes() - before < 8 << 20
        assert torch.equal(sequence.rows(0, length)[:, 0], torch.arange(length).float())


def mapped_bytes():
    """Resident pages of mapped files; skips where the system does not tell."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("needs /proc")
    return int(statm.read_text().split()[2]) * mmap.PAGESIZE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("location", ["ram", "device"])
def test_rows_lie_where_a_gpu_reaches_them(location):
    device = torch.device("cuda")
    with TokenSequence(1000, 8, location=location, device=device) as sequence:
        rows = torch.randn(1000, 8)
        sequence.scatter(torch.arange(1000), rows)
        assert sequence.rows(0, 1000).is_pinned() == (location == "ram")
        loaded = sequence.load(10, 20, device)
        loaded += 1
        sequence.store(10, loaded)
        torch.cuda.synchronize()
        assert torch.equal(sequence.gather(torch.arange(10, 20)).cpu(), rows[10:20] + 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offsets_beyond_32_bits():
    length, width = 12_000_000, 192  # 2.3e9 numbers
    with TokenSequence(length, width, location="device", device="cuda") as sequence:
        index = torch.tensor([0, 5, length // 2, length - 1])
        sequence.rows(0, length).zero_()
        sequence.scatter(index, torch.arange(4.0)[:, None].expand(-1, width))
        assert sequence.gather(index)[:, -1].tolist() == [0, 1, 2, 3]
        assert sequence.rows(0, length).count_nonzero() == 3 * width
