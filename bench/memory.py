"""Peak memory above inputs and output, each measured in a process of its own."""

import subprocess
import sys

from .report import Section

# The high-water mark of the resident set is reset after the inputs and a small warm-up exist.
PROGRAM = """
import sys, torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.nn.attention import SDPBackend, sdpa_kernel
from metal_flash_attn import flash_attn_func
which, heads, length, dim = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(2)
order = (1, length, heads, dim) if which == "ours" else (1, heads, length, dim)
q, k, v = (torch.randn(order) for _ in range(3))
run = flash_attn_func if which == "ours" else sdpa
small = [tensor[..., :64, :] if which != "ours" else tensor[:, :64] for tensor in (q, k, v)]
run(*small)
def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
if which == "math":
    with sdpa_kernel(SDPBackend.MATH):
        out = run(q, k, v)
else:
    out = run(q, k, v)
print((status("VmHWM") - before) / 1024 - out.numel() * out.element_size() / 2**20)
"""


def above_output(which: str, heads: int, length: int, dim: int) -> float:
    """MiB above inputs and output at the peak of one call."""
    arguments = [which, str(heads), str(length), str(dim)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def table() -> Section:
    """Ours and torch's flash kernel at H8 L16384 D64, float32, two threads."""
    section = Section(
        "Peak memory above inputs and output, 2 threads",
        ["H8 L16384 D64 float32", "MiB", "target"],
        "Linux only: resident-set high-water mark of a process of its own.",
    )
    if not sys.platform.startswith("linux"):
        section.rows.append(["not measured on this system", "", ""])
        return section
    section.rows.append(["ours", f"{above_output('ours', 8, 16384, 64):.1f}", "16.0"])
    section.rows.append(["torch flash", f"{above_output('flash', 8, 16384, 64):.1f}", ""])
    scores = 8 * 16384**2 * 4 / 2**20
    section.rows.append(["the score matrix (computed, not run)", f"{scores:.0f}", ""])
    return section
