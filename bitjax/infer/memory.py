"""Enough memory? Asked before it is taken, because Linux would kill the process instead.

    available = min(MemAvailable, for each control group on the way up: limit - usage + page cache)

Memory of our own (KV cache, float tables, activations) must fit in what is available. The mapped
weights of a file need not: the kernel drops pages and reads them again, at the price of a disk read
for each token.

Sources: proc(5), meminfo; the Linux kernel's documentation of control groups, versions 1 and 2.
"""

from __future__ import annotations

from pathlib import Path

DISK_BYTES_PER_SECOND = 2e9  # of an ordinary NVMe disk, for the estimate in a warning


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take; None where the system does not tell (not Linux).

    Args:
        root: of the file system with `proc` and `sys`.
    """
    limits = [_meminfo(root), *_control_groups(root)]
    known = [limit for limit in limits if limit is not None]
    return max(0, min(known)) if known else None


def require_memory(what: str, needed: int, available: int | None) -> None:
    """Refuse what does not fit.

    Raises:
        ValueError: `needed` bytes exceed those `available`; says what for, and both numbers.
    """
    if available is not None and needed > available:
        raise ValueError(
            f"{what} needs {_gigabytes(needed)} of memory; {_gigabytes(available)} are available"
        )


def mapping_warning(file_bytes: int, available: int | None) -> str:
    """A sentence on what a mapped file larger than memory costs; empty if it fits."""
    if available is None or file_bytes <= available:
        return ""
    beyond = file_bytes - available
    return (
        f"the weights take {_gigabytes(file_bytes)} and {_gigabytes(available)} of memory are "
        f"available: every token reads at least {_gigabytes(beyond)} from the disk again, about "
        f"{beyond / DISK_BYTES_PER_SECOND:.1f} s at {DISK_BYTES_PER_SECOND / 1e9:.0f} GB/s"
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _meminfo(root: Path) -> int | None:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024  # "kB" there are 1024 bytes
    except OSError:
        pass
    return None


def _control_groups(root: Path) -> list[int | None]:
    """What each control group of the process leaves; a group limits all below it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base = "sys/fs/cgroup/memory"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):  # in a container the path may lead nowhere
            left.append(_group(root / base / folder, *names))
    return left


def _group(folder: Path, limit: str, usage: str) -> int | None:
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    cached = sum(int(counts.get(name, 0)) for name in ("active_file", "inactive_file"))
    return None if most == "max" else int(most) - used + cached
