// y = a W' for more rows of `a`: a block multiplies a tile of W's rows with a tile of tokens on the tensor cores.
//
// Both factors come through a ring of stages of 64 inputs in shared memory that the whole block shares. W is the left
// factor, as in gemv.cuh, but its codes are multiplied by their scale in 16 bits first: with many tokens that is less
// work than scaling sums, and rounds as a dequantised weight does. Where the tiles are too few for all multiprocessors,
// K is cut (split-K): partial sums go to `partial`, and the kernel `sum_splits` adds them in order.
#pragma once

namespace gemm {

const int STAGE = AWQ_GEMM_STAGE;    // inputs
const int STAGES = AWQ_GEMM_STAGES;  // in the ring
const int CHUNKS = STAGE / 32;       // of 16 bytes of codes in a row of a stage
const int PIECES = STAGE / 8;        // of 16 bytes of activations in a row of a stage

// The tile of a block: WARPS_N by WARPS_M warps, each with TILES_N times 16 rows of W and TILES_M times 8 tokens.
template <int TILES_N_, int TILES_M_, int WARPS_N_, int WARPS_M_>
struct Tile {
    static const int TILES_N = TILES_N_, TILES_M = TILES_M_, WARPS_N = WARPS_N_, WARPS_M = WARPS_M_;
    static const int ROWS = 16 * TILES_N * WARPS_N, TOKENS = 8 * TILES_M * WARPS_M, THREADS = 32 * WARPS_N * WARPS_M;
    static const int SCALE_WORDS = AWQ_GEMM_SCALE_WORDS;
    static const int CODES = TOKENS * STAGE * 2;  // activations lie first
    static const int SCALES = CODES + ROWS * STAGE / 2;
    static const int ZERO_POINTS = SCALES + ROWS * SCALE_WORDS * 4;
    static const int BYTES = AWQ_GEMM_STAGE_BYTES(ROWS, TOKENS);
    static_assert(BYTES == ZERO_POINTS + ROWS * 4, "params.h tells launch.c");
};

// As in gemv.cuh: a row's chunks (and a token's halves) trade places so that a warp's reads meet no bank twice. Rows 8
// apart (tokens 2 apart) have the same places.
DEVICE int place_of_chunk(int row, int chunk) { return chunk ^ (row * CHUNKS / 8 & (CHUNKS - 1)); }
DEVICE int place_of_piece(int token, int piece) { return piece ^ (token & 1) << 2; }

// What a thread copies of every stage: of activations, codes and scales each a few rows, so many rows apart. Copies of
// nothing, zeros, may have any address.
template <class At, bool ZERO_POINTS>
struct Loader {
    static const int TOKENS_APART = At::THREADS / PIECES, ROWS_APART = At::THREADS / CHUNKS;
    static const int SCALE_ROWS_APART = At::THREADS / At::SCALE_WORDS;
    static_assert(TOKENS_APART % 2 == 0 && ROWS_APART % 8 == 0 && At::THREADS >= At::ROWS, "places repeat");
    const awq_params &p;
    const int first_row, first_token;
    const int token, piece, row, chunk;  // what this thread copies first
    const u16 *a;
    const u8 *codes;

    DEVICE Loader(const awq_params &p)
        : p(p),
          first_row(blockIdx.x * At::ROWS),
          first_token(blockIdx.y * At::TOKENS),
          token(threadIdx.x / PIECES),
          piece(threadIdx.x % PIECES),
          row(threadIdx.x / CHUNKS),
          chunk(threadIdx.x % CHUNKS),
          a(p.a + static_cast<u64>(first_token + token) * p.K + 8 * piece),
          codes(p.codes + static_cast<u64>(first_row + row) * (p.padded_K / 2) + 16 * chunk) {}

    DEVICE void fetch_activations(u8 *stage, int first_k) const {
        u8 *to = stage + 16 * (token * PIECES + place_of_piece(token, piece));
        const u64 step = static_cast<u64>(TOKENS_APART) * p.K;
        const bool inside = first_k + 8 * piece < p.K;
#pragma unroll
        for (int i = 0; i < At::TOKENS / TOKENS_APART; i++)
            copy_16(to + i * TOKENS_APART * STAGE * 2, a + first_k + i * step,
                    inside && first_token + token + i * TOKENS_APART < p.M ? 16 : 0);
    }

    DEVICE void fetch_codes(u8 *stage, int first_k) const {
        u8 *to = stage + At::CODES + row * (STAGE / 2) + 16 * place_of_chunk(row, chunk);
        const u64 row_bytes = p.padded_K / 2;
        const bool inside = first_k + 32 * chunk < p.padded_K;
#pragma unroll
        for (int i = 0; i < At::ROWS; i += ROWS_APART)
            copy_16(to + i * (STAGE / 2), codes + first_k / 2 + i * row_bytes,
                    inside && first_row + row + i < p.N ? 16 : 0);
    }

    DEVICE void fetch_scales(u8 *stage, int first_k) const {
        const int block = first_k >> p.block_shift, blocks = p.block_shift == 5 && block + 1 < p.G ? 2 : 1;
        const int scale_row = first_row + threadIdx.x / At::SCALE_WORDS, word = threadIdx.x % At::SCALE_WORDS;
        u8 *to = stage + At::SCALES + 4 * threadIdx.x;
#pragma unroll
        for (int i = 0; i < At::ROWS; i += SCALE_ROWS_APART)
            copy_word(to + i * At::SCALE_WORDS * 4, scales_of(p, min(scale_row + i, p.N - 1), block), 2 * blocks, word);
        if (ZERO_POINTS && threadIdx.x < At::ROWS)  // the blocks of a stage share a byte
            copy_word(stage + At::ZERO_POINTS + 4 * threadIdx.x,
                      zero_points_of(p, min(first_row + static_cast<int>(threadIdx.x), p.N - 1), block), 1, 0);
    }

    DEVICE void fetch(u8 *stage, int first_k) const {
        fetch_activations(stage, first_k);
        fetch_codes(stage, first_k);
        fetch_scales(stage, first_k);
    }
};

// The scales and the zero points of one row of the tile, row n of W. They lie in the words that they were copied with,
// from the byte on at which they start in memory.
template <class T, class At, bool ZERO_POINTS>
struct Blocks {
    u32 scales, zero_points;  // of the stage's blocks, the first in the lowest bits

    DEVICE Blocks(const awq_params &p, const u8 *stage, int n, int row, int first_block) {
        const u32 *words = reinterpret_cast<const u32 *>(stage + At::SCALES) + row * At::SCALE_WORDS;
        const u32 start = reinterpret_cast<u64>(p.scales) / 2 + static_cast<u32>(n) * p.G + first_block;
        scales = right(words[0], words[1], 16 * (start & 1));
        if (!ZERO_POINTS) return;
        const u32 packed = *reinterpret_cast<const u32 *>(stage + At::ZERO_POINTS + row * 4);
        const u32 byte =
            reinterpret_cast<u64>(p.zero_points) + static_cast<u32>(n) * p.zero_point_stride + first_block / 2;
        zero_points = packed >> (8 * (byte & 3) + 4 * (first_block & 1));
    }
    // Twice, as a pair.
    DEVICE u32 scale(int block) const { return select_bytes(scales, 0, block ? 0x3232 : 0x1010); }
    DEVICE typename Codes<T>::Offset offset(int block) const {
        return Codes<T>::offset(ZERO_POINTS ? zero_points >> 4 * block & 15 : 8, 0);
    }
};

// Eight weights as pairs: word t of a chunk of a row.
template <class T, class B>
DEVICE void weights(u32 (&pairs)[4], const u8 *chunk, int t, const B &blocks, int block) {
    Codes<T>::unpack(pairs, reinterpret_cast<const u32 *>(chunk)[t], blocks.offset(block));
    const u32 scale = blocks.scale(block);
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] = T::multiply(pairs[i], scale);
}

template <class T, class At, bool ZERO_POINTS>
DEVICE void multiply(const awq_params &p, float (&sums)[At::TILES_N][At::TILES_M][4], const u8 *stage, int first_row,
                     int first_k) {
    typedef Blocks<T, At, ZERO_POINTS> RowBlocks;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int warp_row = warp % At::WARPS_N * At::TILES_N * 16 + g, first_block = first_k >> p.block_shift;
    const int warp_token = warp / At::WARPS_N * At::TILES_M * 8 + g;
    const Words4 *x = reinterpret_cast<const Words4 *>(stage) + warp_token * PIECES;
    const u8 *codes = stage + At::CODES + warp_row * (STAGE / 2);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        if (first_k + 32 * chunk >= p.padded_K) break;
        const int block = p.block_shift == 5 ? chunk : 0;
        u32 b[At::TILES_M][4];
#pragma unroll
        for (int j = 0; j < At::TILES_M; j++) interleave(b[j], x[8 * j * PIECES + place_of_piece(g, 4 * chunk + t)]);
#pragma unroll
        for (int i = 0; i < At::TILES_N; i++) {
            u32 w[2][4];
#pragma unroll
            for (int low = 0; low < 2; low++) {
                const int row = 16 * i + 8 * low;
                weights<T>(w[low], codes + row * (STAGE / 2) + 16 * place_of_chunk(g, chunk), t,
                           RowBlocks(p, stage, first_row + warp_row + row, warp_row + row, first_block), block);
            }
#pragma unroll
            for (int half = 0; half < 4; half += 2) {
                const u32 a[4] = {w[0][half], w[1][half], w[0][half + 1], w[1][half + 1]};
#pragma unroll
                for (int j = 0; j < At::TILES_M; j++) T::multiply_tiles(sums[i][j], a, b[j][half], b[j][half + 1]);
            }
        }
    }
}

// Of a lane's four sums in a tile, two are of row g and two of row g + 8, of the tokens 2t and 2t + 1.
template <class T, class At>
DEVICE void finish(const awq_params &p, const float (&sums)[At::TILES_N][At::TILES_M][4], int first_row,
                   int first_token) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int token = first_token + warp / At::WARPS_N * At::TILES_M * 8 + 2 * t;
    const bool whole = p.splits == 1;
    const u64 part = static_cast<u64>(blockIdx.z) * p.M;
#pragma unroll
    for (int i = 0; i < 2 * At::TILES_N; i++) {
        const int n = first_row + warp % At::WARPS_N * At::TILES_N * 16 + 8 * i + g;
        if (n >= p.N) continue;
        const float bias = whole && p.bias ? T::wide(p.bias[n]) : 0;
#pragma unroll
        for (int j = 0; j < 2 * At::TILES_M; j++) {
            const int m = token + 8 * (j / 2) + j % 2;
            const float sum = sums[i / 2][j / 2][i % 2 * 2 + j % 2];
            if (m >= p.M) continue;
            if (whole) p.y[static_cast<u64>(m) * p.N + n] = T::narrow(sum + bias);
            else p.partial[(part + m) * p.N + n] = sum;
        }
    }
}

template <class T, class At, bool ZERO_POINTS>
DEVICE void run(const awq_params &p) {
    const Loader<At, ZERO_POINTS> loader(p);
    const int start = blockIdx.z * p.split_K, end = min(p.padded_K, start + p.split_K);
    const int stages = (end - start + STAGE - 1) / STAGE;
    u8 *ring = shared_memory();
    auto fetch = [&](int stage) {
        if (stage < stages) loader.fetch(ring + stage % STAGES * At::BYTES, start + stage * STAGE);
        close_group_of_copies();
    };
    for (int i = 0; i < STAGES - 1; i++) fetch(i);

    float sums[At::TILES_N][At::TILES_M][4] = {};
    for (int stage = 0; stage < stages; stage++) {
        wait_for_copies<STAGES - 2>();
        block_barrier();  // all copies are there, and all have read the stage that is overwritten next
        fetch(stage + STAGES - 1);
        multiply<T, At, ZERO_POINTS>(p, sums, ring + stage % STAGES * At::BYTES, loader.first_row,
                                     start + stage * STAGE);
    }
    finish<T, At>(p, sums, loader.first_row, loader.first_token);
}

}  // namespace gemm
