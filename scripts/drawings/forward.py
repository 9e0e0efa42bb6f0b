"""Drawings of the forward pass."""

from __future__ import annotations

from .canvas import FAINT, KEY, MARK, MEMORY, OUT, PAPER, QUERY, SCORE, VALUE, Canvas


def online_softmax() -> Canvas:
    """Blocks of keys stream past rows that keep maximum, sum and output."""
    c = Canvas(760, 382, "Online softmax: blocks of K and V pass by a block of query rows")
    c.box(24, 120, 70, 96, "Q\n64 rows", fill=QUERY, bold=True)
    for block in range(5):
        now = block == 2
        x = 130 + block * 84
        state = "now" if now else ("done" if block < 2 else "to come")
        c.box(x, 30, 78, 52, f"K block {block}", fill=KEY if now else MEMORY, bold=now)
        c.box(x, 250, 78, 52, f"V block {block}", fill=VALUE if now else MEMORY, bold=now)
        c.box(
            x, 120, 78, 96, "S = Q K\u1d40\nP = exp(S - m)" if now else "", fill=SCORE if now else PAPER,
            dashed=not now, size=10.5,
        )  # fmt: skip
        if not now:
            c.text(x + 39, 165, "never\nstored", size=10, color=FAINT)
        c.text(x + 39, 22, state, size=11, color=FAINT)
    c.arrow(337, 84, 337, 116)
    c.arrow(337, 218, 337, 246)
    c.box(580, 96, 158, 44, "m  largest score so far", fill=PAPER, size=12)
    c.box(580, 146, 158, 44, "l  sum of weights so far", fill=PAPER, size=12)
    c.box(580, 196, 158, 44, "O  weighted sum of V", fill=OUT, size=12, bold=True)
    c.text(659, 86, "kept for each row", size=11, color=FAINT)
    c.arrow(556, 168, 576, 168)
    c.text(
        380, 328,
        "a block with larger scores raises m to m':    l = l e^(m - m') + sum(P)    "
        "O = O e^(m - m') + P V", size=12,
    )  # fmt: skip
    c.text(380, 348, "at the end:    out = O / l    lse = m + ln l", size=12)
    c.text(380, 368, "memory: one block of scores, not queries x keys", size=12, color=FAINT)
    return c


def blocks_of_a_mask() -> Canvas:
    """Which blocks of keys a causal and a windowed mask leave to do."""
    c = Canvas(
        760, 300, "Blocks of a causal mask and of a window: skipped, with mask code, without"
    )
    cell = (32, 26)

    def causal(row: int, column: int) -> tuple[str, str]:
        if column > row:
            return PAPER, ""
        return (MARK, "edge") if column == row else (SCORE, "full")

    def window(row: int, column: int) -> tuple[str, str]:
        if column > row or column < row - 3:
            return PAPER, ""
        return (MARK, "edge") if column in {row, row - 3} else (SCORE, "full")

    for x, look, name in ((70, causal, "causal"), (430, window, "causal, window of 3 blocks")):
        c.text(x + 4 * 32, 30, name, bold=True)
        c.grid(x, 44, 8, 8, cell, look, size=9.5)
        c.text(x + 4 * 32, 270, "blocks of keys", size=11, color=FAINT)
    c.text(40, 152, "blocks\nof\nqueries", size=11, color=FAINT)
    c.text(
        380, 292, "white: skipped, not even read     full: no mask code     edge: mask code, key by key",
        size=12,
    )  # fmt: skip
    return c


def _lane(row: int, column: int) -> int:
    """The lane that holds an element of an 8x8 fragment: the map of simdgroup.metal, turned round."""
    for lane in range(32):
        first = (lane // 4 & 2) * 2 + lane % 2 * 2
        if row == (lane // 4 & 4) + lane // 2 % 4 and column in {first, first + 1}:
            return lane
    raise ValueError("every element has a lane")


def fragment() -> Canvas:
    """Which lane of a simdgroup holds which element of an 8x8 fragment."""
    c = Canvas(
        760, 330, "Lane map of an 8x8 simdgroup_matrix: a lane holds two neighbours of a row"
    )
    shades = [QUERY, KEY, VALUE, SCORE, OUT, MARK, MEMORY, "#fff3c4"]

    def look(row: int, column: int) -> tuple[str, str]:
        return shades[row], str(_lane(row, column))

    c.grid(40, 40, 8, 8, (34, 30), look, size=12)
    c.text(176, 28, "which lane has the element", bold=True)
    c.text(176, 300, "columns", size=11, color=FAINT)
    c.text(
        356, 62,
        "A simdgroup is 32 lanes. An 8x8 fragment has 64 elements:\neach lane holds two neighbours of a "
        "row.", anchor="start",
    )  # fmt: skip
    c.text(
        356, 118,
        "A row lies in four lanes, which differ in bits 0 and 3\nof their number. Row 0: lanes 0, 1, 8, 9.",
        anchor="start",
    )  # fmt: skip
    c.text(
        356, 174,
        "So the maximum or the sum of a row is two shuffles:\n"
        "x = max(x, simd_shuffle_xor(x, 1))\nx = max(x, simd_shuffle_xor(x, 8))",
        anchor="start",
    )  # fmt: skip
    c.text(
        356, 248,
        "and P = exp2(S - max) is computed where S lies: nothing\nmoves between the two products.",
        anchor="start",
    )  # fmt: skip
    c.text(
        356, 296, "Apple does not document the map. On a Mac the probe\nrefuses a kernel for which it is another.",
        anchor="start", size=12, color=FAINT,
    )  # fmt: skip
    return c


def simdgroup_step() -> Canvas:
    """What a simdgroup does with one block of keys, all of it in registers."""
    c = Canvas(
        760, 318, "One block of keys in the simdgroup kernel: Q, S, P and O live in registers"
    )
    c.box(
        150,
        16,
        590,
        54,
        "device memory (or threadgroup memory, when a block is staged)",
        fill=MEMORY,
    )
    c.box(24, 110, 716, 190, "", fill=PAPER, dashed=True)
    c.text(36, 128, "registers of 32 lanes", anchor="start", size=11, color=FAINT)
    c.box(48, 170, 80, 72, "Q\n2x8 rows", fill=QUERY, bold=True)
    c.box(196, 170, 110, 72, "S = Q K\u1d40\nfloat", fill=SCORE, bold=True)
    c.box(374, 170, 110, 72, "P = exp2(S - m)\ntype of V", fill=SCORE, bold=True, size=12)
    c.box(552, 170, 110, 72, "O += P V\nfloat", fill=OUT, bold=True)
    c.box(
        196,
        262,
        288,
        26,
        "m, l: one float each, for the row a lane is part of",
        fill=PAPER,
        size=11.5,
    )
    c.arrow(130, 206, 192, 206)
    c.arrow(308, 206, 370, 206, "in place")
    c.arrow(486, 206, 548, 206)
    c.arrow(251, 72, 251, 166)
    c.text(258, 100, "K, one fragment at a time", anchor="start", size=11, color=FAINT)
    c.arrow(607, 72, 607, 166)
    c.text(600, 100, "V, one fragment at a time", anchor="end", size=11, color=FAINT)
    return c


def staged() -> Canvas:
    """Direct and staged blocks: who reads K and V, how often, and the barriers."""
    c = Canvas(760, 330, "Direct and staged: who reads a block of K and V, and how often")
    for x, name in ((24, "direct"), (396, "staged")):
        c.text(x + 170, 28, name, bold=True, size=15)
        c.box(x, 44, 340, 40, "K, V block in device memory", fill=KEY)
        for index in range(4):
            c.box(x + index * 87, 232, 79, 46, f"simdgroup {index}\n16 rows", fill=QUERY, size=11)
    for index in range(4):
        c.arrow(63 + index * 87, 86, 63 + index * 87, 228)
    c.text(194, 154, "each reads the block itself:\n4 reads, no barrier", size=12, halo=True)
    c.box(396, 130, 340, 40, "the block in threadgroup memory", fill=VALUE)
    c.arrow(566, 86, 566, 126)
    c.text(576, 110, "copied once, by all threads", anchor="start", size=11, color=FAINT)
    for index in range(4):
        c.arrow(435 + index * 87, 172, 435 + index * 87, 228)
    c.text(566, 196, "a barrier after the copy,\na barrier after the reads", size=11, halo=True)
    c.text(
        380, 310,
        "staged reads a quarter of the device memory and pays two barriers a block; "
        "the planner decides by tile and GPU", size=12,
    )  # fmt: skip
    return c


def tensorops() -> Canvas:
    """The flow of data in the tensorops kernels."""
    c = Canvas(760, 400, "The tensorops kernel: two matmul2d with cooperative tensors between them")
    c.box(24, 20, 150, 50, "Q\nthreadgroup memory", fill=QUERY, size=12)
    c.box(196, 20, 150, 50, "K block\ndevice memory", fill=KEY, size=12)
    c.box(560, 20, 176, 50, "V block\ndevice memory", fill=VALUE, size=12)
    c.box(100, 118, 170, 46, "matmul2d   S += Q K\u1d40", fill=PAPER, bold=True)
    c.arrow(99, 72, 150, 114)
    c.arrow(271, 72, 220, 114)
    c.box(24, 194, 712, 126, "", fill=PAPER, dashed=True)
    c.text(
        200, 211, "cooperative tensors: registers, and only\nthe hardware knows which lane has what",
        anchor="start", size=11, color=FAINT,
    )  # fmt: skip
    c.box(100, 246, 170, 56, "S  [16, keys]\nfloat", fill=SCORE)
    c.box(340, 246, 170, 56, "P  left operand\nconverted in place", fill=SCORE)
    c.box(566, 246, 150, 56, "O  [16, columns]\nfloat", fill=OUT)
    c.arrow(185, 166, 185, 242)
    c.arrow(272, 274, 336, 274, "exp2")
    c.box(560, 118, 176, 46, "matmul2d   O += P V", fill=PAPER, bold=True)
    c.arrow(648, 72, 648, 114)
    c.arrow(470, 244, 580, 168)
    c.arrow(660, 166, 660, 242)
    c.box(100, 346, 410, 36, "row maximum and sum: reduce_rows, map_iterator", fill=PAPER, size=12)
    c.arrow(185, 304, 185, 342)
    c.box(566, 346, 150, 36, "one float a row", fill=MEMORY, size=12)
    c.arrow(512, 364, 562, 364)
    c.arrow(641, 344, 641, 306)
    c.text(
        736,
        396,
        "through threadgroup memory, only when a maximum rises by more than 8",
        anchor="end",
        size=11,
        color=FAINT,
    )
    return c


def varlen() -> Canvas:
    """Sequences of different lengths in one launch."""
    c = Canvas(760, 330, "Packed sequences: one launch for all of them")
    lengths = [(0, 5, QUERY), (5, 2, KEY), (7, 0, MARK), (7, 6, VALUE)]
    c.text(24, 34, "q  [tokens, heads, head_dim]", anchor="start", bold=True)
    for start, length, fill in lengths:
        for token in range(length):
            c.box(24 + (start + token) * 46, 46, 44, 30, "", fill=fill)
    for at, offset in ((0, "0"), (5, "5"), (7, "7 7"), (13, "13")):
        c.text(24 + at * 46, 96, offset, size=12)
    c.text(690, 96, "cu_seqlens", size=12, color=FAINT)
    c.text(
        24,
        132,
        "grid: blocks of the longest sequence  x  heads  x  sequences",
        anchor="start",
        bold=True,
    )
    rows = [
        "sequence 0, 5 tokens",
        "sequence 1, 2 tokens",
        "sequence 2, none",
        "sequence 3, 6 tokens",
    ]
    for row, (name, (_, length, fill)) in enumerate(zip(rows, lengths, strict=True)):
        y = 148 + row * 36
        c.text(24, y + 20, name, anchor="start", size=12)
        for block in range(3):
            alive = block * 2 < length
            first, last = block * 2, min(block * 2 + 2, length) - 1
            rows_of_it = f"row {first}" if first == last else f"rows {first} and {last}"
            c.box(
                190 + block * 130, y, 124, 30, rows_of_it if alive else "ends at once",
                fill=fill if alive else PAPER, dashed=not alive, size=11,
            )  # fmt: skip
    c.text(
        592, 176, "a threadgroup reads the two\noffsets of its sequence, and\nends where there are no\nrows for it",
        anchor="start", size=11,
    )  # fmt: skip
    c.text(
        380, 316, "no padding, no loop on the host, no wait for the GPU to learn the lengths (blocks of 2 rows here)",
        size=12, color=FAINT,
    )  # fmt: skip
    return c


DRAWINGS = {
    "online-softmax": online_softmax,
    "mask-blocks": blocks_of_a_mask,
    "fragment": fragment,
    "simdgroup": simdgroup_step,
    "staged": staged,
    "tensorops": tensorops,
    "varlen": varlen,
}
