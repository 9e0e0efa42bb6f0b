"""Peak memory of one call beyond inputs and outputs.

CPU tensors: the high-water mark of the resident set of a process of its own, after inputs exist and
a small call has loaded what every call needs. Linux lets a process lower its mark to what is
resident (proc(5), clear_refs); elsewhere the mark only rises, and how far it rises is taken.

MPS tensors: what the driver has allocated for the process when the call is done, over what it had
after torch's cache was emptied. Torch keeps what a call frees, so that nothing the call used is
missing, but it allocates in heaps of up to 32 MiB: smaller differences mean nothing.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .contenders import Contender, contenders, prepare
from .problem import Problem

_MARK = Path("/proc/self/clear_refs")
_SMALL = 64
"""Queries and keys of the call that comes first."""


def beyond_output(problem: Problem, name: str, threads: int) -> float:
    """Bytes at the peak of one call on the CPU by the contender `name`, measured in a new process.

    Raises:
        RuntimeError: that process failed; the message is the end of what it wrote.
    """
    question = json.dumps([dataclasses.asdict(problem), name, threads])
    command = [sys.executable, "-m", __name__, question]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return float(done.stdout)


def beyond_output_on_mps(problem: Problem, contender: Contender) -> float:
    """Bytes at the peak of one call on the GPU of this process."""
    with contender.settings():
        contender.call()
        torch.mps.synchronize()
        gc.collect()
        torch.mps.empty_cache()
        before = torch.mps.driver_allocated_memory()
        results = contender.call()
        queued = torch.mps.driver_allocated_memory()
        torch.mps.synchronize()
        after = max(queued, torch.mps.driver_allocated_memory())
    return max(after - before - _size(problem, results), 0.0)


def _size(problem: Problem, results: Any) -> int:
    """Bytes of what a call returns; with gradients also of the output, which belongs to them."""
    tensors = results if isinstance(results, tuple) else (results,)
    size: int = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if problem.backward:
        query_rows, _ = problem.tokens
        size += query_rows * problem.heads * problem.value_dim * tensors[0].element_size()
    return size


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _resident() -> int:
    """Bytes from where the mark rises; lowers the mark to it where the system can."""
    if _MARK.exists():
        _MARK.write_text("5", encoding="ascii")
        return _status("VmRSS")
    return _highest()


def _highest() -> int:
    if _MARK.exists():
        return _status("VmHWM")
    # In bytes on macOS, in KiB elsewhere (getrusage(2) of each).
    unit = 1 if sys.platform == "darwin" else 1024
    highest: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return unit * highest


def _called(problem: Problem, name: str) -> Contender:
    (contender,) = contenders(prepare(problem), [name])
    if not isinstance(contender, Contender):
        raise NotImplementedError(contender.reason)
    return contender


def _measure(problem: Problem, name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    contender = _called(problem, name)
    small = dataclasses.replace(
        problem,
        query_len=min(problem.query_len, _SMALL),
        key_len=min(problem.key_len, _SMALL),
        lengths=tuple(min(length, _SMALL) for length in problem.lengths),
    )
    warm = _called(small, name)
    with warm.settings():
        warm.call()
    with contender.settings():
        gc.collect()
        before = _resident()
        results = contender.call()
        return max(_highest() - before - _size(problem, results), 0.0)


def _main() -> None:
    fields, name, threads = json.loads(sys.argv[1])
    for listed in ("window", "lengths"):
        fields[listed] = tuple(fields[listed])
    print(_measure(Problem(**fields), name, threads))


if __name__ == "__main__":
    _main()
