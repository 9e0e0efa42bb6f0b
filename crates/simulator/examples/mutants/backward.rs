//! Planted bugs in the kernels of the backward pass; each is planted in every kernel of the variant that has the text.

use super::list::{Mutant, bug, none};

const PLAIN: &str = "backward f32 16";
const CAUSAL: &str = "backward f16 64 causal";
const STAGED: &str = "backward f16 64 staged causal";
const PACKED: &str = "backward bf16 128 packed window";
const SOFTCAP: &str = "backward f32 32/48 softcap alibi";
const MASKED: &str = "backward f16 72 boolean mask";
const BIASED: &str = "backward bf16 20/12 float bias";
const PARKED: &str = "backward f32 61 parked in chunks";
const ALL: &str = "backward f16 40/24 everything packed";
const WINDOW: &str = "backward bf16 96 bias softcap window";
const CHUNKS: &str = "backward f32 44/28 staged in chunks";

/// The problem whose rows lie far apart.
pub const FAR: &str = "gradients far apart, direct";
pub const FAR_STAGED: &str = "gradients far apart, staged";

/// Every mutant of these kernels, by what it damages.
pub const MUTANTS: &[Mutant] = &[
    // LSE and delta.
    bug("gradient: delta of half the columns", PLAIN, "delta += simd_shuffle_xor(delta, 2);", ""),
    bug("gradient: delta of another query", PLAIN, "simd_shuffle_xor(delta, 1)", "simd_shuffle_xor(delta, 4)"),
    bug("gradient: delta misses a piece", CAUSAL, "i < (VALUE_DIM + 3) / 4", "i < VALUE_DIM / 4 - 1"),
    bug("gradient: gradient of the lse is added", CAUSAL, "delta -= d_lse[at];", "delta += d_lse[at];"),
    bug("gradient: gradient of the lse is forgotten", PACKED, "delta -= d_lse[at];", ""),
    bug("gradient: lse in natural units", PLAIN, "RowState(natural * LOG2_E, delta)", "RowState(natural, delta)"),
    bug(
        "gradient: out is read with the strides of its gradient",
        CAUSAL,
        "row * sizes.forward.out.row",
        "row * sizes.d_out.row",
    ),
    bug(
        "gradient: lse of packed sequences starts at 0",
        PACKED,
        "sizes.forward.lse_head + place.query_start + query;",
        "sizes.forward.lse_head + query;",
    ),
    bug(
        "gradient: lanes past the end store",
        PLAIN,
        "if (query < place.query_len && lane % 4 == 0)",
        "if (query <= place.query_len && lane % 4 == 0)",
    ),
    // Scores and their gradients.
    bug(
        "gradient: weights without the scale",
        PLAIN,
        "fma(product, factors.query * factors.score, -lse)",
        "product - lse",
    ),
    bug("gradient: sign of the scale is lost", PLAIN, "factors.query * factors.score", "factors.score"),
    bug(
        "gradient: sign of the scale is lost in modified scores",
        SOFTCAP,
        "modified_score(product * factors.query,",
        "modified_score(product,",
    ),
    bug("gradient: softcap has no derivative", SOFTCAP, "weight * fma(-saturated, saturated, 1.0f)", "weight"),
    bug(
        "gradient: derivative of the softcap is of the first order",
        ALL,
        "fma(-saturated, saturated, 1.0f)",
        "(1.0f - saturated)",
    ),
    bug(
        "gradient: dV weighs by the derivative of the softcap",
        SOFTCAP,
        "is_visible && kept ? weight[0] : 0.0f",
        "is_visible ? weight[1] : 0.0f",
    ),
    bug(
        "gradient: dK weighs without the derivative of the softcap",
        WINDOW,
        "is_visible ? weight[1] : 0.0f",
        "is_visible ? weight[0] : 0.0f",
    ),
    bug(
        "gradient: position of the key where the query's is due",
        SOFTCAP,
        "row.position = query + place.diagonal",
        "row.position = key + place.diagonal",
    ),
    bug("gradient: slope in the wrong units", ALL, "sizes.alibi_head] * LOG2_E;", "sizes.alibi_head];"),
    bug("gradient: bias of the first query", BIASED, "head.bias + query * sizes.bias_query", "head.bias"),
    bug("gradient: bias of the first head", WINDOW, " + place.head * sizes.bias_head", ""),
    bug("gradient: delta is not subtracted from dP (queries)", PLAIN, "product, states[r][1],", "product, 0.0f,"),
    bug("gradient: delta is not subtracted from dP (keys)", PLAIN, "product, states[f][e][1],", "product, 0.0f,"),
    bug("gradient: delta of the next query", PLAIN, "product, states[f][e][1],", "product, states[f][1 - e][1],"),
    bug(
        "gradient: lse of a clamped query is not clamped",
        CAUSAL,
        "head.states[block.first + (EDGE ? min(row, block.last) : row)]",
        "head.states[block.first + row]",
    ),
    bug(
        "gradient: states of the first head",
        CAUSAL,
        "place.batch * sizes.lse_batch + place.head * sizes.lse_head + place.query_start);",
        "place.batch * sizes.lse_batch + place.query_start);",
    ),
    bug("gradient: gradients are not scaled", PLAIN, "backward_factors.scale, lane", "1.0f, lane"),
    bug("gradient: dV is scaled", PLAIN, "DROPOUT ? factors.kept : 1.0f", "backward_factors.scale"),
    // Masks.
    bug(
        "gradient: keys see one query too early",
        CAUSAL,
        "key - place.diagonal - int(sizes.window_right)",
        "key - place.diagonal - int(sizes.window_right) - 1",
    ),
    bug(
        "gradient: keys miss their last query",
        MASKED,
        "+ int(sizes.window_left) + 1, range.start",
        "+ int(sizes.window_left), range.start",
    ),
    bug(
        "gradient: the diagonal has the wrong sign for keys",
        STAGED,
        "key - place.diagonal -",
        "key + place.diagonal -",
    ),
    bug(
        "gradient: blocks on the diagonal count as full",
        CAUSAL,
        "const int full_start = last_seeing.start",
        "const int full_start = first_seeing.start",
    ),
    bug(
        "gradient: blocks at a window's end count as full",
        PACKED,
        "const int full_end = first_seeing.end",
        "const int full_end = last_seeing.end",
    ),
    bug(
        "gradient: queries that only the first keys see are skipped",
        CAUSAL,
        "const int seeing_start = first_seeing.start",
        "const int seeing_start = last_seeing.start",
    ),
    bug(
        "gradient: queries that only the last keys see are skipped",
        PACKED,
        "? last_seeing.end : 0",
        "? first_seeing.end : 0",
    ),
    bug(
        "gradient: keys that only the last queries see are skipped",
        CAUSAL,
        "? last_visible.end : 0",
        "? first_visible.end : 0",
    ),
    bug("gradient: hidden queries weigh", CAUSAL, "8 * f + e >= start && 8 * f + e < end", "8 * f + e < end"),
    bug("gradient: the last visible one is hidden", CAUSAL, "8 * f + e < end)", "8 * f + e + 1 < end)"),
    bug("gradient: blocks step too far", PLAIN, "first += BLOCK", "first += BLOCK + 8"),
    // Heads and places.
    bug("gradient: only the first head of a group counts", PLAIN, "member < int(sizes.group)", "member < 1"),
    bug(
        "gradient: heads of another group",
        PLAIN,
        "place.key_head * int(sizes.group) + member",
        "place.key_head + member",
    ),
    bug("gradient: dK with the strides of k", PLAIN, "key * backward_sizes.d_key.row", "key * sizes.k.row"),
    bug(
        "gradient: dV with the strides of dK",
        SOFTCAP,
        "key * backward_sizes.d_value.row",
        "key * backward_sizes.d_key.row",
    ),
    bug("gradient: dQ with the strides of q", CAUSAL, "query * backward_sizes.d_query.row", "query * sizes.q.row"),
    bug(
        "gradient: blocks of dO step with the stride of q",
        SOFTCAP,
        "gradients + first * backward_sizes.d_out.row;",
        "gradients + first * sizes.q.row;",
    ),
    bug("gradient: a row past the end is stored", PLAIN, "if (key < place.key_len) {", "if (key <= place.key_len) {"),
    bug(
        "gradient: keys are not clamped",
        PLAIN,
        "min(first_key + 8 * r + lane.row, place.key_len - 1)",
        "first_key + 8 * r + lane.row",
    ),
    bug("gradient: columns start at the first chunk", PARKED, "+ chunk * HEAD_CHUNK;", ";"),
    bug("gradient: blocks are read from the first chunk", CHUNKS, "chunk_start(chunk, HEAD_CHUNK)", "0"),
    bug("gradient: values' blocks are read from the first chunk", PARKED, "chunk_start(chunk, VALUE_CHUNK)", "0"),
    bug(
        "gradient: a chunk's tail writes one too many",
        PARKED,
        "if (WHOLE || column < width)",
        "if (WHOLE || column <= width)",
    ),
    // Fragments.
    bug(
        "gradient: neighbours of a fragment are exchanged",
        PLAIN,
        "operand(evens[i], odds[i]);  //",
        "operand(odds[i], evens[i]);  //",
    ),
    bug(
        "gradient: sums and results deal differently",
        PLAIN,
        "value_dimension<FRAGMENTS>(v, lane.column + e)",
        "8 * v + lane.column + e",
    ),
    bug("gradient: parked rows of the other kind", PARKED, "+ ROW_FRAGMENTS * HEAD_DEALS * 64;", ";"),
    bug(
        "gradient: simdgroups park rows in the same place",
        PARKED,
        "parked + int(simdgroup_index) * (ROW_FRAGMENTS * (HEAD_DEALS",
        "parked + 0 * (ROW_FRAGMENTS * (HEAD_DEALS",
    ),
    bug("gradient: sums start with what was there", CAUSAL, "    clear_sums(sums.values);\n", ""),
    bug("gradient: row fragments share their sums", BIASED, "lane, sums[r])", "lane, sums[0])"),
    // Threadgroup memory.
    bug(
        "gradient: no barrier before a block is written",
        STAGED,
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // the previous",
        "// the previous",
    ),
    bug(
        "gradient: no barrier after a block is written",
        STAGED,
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // this",
        "// this",
    ),
    bug(
        "gradient: simdgroups leave before a barrier",
        STAGED,
        "if (group_first >= place.key_len)",
        "if (first_key >= place.key_len)",
    ),
    bug(
        "gradient: barriers in a divergent loop",
        STAGED,
        "const int loop_end = seeing_queries(group_last, place, sizes).end",
        "const int loop_end = seeing_end",
    ),
    bug(
        "gradient: staged tail of dO is short",
        CHUNKS,
        "VALUE_LENGTH = (VALUE_DIM + VALUE_CHUNK - 1) / VALUE_CHUNK * VALUE_CHUNK / 4",
        "VALUE_LENGTH = (VALUE_DIM + 3) / 4",
    ),
    // Offsets.
    bug("gradient: owned keys of 32 bits", FAR, "keys + key * sizes.k.row", "keys + key * int(sizes.k.row)"),
    bug(
        "gradient: owned gradients of 32 bits",
        FAR,
        "gradients + query * backward_sizes.d_out.row",
        "gradients + query * int(backward_sizes.d_out.row)",
    ),
    bug(
        "gradient: blocks of queries of 32 bits",
        FAR,
        "queries + first * sizes.q.row;",
        "queries + first * int(sizes.q.row);",
    ),
    bug(
        "gradient: blocks of values of 32 bits",
        FAR,
        "values + first * sizes.v.row;",
        "values + first * int(sizes.v.row);",
    ),
    bug("gradient: rows in a block of 32 bits", FAR, "+ (8 * fragment) * stride", "+ (8 * fragment) * int(stride)"),
    bug("gradient: rows in an edge block of 32 bits", FAR, "fragment, last) * stride", "fragment, last) * int(stride)"),
    bug("gradient: staged rows of 32 bits", FAR_STAGED, "min(row, last) * stride", "min(row, last) * int(stride)"),
    bug(
        "gradient: staged blocks of 32 bits",
        FAR_STAGED,
        "queries + first * sizes.q.row,",
        "queries + first * int(sizes.q.row),",
    ),
    bug(
        "gradient: rows of dQ of 32 bits",
        FAR,
        "query * backward_sizes.d_query.row",
        "query * int(backward_sizes.d_query.row)",
    ),
    bug(
        "gradient: rows of dK of 32 bits",
        FAR,
        "key * backward_sizes.d_key.row",
        "key * int(backward_sizes.d_key.row)",
    ),
    bug(
        "gradient: rows of dV of 32 bits",
        FAR,
        "key * backward_sizes.d_value.row",
        "key * int(backward_sizes.d_value.row)",
    ),
    bug("gradient: rows of delta of 32 bits", FAR, "row * sizes.d_out.row", "int(row) * int(sizes.d_out.row)"),
    bug("gradient: rows of the bias of 32 bits", FAR, "query * sizes.bias_query", "query * int(sizes.bias_query)"),
    // Types and address spaces.
    bug(
        "gradient: input is written to",
        PLAIN,
        "device scalar* d_key [[buffer(13)]]",
        "device const scalar* d_key [[buffer(13)]]",
    ),
    bug(
        "gradient: parked rows are taken for device memory",
        PARKED,
        "threadgroup scalar4* parked;",
        "device scalar4* parked;",
    ),
    // Changes that are none.
    none(
        "gradient: blocks start at the first visible row",
        WINDOW,
        "/ BLOCK * BLOCK",
        "/ 1",
        "Any partition into blocks gives the same sums; the alignment only fixes their order.",
    ),
    none(
        "gradient: queries that see nothing have an lse of 0",
        MASKED,
        "RowState(-LOWEST, 0.0f)",
        "RowState(0.0f, 0.0f)",
        "Every key is hidden from such a query, and a hidden key weighs 0 beside any finite LSE.",
    ),
];
