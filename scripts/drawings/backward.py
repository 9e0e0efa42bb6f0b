"""Drawings of the backward pass."""

from __future__ import annotations

from .canvas import FAINT, KEY, MARK, MEMORY, OUT, PAPER, QUERY, VALUE, Canvas


def backward() -> Canvas:
    """Who owns which rows in the three kernels of the backward pass."""
    c = Canvas(760, 420, "The backward pass: three kernels, and each gradient row has one owner")
    c.box(24, 20, 712, 62, "", fill=PAPER)
    c.text(40, 46, "1  delta", anchor="start", bold=True)
    c.text(
        150,
        46,
        "delta = rowsum(dO * O) - dLSE: one number for each query, kept with its LSE",
        anchor="start",
    )
    c.text(
        150,
        68,
        "what is saved from the forward pass: q, k, v, out, LSE. No scores",
        anchor="start",
        size=12,
        color=FAINT,
    )
    cell = (30, 22)

    def by_rows(row: int, column: int) -> tuple[str, str]:
        if column > row:
            return PAPER, ""
        return (QUERY, "") if row == 4 else (MEMORY, "")

    def by_columns(row: int, column: int) -> tuple[str, str]:
        if column > row:
            return PAPER, ""
        return (KEY, "") if column == 2 else (MEMORY, "")

    c.text(40, 122, "2  dQ", anchor="start", bold=True)
    c.grid(90, 140, 8, 8, cell, by_rows)
    c.arrow(94, 239, 236, 239)
    c.text(210, 338, "a simdgroup owns queries,\nwalks over keys", size=12)
    c.text(398, 122, "3  dK, dV", anchor="start", bold=True)
    c.grid(450, 140, 8, 8, cell, by_columns)
    c.arrow(525, 188, 525, 312)
    c.text(
        570,
        338,
        "a simdgroup owns keys,\nwalks over queries and the heads that share them",
        size=12,
    )
    for x in (62, 422):
        c.text(x, 232, "queries", size=11, color=FAINT)
    c.text(210, 132, "keys", size=11, color=FAINT)
    c.text(570, 132, "keys", size=11, color=FAINT)
    c.box(24, 376, 240, 30, "S = Q K\u1d40   dP = dO V\u1d40   dQ += dS K", fill=OUT, size=12)
    c.box(
        276,
        376,
        460,
        30,
        "S, dP again   dV += P\u1d40 dO   dK += dS\u1d40 Q      dS = P (dP - delta)",
        fill=VALUE,
        size=12,
    )
    return c


def checks() -> Canvas:
    """What stands between a text and a call on a Mac."""
    c = Canvas(860, 470, "How a kernel text is proved: the same text in every layer")
    c.box(340, 14, 180, 44, "MSL text\nthe one that ships", fill=QUERY, bold=True)
    layers = [
        (
            "type layer",
            "clang's front end, C++ with address spaces",
            "wrong address space, const,\nelement type",
            KEY,
        ),
        (
            "fast layer",
            "threads as fibers, random order, NaN everywhere",
            "numbers, missing barriers,\nfar accesses, deadlocks",
            VALUE,
        ),
        (
            "check layer",
            "every access is checked",
            "exact bounds, races, unwritten\nbytes, overflow; exact counts",
            VALUE,
        ),
        (
            "planted bugs",
            "each must be caught by one of the above",
            "tests that would notice nothing",
            MARK,
        ),
        ("NVIDIA GPU", "the same text as PTX, truly parallel", "large sizes, real races", OUT),
        ("Apple's compiler", "hosted Mac in CI", "what Apple's compiler refuses", MEMORY),
        ("probe", "the user's Mac, before the first call", "this GPU, macOS and torch", MEMORY),
    ]
    c.text(150, 84, "layer", size=11, color=FAINT)
    c.text(420, 84, "how it runs", size=11, color=FAINT)
    c.text(720, 84, "what it finds", size=11, color=FAINT)
    for row, (name, how, finds, fill) in enumerate(layers):
        y = 92 + row * 50
        c.box(60, y, 180, 44, name, fill=fill, bold=True)
        c.text(420, y + 27, how, size=12)
        c.text(720, y + (19 if "\n" in finds else 27), finds, size=12)
    c.arrow(338, 36, 40, 36)
    c.arrow(40, 36, 40, 440)
    for row in range(7):
        c.arrow(40, 114 + row * 50, 57, 114 + row * 50)
    c.text(
        430,
        458,
        "one judge for all: attention in float64, and an error bound derived for each element",
        size=12,
    )
    return c


DRAWINGS = {"backward": backward, "layers": checks}
