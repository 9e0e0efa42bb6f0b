use proptest::prelude::*;

use super::*;
use crate::{Dtype, Options, Problem};

const DIMS: [i64; 2] = [2, 8];

fn contiguous(shape: &[i64]) -> Vec<i64> {
    (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect()
}

fn problem(batch: i64, cache_shape: [i64; 2], options: &CacheOptions<'_>) -> Result<Problem> {
    let q_shape = [batch, 3, 4, 8];
    let cache_shape = [cache_shape[0], cache_shape[1], DIMS[0], DIMS[1]];
    let (q_strides, cache_strides) = (contiguous(&q_shape), contiguous(&cache_shape));
    let q = TensorMeta { dtype: Dtype::F32, shape: &q_shape, strides: &q_strides };
    let cache = TensorMeta { dtype: Dtype::F32, shape: &cache_shape, strides: &cache_strides };
    Problem::cached(q, cache, cache, options, &Options { window: (-1, -1), ..Options::default() })
}

fn paged(new_len: usize) -> CacheOptions<'static> {
    CacheOptions {
        lengths: Some(LengthsArgument::Each(&[2])),
        block_table: Some((&[2, 3], &[3, 1])),
        new_len,
        ..CacheOptions::default()
    }
}

fn slots(new_len: usize) -> CacheOptions<'static> {
    CacheOptions {
        lengths: Some(LengthsArgument::Each(&[2])),
        batch_index: Some(&[2]),
        left_pad: Some(&[2]),
        new_len,
        ..CacheOptions::default()
    }
}

#[track_caller]
fn expect_error<T: std::fmt::Debug>(result: Result<T>, text: &str) {
    assert_eq!(result.unwrap_err().to_string(), text);
}

#[test]
fn keys_lie_where_the_buffers_say() {
    let problem = problem(2, [5, 16], &paged(4)).unwrap();
    let cache = problem.cache.unwrap();
    let buffers = CacheBuffers { lengths: &[30, 0], pages: &[4, 0, 2, 1, -7, 99], ..CacheBuffers::default() };
    problem.check_cache(&buffers).unwrap();
    assert_eq!((cache.capacity(), cache.blocks(), cache.block_len()), (48, 5, 16));
    assert_eq!((cache.filled(&buffers, 0), cache.key_len(&buffers, 0), cache.key_len(&buffers, 1)), (30, 34, 4));
    assert_eq!(cache.row(&buffers, 0, 15), CacheRow { block: 4, row: 15 });
    assert_eq!(cache.row(&buffers, 0, 16), CacheRow { block: 0, row: 0 });
    assert_eq!(cache.row(&buffers, 0, 33), CacheRow { block: 2, row: 1 });
    assert_eq!(cache.row(&buffers, 1, 3), CacheRow { block: 1, row: 3 });
    assert_eq!(cache.run(&buffers, 0, 17), 15);
}

#[test]
fn left_padding_moves_keys_and_shortens_sequences() {
    let problem = problem(2, [4, 20], &slots(1)).unwrap();
    let cache = problem.cache.unwrap();
    let buffers = CacheBuffers { lengths: &[9, 19], slots: &[3, 1], left_pad: &[4, 19], ..CacheBuffers::default() };
    problem.check_cache(&buffers).unwrap();
    assert_eq!((cache.key_len(&buffers, 0), cache.key_len(&buffers, 1)), (6, 1));
    assert_eq!(cache.row(&buffers, 0, 0), CacheRow { block: 3, row: 4 });
    // The new key goes behind what is filled.
    assert_eq!(cache.row(&buffers, 0, 5), CacheRow { block: 3, row: 9 });
    assert_eq!(cache.run(&buffers, 0, 2), 14);
}

#[test]
fn a_cache_without_lengths_is_full() {
    let whole = problem(3, [3, 20], &CacheOptions::default()).unwrap();
    assert_eq!(whole.cache.unwrap().key_len(&CacheBuffers::default(), 2), 20);
    assert_eq!(whole.lengths, Lengths::Dense { batch: 3, query_len: 3, key_len: 20 });
    let part = CacheOptions { lengths: Some(LengthsArgument::Same(7)), new_len: 2, ..CacheOptions::default() };
    assert_eq!(problem(3, [3, 20], &part).unwrap().lengths.max_key_len(), 9);
}

#[test]
fn wrong_contents_are_named() {
    let valid = CacheBuffers { lengths: &[30, 16], pages: &[4, 0, 2, 1, 3, 99], ..CacheBuffers::default() };
    let table = [
        (
            CacheBuffers { lengths: &[30, -1], ..valid },
            "cache_seqlens is -1 at index 1; allowed: 0 to 44: 48 positions in the cache, less 4 new keys",
        ),
        (
            CacheBuffers { lengths: &[45, 16], ..valid },
            "cache_seqlens is 45 at index 0; allowed: 0 to 44: 48 positions in the cache, less 4 new keys",
        ),
        (
            CacheBuffers { pages: &[4, 5, 2, 1, 3, 99], ..valid },
            "block_table is 5 at index (0, 1); allowed: 0 to 4, the pages of the cache",
        ),
        (
            CacheBuffers { pages: &[4, 0, 2, 1, -1, 99], ..valid },
            "block_table is -1 at index (1, 1); allowed: 0 to 4, the pages of the cache",
        ),
        (
            CacheBuffers { pages: &[4, 0, 2, 1, 2, 99], ..valid },
            "block_table is 2 at index (0, 2) and at index (1, 1); allowed: pages that get new keys stand in it once",
        ),
        (
            CacheBuffers { pages: &[4, 0, 2, 2, 3, 99], ..valid },
            "block_table is 2 at index (0, 2) and at index (1, 0); allowed: pages that get new keys stand in it once",
        ),
        (
            CacheBuffers { pages: &[0, 0, 2, 1, 3, 99], ..valid },
            "block_table is 0 at index (0, 1) and at index (0, 0); allowed: pages that get new keys stand in it once",
        ),
    ];
    let problem_of_pages = problem(2, [5, 16], &paged(4)).unwrap();
    problem_of_pages.check_cache(&valid).unwrap();
    for (buffers, text) in table {
        expect_error(problem_of_pages.check_cache(&buffers), text);
    }
    // Sequences may share pages that nobody writes.
    let shared = CacheBuffers { pages: &[4, 0, 2, 4, 3, 99], ..valid };
    problem_of_pages.check_cache(&shared).unwrap();

    let valid = CacheBuffers { lengths: &[9, 19], slots: &[3, 1], left_pad: &[4, 19], ..CacheBuffers::default() };
    let table = [
        (
            CacheBuffers { slots: &[3, 4], ..valid },
            "cache_batch_idx is 4 at index 1; allowed: 0 to 3, the slots of the cache",
        ),
        (
            CacheBuffers { slots: &[-1, 1], ..valid },
            "cache_batch_idx is -1 at index 0; allowed: 0 to 3, the slots of the cache",
        ),
        (
            CacheBuffers { slots: &[1, 1], ..valid },
            "cache_batch_idx is 1 at index 0 and at index 1; allowed: a slot of its own for each sequence that gets new keys",
        ),
        (
            CacheBuffers { left_pad: &[10, 0], ..valid },
            "cache_leftpad is 10 at index 0; allowed: 0 to 9, the filled length of the sequence",
        ),
        (
            CacheBuffers { left_pad: &[0, -2], ..valid },
            "cache_leftpad is -2 at index 1; allowed: 0 to 19, the filled length of the sequence",
        ),
    ];
    let problem_of_slots = problem(2, [4, 20], &slots(1)).unwrap();
    problem_of_slots.check_cache(&valid).unwrap();
    for (buffers, text) in table {
        expect_error(problem_of_slots.check_cache(&buffers), text);
    }
    // Two sequences may read one slot.
    problem(2, [4, 20], &slots(0)).unwrap().check_cache(&CacheBuffers { slots: &[1, 1], ..valid }).unwrap();
}

#[test]
fn wrong_shapes_are_named() {
    let new_keys = |new_len, options: CacheOptions<'static>| CacheOptions { new_len, ..options };
    let none = CacheOptions::default();
    for (cache_shape, options, text) in [
        (
            [3, 20],
            none,
            "k_cache has shape (3, 20, 2, 8); allowed: batch = 2, as in q, or cache_batch_idx to say which is whose",
        ),
        (
            [2, 20],
            new_keys(1, none),
            "cache_seqlens is None; allowed: the filled length of each sequence, behind which k and v go",
        ),
        (
            [2, 20],
            CacheOptions { lengths: Some(LengthsArgument::Each(&[3])), ..none },
            "cache_seqlens has shape (3); allowed: (2): one for each sequence",
        ),
        (
            [2, 20],
            CacheOptions { lengths: Some(LengthsArgument::Same(21)), ..none },
            "cache_seqlens is 21; allowed: 0 to 20, the positions that a sequence has in the cache",
        ),
        (
            [2, 20],
            new_keys(1, CacheOptions { lengths: Some(LengthsArgument::Same(20)), ..none }),
            "cache_seqlens is 20; allowed: 0 to 19: 20 positions in the cache, less 1 new keys",
        ),
        (
            [2, 20],
            CacheOptions { left_pad: Some(&[2, 1]), ..none },
            "cache_leftpad has shape (2, 1); allowed: (2): one for each sequence",
        ),
        (
            [2, 20],
            CacheOptions { batch_index: Some(&[1]), ..none },
            "cache_batch_idx has shape (1); allowed: (2): one for each sequence",
        ),
        (
            [5, 20],
            paged(0),
            "k_cache has shape (5, 20, 2, 8); allowed: pages of a multiple of 16 keys: (pages, page_size, heads, head_dim)",
        ),
        (
            [5, 16],
            CacheOptions { block_table: Some((&[3, 3], &[3, 1])), ..none },
            "block_table has shape (3, 3); allowed: (2, max_pages): the pages of each sequence",
        ),
        (
            [5, 16],
            CacheOptions { batch_index: Some(&[2]), ..paged(0) },
            "cache_batch_idx: together with block_table is not supported; select the rows of block_table instead",
        ),
        (
            [5, 16],
            CacheOptions { left_pad: Some(&[2]), ..paged(0) },
            "cache_leftpad: together with block_table is not supported; drop padded pages from block_table, or pad on the right",
        ),
    ] {
        expect_error(problem(2, cache_shape, &options), text);
    }
}

proptest! {
    /// No two keys of a checked cache that gets new keys share a row with one of the new ones.
    #[test]
    fn new_keys_have_rows_of_their_own(
        mut pages in Just(vec![0, 1, 2, 3, 4, 5]).prop_shuffle(),
        changed in (0usize..6, -1i32..7),
        lengths in prop::collection::vec(0i32..42, 2),
        new_len in 1usize..8,
    ) {
        pages[changed.0] = changed.1;
        let problem = problem(2, [6, 16], &paged(new_len)).unwrap();
        let cache = problem.cache.unwrap();
        let buffers = CacheBuffers { lengths: &lengths, pages: &pages, ..CacheBuffers::default() };
        prop_assume!(problem.check_cache(&buffers).is_ok());
        let mut owners = std::collections::HashMap::new();
        for sequence in 0..2 {
            let key_len = cache.key_len(&buffers, sequence);
            for key in 0..key_len {
                let new = key >= key_len - new_len;
                let row = cache.row(&buffers, sequence, key);
                prop_assert!(row.block < 6 && row.row < 16);
                let other = owners.insert(row, new);
                prop_assert!(other != Some(true) && !(new && other.is_some()));
            }
        }
    }
}
