// Attention forward with the matrix units that matmul2d of MetalPerformancePrimitives uses (M5 and later).
//
// One threadgroup: SIMDGROUPS * ROWS consecutive queries of one head of one sequence, VALUE_CHUNK columns of v.
//   threads (32, SIMDGROUPS, 1); threadgroups (queries / rows, heads * value chunks, sequences)
// One simdgroup: ROWS queries, in a loop over blocks of KEYS keys that any of them sees:
//   S = Q K^T [ROWS, KEYS]; P = exp2(S - maximum); O = P V + O * correction [ROWS, VALUE_CHUNK]; sum += P
// The products of a block are made in steps: HEAD_STEP columns of Q and K add to S, and VALUE_STEP columns of V give as
// many of O. A step as wide as the matrix is one large matmul2d; 16 and 32 are the fragments of the hardware.
// What lives where:
//   registers    S float; P, which is S made the left operand; O float; maximum and sum of each row;
//                QUERY_IN_REGISTERS: Q, one left operand for each head step
//   threadgroup  QUERY_IN_THREADGROUP: Q; STAGED: one block of K and one of V for all simdgroups;
//                WEIGHTS_IN_THREADGROUP: P; a float for each row, for the few times that O is rescaled
//   device       Q, K, V, read where they lie, whatever their strides; the right operands themselves unless STAGED or
//                OPERANDS_IN_REGISTERS, where lanes load them element by element
// Which lane holds which element is never assumed: every use of an element asks for its position, and a row's maximum is
// found by map_iterator, whose answers for S are kept in the bits of one number before the loop (a call for each element
// of each block was reported to take a third of the time of a kernel).
// The end of a sequence: nothing past it is read. A block that would pass it is moved back to end with it, and its keys
// that were counted before are hidden. Sequences shorter than a block are read element by element, rows past the end as
// the last row. So nothing depends on what matmul2d makes of rows beyond the extents of a tensor.
// Products accumulate into cooperative tensors that were set to 0, and never into memory: mode::multiply has been seen to
// do either with what is there.
// Barriers: STAGED, one of the threadgroup after a block was written and one after it was read; KEEP_STEP, one that orders
// no memory, so that simdgroups stay at the same block and share it in the cache. Both are reached by all simdgroups the
// same number of times. Others are of a simdgroup: around Q, P and the floats of the rows in threadgroup memory.

// The two products in steps of some columns. FILLED: K and V are loaded element by element.
template <int HEAD_COLUMNS, int VALUE_COLUMNS, bool FILLED>
struct Products {
    static constexpr constant int HEAD_STEPS = HEAD_WIDTH / HEAD_COLUMNS;
    static constexpr constant int VALUE_STEPS = VALUE_CHUNK / VALUE_COLUMNS;
    static constexpr constant bool IS_FILLED = FILLED;
    typedef matmul2d<matmul2d_descriptor(ROWS, KEYS, HEAD_COLUMNS, false, true, RELAXED,
                                         matmul2d_descriptor::mode::multiply_accumulate),
                     execution_simdgroup> Score;
    typedef matmul2d<matmul2d_descriptor(ROWS, VALUE_COLUMNS, KEYS, false, false, RELAXED,
                                         matmul2d_descriptor::mode::multiply_accumulate),
                     execution_simdgroup> Value;
    typedef typename Score::template cooperative_tensor_left_input_t<scalar, scalar, float> Query;
    typedef typename Score::template cooperative_tensor_right_input_t<scalar, scalar, float> FilledKeys;
    typedef typename Value::template cooperative_tensor_right_input_t<weight, scalar, float> FilledValues;
    typedef conditional_t<FILLED, FilledKeys, BlockTile> Keys;
    typedef conditional_t<FILLED, FilledValues, BlockTile> Values;

    static void load_query(thread Query& query, int step, thread const Task& task) {
        UNROLL
        for (ushort i = 0; i < query.get_capacity(); ++i) {
            if (query.is_valid_element(i)) {
                const auto position = query.get_multidimensional_index(i);
                const int column = step * HEAD_COLUMNS + position[0];
#if QUERY_IN_THREADGROUP
                query[i] = task.parked_queries[position[1] * HEAD_PITCH + column];
#else
                query[i] = query_element(task, position[1], column);
#endif
            }
        }
    }

    // S += Q K^T over the columns of a step.
    template <typename Left, typename Scores>
    static void add_scores(thread Left& query, int step, int first, thread const Task& task, thread Scores& scores) {
        Score product;
        if constexpr (FILLED) {
            auto keys = product.template get_right_input_cooperative_tensor<scalar, scalar, float>();
            UNROLL
            for (ushort i = 0; i < keys.get_capacity(); ++i) {
                if (keys.is_valid_element(i)) {
                    const auto position = keys.get_multidimensional_index(i);
                    keys[i] = key_element(task, first + position[1], step * HEAD_COLUMNS + position[0]);
                }
            }
            product.run(query, keys, scores);
        } else {
#if STAGED
            Keys keys(task.staged_keys + step * HEAD_COLUMNS, dextents<int, 2>(HEAD_COLUMNS, KEYS),
                      array<int, 2>{1, HEAD_PITCH});
#else
            device const scalar* corner = task.keys + first * task.sizes->k.row + step * HEAD_COLUMNS;
            Keys keys(const_cast<device scalar*>(corner),
                      dextents<int, 2>(HEAD_COLUMNS, KEYS), array<int, 2>{1, int(task.sizes->k.row)});
#endif
            product.run(query, keys, scores);
        }
    }

    // O += P V for the columns of a step.
    template <typename Weights, typename Out>
    static void add_values(thread Weights& weights, int step, int first, thread const Task& task, thread Out& out) {
        Value product;
        if constexpr (FILLED) {
            auto values = product.template get_right_input_cooperative_tensor<weight, scalar, float>();
            UNROLL
            for (ushort i = 0; i < values.get_capacity(); ++i) {
                if (values.is_valid_element(i)) {
                    const auto position = values.get_multidimensional_index(i);
                    values[i] = value_element(task, first + position[1], step * VALUE_COLUMNS + position[0]);
                }
            }
            product.run(weights, values, out);
        } else {
#if STAGED
            Values values(task.staged_values + step * VALUE_COLUMNS, dextents<int, 2>(VALUE_COLUMNS, KEYS),
                          array<int, 2>{1, VALUE_PITCH});
#else
            device const scalar* corner = task.values + first * task.sizes->v.row + step * VALUE_COLUMNS;
            Values values(const_cast<device scalar*>(corner),
                          dextents<int, 2>(VALUE_COLUMNS, KEYS), array<int, 2>{1, int(task.sizes->v.row)});
#endif
            product.run(weights, values, out);
        }
    }
};

// Attention of the rows of a simdgroup. Query: the left operands that hold Q, none unless QUERY_IN_REGISTERS.
template <typename Op, typename... Query>
struct Attention {
    // Whether left operands are loaded element by element; otherwise matmul2d reads Q from threadgroup memory.
    static constexpr constant bool LOADED = Op::IS_FILLED || !QUERY_IN_THREADGROUP;
    typedef conditional_t<LOADED, typename Op::Query, ThreadgroupTile> Left;
    typedef typename Op::Keys Keys;
    typedef typename Op::Score::template cooperative_tensor_destination_t<Left, Keys, float> Scores;
    typedef typename Op::Score::template cooperative_tensor_row_reduction_destination_t<Left, Keys, float> Rows;

    // S = Q K^T.
    static void multiply_keys(int first, thread const Task& task, thread Scores& scores, thread Query&... query) {
        clear(scores);
        if constexpr (sizeof...(Query) != 0) {
            int step = 0;
            (Op::add_scores(query, step++, first, task, scores), ...);
        } else {
            UNROLL
            for (int step = 0; step < Op::HEAD_STEPS; ++step) {
                if constexpr (LOADED) {
                    typename Op::Score product;
                    auto query_columns = product.template get_left_input_cooperative_tensor<scalar, scalar, float>();
                    Op::load_query(query_columns, step, task);
                    Op::add_scores(query_columns, step, first, task, scores);
                } else {
                    constexpr int columns = HEAD_WIDTH / Op::HEAD_STEPS;
                    Left query_columns(task.parked_queries + step * columns, dextents<int, 2>(columns, ROWS),
                                       array<int, 2>{1, HEAD_PITCH});
                    Op::add_scores(query_columns, step, first, task, scores);
                }
            }
        }
    }

    // S becomes P; the maximum, the sum and O follow.
    template <typename... Out>
    static void soften(Block block, ulong second, thread const Task& task, thread Scores& scores, thread Rows& maximum,
                       thread Rows& sum, thread Out&... out) {
        // What a score is worth in units of log2. Where nothing else stands between product and score, the largest
        // product is the largest score, and one fma scales a product and subtracts the maximum.
        float unit = task.factors->score;
        if (SCORE_MODIFIED || block.edge) {
            finish_scores(scores, task, block);
            unit = 1.0f;
        }
        typename Op::Score product;
        auto block_rows = product.template get_row_reduction_destination_cooperative_tensor<Left, Keys, float>();
        auto correction = product.template get_row_reduction_destination_cooperative_tensor<Left, Keys, float>();
        reduce_rows(scores, block_rows, reduction_operation::max, numeric_limits<float>::lowest());
        bool corrected = false;
        UNROLL
        for (ushort r = 0; r < maximum.get_capacity(); ++r) {
            if (maximum.is_valid_element(r)) {
                const float largest = block_rows[r] * unit;
                const float old = maximum[r];
                maximum[r] = largest > old + MAXIMUM_LAG ? largest : old;
                correction[r] = fast::exp2(old - maximum[r]);
                corrected = corrected || maximum[r] != old;
            }
        }
        UNROLL
        for (ushort i = 0; i < scores.get_capacity(); ++i) {
            if (scores.is_valid_element(i)) {
                scores[i] = fast::exp2(fma(scores[i], unit, -of_row(maximum, scores, second, i)));
            }
        }
        reduce_rows(scores, block_rows, reduction_operation::sum, 0.0f);
        UNROLL
        for (ushort r = 0; r < sum.get_capacity(); ++r) {
            if (sum.is_valid_element(r)) {
                sum[r] = fma(sum[r], correction[r], block_rows[r]);
            }
        }
        if (simd_any(corrected)) {
            share_rows(correction, scores, second, task.row_values);
            (multiply_rows(out, task.row_values), ...);
        }
    }

#if WEIGHTS_NARROW
    // Whether lanes have the same elements of a narrow S as of a float S. Where not, the result is NaN, and the check before
    // the first use notices.
    static bool places_agree(thread Scores& scores) {
        typename Op::Score product;
        auto narrow = product.template get_destination_cooperative_tensor<Left, Keys, scalar>();
        bool agree = narrow.get_capacity() == scores.get_capacity();
        UNROLL
        for (ushort i = 0; i < scores.get_capacity(); ++i) {
            if (scores.is_valid_element(i)) {
                const auto position = scores.get_multidimensional_index(i);
                const auto place = narrow.get_multidimensional_index(i);
                agree = agree && place[0] == position[0] && place[1] == position[1];
            }
        }
        return agree;
    }
#endif

    // O += P V.
    template <typename... Out>
    static void multiply_values(int first, thread const Task& task, thread Scores& scores, thread Out&... out) {
#if WEIGHTS_IN_THREADGROUP
#if !STAGED
        simdgroup_barrier(mem_flags::mem_threadgroup);  // the weights of the block before have been read
#endif
        UNROLL
        for (ushort i = 0; i < scores.get_capacity(); ++i) {
            if (scores.is_valid_element(i)) {
                const auto position = scores.get_multidimensional_index(i);
                task.parked_weights[position[1] * KEYS + position[0]] = scalar(scores[i]);
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);  // these have been written
        ThreadgroupTile weights(task.parked_weights, dextents<int, 2>(KEYS, ROWS), array<int, 2>{1, KEYS});
#else
        typename Op::Value product;
#if WEIGHTS_NARROW
        typename Op::Score score_product;
        auto narrow = score_product.template get_destination_cooperative_tensor<Left, Keys, scalar>();
        UNROLL
        for (ushort i = 0; i < scores.get_capacity(); ++i) {
            if (scores.is_valid_element(i)) {
                narrow[i] = scalar(scores[i]);
            }
        }
        auto weights = product.template get_left_input_cooperative_tensor<weight, scalar, float>(narrow);
#else
        round_weights(scores);
        auto weights = product.template get_left_input_cooperative_tensor<weight, scalar, float>(scores);
#endif
#endif
        int step = 0;
        (Op::add_values(weights, step++, first, task, out), ...);
    }

    template <typename... Out>
    static void run(thread const Task& task, thread Scores& scores, thread Query&... query, thread Out&... out) {
        typename Op::Score product;
        auto maximum = product.template get_row_reduction_destination_cooperative_tensor<Left, Keys, float>();
        auto sum = product.template get_row_reduction_destination_cooperative_tensor<Left, Keys, float>();
        UNROLL
        for (ushort r = 0; r < maximum.get_capacity(); ++r) {
            if (maximum.is_valid_element(r)) {
#if SINKS
                maximum[r] = sink_logit(task.sink);
                sum[r] = sink_weight(task.sink);
#else
                maximum[r] = LOWEST;
                sum[r] = 0.0f;
#endif
            }
        }
        const ulong second = second_row_elements(scores, maximum);

        // Blocks start at multiples of KEYS, so that the rounding of a row does not depend on its neighbours' mask.
        for (int first = task.loop.start / KEYS * KEYS; first < task.loop.end; first += KEYS) {
#if STAGED
            stage_block(task, first);
#elif KEEP_STEP
            threadgroup_barrier(mem_flags::mem_none);
#endif
            if (first >= task.seen.end || first + KEYS <= task.seen.start) {
                continue;
            }
            Block block;
            block.counted = first;
            block.first = Op::IS_FILLED || STAGED ? first : min(first, task.place.key_len - KEYS);
            block.edge = first < task.full.start || first + KEYS > task.full.end;
            multiply_keys(block.first, task, scores, query...);
            soften(block, second, task, scores, maximum, sum, out...);
#if DROPOUT
            drop(scores, block.first, task);
#endif
            multiply_values(block.first, task, scores, out...);
        }

#if WEIGHTS_NARROW
        const bool right = simd_all(places_agree(scores));
#endif
        auto normalizer = product.template get_row_reduction_destination_cooperative_tensor<Left, Keys, float>();
        UNROLL
        for (ushort r = 0; r < sum.get_capacity(); ++r) {
            if (sum.is_valid_element(r)) {
                normalizer[r] = sum[r] == 0.0f ? 0.0f : 1.0f / sum[r];
#if DROPOUT
                normalizer[r] *= task.factors->kept;
#endif
#if WEIGHTS_NARROW
                normalizer[r] = right ? normalizer[r] : as_type<float>(NOT_A_NUMBER);
#endif
            }
        }
        share_rows(normalizer, scores, second, task.row_values);
        (multiply_rows(out, task.row_values), ...);
        int step = 0;
        (store_rows(out, VALUE_CHUNK / Op::VALUE_STEPS * step++, task), ...);
#if LSE
        UNROLL
        for (ushort i = 0; i < scores.get_capacity(); ++i) {
            if (scores.is_valid_element(i)) {
                const auto position = scores.get_multidimensional_index(i);
                const int query_row = task.first_query + position[1];
                if (task.place.value_chunk == 0 && position[0] == 0 && query_row <= task.last_query) {
                    const float row_maximum = of_row(maximum, scores, second, i);
                    task.lse[query_row] = lse_bits(row_maximum, of_row(sum, scores, second, i));
                }
            }
        }
#endif
    }

    // Declares the tensors of O, one after the other, as cooperative tensors cannot be elements of an array.
    template <typename Weights, typename... Out>
    static void hold_out(thread const Task& task, thread Scores& scores, thread Query&... query, thread Out&... out) {
        if constexpr (sizeof...(Out) < Op::VALUE_STEPS) {
            typename Op::Value product;
            auto next = product.template get_destination_cooperative_tensor<Weights, typename Op::Values, float>();
            clear(next);
            hold_out<Weights>(task, scores, query..., out..., next);
        } else {
            run(task, scores, query..., out...);
        }
    }

    template <typename Weights>
    static void start_with(thread Weights&, thread const Task& task, thread Scores& scores, thread Query&... query) {
        hold_out<Weights>(task, scores, query...);
    }

    static void start(thread const Task& task, thread Query&... query) {
        typename Op::Score score_product;
        auto scores = score_product.template get_destination_cooperative_tensor<Left, Keys, float>();
        clear(scores);
#if WEIGHTS_IN_THREADGROUP
        hold_out<ThreadgroupTile>(task, scores, query...);
#else
        // What type P has is the operation's business.
        typename Op::Value product;
#if WEIGHTS_NARROW
        auto narrow = score_product.template get_destination_cooperative_tensor<Left, Keys, scalar>();
        clear(narrow);
        auto weights = product.template get_left_input_cooperative_tensor<weight, scalar, float>(narrow);
#else
        auto weights = product.template get_left_input_cooperative_tensor<weight, scalar, float>(scores);
#endif
        start_with(weights, task, scores, query...);
#endif
    }
};

// Declares and loads the left operands that hold Q, and begins.
template <typename Op, typename... Query>
void attend(thread const Task& task, thread Query&... query) {
    if constexpr (QUERY_IN_REGISTERS && sizeof...(Query) < Op::HEAD_STEPS) {
        typename Op::Score product;
        auto next = product.template get_left_input_cooperative_tensor<scalar, scalar, float>();
        Op::load_query(next, sizeof...(Query), task);
        attend<Op>(task, query..., next);
    } else {
        Attention<Op, Query...>::start(task, query...);
    }
}

[[max_total_threads_per_threadgroup(32 * SIMDGROUPS)]]
kernel void attention_tensorops(
    device const scalar* q [[buffer(0)]],
    device const scalar* k [[buffer(1)]],
    device const scalar* v [[buffer(2)]],
    device scalar* out [[buffer(3)]],
#if LSE
    device uint* lse [[buffer(4)]],
#endif
#if PACKED
    device const int* query_offsets [[buffer(5)]],
    device const int* key_offsets [[buffer(6)]],
#endif
#if ALIBI
    device const float* alibi_slopes [[buffer(7)]],
#endif
#if BIAS
    device const bias_scalar* bias [[buffer(8)]],
#endif
#if SINKS
    device const float* sinks [[buffer(9)]],
#endif
    constant Sizes& sizes [[buffer(10)]],
    constant Factors& factors [[buffer(11)]],
    uint3 threadgroup_position [[threadgroup_position_in_grid]],
    uint3 threadgroup_count [[threadgroups_per_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]])
{
    threadgroup float row_values[SIMDGROUPS * ROWS];
#if QUERY_IN_THREADGROUP
    threadgroup scalar parked_queries[SIMDGROUPS * ROWS * HEAD_PITCH];
#endif
#if WEIGHTS_IN_THREADGROUP
    threadgroup scalar parked_weights[SIMDGROUPS * ROWS * KEYS];
#endif
#if STAGED
    // Of scalar4, so that they are aligned to it.
    threadgroup scalar4 staged_keys[KEYS * HEAD_PITCH / 4];
    threadgroup scalar4 staged_values[KEYS * VALUE_PITCH / 4];
#endif
#if PACKED
    const Place place = place_of(threadgroup_position, sizes, query_offsets, key_offsets);
#else
    const Place place = place_of(threadgroup_position, sizes);
#endif
#if WINDOW_RIGHT
    // Later queries see more keys: the longest work first leaves no long tail at the end of the grid.
    const int row_group = int(threadgroup_count.x - 1 - threadgroup_position.x);
#else
    const int row_group = int(threadgroup_position.x);
#endif
    const int simdgroup = int(simdgroup_index);
    const int group_first = row_group * (SIMDGROUPS * ROWS);
    if (group_first >= place.query_len) {
        return;
    }

    Task task;
    task.sizes = &sizes;
    task.factors = &factors;
    task.place = place;
    task.simdgroup = simdgroup;
    task.lane = int(lane_index);
    task.first_query = group_first + simdgroup * ROWS;
    task.last_query = min(task.first_query + ROWS, place.query_len) - 1;
    task.sign = factors.query;
    task.columns = min(VALUE_CHUNK, VALUE_DIM - place.value_chunk * VALUE_CHUNK);
    const int first_column = place.value_chunk * VALUE_CHUNK;
    task.queries = q + row_offset(sizes.q, place.batch, place.head, place.query_start);
    task.keys = k + row_offset(sizes.k, place.batch, place.key_head, place.key_start);
    task.values = v + row_offset(sizes.v, place.batch, place.key_head, place.key_start) + first_column;
    task.results = out + row_offset(sizes.out, place.batch, place.head, place.query_start) + first_column;
#if LSE
    task.lse = lse + place.batch * sizes.lse_batch + place.head * sizes.lse_head + place.query_start;
#endif
#if BIAS
    task.bias = bias + place.batch * sizes.bias_batch + place.head * sizes.bias_head;
#endif
#if ALIBI
    task.slope = alibi_slopes[place.batch * sizes.alibi_batch + place.head * sizes.alibi_head] * LOG2_E;
#endif
#if SINKS
    task.sink = sinks[place.head * sizes.sinks_head];
#endif
    task.row_values = row_values + simdgroup * ROWS;
#if WEIGHTS_IN_THREADGROUP
    task.parked_weights = parked_weights + simdgroup * (ROWS * KEYS);
#endif
#if STAGED
    task.staged_keys = (threadgroup scalar*)staged_keys;
    task.staged_values = (threadgroup scalar*)staged_values;
#endif

    // Both ends of a row's visible keys never decrease with the row. A simdgroup behind the last query sees nothing.
    const bool has_rows = task.first_query < place.query_len;
    const KeyRange first_visible = visible_keys(min(task.first_query, task.last_query), place, sizes);
    const KeyRange last_visible = visible_keys(task.last_query, place, sizes);
    task.seen.start = first_visible.start;
    task.seen.end = has_rows ? last_visible.end : 0;
    task.full.start = last_visible.start;
    task.full.end = first_visible.end;
#if STAGED || KEEP_STEP
    const int group_last = min(group_first + SIMDGROUPS * ROWS, place.query_len) - 1;
    task.loop.start = visible_keys(group_first, place, sizes).start;
    task.loop.end = visible_keys(group_last, place, sizes).end;
#else
    if (!has_rows) {
        return;
    }
    task.loop = task.seen;
#endif

#if QUERY_IN_THREADGROUP
    task.parked_queries = parked_queries + simdgroup * (ROWS * HEAD_PITCH);
    for (int row = 0; row < ROWS; ++row) {
        for (int column = task.lane; column < HEAD_WIDTH; column += 32) {
            task.parked_queries[row * HEAD_PITCH + column] = query_element(task, row, column);
        }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);  // Q has been written
#endif

#if OPERANDS_IN_REGISTERS
    attend<Products<HEAD_STEP, VALUE_STEP, true>>(task);
#else
#if PACKED && !STAGED
    if (place.key_len < KEYS) {
        attend<Products<16, 16, true>>(task);
        return;
    }
#endif
    attend<Products<HEAD_STEP, VALUE_STEP, false>>(task);
#endif
}
