"""`python -m bench`: the CPU engine beside torch, interleaved in one process."""

import argparse
import json
import os
import sys
from typing import Any

# Environment that holds both libraries to one instruction set; it is read when they are loaded.
INSTRUCTION_SETS = {
    "avx2": {
        "MTLFLASHATTN_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--isa",
        choices=["avx2", "native"],
        help="instruction set of both libraries (default: avx2 where the machine has it)",
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="per case (default 2)")
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument(
        "--llama",
        metavar="LIBRARY",
        help="libggml.so of a llama.cpp build, to compare decode with (docs/development.md)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    return parser.parse_args()


def restart_with(isa: str, program: str = "bench") -> None:
    """Starts this program again where the environment does not yet hold both to `isa`."""
    wanted = INSTRUCTION_SETS.get(isa, {})
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, "-m", program, *sys.argv[1:]])


def main() -> None:
    options = arguments()
    from metal_flash_attn._native import instruction_sets

    restart_with(options.isa or ("avx2" if "avx2" in instruction_sets() else "native"))
    from . import caches, llama, memory, overhead, tables

    if options.llama:
        try:
            caches.library = llama.Ggml(options.llama)
        except ValueError as error:
            raise SystemExit(str(error)) from None

    sections = [
        tables.one_thread(options.seconds, options.only),
        tables.two_threads(options.seconds, options.only),
    ]
    if not options.only:
        sections += [overhead.table(options.seconds), overhead.patch_table(options.seconds)]
        sections += memory.tables()
    figures: dict[str, Any] = {}
    for section in sections:
        figures[section.title] = section.show()
    if options.json:
        with open(options.json, "w") as file:  # noqa: PTH123
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
