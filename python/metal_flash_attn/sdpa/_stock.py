"""What torch's own scaled_dot_product_attention does on MPS: kernels and known defects by version.

All version windows stand in the two tables below, each with the upstream issue or pull request that
it comes from. Versions are (major, minor); `until` is the first release without the entry.
"""

from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

import torch

Version: TypeAlias = tuple[int, int]

_PULL = "https://github.com/pytorch/pytorch/pull/"
_ISSUE = "https://github.com/pytorch/pytorch/issues/"

HALF: Final = (torch.float16, torch.bfloat16)


class Call(NamedTuple):
    """What gates look at."""

    dtype: torch.dtype
    batch: int
    heads: int
    query_len: int
    key_len: int
    head_dim: int
    value_dim: int
    mask: torch.dtype | None
    causal: bool
    contiguous: bool
    """Whether q is."""
    same_batch: bool
    """Whether q, k and v have the same leading dimensions, at most one."""
    gradient: bool
    """Whether gradients of q, k or v will be asked for."""

    @property
    def longest(self) -> int:
        """Longest of query and key length."""
        return max(self.query_len, self.key_len)

    @property
    def scores(self) -> int:
        """Elements of the score matrix."""
        return self.batch * self.heads * self.query_len * self.key_len


class Kernel(NamedTuple):
    """A fused kernel of stock torch on MPS, which holds no score matrix."""

    name: str
    since: Version
    head_dims: frozenset[int]
    shortest: int
    """Shortest query length."""
    longest: int
    """Longest query length; 0 for any."""
    masks: str
    """"bool": none or a boolean one; "any": also one of q's dtype."""
    source: str


KERNELS: Final = (
    Kernel(
        name="vector",
        since=(2, 13),
        head_dims=frozenset({64, 96, 128, 256}),
        shortest=1,
        longest=8,
        masks="any",
        source=_PULL + "181575",
    ),
    Kernel(
        name="vector",
        since=(2, 8),
        head_dims=frozenset({64, 96, 128}),
        shortest=1,
        longest=8,
        masks="bool",
        source=_PULL + "152781",
    ),
    Kernel(
        name="prefill",
        since=(2, 13),
        head_dims=frozenset({32, 64, 72, 80, 96, 128, 256}),
        shortest=9,
        longest=0,
        masks="any",
        source=_PULL + "181575",
    ),
)
"""Newest first where one replaces another. Every other call takes the graph, which holds all
scores. What torch 2.14 adds on macOS 26.2 (pull request 182256) serves calls of prefill."""

GRAPH: Final = "graph"

MATH: Final = "math"
"""Operations of torch, one after the other, which serve every call that needs gradients: all
weights are kept for the backward pass (pull request 134719)."""


class Defect(NamedTuple):
    """Calls that some versions of stock torch are known to get wrong on MPS, or to die of."""

    since: Version
    until: Version | None
    """None where no release is known to be right."""
    kernel: str
    """Of `KERNELS`, or the graph, or math."""
    matches: Callable[[Call], bool]
    what: str
    source: str
    ends_process: bool = False


DEFECTS: Final = (
    Defect(
        since=(2, 7),
        until=(2, 12),
        kernel=GRAPH,
        matches=lambda call: call.value_dim != call.head_dim,
        what="the output has the width of q where v is wider or narrower",
        source=_ISSUE + "176767",
    ),
    Defect(
        since=(2, 7),
        until=(2, 8),
        kernel=GRAPH,
        matches=lambda call: call.mask is not None,
        what="rows that a mask hides entirely become NaN",
        source=_PULL + "156707",
    ),
    Defect(
        since=(2, 7),
        until=None,
        kernel=GRAPH,
        matches=lambda call: call.causal and call.dtype in HALF,
        what="is_causal in float16 and bfloat16 shows up to three future keys",
        source=_ISSUE + "195910",
    ),
    Defect(
        since=(2, 7),
        until=(2, 13),
        kernel=GRAPH,
        matches=lambda call: call.scores > 2**32,
        what="a score matrix of more than 2**32 elements is wrong",
        source=_ISSUE + "179352",
    ),
    Defect(
        since=(2, 13),
        until=None,
        kernel=GRAPH,
        matches=lambda call: call.scores > 2**32,
        what="matrix products with more than 2**32 elements are wrong",
        source=_ISSUE + "197636",
    ),
    Defect(
        since=(2, 13),
        until=None,
        kernel=MATH,
        matches=lambda call: call.scores > 2**32,
        what="matrix products with more than 2**32 elements are wrong",
        source=_ISSUE + "197636",
    ),
    Defect(
        since=(2, 7),
        until=None,
        kernel=GRAPH,
        matches=lambda call: call.dtype == torch.float32 and call.scores > 2**30,
        what="float32 scores of more than 2**32 bytes end the process",
        source=_ISSUE + "149261",
        ends_process=True,
    ),
    Defect(
        since=(2, 8),
        until=(2, 9),
        kernel="vector",
        matches=lambda call: not call.contiguous,
        what="a q that is not contiguous is read wrongly",
        source=_ISSUE + "163597",
    ),
    Defect(
        since=(2, 8),
        until=(2, 10),
        kernel="vector",
        matches=lambda call: call.key_len % 32 != 0,
        what="key lengths that are no multiple of 32 read beyond the keys",
        source=_PULL + "169222",
    ),
    Defect(
        since=(2, 8),
        until=(2, 11),
        kernel="vector",
        matches=lambda call: call.key_len >= 1024,
        what="1024 keys and more read beyond the keys",
        source=_ISSUE + "174861",
    ),
    Defect(
        since=(2, 8),
        until=(2, 12),
        kernel="vector",
        matches=lambda call: call.batch > 1 and not call.contiguous,
        what="permuted q, k and v of more than one sequence are read wrongly",
        source=_ISSUE + "181133",
    ),
    Defect(
        since=(2, 8),
        until=(2, 12),
        kernel="vector",
        matches=lambda call: call.mask == torch.bool,
        what="boolean masks are misread",
        source=_PULL + "182285",
    ),
    Defect(
        since=(2, 8),
        until=(2, 13),
        kernel="vector",
        matches=lambda call: call.mask is not None and call.batch * call.heads > 1,
        what="masks that are broadcast over sequences or heads are misread",
        source=_PULL + "184180",
    ),
)

LONG_HALF: Final = _PULL + "190791"
"""float16 and bfloat16 lose precision in long rows of the graph's softmax; contested there."""

MASKED_CAUSAL_ABORTS: Final[Version] = (2, 13)
"""Before this release a mask together with is_causal ended the process (pull request 181856)."""


def version_of(text: str) -> Version:
    """(2, 15) of "2.15.0+cpu"."""
    major, minor, *_ = text.split(".")
    return int(major), int(minor)


class Stock:
    """Stock torch of one version."""

    def __init__(self, version: Version) -> None:
        """Keeps what holds for `version`."""
        self.kernels = tuple(kernel for kernel in KERNELS if kernel.since <= version)
        self.defects = tuple(
            defect
            for defect in DEFECTS
            if defect.since <= version and (defect.until is None or version < defect.until)
        )

    def kernel(self, call: Call) -> str:
        """Name of the kernel that serves `call`: one of `KERNELS`, the graph, or math."""
        if call.gradient:
            return MATH
        if call.head_dim != call.value_dim:
            return GRAPH
        for kernel in self.kernels:
            lengths = kernel.shortest <= call.query_len and (
                kernel.longest == 0 or call.query_len <= min(kernel.longest, call.key_len)
            )
            if lengths and call.head_dim in kernel.head_dims and _takes_mask(kernel, call):
                return kernel.name
        return GRAPH

    def defect(self, call: Call, kernel: str) -> Defect | None:
        """The first known defect that `call` would meet."""
        for defect in self.defects:
            if defect.kernel == kernel and defect.matches(call):
                return defect
        return None


def _takes_mask(kernel: Kernel, call: Call) -> bool:
    if call.mask is None or call.mask == torch.bool:
        return True
    return kernel.masks == "any" and call.mask == call.dtype
