//! Planted bugs in the kernels of attention with few queries and over caches: decode, merge and append.

use super::list::{Mutant, bug};

const PLAIN: &str = "decode f16 64";
const CAUSAL: &str = "decode f16 128 causal";
const PACKED: &str = "decode bf16 64 packed window sinks";
const STAGED: &str = "decode f32 32/48 softcap alibi sinks";
const CHUNKS: &str = "decode f16 61/33 everything in chunks";
const MASKED: &str = "decode bf16 72 boolean mask";
const BIASED: &str = "decode f16 80 bias staged causal";
const SINGLE: &str = "decode f32 40/24 staged parked packed";
const SLOTS: &str = "decode f16 64 slots causal";
const PADDED: &str = "decode bf16 40/24 padded slots window alibi";
const PAGES: &str = "decode f32 32 small pages causal";
const PACKED_PAGES: &str = "decode f16 72 pages packed window";
const APPEND: &str = "append f16 to slots";
const NEIGHBOURS: &str = "append f32 neighbours to padded slots";
const HALVES: &str = "append bf16 halves to pages";
const PACKED_APPEND: &str = "append f16 halves to pages, packed";

/// Every mutant of these kernels, by what it damages.
pub const MUTANTS: &[Mutant] = &[
    // Rows that share a key head.
    bug("decode: rows are heads first", CAUSAL, "const int query = row / group;", "const int query = row % group;"),
    bug(
        "decode: heads of a group in the strides of rows",
        PLAIN,
        "member * sizes.forward.q.head",
        "member * sizes.forward.q.row",
    ),
    bug(
        "decode: queries of the first head",
        PLAIN,
        "place.key_head * group, place.query_start)",
        "0, place.query_start)",
    ),
    bug("decode: one row too many", PLAIN, "if (row >= row_count) {", "if (row > row_count) {"),
    bug("decode: the last row is lost", PLAIN, "if (row >= row_count) {", "if (row >= row_count - 1) {"),
    bug(
        "decode: rows past the end are read",
        PLAIN,
        "min(first_row + 8 * r + lane.row, row_count - 1)",
        "first_row + 8 * r + lane.row",
    ),
    bug(
        "decode: heads of the first group",
        CAUSAL,
        "const int head = place.key_head * group + row % group;",
        "const int head = row % group;",
    ),
    bug(
        "decode: slopes of the first head of a group",
        STAGED,
        "head * sizes.forward.alibi_head",
        "place.key_head * sizes.forward.alibi_head",
    ),
    bug("decode: bias of the first query", BIASED, "+ query * sizes.forward.bias_query;", ";"),
    bug("decode: mask of another head", MASKED, "head * sizes.forward.bias_head", "member * sizes.forward.bias_head"),
    bug("decode: row groups overlap", CHUNKS, "/ splits * GROUP_ROWS;", "/ splits * (GROUP_ROWS - 1);"),
    bug("decode: packed queries start at 0", SINGLE, "place.query_start + query)\n", "query)\n"),
    bug(
        "decode: more queries than the longest sequence has",
        PACKED,
        "min(place.query_len, int(sizes.forward.query_len))",
        "place.query_len + 1",
    ),
    // Splits and turns.
    bug(
        "decode: splits overlap",
        CAUSAL,
        "const int start = all_start + min(split * split_turns, turns) * TURN;",
        "const int start = all_start + min(split * split_turns, max(turns - 1, 0)) * TURN;",
    ),
    bug(
        "decode: the last turn is lost",
        CAUSAL,
        "(max(all_end - all_start, 0) + TURN - 1) / TURN",
        "max(all_end - all_start, 0) / TURN",
    ),
    bug("decode: splits are too short", CAUSAL, "(turns + splits - 1) / splits", "turns / splits"),
    bug("decode: a split ends at the end of all", STAGED, "min((split + 1) * split_turns, turns)", "turns"),
    bug(
        "decode: simdgroups take the same blocks",
        PLAIN,
        "start + int(simdgroup_index) * KEYS; first < end; first += TURN",
        "start; first < end; first += TURN",
    ),
    bug("decode: simdgroups skip blocks", PLAIN, "first < end; first += TURN", "first < end; first += 2 * TURN"),
    bug(
        "decode: blocks of the first row's keys",
        CAUSAL,
        "const int all_end = last_visible.end;",
        "const int all_end = first_visible.end;",
    ),
    bug(
        "decode: a window begins with the last row",
        PACKED,
        "const int all_start = first_visible.start / KEYS * KEYS;",
        "const int all_start = last_visible.start / KEYS * KEYS;",
    ),
    bug(
        "decode: full blocks are those of the first row",
        CAUSAL,
        "const int full_end = first_visible.end;",
        "const int full_end = last_visible.end;",
    ),
    bug(
        "decode: a simdgroup skips blocks that its rows see",
        BIASED,
        "first >= seen_end ||",
        "first + KEYS > seen_end ||",
    ),
    bug(
        "decode: every split counts the sink",
        STAGED,
        "split == 0 && (STAGED || simdgroup_index == 0)",
        "STAGED || simdgroup_index == 0",
    ),
    bug(
        "decode: every simdgroup counts the sink",
        PACKED,
        "split == 0 && (STAGED || simdgroup_index == 0)",
        "split == 0",
    ),
    bug(
        "decode: every lane counts the sink",
        PACKED,
        "lane.column == 0 ? sink_weight(sink) : 0.0f",
        "sink_weight(sink)",
    ),
    // Adding up simdgroups.
    bug(
        "decode: parked results are not waited for",
        PLAIN,
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // half of the results have been parked",
        "",
    ),
    bug(
        "decode: parked results are overwritten",
        PLAIN,
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // they have been added",
        "",
    ),
    bug(
        "decode: the barrier orders device memory",
        PLAIN,
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // half of the results have been parked",
        "threadgroup_barrier(mem_flags::mem_device);",
    ),
    bug(
        "decode: a staged block is not waited for",
        STAGED,
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // this block has been written",
        "",
    ),
    bug(
        "decode: a staged block is overwritten",
        STAGED,
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // the previous block has been read",
        "",
    ),
    bug("decode: own results are not rescaled", PLAIN, "thread_elements()[e] * own)", "thread_elements()[e])"),
    bug("decode: parked results are not rescaled", PLAIN, "fma(values[e], other,", "fma(values[e], 1.0f,"),
    bug(
        "decode: sums are added without their maxima",
        CAUSAL,
        "fma(state[1], other, rows.sum[r] * own)",
        "state[1] + rows.sum[r]",
    ),
    bug(
        "decode: results of the last rows stay where they are",
        PACKED,
        "parked + r * (VALUE_FRAGMENTS + 1) * 32 + lane.index;",
        "parked + lane.index;",
    ),
    bug("decode: simdgroups share a place", PLAIN, "parked_results + slot * (PARKED_PAIRS * 32);", "parked_results;"),
    bug(
        "decode: half of the simdgroups is forgotten",
        PLAIN,
        "for (int half = SIMDGROUPS / 2;",
        "for (int half = SIMDGROUPS / 4;",
    ),
    // Partial results.
    bug("decode: states of all splits in one place", CAUSAL, "split * state_count(sizes) + state_at", "state_at"),
    bug("decode: states of the first sequence", CAUSAL, "place.batch * sizes.forward.query_len + query", "query"),
    bug(
        "decode: states of packed queries start at 0",
        PACKED,
        "const long token = place.query_start + query;",
        "const long token = query;",
    ),
    bug(
        "decode: partial columns of the first chunk",
        CHUNKS,
        "at * VALUE_DIM + place.value_chunk * VALUE_CHUNK",
        "at * VALUE_DIM",
    ),
    bug("decode: the sum of one lane", CAUSAL, "sum += simd_shuffle_xor(sum, 8);", ""),
    bug(
        "decode: values of empty splits are merged",
        STAGED,
        "if (state[1] == 0.0f) {\n            continue;",
        "if (false) {\n            continue;",
    ),
    bug("decode: values of empty rows are not written", STAGED, "if (sum != 0.0f) {", "if (sum > 1.0f) {"),
    // Merging.
    bug(
        "merge: the last split is lost",
        CAUSAL,
        "for (int split = 0; split < splits; ++split) {\n        const SplitState",
        "for (int split = 0; split < splits - 1; ++split) {\n        const SplitState",
    ),
    bug("merge: weights are not scaled", CAUSAL, "sum = fma(state[1], weight, sum);", "sum += state[1];"),
    bug(
        "merge: values are not scaled",
        CAUSAL,
        "fma(partial[column], weight, merged[i])",
        "partial[column] + merged[i]",
    ),
    bug(
        "merge: columns of the lane before",
        CAUSAL,
        "int(threadgroup_position.y) * (32 * COLUMNS) + int(lane_index)",
        "int(threadgroup_position.y) * (32 * COLUMNS) + int(lane_index) / 2",
    ),
    bug(
        "merge: one column too many",
        STAGED,
        "if (column < value_dim) {\n            result",
        "if (column <= value_dim) {\n            result",
    ),
    bug(
        "merge: rows are heads first",
        CAUSAL,
        "const int query = row / heads;\n    const int head = row % heads;\n    const int value_dim",
        "const int query = row % heads;\n    const int head = row / heads;\n    const int value_dim",
    ),
    bug(
        "merge: out in the strides of q",
        CAUSAL,
        "row_offset(sizes.forward.out, place.batch, head, place.query_start + query);\n#pragma",
        "row_offset(sizes.forward.q, place.batch, head, place.query_start + query);\n#pragma",
    ),
    bug(
        "merge: the normalizer is not inverted",
        CAUSAL,
        "1.0f / sum;\n    device scalar* result",
        "sum;\n    device scalar* result",
    ),
    bug(
        "merge: lse of the first head",
        CAUSAL,
        "+ head * sizes.forward.lse_head + place.query_start + query] =\n            lse_bits(maximum, sum)",
        "+ place.query_start + query] =\n            lse_bits(maximum, sum)",
    ),
    bug(
        "merge: packed queries start at 0",
        PACKED,
        "place.batch, head, place.query_start + query);",
        "place.batch, head, query);",
    ),
    // Caches.
    bug(
        "cache: the slot of another sequence",
        PADDED,
        "slot_of(place.batch, slots, sizes.cache)",
        "slot_of(0, slots, sizes.cache)",
    ),
    bug("cache: slots are not indexed", PADDED, "cache.indexed != 0 ? slots[sequence] : sequence", "sequence"),
    bug(
        "cache: padding is not skipped",
        PADDED,
        "place.key_start = sizes.cache.left_padded != 0 ? clamp(left_pad[place.batch], 0, filled) : 0;",
        "place.key_start = 0;",
    ),
    bug(
        "cache: padded positions count as keys",
        PADDED,
        "int(sizes.cache.capacity)) - place.key_start;",
        "int(sizes.cache.capacity));",
    ),
    bug("cache: new keys are not seen", SLOTS, "filled + int(sizes.cache.new_len), ", "filled, "),
    bug("cache: the length of the first sequence", SLOTS, "filled = lengths[sequence];", "filled = lengths[0];"),
    bug(
        "cache: offsets are lengths",
        PACKED_PAGES,
        "long(lengths[sequence + 1]) - lengths[sequence]",
        "long(lengths[sequence + 1])",
    ),
    bug(
        "cache: the diagonal of the whole cache",
        SLOTS,
        "place.key_len - place.query_len;\n#endif\n    const int group",
        "int(sizes.cache.capacity) - place.query_len;\n#endif\n    const int group",
    ),
    bug(
        "cache: pages of the first sequence",
        PAGES,
        "page_of(place.batch, first, pages, sizes.cache)",
        "page_of(0, first, pages, sizes.cache)",
    ),
    bug(
        "cache: the first page of a sequence",
        PAGES,
        "sequence * cache.table_stride + position / int(cache.block_len)",
        "sequence * cache.table_stride",
    ),
    bug(
        "cache: rows of the table lie close",
        PAGES,
        "sequence * cache.table_stride + position",
        "sequence * 2 + position",
    ),
    bug(
        "cache: rows of a page are not wrapped",
        PAGES,
        "const long row = first % int(sizes.cache.block_len);",
        "const long row = first;",
    ),
    bug("cache: pages in the strides of rows", PAGES, "page * sizes.forward.v.batch", "page * sizes.forward.v.row"),
    // Appending.
    bug(
        "append: new keys are written over the old ones",
        APPEND,
        "const int position = filled + token;",
        "const int position = token;",
    ),
    bug(
        "append: one token too many",
        APPEND,
        "token >= int(sizes.cache.new_len) ||",
        "token > int(sizes.cache.new_len) ||",
    ),
    bug(
        "append: the last columns are lost",
        APPEND,
        "column < int(sizes.value_dim); column += 32",
        "column + 32 < int(sizes.value_dim); column += 32",
    ),
    bug(
        "append: keys of the first head",
        APPEND,
        "row_offset(sizes.new_keys, sequence, head, token)",
        "row_offset(sizes.new_keys, sequence, 0, token)",
    ),
    bug(
        "append: values in the strides of keys",
        APPEND,
        "row_offset(sizes.value_cache, block, head, place)",
        "row_offset(sizes.key_cache, block, head, place)",
    ),
    bug(
        "append: the block of the sequence",
        NEIGHBOURS,
        "const int block = slot_of(sequence, slots, sizes.cache);",
        "const int block = sequence;",
    ),
    bug("append: rotated the other way", NEIGHBOURS, "scalar(fma(x, c, -(y * s)));", "scalar(fma(x, c, y * s));"),
    bug(
        "append: the second of a pair is the first",
        NEIGHBOURS,
        "const float y = float(from[second]);",
        "const float y = float(from[first]);",
    ),
    bug(
        "append: pairs are the other ones",
        HALVES,
        "sizes.neighbours != 0 ? 2 * pair : pair;",
        "sizes.neighbours == 0 ? 2 * pair : pair;",
    ),
    bug(
        "append: keys stand at the filled position",
        HALVES,
        "rotate_row(from, to, position, cosines",
        "rotate_row(from, to, filled, cosines",
    ),
    bug("append: queries always advance", HALVES, "sizes.queries_advance != 0 ? query : 0", "query"),
    bug("append: queries never advance", PACKED_APPEND, "sizes.queries_advance != 0 ? query : 0", "0"),
    bug(
        "append: columns behind the pairs are lost",
        HALVES,
        "int column = int(sizes.rotary_dim) + lane;",
        "int column = int(sizes.rotary_dim) + lane + 32;",
    ),
    bug(
        "append: sines in the strides of cosines",
        NEIGHBOURS,
        "sines + at * sizes.sin_row",
        "sines + (at + 1) * sizes.sin_row",
    ),
    bug("append: rows of a page are not wrapped", HALVES, "position % int(sizes.cache.block_len);", "position;"),
    bug(
        "append: packed queries start at 0",
        PACKED_APPEND,
        "const int start = clamp(query_offsets[sequence], 0, int(sizes.query_rows));",
        "const int start = 0;",
    ),
];
