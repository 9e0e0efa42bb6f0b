from collections.abc import Sequence
from typing import Any, final

from torch import Tensor
from typing_extensions import Self

__all__ = [
    "Plan",
    "ShutForms",
    "Trace",
    "TraceEntry",
    "_SimulatedLibrary",
    "_SimulatedPipeline",
    "_count_tile",
    "_forget_kernels",
    "_kernel_text",
    "_machine",
    "_panic",
    "_plan_elsewhere",
    "_pretend_mps",
    "_probes",
    "_settings",
    "_store_tiles",
    "_tile_candidates",
    "attend_cached",
    "backward_into",
    "execute_backward",
    "execute_cached_operator",
    "execute_operator",
    "fma_peak",
    "forward",
    "instruction_sets",
    "plan",
    "read_bandwidth",
    "sdpa",
    "sdpa_settings",
]

@final
class Plan:
    """Which tier serves a call."""

    @property
    def tier(self) -> str:
        """Name of the tier."""
    @property
    def isa(self) -> str | None:
        """Instruction set of the cpu tier; None for the others."""
    @property
    def tile(self) -> str | None:
        """Tile of a Metal kernel, in words, or of each kernel of gradients; None without tiles."""
    @property
    def tile_source(self) -> str | None:
        """Where the tile comes from: "default", "tuned" or "forced"; None without one."""
    @property
    def reasons(self) -> list[tuple[str, str]]:
        """Every other tier, with the reason why it does not serve."""

@final
class TraceEntry:
    """Calls of one shape that one tier served."""

    @property
    def calls(self) -> int:
        """How many there were."""
    @property
    def dtype(self) -> str:
        """Element type of q, k and v, as torch names it."""
    @property
    def head_dim(self) -> int:
        """Head dimension of q and k."""
    @property
    def value_dim(self) -> int:
        """Head dimension of v and the output."""
    @property
    def query_len(self) -> int:
        """Queries of the longest sequence."""
    @property
    def key_len(self) -> int:
        """Keys of the longest sequence."""
    @property
    def causal(self) -> bool:
        """Whether keys after the diagonal were hidden."""
    @property
    def tier(self) -> str:
        """The tier that served."""
    @property
    def backward(self) -> bool:
        """Whether it served gradients."""

@final
class Trace:
    """Counts the attention calls of the process while its `with` block is open."""

    def __new__(cls) -> Self: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_exception: object) -> None: ...
    @property
    def calls(self) -> list[TraceEntry]:
        """What was counted so far, most frequent first."""
    def summary(self) -> str:
        """The same as a table; empty when there were no calls."""

def forward(
    packing: int,
    varlen: bool,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int] | Tensor,
    softcap: float,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    top_left: bool,
    return_lse: bool,
    /,
) -> Any:
    """Attention as the public functions ask for it.

    `packing` counts the tensors that came as one: 1 is q, k, v; 2 is q, kv (as k); 3 is qkv (as q).
    Returns out, or (out, lse) with `return_lse`, and behind them the random state if something is
    dropped.
    """

def attend_cached(
    caches_named: bool,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int] | Tensor,
    softcap: float,
    rotary_interleaved: bool,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    top_left: bool,
    num_splits: int,
    return_lse: bool,
    /,
) -> Any:
    """Attention over a cache as the public functions ask for it.

    `caches_named` tells messages that the caches are called `k_cache` and `v_cache`, not `k` and
    `v`. Returns out, or (out, lse) with `return_lse`.
    """

def execute_cached_operator(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The body of `torch.ops.mtlflashattn.attend_cached` and `append_and_attend`."""

def execute_operator(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The body of `torch.ops.mtlflashattn.forward`."""

def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    out_layout: str,
    /,
) -> Tensor:
    """Attention of `[B, H, L, D]` as torch's scaled_dot_product_attention means it.

    `out_layout` is how out `[B, H, Lq, Dv]` lies in memory: "like_query" as `torch.empty_like(q)`,
    "contiguous" or "tokens_first".
    """

@final
class ShutForms:
    """Forms of scaled_dot_product_attention calls that are known to be torch's, at most `most`.

    A form is whatever decides whether shapes are served and a gate opens: shapes, dtypes, whether
    there is a mask and of which dtype, `is_causal`, `enable_gqa`, whether query is contiguous.
    Calls under autocast, with subclasses or with odd arguments have none.
    """

    def __new__(cls, most: int) -> Self: ...
    def __len__(self) -> int: ...
    def holds(
        self,
        query: Any,
        key: Any,
        value: Any,
        options: tuple[Any, ...],
        named: dict[str, Any],
    ) -> bool:
        """Whether the form of this call is among them; options as torch's, by place and by name."""
    def add(
        self,
        query: Any,
        key: Any,
        value: Any,
        options: tuple[Any, ...],
        named: dict[str, Any],
    ) -> None:
        """Adds the form of a call; all others are forgotten when there are too many."""

def sdpa_settings() -> tuple[str, float, int, int]:
    """`MTLFLASHATTN_SDPA`, and `_MIN_GB`, `_MIN_SEQ` and `_FAST_MIN_SEQ` of it."""

def execute_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The body of `torch.ops.mtlflashattn.backward`."""

def backward_into(
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dbias: Tensor | None,
    dsinks: Tensor | None,
    *arguments: Any,
) -> None:
    """Writes gradients; None for those that are not wanted.

    The other arguments are those of `torch.ops.mtlflashattn.backward` without its last.
    """

def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int] | Tensor,
    softcap: float,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    top_left: bool,
    backward: bool,
    /,
) -> Plan:
    """Plans a call of `attention`, or its gradients, without computing it."""

def instruction_sets() -> list[str]:
    """Names of the instruction sets that this machine can run, best last."""

def fma_peak() -> float:
    """Measures the fused multiply-adds of one thread, times two, in GFLOP/s."""

def read_bandwidth() -> float:
    """Measures the read bandwidth of one thread over uncached memory, in GB/s."""

def _plan_elsewhere(question: dict[str, Any]) -> dict[str, Any]:
    """Plans a call on an Apple GPU that need not be here; keys are the command line's options."""

def _kernel_text(question: dict[str, Any]) -> dict[str, Any]:
    """The text of a kernel and its launch, for an Apple GPU that need not be here."""

def _settings() -> list[dict[str, Any]]:
    """Every setting with the text in the environment; needs no torch and gives no warnings."""

def _probes() -> dict[str, Any] | None:
    """What is known of the kernels of the device that takes Metal kernels; None without one."""

def _machine() -> dict[str, Any]:
    """What the planner makes of this machine: its devices, and the tiers of typical calls."""

def _tile_candidates(question: dict[str, Any], tile: str | None) -> dict[str, Any]:
    """The tiles that could serve a call on this machine's device, the planner's own first."""

def _count_tile(question: dict[str, Any], tile: str) -> dict[str, int]:
    """Runs a call with a tile on the simulator, and counts."""

def _store_tiles(winners: list[dict[str, Any]], replace: bool) -> str:
    """Puts tuned tiles into the record of this machine; returns its file."""

def _panic() -> None:
    """Panics in Rust, so that tests can see what becomes of it."""

@final
class _SimulatedLibrary:
    """A compiled MSL text on the simulator: what a stand-in for torch's MPS half is made of."""

    def __new__(cls, source: str) -> Self:
        """Raises SyntaxError where the compiler refuses the text."""
    def pipeline(self, name: str) -> _SimulatedPipeline:
        """Raises RuntimeError where the device makes no pipeline of the kernel."""

@final
class _SimulatedPipeline:
    """A kernel on the simulator."""

    @property
    def max_threads(self) -> int:
        """Threads that a threadgroup may have."""
    def dispatch(
        self,
        arguments: Sequence[bytes | tuple[int, int]],
        threads: tuple[int, int, int],
        group: tuple[int, int, int],
        /,
    ) -> None:
        """Runs the kernel; argument n is `[[buffer(n)]]`: bytes, or an address and a size."""

def _pretend_mps(on: bool) -> None:
    """Lets CPU tensors take the way of MPS tensors, or ends that."""

def _forget_kernels() -> None:
    """Forgets all kernels, the ones that failed, and what is known of the GPU."""
