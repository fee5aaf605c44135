// y = a W' for up to 8 rows of `a`: bound by reading W once.
//
// A warp takes 16 rows of W and one stage of 256 inputs after the other; the warps of a block share the rows and divide
// the stages (split-K), and add up what they have at the end of their rows. Blocks stay and go on to their next rows:
// the copies of those are under way before the last ones are done. Every warp has its own ring of stages in shared
// memory, so nothing waits for another warp while it reads.
//
// The products are matrix products of the tensor cores with W as the left factor: 16 rows of W, 8 columns for the rows
// of `a`. Codes minus zero point are exact in 16 bits, the sums are in float32, and a block's scale multiplies its sum:
// nothing but the order of additions differs from the reference.
//
// WHOLE: K consists of whole stages and the rows of `a` are aligned, so that nothing needs to be checked.
#pragma once

namespace gemv {

const int ROWS = AWQ_GEMV_ROWS, TOKENS = AWQ_GEMV_TOKENS;  // of a tile
const int STAGE = AWQ_GEMV_STAGE;                          // inputs
const int STAGES = AWQ_GEMV_STAGES;                        // in a warp's ring
const int CHUNKS = STAGE / 32;                             // of 16 bytes of codes in a row of a stage
const int PITCH = AWQ_GEMV_PITCH;  // floats from one token of the partial sums to the next: no bank twice in a store

// A stage in shared memory: codes, then for each row the 4-byte words that hold its scales and its zero points. Where
// rows do not start at whole words, one more word holds the rest.
template <int SHIFT_, bool ZERO_POINTS_, bool WHOLE_>
struct Layout {
    static const int SHIFT = SHIFT_;
    static const bool ZERO_POINTS = ZERO_POINTS_, WHOLE = WHOLE_;
    static const int WORDS = SHIFT == 5 ? 1 : SHIFT == 6 ? 2 : 4;  // of codes that a thread takes of a block, at most
    static const int SCALES = (STAGE >> SHIFT) / 2;                // words
    static const int SCALE_WORDS = SCALES + !WHOLE, ZERO_POINT_WORDS = 2 - WHOLE;
    static const int SCALES_AT = ROWS * STAGE / 2;
    static const int ZERO_POINTS_AT = SCALES_AT + ROWS * SCALE_WORDS * 4;
    static const int BYTES = AWQ_GEMV_STAGE_BYTES(SHIFT, ZERO_POINTS);
    static_assert(ZERO_POINTS_AT + ROWS * ZERO_POINT_WORDS * 4 * ZERO_POINTS <= BYTES, "params.h tells launch.c");
};

// Chunks of a row trade places by the row, so that eight rows' reads of one chunk meet no bank twice: the bits of the
// row number, in reverse, also part the rows that read 8 and 16 bytes at once.
DEVICE int place(int row, int chunk) { return chunk ^ ((row & 1) << 2 | (row & 2) | (row & 4) >> 2); }

// The last tile ends with the last row, even if others hold its first rows too: both write the same there.
DEVICE int first_row_of(const awq_params &p, int tile) { return min(tile * ROWS, p.N - ROWS); }

// The stages of a warp, in order: tile by tile of the block, and of each the stages that are this warp's. What this lane
// copies of one lies so many bytes behind what it copied of the one before.
template <class At>
struct Fetcher {
    const awq_params &p;
    const int lane, warp, warps, tiles, stages;
    int tile, stage;
    // small: scales in the lower lanes, zero points in the upper ones. Of the first row and stage; of a row; of now.
    const bool scales;
    const u8 *first_codes, *first_small;
    const u32 codes_bytes, small_bytes;
    const u8 *codes, *small;

    DEVICE Fetcher(const awq_params &p)
        : p(p),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32),
          warps(blockDim.x / 32),
          tiles((p.N + ROWS - 1) / ROWS),
          stages((p.padded_K + STAGE - 1) / STAGE),
          tile(blockIdx.x),
          stage(warp),
          scales(!At::ZERO_POINTS || lane < ROWS),
          codes_bytes(p.padded_K / 2),
          small_bytes(scales ? 2 * p.G : p.zero_point_stride) {
        const int block = warp * (STAGE >> At::SHIFT);
        first_codes =
            p.codes + static_cast<u64>(lane / CHUNKS) * codes_bytes + warp * (STAGE / 2) + 16 * (lane % CHUNKS);
        first_small = scales ? scales_of(p, lane % ROWS, block) : zero_points_of(p, lane % ROWS, block);
        enter();
    }
    DEVICE void enter() {
        const u64 row = static_cast<u32>(first_row_of(p, tile));
        codes = first_codes + row * codes_bytes;
        small = first_small + row * small_bytes;
    }
    DEVICE void next() {
        stage += warps;
        codes += warps * (STAGE / 2);
        small += warps * (scales ? (STAGE >> At::SHIFT) * 2 : (STAGE >> At::SHIFT) / 2);
        if (stage < stages) return;
        stage = warp;
        tile += gridDim.x;
        enter();
    }
    DEVICE void fetch(u8 *to) {
        if (tile >= tiles || stage >= stages) return;
        fetch_codes(to);
        fetch_scales(to + At::SCALES_AT, to + At::ZERO_POINTS_AT);
        next();
    }
    DEVICE void fetch_codes(u8 *to) const {
        const int row = lane / CHUNKS, chunk = lane % CHUNKS, ROWS_AT_ONCE = 32 / CHUNKS;
        const bool inside = At::WHOLE || stage * STAGE + 32 * chunk < p.padded_K;
        const u64 row_bytes = p.padded_K / 2;
#pragma unroll
        for (int i = 0; i < ROWS; i += ROWS_AT_ONCE)
            copy_16(to + (row + i) * (STAGE / 2) + 16 * place(row + i, chunk), codes + i * row_bytes, inside ? 16 : 0);
    }
    DEVICE void fetch_scales(u8 *scales, u8 *zero_points) const {
        if constexpr (At::WHOLE) {
            if (lane < ROWS) copy_words<At::SCALES>(scales + lane * At::SCALES * 4, small);
            else if (At::ZERO_POINTS) copy_word(zero_points + (lane - ROWS) * 4, small, 1, 0);
            return;
        }
        const int block = stage * (STAGE >> At::SHIFT), blocks = min(STAGE >> At::SHIFT, p.G - block);
        for (int i = lane; i < ROWS * At::SCALE_WORDS; i += 32)
            copy_word(scales + 4 * i, scales_of(p, first_row_of(p, tile) + i / At::SCALE_WORDS, block), 2 * blocks,
                      i % At::SCALE_WORDS);
        if (At::ZERO_POINTS)
            copy_word(zero_points + 4 * lane, zero_points_of(p, first_row_of(p, tile) + lane / 2, block),
                      (blocks + 1) / 2, lane % 2);
    }
};

// The scales and the zero points of one row in a stage.
template <class T, class At>
struct Blocks {
    u32 scales[At::SCALES], zero_points[2];  // a byte each: of the blocks with even numbers, of the others

    DEVICE Blocks(const awq_params &p, const u8 *stage, int first_row, int row, int block) {
        const u32 *words = reinterpret_cast<const u32 *>(stage + At::SCALES_AT) + row * At::SCALE_WORDS;
        const u32 shift = !At::WHOLE && reinterpret_cast<u64>(scales_of(p, first_row + row, block)) & 2 ? 16 : 0;
#pragma unroll
        for (int i = 0; i < At::SCALES; i++) scales[i] = At::WHOLE ? words[i] : right(words[i], words[i + 1], shift);
        if (!At::ZERO_POINTS) return;
        words = reinterpret_cast<const u32 *>(stage + At::ZERO_POINTS_AT) + row * At::ZERO_POINT_WORDS;
        const u32 before = 8 * (reinterpret_cast<u64>(zero_points_of(p, first_row + row, block)) & 3);
        const u32 packed = right(words[0], At::WHOLE ? 0 : words[At::ZERO_POINT_WORDS - 1], before);
        zero_points[0] = packed & 0x0f0f0f0fu;
        zero_points[1] = packed >> 4 & 0x0f0f0f0fu;
    }
    DEVICE float scale(int block) const { return T::wide(static_cast<u16>(scales[block / 2] >> 16 * (block % 2))); }
    DEVICE typename Codes<T>::Offset offset(int block) const {
        return At::ZERO_POINTS ? Codes<T>::offset(zero_points[block % 2], block / 2) : Codes<T>::offset(8, 0);
    }
};

// The activations of a thread for one stage, in the order in which `multiply` meets them. Of the rows that a tile has
// and `a` has not, any number will do.
template <class At>
DEVICE void load(const awq_params &p, Words4 (&x)[CHUNKS], int first_k, int lane) {
    const u32 m = min(lane / 4, p.M - 1), k = first_k + 8 * At::WORDS * (lane % 4);
    const u16 *from = p.a + (static_cast<u64>(m) * static_cast<u32>(p.K) + k);
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        const int further = 32 * (i / At::WORDS * At::WORDS) + 8 * (i % At::WORDS);
        x[i] = At::WHOLE ? load_16(from + further) : activations(p, m, k + further);
    }
}

// The products of one stage, added to `sums`. A thread t of four takes WORDS neighbouring words of the WORDS chunks of
// a group: those lie in one block, so that the whole matrix product does.
template <class T, class At>
DEVICE void multiply(const awq_params &p, float (&sums)[4], const u8 *stage, const Words4 (&x)[CHUNKS], int first_row,
                     int first_k, int lane) {
    const int WORDS = At::WORDS, g = lane / 4, t = lane % 4;
    const Blocks<T, At> upper(p, stage, first_row, g, first_k >> At::SHIFT);
    const Blocks<T, At> lower(p, stage, first_row, g + 8, first_k >> At::SHIFT);
#pragma unroll
    for (int group = 0; group < CHUNKS / WORDS; group++) {
        if (!At::WHOLE && first_k + group * WORDS * 32 >= p.padded_K) break;
        const int block = group * WORDS * 32 >> At::SHIFT, chunk = group * WORDS + t * WORDS / 4;
        const u8 *row = stage + g * (STAGE / 2) + 16 * place(g, chunk) + 4 * (t * WORDS % 4);
        const Pack<WORDS> above = *reinterpret_cast<const Pack<WORDS> *>(row);
        const Pack<WORDS> below = *reinterpret_cast<const Pack<WORDS> *>(row + 8 * (STAGE / 2));
        float exact[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            u32 w[2][4], b[4];
            Codes<T>::unpack(w[0], above.word[i], upper.offset(block));
            Codes<T>::unpack(w[1], below.word[i], lower.offset(block));
            interleave(b, x[group * WORDS + i]);
#pragma unroll
            for (int half = 0; half < 4; half += 2) {
                const u32 a[4] = {w[0][half], w[1][half], w[0][half + 1], w[1][half + 1]};
                T::multiply_tiles(exact, a, b[half], b[half + 1]);
            }
        }
        sums[0] += upper.scale(block) * exact[0];
        sums[1] += upper.scale(block) * exact[1];
        sums[2] += lower.scale(block) * exact[2];
        sums[3] += lower.scale(block) * exact[3];
    }
}

// The sums of all warps, to y.
template <class T>
DEVICE void finish(const awq_params &p, float *shared, const float (&sums)[4], int first_row) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4, t = lane % 4;
    float *mine = shared + warp * TOKENS * PITCH;
    mine[2 * t * PITCH + g] = sums[0];
    mine[(2 * t + 1) * PITCH + g] = sums[1];
    mine[2 * t * PITCH + g + 8] = sums[2];
    mine[(2 * t + 1) * PITCH + g + 8] = sums[3];
    block_barrier();
    for (int i = threadIdx.x; i < ROWS * p.M; i += blockDim.x) {
        const int n = first_row + i % ROWS, m = i / ROWS;
        float sum = p.bias ? T::wide(p.bias[n]) : 0;
        for (int w = 0; w < warps; w++) sum += shared[(w * TOKENS + m) * PITCH + i % ROWS];
        p.y[static_cast<u64>(m) * p.N + n] = T::narrow(sum);
    }
}

template <class T, class At>
DEVICE void run(const awq_params &p) {
    Fetcher<At> fetcher(p);
    const int lane = fetcher.lane, warp = fetcher.warp, warps = fetcher.warps, stages = fetcher.stages;
    u8 *ring = shared_memory() + warp * STAGES * At::BYTES;
    float *partial = reinterpret_cast<float *>(shared_memory() + warps * STAGES * At::BYTES);
    u32 fetched = 0, used = 0, parity = 0;
    auto fetch_next = [&]() {
        fetcher.fetch(ring + fetched * At::BYTES);
        fetched = (fetched + 1) % STAGES;
        close_group_of_copies();
    };
    for (int i = 0; i < STAGES - 1; i++) fetch_next();

    Words4 x[CHUNKS];  // of the stage that comes next: under way while the one before is multiplied
    if (warp < stages) load<At>(p, x, warp * STAGE, lane);
    for (int tile = blockIdx.x; tile < fetcher.tiles; tile += gridDim.x) {
        const int first_row = first_row_of(p, tile);
        float sums[4] = {0, 0, 0, 0};
        for (int stage = warp; stage < stages; stage += warps) {
            wait_for_copies<STAGES - 2>();
            warp_barrier();  // all lanes' copies are there, and all have read the stage that is overwritten next
            fetch_next();
            multiply<T, At>(p, sums, ring + used * At::BYTES, x, first_row, stage * STAGE, lane);
            load<At>(p, x, (stage + warps < stages ? stage + warps : warp) * STAGE, lane);
            used = (used + 1) % STAGES;
        }
        finish<T>(p, partial + parity * warps * TOKENS * PITCH, sums, first_row);
        parity ^= 1;  // who is late may still read the sums of the tile before
    }
}

}  // namespace gemv
