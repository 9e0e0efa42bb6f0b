//! Planted bugs in what the kernels drop.

use super::list::{Mutant, bug};

const SCALAR: &str = "bf16 boolean mask";
const SCALAR_WINDOW: &str = "f32 half bias";
const STAGED: &str = "f16 64 staged causal";
const PACKED: &str = "bf16 128 packed window";
const TENSOR: &str = "tensor f16 128 causal in step";
const TENSOR_STAGED: &str = "staged f16 64 causal, aligned";
const GRADIENT_PACKED: &str = "backward bf16 128 packed window";
const GRADIENT_MASKED: &str = "backward f16 72 boolean mask";
const GRADIENT_APART: &str = "backward f32 44/28 staged in chunks";

/// Every mutant of dropout, by what it damages.
pub const MUTANTS: &[Mutant] = &[
    // Random words.
    bug("dropout: nine rounds", SCALAR, "round < 10", "round < 9"),
    bug("dropout: another multiplier", SCALAR, "0xd2511f53u", "0xd2511f51u"),
    bug("dropout: half of the key does not grow", SCALAR, "low += 0x9e3779b9u;", ""),
    bug(
        "dropout: the halves of a product change places",
        SCALAR,
        "words.x * 0xd2511f53u",
        "mulhi(words.x, 0xd2511f53u)",
    ),
    bug("dropout: high half of the offset is lost", SCALAR, " ^ uint(ulong(sizes.dropout_offset) >> 32)", ""),
    bug("dropout: high half of the seed is lost", SCALAR, "uint(ulong(sizes.dropout_seed) >> 32) ^ ", ""),
    bug("dropout: low half of the offset is lost", PACKED, "head, uint(sizes.dropout_offset)", "head, 0u"),
    bug("dropout: every sequence drops the same", PACKED, "place.batch * sizes.query_heads + place.head", "place.head"),
    bug(
        "dropout: heads of a group drop the same",
        PACKED,
        "query_heads + place.head)",
        "query_heads + place.key_head)",
    ),
    // From words to keys.
    bug("dropout: neighbours change places", SCALAR, "(key & 1) != 0", "(key & 1) == 0"),
    bug("dropout: halves of a group change places", SCALAR, "(key & 4) != 0", "(key & 4) == 0"),
    bug("dropout: pairs change places", TENSOR, "(key & 2) != 0", "(key & 2) == 0"),
    bug("dropout: what is kept and what is dropped", STAGED, "return bits >= ", "return bits < "),
    // The scalar kernel.
    bug(
        "dropout: a window begins without words",
        SCALAR_WINDOW,
        "if (key == visible.start || key % 8 == 0)",
        "if (key % 8 == 0)",
    ),
    bug(
        "dropout: dropped weights are not summed",
        SCALAR,
        "if (!is_kept(word_of(words, key), key, sizes)) {",
        "if (!is_kept(word_of(words, key), key, sizes)) {\n            sum -= weight;",
    ),
    bug("dropout: kept weights are not multiplied (scalar)", SCALAR, "normalizer *= factors.kept;", ""),
    // The simdgroup kernel.
    bug("dropout: one group for a block", STAGED, "first_key / 8 + call % FRAGMENTS", "first_key / 8"),
    bug("dropout: one key for two", PACKED, "is_kept(words[call % 4], e, sizes)", "is_kept(words[call % 4], 0, sizes)"),
    bug("dropout: one row for two", STAGED, "value_at(queries, call / FRAGMENTS)", "queries[0]"),
    // Words that lanes share.
    bug("dropout: all lanes make the first call", STAGED, "first + own_call(position, calls)", "first"),
    bug("dropout: a lane keeps what it should give", STAGED, "kept = is_second ? second : first", "kept = first"),
    bug("dropout: calls of two lanes change places", PACKED, "first = is_second ? got : kept;", "first = kept;"),
    bug(
        "dropout: lanes of two rows trade",
        STAGED,
        "own_words(words, position, 1, 8, calls)",
        "own_words(words, position, 2, 8, calls)",
    ),
    bug(
        "dropout: bits of a position change places",
        STAGED,
        "own_words(words, position, 1, 8, calls)",
        "own_words(words, position, 8, 1, calls)",
    ),
    bug("dropout: words of two calls are not traded", GRADIENT_APART, "if (calls > 1) {", "if (calls > 2) {"),
    bug("dropout: the high words of two calls are lost", GRADIENT_APART, "y = is_high ? w : y;", ""),
    bug("dropout: kept weights are not multiplied (simdgroup)", STAGED, "normalizer *= factors.kept;", ""),
    // The tensorops kernels.
    bug(
        "dropout: a block was not moved back",
        TENSOR,
        "drop(scores, block.first, task)",
        "drop(scores, block.counted, task)",
    ),
    bug("dropout: words of another row", TENSOR, "row != query || key / 8 != group", "key / 8 != group"),
    bug("dropout: words of another group", TENSOR_STAGED, "row != query || key / 8 != group", "row != query"),
    bug(
        "dropout: kept weights are not multiplied (tensorops)",
        TENSOR_STAGED,
        "normalizer[r] *= task.factors->kept;",
        "",
    ),
    // Gradients.
    bug(
        "dropout: dV of dropped weights",
        GRADIENT_MASKED,
        "is_visible && kept ? weight[0] : 0.0f",
        "is_visible ? weight[0] : 0.0f",
    ),
    bug("dropout: dV is not multiplied", GRADIENT_APART, "DROPOUT ? factors.kept : 1.0f", "1.0f"),
    bug("dropout: dP is not multiplied", GRADIENT_MASKED, "product * factors.kept", "product"),
    bug("dropout: dP of dropped weights", GRADIENT_PACKED, "dropped ? 0.0f : ", ""),
    bug(
        "dropout: dropped weights have no delta",
        GRADIENT_PACKED,
        "((dropped ? 0.0f : product * factors.kept) - delta)",
        "(dropped ? 0.0f : product * factors.kept - delta)",
    ),
    bug("dropout: marks stay", GRADIENT_MASKED, "abs(weight) * (", "weight * ("),
    bug("dropout: one group for a block (dQ)", GRADIENT_PACKED, "first_key / 8 + call % FRAGMENTS", "first_key / 8"),
    bug("dropout: one key for two (dQ)", GRADIENT_APART, "is_kept(words[call % 4], e,", "is_kept(words[call % 4], 0,"),
    bug("dropout: group of the query (dK)", GRADIENT_APART, "value_at(keys, call / BLOCK_FRAGMENTS) / 8", "query / 8"),
    bug("dropout: one fragment for a block (dK)", GRADIENT_MASKED, "8 * (call % BLOCK_FRAGMENTS)", "0"),
    bug("dropout: one column for two (dK)", GRADIENT_MASKED, "words[0] = is_odd ? other : own;", "words[0] = own;"),
    bug(
        "dropout: lanes of two columns trade (dK)",
        GRADIENT_APART,
        "simd_shuffle_xor(own, 2)",
        "simd_shuffle_xor(own, 1)",
    ),
    bug(
        "dropout: key and query change places (dK)",
        GRADIENT_MASKED,
        "is_kept(words[e][call % 4], lane.row,",
        "is_kept(words[e][call % 4], query,",
    ),
];
