"""How far the resident memory of this process rises above a starting point."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

_PROC = Path("/proc/self")


def _status_bytes(field: str) -> int:
    """One size of /proc/self/status in bytes, for example VmRSS or VmHWM."""
    for line in (_PROC / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _reset_high_water_mark() -> bool:
    """Set VmHWM back to the present resident size; false where the kernel does not offer that."""
    try:
        # 5 is the value that resets the peak (proc(5), /proc/pid/clear_refs).
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_bytes() -> int:
    """Resident size now; POSIX `ps` gives it in KiB where there is no /proc."""
    if (_PROC / "status").exists():
        return _status_bytes("VmRSS")
    command = ["/bin/ps", "-o", "rss=", "-p", str(os.getpid())]
    kibibytes = subprocess.check_output(command, text=True)  # noqa: S603 (nothing comes from outside)
    return int(kibibytes) * 1024


def _highest_resident_bytes() -> int:
    """Highest resident size since the process began; macOS reports bytes, other systems KiB."""
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


class PeakMemory:
    """Measures from its construction on.

    `exact` is false where the high-water mark cannot be reset: an earlier peak of the process may
    then stand in for the one asked about, and `above_start` is an upper limit.
    """

    def __init__(self) -> None:
        self.exact = _reset_high_water_mark()
        self._start = _resident_bytes()

    def above_start(self) -> int:
        """Bytes between the resident size at the start and the highest one since."""
        highest = _status_bytes("VmHWM") if self.exact else _highest_resident_bytes()
        return max(0, highest - self._start)
