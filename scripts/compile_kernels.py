"""Writes the texts of the Metal kernels to a folder; compiles them where there is Apple's compiler.

`python scripts/compile_kernels.py FOLDER`

The texts are those that the planner's tiles have for the GPUs, tiers, dtypes, head dimensions and
features below, as `python -m metal_flash_attn msl` prints them. What lies in the folder already, as
the example kernel_texts of crates/metal writes it, is compiled, too. A kernel of crates/metal of
which there is no text then is an error. Elsewhere than on a Mac with Xcode the texts are written
only.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from metal_flash_attn import _native
from metal_flash_attn._cli import _parser

KERNELS = Path(__file__).parents[1] / "crates/metal/kernels"
MACHINES = {
    "scalar": ["m1"],
    "simdgroup": ["m1", "m3-max"],
    "decode": ["m1", "m3-max"],
    "tensorops": ["m5"],
    "tensorops-staged": ["m5"],
}
DTYPES = ["f16", "bf16", "f32"]
SHAPES = [(40, 40), (64, 64), (80, 80), (128, 128), (128, 64), (256, 256)]
"""Head dimensions of q and k, and of v."""
FEATURES = [
    "",
    "--causal",
    "--window 100,0 --sinks",
    "--causal --softcap 30 --alibi --lse",
    "--bias bool",
    "--bias f32 --causal",
]
TENSOR_HEADER = "MetalPerformancePrimitives"
"""Texts that include it need Metal 4; the others need 3.1, which has bfloat."""


def commands() -> Iterator[list[str]]:
    """Arguments of `msl`: each feature at two shapes, each shape with two features."""
    for tier, machines in MACHINES.items():
        query_len = 1 if tier == "decode" else 4096
        for machine, dtype, (at, dims) in itertools.product(machines, DTYPES, enumerate(SHAPES)):
            q, k, v = f"1x{query_len}x8x{dims[0]}", f"1x4096x2x{dims[0]}", f"1x4096x2x{dims[1]}"
            features = FEATURES if at in {1, 3} else FEATURES[:2]
            for feature in features:
                yield (
                    f"msl --tier {tier} --gpu {machine} --macos 26.2 --torch 2.15 --dtype {dtype} "
                    f"--q {q} --k {k} --v {v} {feature}"
                ).split()


def write(folder: Path) -> None:
    """Writes each text once."""
    folder.mkdir(parents=True, exist_ok=True)
    for command in commands():
        options = vars(_parser().parse_args(command))
        source = _native._kernel_text(options)["source"]
        digest = hashlib.sha256(source.encode()).hexdigest()[:12]
        path = folder / f"{options['tier']}-{digest}.metal"
        path.write_text(f"// {' '.join(command)}\n{source}", encoding="ascii")


def missing(folder: Path) -> list[str]:
    """Kernels of crates/metal of which the folder has no text."""
    kernel = re.compile(r"^kernel void (\w+)\(", re.MULTILINE)

    def names(paths: Iterable[Path]) -> set[str]:
        return {name for path in paths for name in kernel.findall(path.read_text(encoding="ascii"))}

    return sorted(names(KERNELS.glob("*.metal")) - names(folder.glob("*.metal")))


def compile_one(path: Path) -> str:
    """What the compiler says against a text; empty if nothing."""
    standard = "metal4.0" if TENSOR_HEADER in path.read_text(encoding="ascii") else "metal3.1"
    # As torch compiles it: no fast mathematics but where the text asks for it.
    command: list[str | Path] = ["xcrun", "-sdk", "macosx", "metal", f"-std={standard}"]
    command += ["-fno-fast-math", "-c", path, "-o", path.with_suffix(".air")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if process.returncode == 0 else f"{path.name}: {process.stderr.strip()}"


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python scripts/compile_kernels.py FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    write(folder)
    if forgotten := missing(folder):
        print(f"no text of {', '.join(forgotten)}: run the example kernel_texts", file=sys.stderr)
        return 1
    texts = sorted(folder.glob("*.metal"))
    if shutil.which("xcrun") is None:
        print(f"{len(texts)} texts; not compiled: there is no xcrun here")
        return 0
    with ThreadPoolExecutor() as pool:
        faults = [fault for fault in pool.map(compile_one, texts) if fault]
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{len(texts)} texts, {len(faults)} refused by the compiler")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
