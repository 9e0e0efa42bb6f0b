//! The planted bugs of the tensorops kernels.

use super::list::{Mutant, bug, none};

const PLAIN: &str = "tensor f16 64";
const CAUSAL: &str = "tensor f16 128 causal in step";
const PACKED: &str = "tensor bf16 96 packed window in steps";
const SHORT: &str = "tensor f16 64 packed causal";
const SOFTCAP: &str = "tensor f32 32/48 softcap alibi";
const BIASED: &str = "tensor f16 80 bias loaded";
const MASKED: &str = "tensor f16 72 boolean mask loaded";
const CHUNKS: &str = "tensor f16 256 in chunks";
const ALL: &str = "tensor bf16 64/32 everything";
const HELD: &str = "tensor f16 80 bias in registers";
const STAGED: &str = "staged f16 64 causal, aligned";
const STAGED_WEIGHTS: &str = "staged bf16 72 weights parked, aligned";
const STAGED_ALL: &str = "staged f16 61/33 everything";

/// The problem whose rows lie far apart, in three kernels.
pub const FAR_TENSOR: &str = "far apart, tensor";
pub const FAR_LOADED: &str = "far apart, tensor loaded";
pub const FAR_TENSOR_STAGED: &str = "far apart, tensor staged";

/// Every mutant, by what it damages.
pub const MUTANTS: &[Mutant] = &[
    bug("tensor: simdgroups share rows", PLAIN, "group_first + simdgroup * ROWS", "group_first + simdgroup * 8"),
    bug(
        "tensor: row past the end is stored",
        PLAIN,
        "query <= task.last_query && column",
        "query <= task.last_query + 1 && column",
    ),
    bug("tensor: column past the end is stored", MASKED, "column < task.columns) {", "column <= task.columns) {"),
    bug(
        "tensor: out is written with the strides of q",
        PLAIN,
        "query * task.sizes->out.row",
        "query * task.sizes->q.row",
    ),
    bug(
        "tensor: k is read with the strides of v",
        SOFTCAP,
        "task.keys + first * task.sizes->k.row",
        "task.keys + first * task.sizes->v.row",
    ),
    bug("tensor: rows of v step with the stride of k", SOFTCAP, "int(task.sizes->v.row)", "int(task.sizes->k.row)"),
    bug(
        "tensor: columns of v start at the first chunk",
        CHUNKS,
        "place.key_head, place.key_start) + first_column",
        "place.key_head, place.key_start)",
    ),
    bug(
        "tensor: columns of out start at the first chunk",
        CHUNKS,
        "place.query_start) + first_column",
        "place.query_start)",
    ),
    bug(
        "tensor: lse of packed sequences starts at 0",
        PACKED,
        "place.head * sizes.lse_head + place.query_start",
        "place.head * sizes.lse_head",
    ),
    bug(
        "tensor: every chunk starts a row of lse",
        PLAIN,
        "position[0] == 0 && query_row <= task.last_query",
        "position[0] == 0 && query_row < task.last_query",
    ),
    bug(
        "tensor: queries are not clamped",
        PLAIN,
        "min(task.first_query + row, task.last_query);",
        "task.first_query + row;",
    ),
    bug(
        "tensor: grid is turned round one off",
        CAUSAL,
        "threadgroup_count.x - 1 - threadgroup_position.x",
        "threadgroup_count.x - threadgroup_position.x",
    ),
    bug("tensor: steps of q and k differ", ALL, "task.parked_queries + step * columns", "task.parked_queries"),
    bug(
        "tensor: steps of k start at the first column",
        ALL,
        "first * task.sizes->k.row + step * HEAD_COLUMNS",
        "first * task.sizes->k.row",
    ),
    bug(
        "tensor: steps of v start at the first column",
        ALL,
        "first * task.sizes->v.row + step * VALUE_COLUMNS",
        "first * task.sizes->v.row",
    ),
    bug("tensor: steps of out start at the first column", ALL, "VALUE_CHUNK / Op::VALUE_STEPS * step++", "0 * step++"),
    bug(
        "tensor: loaded steps of q start at the first column",
        BIASED,
        "const int column = step * HEAD_COLUMNS + position[0];",
        "const int column = position[0];",
    ),
    bug(
        "tensor: loaded steps of k start at the first column",
        BIASED,
        "step * HEAD_COLUMNS + position[0]);",
        "position[0]);",
    ),
    bug(
        "tensor: loaded steps of v start at the first column",
        BIASED,
        "step * VALUE_COLUMNS + position[0]);",
        "position[0]);",
    ),
    bug(
        "tensor: the last step of q is left out",
        ALL,
        "step < Op::HEAD_STEPS; ++step",
        "step < Op::HEAD_STEPS - 1; ++step",
    ),
    bug("tensor: head dimension has no tail", MASKED, "column < HEAD_DIM ? scalar(float(", "true ? scalar(float("),
    bug("tensor: k has no tail", MASKED, "column < HEAD_DIM ? task.keys", "true ? task.keys"),
    bug("tensor: v has no tail", MASKED, "column < task.columns ? task.values", "true ? task.values"),
    bug(
        "tensor: keys are not transposed",
        PLAIN,
        "HEAD_COLUMNS, false, true, RELAXED",
        "HEAD_COLUMNS, false, false, RELAXED",
    ),
    bug(
        "tensor: positions are the other way round in k",
        BIASED,
        "first + position[1], step * HEAD_COLUMNS + position[0]",
        "first + position[0], step * HEAD_COLUMNS + position[1]",
    ),
    bug(
        "tensor: scores are not cleared",
        PLAIN,
        "        clear(scores);\n        if constexpr (sizeof...(Query) != 0) {",
        "        if constexpr (sizeof...(Query) != 0) {",
    ),
    bug("tensor: out is not cleared", PLAIN, "            clear(next);\n", ""),
    bug(
        "tensor: products overwrite",
        ALL,
        "RELAXED,\n                                         matmul2d_descriptor::mode::multiply_accumulate",
        "RELAXED,\n                                         matmul2d_descriptor::mode::multiply",
    ),
    bug("tensor: float32 products lose bits", SOFTCAP, "#define RELAXED 0", "#define RELAXED 1"),
    bug("tensor: sign of the scale is not in q", PLAIN, "column]) * task.sign)", "column]))"),
    bug("tensor: the last block reads past the end", PLAIN, "min(first, task.place.key_len - KEYS)", "first"),
    bug(
        "tensor: keys of the block before count twice",
        PLAIN,
        "key >= max(visible.start, block.counted)",
        "key >= visible.start",
    ),
    bug("tensor: short sequences read whole blocks", SHORT, "if (place.key_len < KEYS) {", "if (place.key_len < 0) {"),
    bug(
        "tensor: sequences of one key less than a block read whole blocks",
        PACKED,
        "if (place.key_len < KEYS) {",
        "if (place.key_len < KEYS - 1) {",
    ),
    bug(
        "tensor: loaded keys are not clamped",
        BIASED,
        "min(key, task.place.key_len - 1);\n    return column < HEAD_DIM",
        "key;\n    return column < HEAD_DIM",
    ),
    bug(
        "tensor: loaded values are not clamped",
        BIASED,
        "min(key, task.place.key_len - 1);\n    return column < task",
        "key;\n    return column < task",
    ),
    bug(
        "tensor: bias of a key past the end",
        MASKED,
        "const int existing = min(key, task.place.key_len - 1);",
        "const int existing = key;",
    ),
    bug(
        "tensor: last block is never an edge",
        PLAIN,
        "first < task.full.start || first + KEYS > task.full.end",
        "first < task.full.start || first > task.full.end",
    ),
    bug(
        "tensor: blocks on the diagonal count as full",
        CAUSAL,
        "task.full.end = first_visible.end",
        "task.full.end = last_visible.end",
    ),
    bug(
        "tensor: blocks at the start of a window count as full",
        PACKED,
        "task.full.start = last_visible.start",
        "task.full.start = first_visible.start",
    ),
    bug(
        "tensor: keys that only the last rows see are skipped",
        CAUSAL,
        "has_rows ? last_visible.end",
        "has_rows ? first_visible.end",
    ),
    bug(
        "tensor: keys that only the first rows see are skipped",
        PACKED,
        "task.seen.start = first_visible.start",
        "task.seen.start = last_visible.start",
    ),
    bug("tensor: key after the visible ones", CAUSAL, "key < visible.end ? score", "key <= visible.end ? score"),
    bug(
        "tensor: mask of the wrong row",
        CAUSAL,
        "const int query = min(task.first_query + position[1], task.last_query);\n#if SCORE",
        "const int query = min(task.first_query + position[1] / 2, task.last_query);\n#if SCORE",
    ),
    bug(
        "tensor: mask of the wrong column",
        CAUSAL,
        "const int key = block.first + position[0];",
        "const int key = block.first + i;",
    ),
    bug("tensor: blocks step too far", PLAIN, "first += KEYS", "first += KEYS + 16"),
    bug("tensor: scale is applied twice at edges", PLAIN, "            unit = 1.0f;\n", ""),
    bug(
        "tensor: ALiBi from the first key",
        SOFTCAP,
        "modifiers.position = query + task.place.diagonal",
        "modifiers.position = query",
    ),
    bug("tensor: bias of the first query", BIASED, "task.bias + query * task.sizes->bias_query", "task.bias"),
    bug("tensor: bias of the first head", BIASED, "place.head * sizes.bias_head", "0 * sizes.bias_head"),
    bug(
        "tensor: slope in the wrong units",
        SOFTCAP,
        "place.head * sizes.alibi_head] * LOG2_E",
        "place.head * sizes.alibi_head]",
    ),
    bug("tensor: sink of the first head", MASKED, "sinks[place.head * sizes.sinks_head]", "sinks[0]"),
    bug("tensor: the sink does not count", MASKED, "sum[r] = sink_weight(task.sink)", "sum[r] = 0.0f"),
    bug(
        "tensor: maximum starts from 0",
        CAUSAL,
        "reduction_operation::max, numeric_limits<float>::lowest()",
        "reduction_operation::max, 0.0f",
    ),
    bug(
        "tensor: smallest score instead of the largest",
        PLAIN,
        "reduction_operation::max,",
        "reduction_operation::min,",
    ),
    bug("tensor: maximum without the scale", PLAIN, "block_rows[r] * unit", "block_rows[r]"),
    bug("tensor: sum is not rescaled", PLAIN, "fma(sum[r], correction[r], block_rows[r])", "sum[r] + block_rows[r]"),
    bug(
        "tensor: out is not rescaled",
        PLAIN,
        "            (multiply_rows(out, task.row_values), ...);\n        }\n    }",
        "        }\n    }",
    ),
    bug(
        "tensor: only the first tensor of out is rescaled",
        ALL,
        "            (multiply_rows(out, task.row_values), ...);\n        }\n    }",
        "            int tensor = 0;\n            ((tensor++ == 0 ? multiply_rows(out, task.row_values) : void()), ...);\n        }\n    }",
    ),
    bug("tensor: lanes decide about rescaling for themselves", PLAIN, "if (simd_any(corrected)) {", "if (corrected) {"),
    bug("tensor: correction is upside down", PLAIN, "fast::exp2(old - maximum[r])", "fast::exp2(maximum[r] - old)"),
    bug("tensor: maximum of the other row of a lane", PLAIN, "!= 0 ? rows[1] : rows[0]", "!= 0 ? rows[0] : rows[1]"),
    bug(
        "tensor: every lane has two rows",
        PLAIN,
        "if (rows.get_capacity() == 2 && scores.get_capacity() <= 64) {",
        "if (true) {",
    ),
    bug(
        "tensor: elements of nobody are asked for their row",
        PLAIN,
        "if (scores.is_valid_element(i)) {\n                scores[i] = fast::exp2",
        "if (true) {\n                scores[i] = fast::exp2",
    ),
    bug(
        "tensor: out is rescaled by column",
        PLAIN,
        "row_values[out.get_multidimensional_index(i)[1]]",
        "row_values[out.get_multidimensional_index(i)[0] & 15]",
    ),
    bug("tensor: rows without keys divide by 0", CAUSAL, "sum[r] == 0.0f ? 0.0f : 1.0f / sum[r]", "1.0f / sum[r]"),
    bug(
        "tensor: weights are not rounded before they lose bits",
        PLAIN,
        "weights[i] = float(half(weights[i]));",
        "weights[i] = weights[i];",
    ),
    bug(
        "tensor: weights are summed rounded",
        PLAIN,
        "        reduce_rows(scores, block_rows, reduction_operation::sum, 0.0f);",
        "        round_weights(scores);\n        reduce_rows(scores, block_rows, reduction_operation::sum, 0.0f);",
    ),
    bug(
        "tensor: no barrier after q is written",
        PLAIN,
        "simdgroup_barrier(mem_flags::mem_threadgroup);  // Q has",
        "// Q has",
    ),
    bug(
        "tensor: barrier after q orders nothing",
        PLAIN,
        "simdgroup_barrier(mem_flags::mem_threadgroup);  // Q has",
        "simdgroup_barrier(mem_flags::mem_none);  // Q has",
    ),
    bug(
        "tensor: no barrier before rows are shared",
        PLAIN,
        "simdgroup_barrier(mem_flags::mem_threadgroup);  // the values before",
        "// the values before",
    ),
    bug(
        "tensor: no barrier after rows are shared",
        PLAIN,
        "    simdgroup_barrier(mem_flags::mem_threadgroup);  // these have been written\n}",
        "}",
    ),
    bug(
        "tensor: no barrier before weights are written",
        HELD,
        "simdgroup_barrier(mem_flags::mem_threadgroup);  // the weights",
        "// the weights",
    ),
    bug(
        "tensor: no barrier after weights are written",
        STAGED_WEIGHTS,
        "        simdgroup_barrier(mem_flags::mem_threadgroup);  // these have been written\n        Thr",
        "        Thr",
    ),
    bug(
        "tensor: no barrier before a block is written",
        STAGED,
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // the previous",
        "// the previous",
    ),
    bug(
        "tensor: no barrier after a block is written",
        STAGED,
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // this",
        "// this",
    ),
    bug(
        "tensor: barrier of the simdgroup only",
        STAGED,
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // this",
        "simdgroup_barrier(mem_flags::mem_threadgroup);  // this",
    ),
    bug(
        "tensor: barriers in a divergent loop",
        STAGED,
        "task.loop.end = visible_keys(group_last, place, sizes).end",
        "task.loop.end = task.seen.end",
    ),
    bug(
        "tensor: steps are kept in a divergent loop",
        CAUSAL,
        "task.loop.end = visible_keys(group_last, place, sizes).end",
        "task.loop.end = task.seen.end",
    ),
    bug("tensor: simdgroups share their floats", PLAIN, "row_values + simdgroup * ROWS", "row_values"),
    bug(
        "tensor: simdgroups park q in the same place",
        PLAIN,
        "parked_queries + simdgroup * (ROWS * HEAD_PITCH)",
        "parked_queries",
    ),
    bug(
        "tensor: simdgroups park weights in the same place",
        STAGED_WEIGHTS,
        "parked_weights + simdgroup * (ROWS * KEYS)",
        "parked_weights",
    ),
    bug(
        "tensor: staged rows have the pitch of v",
        STAGED_ALL,
        "stage_rows<HEAD_WIDTH, HEAD_PITCH>",
        "stage_rows<HEAD_WIDTH, VALUE_PITCH>",
    ),
    bug(
        "tensor: staged columns are not filled up",
        STAGED_ALL,
        "task.sizes->k.row, HEAD_DIM, first",
        "task.sizes->k.row, HEAD_WIDTH, first",
    ),
    bug(
        "tensor: staged values are not filled up",
        STAGED_ALL,
        "task.sizes->v.row, task.columns, first",
        "task.sizes->v.row, VALUE_CHUNK, first",
    ),
    bug(
        "tensor: staged block is short of a row",
        STAGED,
        "staged_keys[KEYS * HEAD_PITCH / 4]",
        "staged_keys[(KEYS - 1) * HEAD_PITCH / 4]",
    ),
    bug(
        "tensor: a simdgroup's share of rows is not staged",
        STAGED,
        "constexpr int fours = KEYS * WIDTH / 4;",
        "constexpr int fours = (KEYS - 4) * WIDTH / 4;",
    ),
    bug(
        "tensor: held q is loaded once for all steps",
        HELD,
        "Op::load_query(next, sizeof...(Query), task);",
        "Op::load_query(next, 0, task);\n        next[0] = next[0] + scalar(1);",
    ),
    bug(
        "tensor: input that matmul2d reads is const",
        PLAIN,
        "typedef tensor<device scalar, dextents<int, 2>, tensor_inline> BlockTile",
        "typedef tensor<device const scalar, dextents<int, 2>, tensor_inline> BlockTile",
    ),
    bug(
        "tensor: tile is taken for device memory",
        STAGED,
        "typedef ThreadgroupTile BlockTile;",
        "typedef tensor<device scalar, dextents<int, 2>, tensor_inline> BlockTile;",
    ),
    bug(
        "tensor: scores are rounded",
        PLAIN,
        "cooperative_tensor_destination_t<Left, Keys, float> Scores",
        "cooperative_tensor_destination_t<Left, Keys, half> Scores",
    ),
    bug(
        "tensor: inner sizes differ",
        PLAIN,
        "VALUE_COLUMNS, KEYS, false, false",
        "VALUE_COLUMNS, KEYS + 16, false, false",
    ),
    bug(
        "tensor: operation of the whole threadgroup",
        PLAIN,
        "execution_simdgroup> Score;",
        "execution_simdgroups<SIMDGROUPS>> Score;",
    ),
    bug(
        "tensor: tile is wider than its rows",
        PLAIN,
        "dextents<int, 2>(HEAD_COLUMNS, KEYS)",
        "dextents<int, 2>(HEAD_COLUMNS - 16, KEYS)",
    ),
    bug(
        "tensor: block offsets of 32 bits",
        FAR_TENSOR,
        "task.keys + first * task.sizes->k.row",
        "task.keys + first * int(task.sizes->k.row)",
    ),
    bug(
        "tensor: loaded offsets of 32 bits",
        FAR_LOADED,
        "task.values[row * task.sizes->v.row",
        "task.values[row * int(task.sizes->v.row)",
    ),
    bug("tensor: query offsets of 32 bits", FAR_TENSOR, "query * task.sizes->q.row", "query * int(task.sizes->q.row)"),
    bug(
        "tensor: result offsets of 32 bits",
        FAR_TENSOR,
        "query * task.sizes->out.row",
        "query * int(task.sizes->out.row)",
    ),
    bug(
        "tensor: bias offsets of 32 bits",
        FAR_TENSOR,
        "query * task.sizes->bias_query",
        "query * int(task.sizes->bias_query)",
    ),
    bug(
        "tensor: staged offsets of 32 bits",
        FAR_TENSOR_STAGED,
        "const scalar* rows, long stride,",
        "const scalar* rows, int stride,",
    ),
    none(
        "tensor: simdgroups do not keep step",
        CAUSAL,
        "threadgroup_barrier(mem_flags::mem_none);",
        "",
        "The barrier orders no memory; it is for the cache.",
    ),
    none(
        "tensor: corrections are always applied",
        PLAIN,
        "if (simd_any(corrected)) {",
        "if (true) {",
        "A correction of a row whose maximum stands is 1.",
    ),
    none(
        "tensor: blocks start at the first visible key",
        CAUSAL,
        "task.loop.start / KEYS * KEYS",
        "task.loop.start",
        "Any partition of the visible keys into blocks gives the same sums; the alignment only fixes their order.",
    ),
];
