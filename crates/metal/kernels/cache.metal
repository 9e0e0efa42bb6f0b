// Where the keys of a sequence lie in a cache of slots or pages; Cache::row of the core crate has the rule.
//
// The buffers that say so were never looked at: a length, slot, page or position beyond the cache is brought back into it,
// so that wrong contents give wrong numbers and no access outside of the tensors.

// The part of an int64 list that describes a cache, in the order of cache.rs.
struct CacheSizes {
    long blocks;        // slots or pages
    long block_len;     // rows of each
    long capacity;      // positions of a sequence
    long new_len;       // keys that the call appends
    long filled;        // positions before that, where they are not in a buffer
    long filled_from;   // 0: `filled`; 1: one number for each sequence; 2: offsets, one more than sequences
    long indexed;       // 1: a buffer says which slot a sequence has
    long left_padded;   // 1: a buffer says at which position key 0 lies
    long table_stride;  // of the table of pages, from one sequence to the next
};

// Positions that are filled before the call.
int filled_positions(int sequence, device const int* lengths, constant CacheSizes& cache) {
    int filled = int(cache.filled);
    if (cache.filled_from == 1) {
        filled = lengths[sequence];
    } else if (cache.filled_from == 2) {
        // Offsets that decrease may be as far apart as two numbers can.
        filled = int(clamp(long(lengths[sequence + 1]) - lengths[sequence], 0L, cache.capacity));
    }
    return clamp(filled, 0, max(int(cache.capacity - cache.new_len), 0));
}

// The slot of a sequence, as the buffer has it.
int slot_of(int sequence, device const int* slots, constant CacheSizes& cache) {
    return cache.indexed != 0 ? slots[sequence] : sequence;
}

bool is_block(int block, constant CacheSizes& cache) {
    return block >= 0 && block < int(cache.blocks);
}

int nearest_block(int block, constant CacheSizes& cache) {
    return clamp(block, 0, int(cache.blocks) - 1);
}

// The page of a position of a sequence, as the table has it.
int page_of(int sequence, int position, device const int* pages, constant CacheSizes& cache) {
    return pages[sequence * cache.table_stride + position / int(cache.block_len)];
}
