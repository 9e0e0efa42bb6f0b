"""What the figures were measured on."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from metal_flash_attn import __version__, _native


@dataclass(frozen=True)
class Machine:
    """Versions and hardware, as far as they say what a figure means.

    Attributes:
        processor: its name; the architecture where the system does not tell.
        gpu: name and cores, or None for measurements on the CPU.
        isa: instruction set of the cpu tier.
        torch_isa: that of torch's kernels.
    """

    system: str
    processor: str
    gpu: str | None
    threads: int
    isa: str | None
    torch_isa: str
    torch: str
    mtlflashattn: str

    @classmethod
    def here(cls, device: str) -> Machine:
        """This machine, for measurements on `device`."""
        known = _native._machine()
        gpu = known["gpu"] if device != "cpu" else None
        system = platform.system()
        if system == "Darwin":
            system = f"macOS {platform.mac_ver()[0]}"
        return cls(
            system=system,
            processor=_processor(),
            gpu=None if gpu is None else f"{gpu['name']}, {gpu['cores']} cores",
            threads=torch.get_num_threads(),
            isa=known["isa"],
            torch_isa=torch.backends.cpu.get_cpu_capability(),
            torch=torch.__version__,
            mtlflashattn=__version__,
        )

    @property
    def text(self) -> str:
        """One line of it, for tables and pictures."""
        versions = (
            f"torch {self.torch.partition('+')[0]}, mtlflashattn {self.mtlflashattn}, {self.system}"
        )
        if self.gpu is not None:
            return f"{self.gpu}, {versions}"
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        return f"{self.processor}, {threads}, {self.isa}, {versions}"


def _processor() -> str:
    if platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        return done.stdout.strip() or platform.machine()
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
