"""Memory and CPU time of processes, as Linux counts them."""

import os
import resource
from pathlib import Path


def peak() -> int:
    """The most memory that this process has held, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident(field: str) -> int:
    """Resident bytes of this process now (``VmRSS``) or at most (``VmHWM``)."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in text.splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def cpu_seconds() -> float:
    """CPU time of the processes that have ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def descendants(root: int) -> list[int]:
    """A process and all that it started."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (stat := _read(folder / "stat")):
            # The command's name, in brackets, may hold anything.
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found = [root]
    for process in found:  # grows
        found += [child for child, parent in parents.items() if parent == process]
    return found


def resident_of(process: int) -> int:
    """Resident bytes of a process; what it shares with others counts in each."""
    statm = _read(Path(f"/proc/{process}/statm"))
    return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm else 0


def _read(file: Path) -> str:
    """The text of a file; '' where its process has ended."""
    try:
        return file.read_text()
    except OSError:
        return ""
