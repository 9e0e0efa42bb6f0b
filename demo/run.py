"""Runs both demonstrations, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DEMONSTRATIONS = {
    "A pretrained sentence encoder on metal_flash_attn": "sentence_encoder.py",
    "One attention over a long sequence": "long_context.py",
}


def main() -> int:
    folder = Path(__file__).parent
    failed = []
    for heading, script in DEMONSTRATIONS.items():
        # Flushed: the child writes to the same place.
        print(f"\n{heading}\n{'=' * len(heading)}", flush=True)
        command = [sys.executable, str(folder / script)]
        if subprocess.run(command, check=False).returncode != 0:  # noqa: S603 (both paths are ours)
            failed.append(script)
    if failed:
        print(f"\nFAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
