import subprocess
import sys

import pytest

from gigavim.engine import memory
from gigavim.engine.memory import format_bytes, parse_bytes
from gigavim.errors import SettingsError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1.5GB", 1_500_000_000),
        ("800 MiB", 800 << 20),
        ("2G", 2 * 10**9),
        ("123", 123),
        (4096, 4096),
        ("0.5 tb", 5 * 10**11),
    ],
)
def test_sizes_as_people_write_them(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "1.5.2GB", "GBs", "nan", "inf GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(SettingsError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1536, "1.5 kB"), (24e9, "24.0 GB"), (2e15, "2,000 TB")],
)
def test_sizes_for_people(size, text):
    assert format_bytes(size) == text


def test_free_memory_is_within_the_machine():
    assert 0 < memory.available_memory() < 1 << 50
    assert 0 < memory.memory_budget() < memory.memory_budget(1 << 60)
    assert memory.memory_budget(1000) == 1000


def write_group(folder, *, limit, usage, cache, version):
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        2: ("memory.max", "memory.current", "inactive_file"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }[version]
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n")


def test_a_containers_limit_counts(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("0::/\n")
    root = tmp_path / "fs"
    write_group(root, limit=1000, usage=700, cache=200, version=2)
    assert memory._cgroup_free(membership, root) == [500]


def test_the_limits_of_parent_groups_count_and_no_limit_does_not(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("0::/slice/unit\n")
    root = tmp_path / "fs"
    write_group(root / "slice" / "unit", limit="max", usage=700, cache=0, version=2)
    write_group(root / "slice", limit=900, usage=700, cache=0, version=2)
    assert memory._cgroup_free(membership, root) == [200]


def test_version_1_groups_whose_path_is_the_hosts(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/docker/abc\n")
    root = tmp_path / "fs"
    write_group(root / "memory", limit=1000, usage=400, cache=100, version=1)
    assert memory._cgroup_free(membership, root) == [700]


def test_systems_without_control_groups(tmp_path):
    assert memory._cgroup_free(tmp_path / "absent", tmp_path) == []


def test_free_disk_of_a_folder_yet_to_be_made(tmp_path):
    assert memory.free_disk(tmp_path / "a" / "b") > 0


def test_sizes_need_no_torch():
    code = "import sys, gigavim.engine.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
