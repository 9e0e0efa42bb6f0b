// The elements of S and O, whose rows nobody knows beforehand: values of a row, scores, weights.

template <typename Tensor>
void clear(thread Tensor& tensor) {
    UNROLL
    for (ushort i = 0; i < tensor.get_capacity(); ++i) {
        if (tensor.is_valid_element(i)) {
            tensor[i] = 0.0f;
        }
    }
}

// The elements of S that belong to the second of the rows that a lane has a part of.
template <typename Scores, typename Rows>
ulong second_row_elements(thread Scores& scores, thread Rows& rows) {
    ulong elements = 0;
    UNROLL
    for (ushort i = 0; i < scores.get_capacity(); ++i) {
        if (scores.is_valid_element(i) && rows.map_iterator(scores.begin() + i) - rows.begin() == 1) {
            elements |= 1ul << (i & 63);
        }
    }
    return elements;
}

// What `rows` holds for the row of element i of S. The condition is known when the pipeline is built; it holds on the M5.
template <typename Scores, typename Rows>
float of_row(thread Rows& rows, thread Scores& scores, ulong second, ushort i) {
    if (rows.get_capacity() == 2 && scores.get_capacity() <= 64) {
        return (second >> i & 1) != 0 ? rows[1] : rows[0];
    }
    return *rows.map_iterator(scores.begin() + i);
}

// Puts the value of each row where O finds it, whose rows may lie in other lanes than those of S.
template <typename Scores, typename Rows>
void share_rows(thread Rows& rows, thread Scores& scores, ulong second, threadgroup float* row_values) {
    simdgroup_barrier(mem_flags::mem_threadgroup);  // the values before have been read
    UNROLL
    for (ushort i = 0; i < scores.get_capacity(); ++i) {
        if (scores.is_valid_element(i)) {
            const auto position = scores.get_multidimensional_index(i);
            if (position[0] == 0) {
                row_values[position[1]] = of_row(rows, scores, second, i);
            }
        }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);  // these have been written
}

template <typename Out>
void multiply_rows(thread Out& out, threadgroup const float* row_values) {
    UNROLL
    for (ushort i = 0; i < out.get_capacity(); ++i) {
        if (out.is_valid_element(i)) {
            out[i] *= row_values[out.get_multidimensional_index(i)[1]];
        }
    }
}

template <typename Out>
void store_rows(thread Out& out, int first_column, thread const Task& task) {
    UNROLL
    for (ushort i = 0; i < out.get_capacity(); ++i) {
        if (out.is_valid_element(i)) {
            const auto position = out.get_multidimensional_index(i);
            const int query = task.first_query + position[1];
            const int column = first_column + position[0];
            if (query <= task.last_query && column < task.columns) {
                task.results[query * task.sizes->out.row + column] = scalar(out[i]);
            }
        }
    }
}

// Turns products into scores in units of log2, and hides those that their row does not see.
template <typename Scores>
void finish_scores(thread Scores& scores, thread const Task& task, Block block) {
    UNROLL
    for (ushort i = 0; i < scores.get_capacity(); ++i) {
        if (scores.is_valid_element(i)) {
            const auto position = scores.get_multidimensional_index(i);
            const int key = block.first + position[0];
            const int query = min(task.first_query + position[1], task.last_query);
#if SCORE_MODIFIED
            RowModifiers modifiers;
            modifiers.position = query + task.place.diagonal;
#if ALIBI
            modifiers.slope = task.slope;
#endif
#if BIAS
            modifiers.bias = task.bias + query * task.sizes->bias_query;
#endif
            const int existing = min(key, task.place.key_len - 1);
            float score = modified_score(scores[i], existing, modifiers, *task.sizes, *task.factors);
#else
            float score = scores[i] * task.factors->score;
#endif
            if (block.edge) {
                const KeyRange visible = visible_keys(query, task.place, *task.sizes);
                score = key >= max(visible.start, block.counted) && key < visible.end ? score : HIDDEN;
            }
            scores[i] = score;
        }
    }
}

// Under relaxed precision a float operand loses the bits behind the eleventh, which may be cut off: rounded to half before,
// it has no others, and outputs are not biased. They were summed unrounded. A bfloat result does not show the difference.
template <typename Scores>
void round_weights(thread Scores& weights) {
    if constexpr (is_same_v<scalar, half>) {
        UNROLL
        for (ushort i = 0; i < weights.get_capacity(); ++i) {
            if (weights.is_valid_element(i)) {
                weights[i] = float(half(weights[i]));
            }
        }
    }
}

#if DROPOUT
// Weights of dropped keys become 0; they have been summed. Neighbouring elements of a lane often share a group.
template <typename Scores>
void drop(thread Scores& weights, int first, thread const Task& task) {
    int query = -1;
    int group = -1;
    uint4 words = uint4(0u);
    UNROLL
    for (ushort i = 0; i < weights.get_capacity(); ++i) {
        if (weights.is_valid_element(i)) {
            const auto position = weights.get_multidimensional_index(i);
            const int key = first + position[0];
            const int row = task.first_query + position[1];
            if (row != query || key / 8 != group) {
                query = row;
                group = key / 8;
                words = random_words(query, group, task.place, *task.sizes);
            }
            weights[i] = is_kept(word_of(words, key), key, *task.sizes) ? weights[i] : 0.0f;
        }
    }
}
#endif
