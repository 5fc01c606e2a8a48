import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gigavim.engine import memory
from gigavim.engine.plan import PROCESS_BYTES, format_seconds, plan_sweep
from gigavim.errors import ResourceError

GB = 10**9


def plan(make_block, length, **options):
    blocks = [make_block("v2", d_model=192, d_state=16)] * 24
    options = {"estimate": False, "max_memory_bytes": 4 * GB, "device": "cpu"} | options
    return plan_sweep(length, blocks, precision="fp32", **options)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """The same memory on every machine, whatever the tests before have loaded."""
    monkeypatch.setattr(memory, "resident_bytes", lambda: 100_000_000)
    monkeypatch.setattr(memory, "available_memory", lambda: 16 * GB)


@pytest.fixture
def big_disk(monkeypatch):
    monkeypatch.setattr(memory, "free_disk", lambda folder: 1000 * GB)
    monkeypatch.setattr(memory, "is_memory_backed", lambda folder: False)


def test_a_short_sequence_stays_in_ram(make_block):
    found = plan(make_block, 100_000)
    assert found.location == "ram"
    assert found.disk_bytes == 0
    assert found.device_bytes == 0
    assert PROCESS_BYTES + 100_000 * 192 * 4 < found.ram_bytes <= 1 * GB


def test_a_long_one_goes_to_disk_and_keeps_the_limit(make_block, big_disk):
    found = plan(make_block, 31_250_000)  # 100,000 x 80,000 px at patch 16
    assert found.location == "disk"
    assert found.disk_bytes == 31_250_000 * 192 * 4
    assert found.ram_bytes <= 4 * GB


def test_the_limit_decides_between_ram_and_disk(make_block, big_disk):
    in_ram = plan(make_block, 2_000_000)
    assert in_ram.location == "ram"
    assert plan(make_block, 2_000_000, max_memory_bytes=in_ram.ram_bytes).location == "ram"
    assert plan(make_block, 2_000_000, max_memory_bytes=in_ram.ram_bytes - 1).location == "disk"
    assert plan(make_block, 2_000_000, other_bytes=3 * GB).location == "disk"


@pytest.mark.parametrize("gb", [1, 10, 40, 70])
def test_a_gpu_sweeps_in_as_few_pieces_as_its_memory_allows(make_block, monkeypatch, gb):
    monkeypatch.setattr("gigavim.engine.plan.backend_name", lambda device: "triton")
    monkeypatch.setattr(memory, "available_memory", lambda: 100 * GB)
    limits = {"device": "meta", "max_gpu_memory_bytes": gb * GB, "max_memory_bytes": 40 * GB}
    chunks = [plan(make_block, length, **limits).chunk for length in (1000, 900_000, 6_000_000)]
    found = plan(make_block, 6_000_000, **limits)
    assert found.device_bytes <= gb * GB
    assert chunks[0] >= 1000
    assert all(chunk * 768 <= 1 << 31 for chunk in chunks)
    if gb >= 40:
        assert chunks[1] == 900_000
        assert found.location == "device"
        pieces = -(-6_000_000 // chunks[2])
        longer = -(-6_000_000 // (pieces - 1))
        room = longer * 768 > 1 << 31 or longer * 27_600 + 6_000_000 * 768 > gb * GB * 0.9
        assert room, "one piece less would have fitted"


@pytest.mark.parametrize(
    ("device_gb", "ram_gb", "location"), [(40, 4, "device"), (10, 40, "ram"), (10, 4, "disk")]
)
def test_an_accelerator_takes_the_nearest_memory_with_room(
    make_block, big_disk, monkeypatch, device_gb, ram_gb, location
):
    monkeypatch.setattr(memory, "available_memory", lambda: 100 * GB)
    limits = {"max_memory_bytes": ram_gb * GB, "max_gpu_memory_bytes": device_gb * GB}
    # "meta" is an accelerator that every torch has; nothing runs on it here.
    found = plan(make_block, 31_250_000, device="meta", **limits)
    assert found.location == location
    assert 0 < found.device_bytes <= device_gb * GB
    assert found.ram_bytes <= ram_gb * GB
    with pytest.raises(ResourceError, match="raise --max-gpu-memory"):
        plan(make_block, 31_250_000, device="meta", max_gpu_memory_bytes=GB // 100)
    with pytest.raises(ResourceError, match="raise --max-memory"):
        plan(make_block, 31_250_000, device="meta", max_memory_bytes=GB // 10)


def test_a_limit_beyond_the_machine_is_the_machine(make_block, big_disk):
    assert plan(make_block, 31_250_000, max_memory_bytes=100 * GB).location == "disk"


def test_little_memory_means_short_chunks(make_block, big_disk):
    roomy = plan(make_block, 1_000_000, chunk=100_000)
    tight = plan(make_block, 1_000_000, chunk=100_000, max_memory_bytes=PROCESS_BYTES + GB // 5)
    assert roomy.chunk == 100_000
    assert tight.chunk < roomy.chunk
    assert tight.ram_bytes <= PROCESS_BYTES + GB // 5


def test_a_limit_below_the_program_itself_is_refused(make_block):
    with pytest.raises(ResourceError, match=r"100 tokens need at least .*raise --max-memory"):
        plan(make_block, 100, max_memory_bytes=GB // 10)


def test_no_room_on_disk_is_refused_with_the_remedies(make_block, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "is_memory_backed", lambda folder: False)
    monkeypatch.setattr(memory, "free_disk", lambda folder: 1 * GB)
    with pytest.raises(ResourceError, match=r"24.0 GB of disk, but .* has 1.0 GB free: .*scratch"):
        plan(make_block, 31_250_000, scratch_dir=tmp_path)


def test_a_scratch_folder_in_ram_is_no_way_out(make_block, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "is_memory_backed", lambda folder: True)
    with pytest.raises(ResourceError, match="is no disk but RAM"):
        plan(make_block, 31_250_000, scratch_dir=tmp_path)


def test_an_empty_sequence_has_a_plan(make_block):
    found = plan(make_block, 0, estimate=True)
    assert found.location == "ram"
    assert found.seconds == 0


def test_the_estimate_grows_with_tokens_and_blocks(make_block):
    blocks = [make_block("v2", d_model=16)]
    options = {"device": "cpu", "precision": "fp32", "max_memory_bytes": 4 * GB, "chunk": 512}
    short = plan_sweep(20_000, blocks, **options)
    long = plan_sweep(2_000_000, blocks * 3, **options)
    assert 0 < short.seconds < long.seconds


def test_the_plan_reads_as_english(make_block, big_disk):
    lines = plan(make_block, 31_250_000).describe()
    text = "\n".join(lines)
    assert "31,250,000 tokens through 24 blocks" in text
    assert "token stream: 24.0 GB, on disk" in text
    assert "scratch disk: 24.0 GB" in text
    assert "device memory" not in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "1 s"), (45, "45 s"), (720, "12 min"), (11520, "3.2 h")]
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


def test_the_default_budget_is_used(make_block, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1 * GB)
    found = plan(make_block, 100_000, max_memory_bytes=None)
    assert found.ram_bytes <= 0.8 * 1.1 * GB


@pytest.mark.slow
def test_a_process_keeps_the_memory_it_planned(tmp_path):
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    if memory.is_memory_backed(tmp_path):
        pytest.skip("the temporary folder is no disk")
    code = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from conftest import random_block
    from gigavim.engine.plan import plan_sweep
    from gigavim.engine.sequence import TokenSequence
    from gigavim.engine.sweep import sweep
    length, width = 500_000, 256  # 512 MB
    blocks = [random_block("v2", d_model=width, d_state=1)]
    options = {"device": "cpu", "precision": "fp32", "threads": 1}
    scratch = Path(sys.argv[2])
    plan = plan_sweep(
        length, blocks, max_memory_bytes=800_000_000, scratch_dir=scratch, **options
    )
    with TokenSequence(length, width, location=plan.location, scratch_dir=scratch) as sequence:
        for start in range(0, length, 10_000):
            sequence.rows(start, start + 10_000).normal_()
            sequence.release(start, start + 10_000)
        sweep(sequence, blocks, chunk=plan.chunk, **options)
    # Not getrusage, in whose peak that of the parent is counted.
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(plan.location, plan.ram_bytes, peak)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), Path(__file__).parent, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    location, planned, peak = done.stdout.split()
    assert location == "disk"
    assert int(peak) <= int(planned) <= 800_000_000
