"""How much memory and disk there is, and how people write such figures. Needs no torch."""

import shutil
from pathlib import Path

import psutil

from gigavim.errors import SettingsError

DEFAULT_SHARE = 0.8
"""Part of the free memory that gigavim uses where it is given no limit."""

_CGROUP = Path("/sys/fs/cgroup")
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def parse_bytes(text: str | int) -> int:
    """Bytes from "1.5GB", "800 MiB", "2G" or a plain number (kB, MB, GB are powers of 1,000).

    Raises:
        SettingsError: not a positive size.
    """
    from dask.utils import parse_bytes as dask_parse_bytes

    try:
        # dask reads a unit alone ("GB") as one of it, and "" as one byte.
        size = int(dask_parse_bytes(text)) if str(text).strip()[:1].isdigit() else 0
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise SettingsError(f"{text!r} is not a size: write it like 1.5GB, 800MiB or 2000000000")
    return size


def format_bytes(size: float) -> str:
    """A size for people, in powers of 1,000: 1536000 is "1.5 MB"."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:,.{0 if size >= 100 * unit else 1}f} {name}"
    return f"{size:.0f} bytes"


def resident_bytes() -> int:
    """Memory this process holds now."""
    return int(psutil.Process().memory_info().rss)


def available_memory() -> int:
    """Bytes this process may still allocate: free memory of the machine, or less in a container."""
    free = int(psutil.virtual_memory().available)
    return max(0, min([free, *_cgroup_free(Path("/proc/self/cgroup"), _CGROUP)]))


def memory_budget(limit: int | None = None) -> int:
    """What the process as a whole may use: at most `limit`, or 80 % of what it could have."""
    reachable = available_memory() + resident_bytes()
    return int(DEFAULT_SHARE * reachable) if limit is None else min(limit, reachable)


def free_disk(folder: Path) -> int:
    """Free bytes of the file system that holds `folder`, which need not exist yet."""
    resolved = folder.resolve()
    existing = next(f for f in (resolved, *resolved.parents) if f.exists())
    return shutil.disk_usage(existing).free


def is_memory_backed(folder: Path) -> bool:
    """Whether files in `folder` live in RAM (tmpfs, as /tmp on many systems)."""
    resolved = folder.resolve()
    mounts = {Path(p.mountpoint): p.fstype for p in psutil.disk_partitions(all=True)}
    for parent in (resolved, *resolved.parents):
        if parent in mounts:
            return mounts[parent] in ("tmpfs", "ramfs")
    return False


def _cgroup_free(membership: Path, root: Path) -> list[int]:
    """Free bytes under each memory limit that binds this process (control groups v1 and v2)."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    free: list[int] = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # A limit of any ancestor binds as well. Inside a container the path may be the host's,
        # which is not mounted: then only the root, which is the container's own group, exists.
        folder = base / group.lstrip("/")
        while folder.is_relative_to(base):
            value = _group_free(folder, *names)
            if value is not None:
                free.append(value)
            folder = folder.parent
    return free


def _group_free(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    """Limit minus usage of one control group, page cache that can be dropped not counted."""
    try:
        limit = int((folder / limit_name).read_text())  # "max" where there is none: ValueError
        usage = int((folder / usage_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return limit - usage + int(stat.get(cache_name, 0))
