//! The planted bugs: one replacement each in the text of one kernel variant.

/// A change of a kernel's text.
pub struct Mutant {
    /// What is wrong with it.
    pub what: &'static str,
    /// The variant whose text is changed.
    pub variant: &'static str,
    /// Text that occurs in it; every occurrence is replaced.
    pub from: &'static str,
    /// What it is replaced by.
    pub to: &'static str,
    /// Why the change is none, for a mutant that cannot be caught.
    pub equivalent: Option<&'static str>,
}

pub const fn bug(what: &'static str, variant: &'static str, from: &'static str, to: &'static str) -> Mutant {
    Mutant { what, variant, from, to, equivalent: None }
}

pub const fn none(
    what: &'static str,
    variant: &'static str,
    from: &'static str,
    to: &'static str,
    proof: &'static str,
) -> Mutant {
    Mutant { what, variant, from, to, equivalent: Some(proof) }
}

const SCALAR: &str = "f32";
const SCALAR_ALL: &str = "f16 everything packed";
const SCALAR_MASK: &str = "bf16 boolean mask";
const SCALAR_BIAS: &str = "f32 half bias";
const SCALAR_WIDE: &str = "f16 bfloat bias";
const DIRECT: &str = "f16 64 direct";
const STAGED: &str = "f16 64 staged causal";
const STAGED_ALL: &str = "f16 40/24 everything packed";
const PACKED: &str = "bf16 128 packed window";
const SOFTCAP: &str = "f32 32/48 softcap alibi";
const MASKED: &str = "f16 72 boolean mask";
const BIASED: &str = "bf16 20/12 float bias";
const PARKED: &str = "f32 61 parked in chunks";
const PARKED_STAGED: &str = "f32 64 staged parked";
const FROM_DEVICE: &str = "f16 320 from device";
const WINDOW: &str = "bf16 96 bias softcap window";
const ONE: &str = "f16 1";
const WIDE: &str = "f16 8/136 wide block";
const CHUNKS: &str = "bf16 256 in chunks";
const ALIGNED: &str = "f16 12/20 staged aligned";

/// The problem whose rows lie far apart, in three kernels.
pub const FAR_DIRECT: &str = "far apart, direct";
pub const FAR_STAGED: &str = "far apart, staged";
pub const FAR_SCALAR: &str = "far apart, scalar";

/// Every mutant, by what it damages.
pub const MUTANTS: &[Mutant] = &[
    // Places and the mask.
    bug("row past the end is computed", SCALAR, "if (query >= place.query_len)", "if (query > place.query_len)"),
    bug("one key too many", SCALAR, "key < visible.end;", "key <= visible.end;"),
    bug("last key is missed", SCALAR, "key < visible.end;", "key < visible.end - 1;"),
    bug(
        "left window starts late",
        SCALAR_BIAS,
        "place.diagonal - int(sizes.window_left)",
        "place.diagonal - int(sizes.window_left) + 1",
    ),
    bug(
        "left window starts early",
        PACKED,
        "place.diagonal - int(sizes.window_left)",
        "place.diagonal - int(sizes.window_left) - 1",
    ),
    bug("right window ends early", SCALAR_MASK, "int(sizes.window_right) + 1", "int(sizes.window_right)"),
    bug("right window ends late", STAGED, "int(sizes.window_right) + 1", "int(sizes.window_right) + 2"),
    bug("alignment is ignored", SCALAR_MASK, "sizes.top_left != 0 ? 0 : ", ""),
    bug("diagonal has the wrong sign", STAGED, "place.key_len - place.query_len;", "place.query_len - place.key_len;"),
    bug(
        "end of a window is not clamped",
        STAGED,
        "clamp(query + place.diagonal + int(sizes.window_right) + 1, range.start, place.key_len)",
        "query + place.diagonal + int(sizes.window_right) + 1",
    ),
    bug("key head of another group", DIRECT, "place.head / int(sizes.group)", "place.head % int(sizes.group)"),
    bug(
        "heads and chunks are confused",
        PARKED,
        "int(threadgroup_position.y) / int(sizes.value_chunks)",
        "int(threadgroup_position.y)",
    ),
    bug(
        "keys start where queries do",
        PACKED,
        "clamp(key_offsets[place.batch], 0, key_rows)",
        "clamp(query_offsets[place.batch], 0, key_rows)",
    ),
    bug(
        "length of the next sequence",
        PACKED,
        "place.key_start, key_rows) - place.key_start;",
        "place.key_start, key_rows);",
    ),
    bug(
        "query start is forgotten",
        SCALAR_ALL,
        "const long query_row = long(place.query_start) + query;",
        "const long query_row = query;",
    ),
    bug("batch stride is forgotten", DIRECT, "batch * strides.batch + ", ""),
    bug(
        "row and head strides are exchanged",
        DIRECT,
        "head * strides.head + row * strides.row",
        "head * strides.row + row * strides.head",
    ),
    bug("k is read with the strides of v", SOFTCAP, "row_offset(sizes.k,", "row_offset(sizes.v,"),
    bug(
        "blocks of v step with the stride of k",
        SOFTCAP,
        "values + first * sizes.v.row",
        "values + first * sizes.k.row",
    ),
    bug(
        "rows of v step with the stride of k",
        SOFTCAP,
        "block.value_stride = sizes.v.row",
        "block.value_stride = sizes.k.row",
    ),
    bug("out is written with the strides of q", DIRECT, "query * sizes.out.row", "query * sizes.q.row"),
    bug(
        "lse is written with the head stride of out",
        DIRECT,
        "place.head * sizes.lse_head",
        "place.head * sizes.out.head",
    ),
    bug("lse of packed sequences starts at 0", PACKED, "place.query_start + query] =", "query] ="),
    bug(
        "grid is turned round one off",
        STAGED,
        "threadgroup_count.x - 1 - threadgroup_position.x",
        "threadgroup_count.x - threadgroup_position.x",
    ),
    bug("k and v are exchanged", DIRECT, "v [[buffer(2)]]", "v [[buffer(1)]]"),
    bug(
        "row offsets of 32 bits",
        FAR_SCALAR,
        "head * strides.head + row * strides.row",
        "head * strides.head + int(row) * int(strides.row)",
    ),
    bug("head offsets of 32 bits", FAR_DIRECT, "head * strides.head", "head * int(strides.head)"),
    bug("sequence offsets of 32 bits", FAR_SCALAR, "batch * strides.batch", "batch * int(strides.batch)"),
    bug("query offsets of 32 bits", FAR_DIRECT, "queries + query * sizes.q.row", "queries + query * int(sizes.q.row)"),
    bug("result offsets of 32 bits", FAR_DIRECT, "query * sizes.out.row", "query * int(sizes.out.row)"),
    bug("block offsets of 32 bits", FAR_DIRECT, "keys + first * sizes.k.row", "keys + first * int(sizes.k.row)"),
    bug("offsets in a block of 32 bits", FAR_DIRECT, "+ (8 * fragment) * stride", "+ (8 * fragment) * int(stride)"),
    bug("offsets in an edge block of 32 bits", FAR_DIRECT, "fragment, last) * stride", "fragment, last) * int(stride)"),
    bug("staged offsets of 32 bits", FAR_STAGED, "min(row, last) * stride", "min(row, last) * int(stride)"),
    bug(
        "staged block offsets of 32 bits",
        FAR_STAGED,
        "values + first * sizes.v.row",
        "values + first * int(sizes.v.row)",
    ),
    bug("scalar key offsets of 32 bits", FAR_SCALAR, "keys + key * sizes.k.row", "keys + key * int(sizes.k.row)"),
    bug("bias offsets of 32 bits", FAR_DIRECT, "query * sizes.bias_query", "query * int(sizes.bias_query)"),
    bug("bias key offsets of 32 bits", FAR_SCALAR, "key * sizes.bias_key", "key * int(sizes.bias_key)"),
    bug("lse offsets of 32 bits", FAR_SCALAR, "place.head * sizes.lse_head", "place.head * int(sizes.lse_head)"),
    // Scores.
    bug("negative scales are taken for positive ones", SCALAR, "product *= factors.query;", ""),
    bug("sign of the scale is not in q", DIRECT, "scalar4(float4(even) * sign)", "scalar4(float4(even))"),
    bug("sign of the scale is not in scores", FROM_DEVICE, "score *= rows.sign;", ""),
    bug("scale is applied twice", SCALAR, "= product * factors.score;", "= product * factors.score * factors.score;"),
    bug(
        "softcap is not undone",
        SOFTCAP,
        "factors.softcap * saturation(product, factors)",
        "saturation(product, factors)",
    ),
    bug("ALiBi favours distance", SOFTCAP, "fma(-row.slope,", "fma(row.slope,"),
    bug("ALiBi knows no sign of a distance", SCALAR_ALL, "float(abs(key - row.position))", "float(key - row.position)"),
    bug("slope in the wrong units", SOFTCAP, "* LOG2_E;\n#endif", ";\n#endif"),
    bug("slopes of the first sequence", STAGED_ALL, "place.batch * sizes.alibi_batch + ", ""),
    bug("bias in the wrong units", BIASED, "fma(bias, LOG2_E, score)", "bias + score"),
    bug(
        "mask is the other way round",
        MASKED,
        "row.bias[key * sizes.bias_key] != 0",
        "row.bias[key * sizes.bias_key] == 0",
    ),
    bug("bias of the next key", WINDOW, "row.bias[key * sizes.bias_key]", "row.bias[(key + 1) * sizes.bias_key]"),
    bug("bias ignores its key stride", SCALAR_WIDE, "row.bias[key * sizes.bias_key]", "row.bias[key]"),
    bug("bias of the first head", SCALAR_WIDE, "place.head * sizes.bias_head + ", ""),
    bug("bias of a clamped key is not clamped", WINDOW, "(EDGE ? min(row, block.last) : row)", "row"),
    bug("a sink that is none counts", SCALAR_WIDE, "? 0.0f : 1.0f;\n}\n#endif", "? 1.0f : 1.0f;\n}\n#endif"),
    bug("sink in the wrong units", MASKED, "? LOWEST : sink * LOG2_E", "? LOWEST : sink"),
    bug(
        "sink counts once for each lane of a row",
        MASKED,
        "lane.column == 0 ? sink_weight(sink) : 0.0f",
        "sink_weight(sink)",
    ),
    bug("sink of the first head", WIDE, "sinks[place.head * sizes.sinks_head]", "sinks[0]"),
    // The softmax.
    bug(
        "hidden keys weigh as much as visible ones",
        STAGED,
        "HIDDEN = -1.7014118346046923e38f",
        "HIDDEN = -8.507059173023462e37f",
    ),
    bug("rows without keys divide by 0", SCALAR_MASK, "sum == 0.0f ? 0.0f : 1.0f / sum", "1.0f / sum"),
    bug("rows without keys have a finite lse", STAGED, "sum == 0.0f ? POSITIVE_INFINITY : ", ""),
    bug("lse in units of log2", DIRECT, "(maximum + precise::log2(sum)) * LN_2", "maximum + precise::log2(sum)"),
    bug("maximum lags too far for float16", DIRECT, "MAXIMUM_LAG = 8.0f", "MAXIMUM_LAG = 40.0f"),
    bug("sum is not rescaled (scalar)", SCALAR, "sum *= correction;", ""),
    bug("out is not rescaled (scalar)", SCALAR, "accumulated[column] *= correction;", ""),
    bug("sum is not rescaled", DIRECT, "rows.sum[r] *= correction[r];", ""),
    bug("every second column is not rescaled", DIRECT, "rows.out[r][v].thread_elements()[1] *= correction[r];", ""),
    bug("only the last row fragment asks for rescaling", DIRECT, "corrected = corrected || rows", "corrected = rows"),
    bug("lanes decide about rescaling for themselves", DIRECT, "if (simd_any(corrected)) {", "if (corrected) {"),
    bug("correction is upside down", DIRECT, "fast::exp2(old - rows.maximum[r])", "fast::exp2(rows.maximum[r] - old)"),
    bug("maximum over half of the columns", DIRECT, "maximum = max(maximum, simd_shuffle_xor(maximum, 8));", ""),
    bug("maximum of another row", DIRECT, "simd_shuffle_xor(maximum, 1)", "simd_shuffle_xor(maximum, 2)"),
    bug("sum over half of the columns", DIRECT, "sum += simd_shuffle_xor(sum, 1);", ""),
    bug("sum of another row", DIRECT, "simd_shuffle_xor(sum, 8)", "simd_shuffle_xor(sum, 16)"),
    bug("maximum without the scale", DIRECT, "scaled ? maximum : maximum * factors.score", "maximum"),
    bug("weights without the scale", DIRECT, "fma(score, factors.score, -rows.maximum[r])", "score - rows.maximum[r]"),
    bug(
        "outputs accumulate in the input type",
        DIRECT,
        "typedef simdgroup_matrix<float, 8, 8> Accumulator",
        "typedef simdgroup_matrix<scalar, 8, 8> Accumulator",
    ),
    // Fragments.
    bug("lane map: rows", DIRECT, "(quad & 4) + lane.index", "(quad & 2) * 2 + lane.index"),
    bug("lane map: columns", DIRECT, "(quad & 2) * 2 + lane.index % 2 * 2", "(quad & 4) + lane.index % 2 * 2"),
    bug("lane map: neighbours", DIRECT, "lane.index % 2 * 2;", "lane.index % 2;"),
    bug(
        "dimensions dealt as if fragments were four",
        BIASED,
        "FRAGMENTS - first < HEAD_DEAL ? FRAGMENTS - first : HEAD_DEAL",
        "HEAD_DEAL",
    ),
    bug(
        "q and k deal dimensions differently",
        PARKED,
        "scalar4(evens[0], odds[0], evens[1], odds[1])",
        "scalar4(evens[0], evens[1], odds[0], odds[1])",
    ),
    bug(
        "v and out deal dimensions differently",
        DIRECT,
        "value_dimension<VALUE_FRAGMENTS>(v, lane.column + e)",
        "8 * v + lane.column + e",
    ),
    bug("a row's tail reads one too many", PARKED, "|| i < width ? row[i]", "|| i <= width ? row[i]"),
    bug("head dimension has no tail", ONE, "HEAD_WHOLE = HEAD_DIM % 8 == 0", "HEAD_WHOLE = true"),
    bug("value dimension has no tail", PARKED, "VALUE_WHOLE = VALUE_DIM % VALUE_CHUNK == 0", "VALUE_WHOLE = true"),
    bug("aligned tail reads one too many", BIASED, "|| 4 * i < width ?", "|| 4 * i <= width ?"),
    bug("aligned tail is short", ALIGNED, "|| 4 * i < width ?", "|| 4 * i + 4 < width ?"),
    bug("aligned reads are one off", DIRECT, "(device const scalar4*)row)[i]", "(device const scalar4*)row)[i + 1]"),
    bug("aligned reads in elements", STAGED, "(device const scalar4*)row)[i]", "(device const scalar4*)(row + i))[0]"),
    bug("four elements in the wrong order", CHUNKS, "(row, 4 * i + 2, width)", "(row, 4 * i + 1, width)"),
    bug(
        "keys of one fragment are exchanged",
        DIRECT,
        "operand(evens[i], odds[i]);  //",
        "operand(odds[i], evens[i]);  //",
    ),
    bug("values of two fragments are exchanged", WIDE, "elements[2 * i + 1]", "elements[i + 1]"),
    bug("last fragment of v is left out", MASKED, "first + i >= VALUE_FRAGMENTS", "first + i >= VALUE_FRAGMENTS - 1"),
    bug("last fragment of k is left out", MASKED, "first + i >= HEAD_FRAGMENTS)", "first + i >= HEAD_FRAGMENTS - 1)"),
    bug("value dimension's tail writes one too many", PARKED, "|| column < columns) {", "|| column <= columns) {"),
    bug(
        "columns of v start at the first chunk",
        CHUNKS,
        "place.key_start)\n        + place.value_chunk * VALUE_CHUNK;",
        "place.key_start);",
    ),
    bug(
        "columns of out start at the first chunk",
        CHUNKS,
        "place.query_start)\n        + place.value_chunk * VALUE_CHUNK;",
        "place.query_start);",
    ),
    bug(
        "scalar columns of v start at the first chunk",
        SCALAR_WIDE,
        "key * sizes.v.row + first_column",
        "key * sizes.v.row",
    ),
    bug(
        "scalar chunk is always full",
        SCALAR_ALL,
        "min(int(VALUE_CHUNK), int(sizes.value_dim) - first_column)",
        "VALUE_CHUNK",
    ),
    bug("scalar misses a dimension", SCALAR, "i < int(sizes.head_dim)", "i < int(sizes.head_dim) - 1"),
    // Blocks and edges.
    bug("key after the visible ones", STAGED, "8 * f + e < end ?", "8 * f + e <= end ?"),
    bug("first visible key is hidden", PACKED, "8 * f + e >= start &&", "8 * f + e > start &&"),
    bug(
        "blocks that end a row's window count as full",
        PACKED,
        "const int full_start = last_visible.start",
        "const int full_start = first_visible.start",
    ),
    bug(
        "blocks on the diagonal count as full",
        STAGED,
        "const int full_end = first_visible.end",
        "const int full_end = last_visible.end",
    ),
    bug("last block is never an edge", DIRECT, "first + KEYS > full_end", "first > full_end"),
    bug("keys that only the last rows see are skipped", STAGED, "? last_visible.end : 0", "? first_visible.end : 0"),
    bug(
        "keys that only the first rows see are skipped",
        PACKED,
        "const int seen_start = first_visible.start",
        "const int seen_start = last_visible.start",
    ),
    bug("blocks step too far", DIRECT, "first += KEYS", "first += KEYS + 8"),
    bug("rows of a block are not clamped", DIRECT, "min(lane_row + 8 * fragment, last)", "(lane_row + 8 * fragment)"),
    bug(
        "rows are clamped one too far",
        DIRECT,
        "block.last = place.key_len - 1 - first",
        "block.last = place.key_len - first",
    ),
    bug(
        "queries are not clamped",
        DIRECT,
        "min(first_query + 8 * r + lane.row, place.query_len - 1)",
        "first_query + 8 * r + lane.row",
    ),
    bug("a row past the end is stored", DIRECT, "if (query < place.query_len) {", "if (query <= place.query_len) {"),
    bug("simdgroups share rows", DIRECT, "int(simdgroup_index) * ROWS", "int(simdgroup_index) * 8"),
    // Threadgroup memory.
    bug(
        "no barrier before a block is written",
        STAGED,
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // the previous",
        "// the previous",
    ),
    bug(
        "no barrier after a block is written",
        STAGED,
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // this",
        "// this",
    ),
    bug(
        "barrier orders nothing",
        STAGED,
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // this",
        "threadgroup_barrier(mem_flags::mem_none);  // this",
    ),
    bug(
        "barrier orders device memory",
        STAGED,
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // the previous",
        "threadgroup_barrier(mem_flags::mem_device);  // the previous",
    ),
    bug(
        "barrier of the simdgroup only",
        STAGED,
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // this",
        "simdgroup_barrier(mem_flags::mem_threadgroup);  // this",
    ),
    bug(
        "simdgroups leave before a barrier",
        STAGED,
        "if (group_first >= place.query_len)",
        "if (first_query >= place.query_len)",
    ),
    bug("simdgroups leave the loop at different blocks", STAGED, "            continue;", "            break;"),
    bug(
        "barriers in a divergent loop",
        STAGED,
        "const int loop_end = visible_keys(group_last, place, sizes).end",
        "const int loop_end = seen_end",
    ),
    bug("staged rows are not clamped", STAGED, "rows + min(row, last) * stride", "rows + row * stride"),
    bug(
        "staged rows have the pitch of v",
        STAGED_ALL,
        "block[row * PITCH + i % LENGTH]",
        "block[row * VALUE_PITCH + i % LENGTH]",
    ),
    bug(
        "staged block is short of a row",
        STAGED,
        "staged_keys[KEYS * KEY_PITCH]",
        "staged_keys[(KEYS - 1) * KEY_PITCH]",
    ),
    bug(
        "last dimensions are not staged",
        STAGED,
        "stage<HEAD_WHOLE, 2 * HEAD_FRAGMENTS,",
        "stage<HEAD_WHOLE, 2 * HEAD_FRAGMENTS - 1,",
    ),
    bug("staged tail is the next row's", ALIGNED, "last, columns, thread_index)", "last, 2 * columns, thread_index)"),
    bug(
        "a simdgroup's share of rows is not staged",
        STAGED,
        "i < COUNT * LENGTH; i += 32 * SIMDGROUPS",
        "i < (COUNT - 8) * LENGTH; i += 32 * SIMDGROUPS",
    ),
    bug(
        "simdgroups park q in the same place",
        PARKED,
        "parked_queries + int(simdgroup_index) * (ROW_FRAGMENTS * HEAD_DEALS * 64)",
        "parked_queries",
    ),
    bug("lanes park q in the same place", PARKED_STAGED, "* 64 + lane.index * 2", "* 64 + lane.index"),
    bug(
        "parked q overruns",
        PARKED,
        "parked_queries[SIMDGROUPS * ROW_FRAGMENTS * HEAD_DEALS * 64]",
        "parked_queries[SIMDGROUPS * ROW_FRAGMENTS * HEAD_DEALS * 64 - 8]",
    ),
    bug(
        "q from device is of the first row fragment's lane",
        FROM_DEVICE,
        "rows.values[r] = row;",
        "rows.values[r] = queries;",
    ),
    // Types and address spaces.
    bug(
        "staged block is taken for device memory",
        STAGED,
        "typedef threadgroup const scalar4* block_pointer",
        "typedef device const scalar4* block_pointer",
    ),
    bug("parked q is taken for device memory", PARKED, "threadgroup scalar4* parked =", "device scalar4* parked ="),
    bug(
        "parameters are taken for device memory",
        DIRECT,
        "constant Sizes& sizes [[buffer(10)]]",
        "device Sizes& sizes [[buffer(10)]]",
    ),
    bug("input is written to", DIRECT, "device scalar* results = out", "device scalar* results = q"),
    bug(
        "fragment of the wrong size",
        DIRECT,
        "typedef simdgroup_matrix<scalar, 8, 8> Operand",
        "typedef simdgroup_matrix<scalar, 16, 8> Operand",
    ),
    bug(
        "fragment of integers",
        DIRECT,
        "typedef simdgroup_matrix<scalar, 8, 8> Operand",
        "typedef simdgroup_matrix<int, 8, 8> Operand",
    ),
    bug(
        "keys are read as another type",
        BIASED,
        "device const scalar* k [[buffer(1)]]",
        "device const half* k [[buffer(1)]]",
    ),
    // Changes that are none.
    none(
        "blocks start at the first visible key",
        WINDOW,
        "loop_start / KEYS * KEYS",
        "loop_start",
        "Any partition of the visible keys into blocks gives the same sums; the alignment only fixes their order.",
    ),
    none(
        "idle simdgroups compute the last row",
        STAGED,
        "first_query < place.query_len ? last_visible.end : 0",
        "last_visible.end",
        "Their rows are clamped, so that all they read exists, and nothing of them is stored.",
    ),
    none(
        "ends of a window may precede its start",
        PACKED,
        "+ 1, range.start, place.key_len)",
        "+ 1, -place.key_len, place.key_len)",
        "A range that ends before its start holds no key either: every use compares positions with both ends.",
    ),
    none(
        "every lane of a row writes its lse",
        DIRECT,
        "place.value_chunk == 0 && lane.column == 0",
        "place.value_chunk == 0",
        "Four lanes write the same value to the same place.",
    ),
];
