"""The stand-in for torch's MPS half behaves as the documentation of `compile_shader` says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import standin_mps
import torch

SOURCE = """
#include <metal_stdlib>
using namespace metal;

kernel void affine(
    device float* out [[buffer(0)]],
    device const float* in [[buffer(1)]],
    constant long* ints [[buffer(2)]],
    constant float* floats [[buffer(3)]],
    uint i [[thread_position_in_grid]])
{
    out[i] = in[i * ints[0]] * floats[0] + floats[1];
}

kernel void one_long(device long* out [[buffer(0)]], constant long& value [[buffer(1)]]) {
    out[0] = value;
}

kernel void one_int(device int* out [[buffer(0)]], constant int& value [[buffer(1)]]) {
    out[0] = value;
}

kernel void place(
    device int* out [[buffer(0)]],
    uint3 at [[thread_position_in_grid]],
    uint3 size [[threads_per_threadgroup]],
    uint3 group [[threadgroup_position_in_grid]])
{
    out[at.y * 8 + at.x] = int(group.y * 1000 + group.x * 100 + size.y * 10 + size.x);
}
"""


@pytest.fixture(autouse=True)
def standin() -> Iterator[None]:
    with standin_mps.installed():
        yield


@pytest.fixture
def library() -> Any:
    return torch.mps.compile_shader(SOURCE)


def test_lists_are_packed_and_views_are_read_from_their_first_element(library: Any) -> None:
    out, values = torch.zeros(40), torch.arange(200.0)
    library.affine(out[8:], values[100:], [3], (2.0, 0.5), threads=32, group_size=32)
    assert torch.equal(out[8:], (100 + 3 * torch.arange(32.0)) * 2 + 0.5)
    assert out[:8].eq(0).all()


def test_whole_numbers_are_int64_and_may_be_cast(library: Any) -> None:
    out = torch.zeros(2, dtype=torch.int64)
    for value, cast in [(-(2**40), None), (True, None)]:
        library.one_long(out, value, threads=1, group_size=1, arg_casts=cast)
        assert out.tolist() == [int(value), 0]
    narrow = torch.zeros(1, dtype=torch.int32)
    library.one_int(narrow, -7, threads=1, arg_casts="int32")
    assert narrow.item() == -7
    library.one_int(narrow, 9, threads=1, arg_casts={1: "int32"})
    assert narrow.item() == 9


def test_threads_are_counted_in_all_and_default_to_the_first_tensor(library: Any) -> None:
    out = torch.zeros(4, 8, dtype=torch.int32)
    library.place(out, threads=(8, 4), group_size=(4, 2))
    assert out[1, 3] == 24
    assert out[3, 7] == 1124
    ones, values = torch.zeros(32), torch.ones(32)
    library.affine(ones, values, [1], [1.0, 1.0])
    assert ones.eq(2).all()


@pytest.mark.parametrize("bad", [None, "text", torch.float32, [], (), [None], [1, 2.5]], ids=repr)
def test_other_arguments_are_refused(library: Any, bad: Any) -> None:
    with pytest.raises(RuntimeError):
        library.one_long(torch.zeros(1), bad, threads=1, group_size=1)


def test_groups_must_fit(library: Any) -> None:
    out = torch.zeros(4, 8, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="size"):
        library.place(out, threads=(8, 4), group_size=4)
    with pytest.raises(ValueError, match="Threadgroup size exceeds 1024 limit"):
        library.place(out, threads=2048, group_size=2048)
    with pytest.raises(RuntimeError, match="undefined or has wrong dimension"):
        library.one_long(1)


def test_kernels_are_looked_up_by_name(library: Any) -> None:
    assert set(dir(library)) == {"affine", "one_long", "one_int", "place"}
    assert library.affine is not library.affine
    assert library.affine.max_threads_per_threadgroup == 1024
    with pytest.raises(RuntimeError, match="Failed to create function state object"):
        _ = library.missing


def test_sources_must_be_ascii_and_compile() -> None:
    with pytest.raises(SyntaxError, match="undeclared"):
        torch.mps.compile_shader(SOURCE.replace("floats[1]", "undeclared"))
    with pytest.raises(RuntimeError, match="nil"):
        torch.mps.compile_shader(SOURCE + "// \N{EN DASH}")
