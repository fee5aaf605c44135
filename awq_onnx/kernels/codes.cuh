// Codes of 4 bits as exact 16-bit floats, without a conversion instruction.
//
// A word holds eight codes of one row. The bits of a code, put under the exponent of a power of two, are a float: in
// float16 0x6400 | q is 1024 + q, in bfloat16 0x4300 | q is 128 + q; the power and the zero point go in one exact
// subtraction. Two codes that lie 16 bits apart become a pair at once, so a word gives the pairs of codes (0, 4),
// (1, 5), (2, 6), (3, 7): activations are put into the same order, see `interleave`.
#pragma once

// unpack: q - zero point for the eight codes of a word. offset: what the zero point of their block makes of that, where
// byte `at` of a word holds it.
template <class T>
struct Codes;

template <>
struct Codes<Half> {
    // -(1024 + z) in both halves, and -(64 + z): codes in the upper half of a byte are read as 1024 + 16 q, over 16
    // is 64 + q.
    struct Offset {
        u32 low, high;
    };
    static DEVICE Offset offset(u32 zero_points, int at) {
        return {select_bytes(zero_points, 0xe4e4e4e4u, 0x4040 + 0x101 * at),
                select_bytes(zero_points << 4, 0xd4d4d4d4u, 0x4040 + 0x101 * at)};
    }
    static DEVICE void unpack(u32 (&pairs)[4], u32 word, Offset offset) {
        const u32 one = 0x3c003c00u, sixteenth = 0x2c002c00u;
        const u32 rest = word >> 8;
        pairs[0] = Half::multiply_add(bits_under<0x000f000fu, 0x64006400u>(word), one, offset.low);
        pairs[1] = Half::multiply_add(bits_under<0x00f000f0u, 0x64006400u>(word), sixteenth, offset.high);
        pairs[2] = Half::multiply_add(bits_under<0x000f000fu, 0x64006400u>(rest), one, offset.low);
        pairs[3] = Half::multiply_add(bits_under<0x00f000f0u, 0x64006400u>(rest), sixteenth, offset.high);
    }
};

template <>
struct Codes<Bfloat> {
    // -(128 + z) in both halves.
    struct Offset {
        u32 low;
    };
    static DEVICE Offset offset(u32 zero_points, int at) {
        return {select_bytes(zero_points, 0xc3c3c3c3u, 0x4040 + 0x101 * at)};
    }
    static DEVICE void unpack(u32 (&pairs)[4], u32 word, Offset offset) {
        const u32 one = 0x3f803f80u;
#pragma unroll
        for (int i = 0; i < 4; i++)
            pairs[i] = Bfloat::multiply_add(bits_under<0x000f000fu, 0x43004300u>(word >> 4 * i), one, offset.low);
    }
};

// Eight 16-bit floats x as the pairs (x0, x4), (x1, x5), (x2, x6), (x3, x7).
DEVICE void interleave(u32 (&pairs)[4], const Words4 &x) {
    pairs[0] = select_bytes(x.word[0], x.word[2], 0x5410);
    pairs[1] = select_bytes(x.word[0], x.word[2], 0x7632);
    pairs[2] = select_bytes(x.word[1], x.word[3], 0x5410);
    pairs[3] = select_bytes(x.word[1], x.word[3], 0x7632);
}

// Eight inputs of row m of `a` from input k on, zeros beyond M and K.
DEVICE Words4 activations(const awq_params &p, int m, int k) {
    Words4 read = {{0, 0, 0, 0}};
    if (m >= p.M || k >= p.K) return read;
    const u16 *from = p.a + static_cast<u64>(m) * p.K + k;
    if (p.aligned) return load_16(from);
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (k + i < p.K) read.word[i / 2] |= static_cast<u32>(from[i]) << 16 * (i % 2);
    return read;
}

DEVICE u32 zero_point_of(const u8 *row, int block) { return row[block / 2] >> 4 * (block % 2) & 15u; }

// Where the scales and the zero points of a row lie, from a block on.
DEVICE const u8 *scales_of(const awq_params &p, int row, int block) {
    return reinterpret_cast<const u8 *>(p.scales + static_cast<u64>(row) * p.G + block);
}

DEVICE const u8 *zero_points_of(const awq_params &p, int row, int block) {
    return p.zero_points + static_cast<u64>(row) * p.zero_point_stride + block / 2;
}

// Copies the `width` bytes at `from`, a multiple of 2 or less than 4, with the 4-byte words that they lie in: the word
// `number` of these, or zeros where there are not so many. What of a word is not of the array is not looked at.
DEVICE void copy_word(u8 *to, const u8 *from, int width, int number) {
    const int before = static_cast<int>(reinterpret_cast<u64>(from) & 3);
    copy_4(to, from - before + 4 * number, before + width > 4 * number ? 4 : 0);
}

// Copies 1, 2 or 4 words that lie at multiples of their size.
template <int WORDS>
DEVICE void copy_words(u8 *to, const u8 *from) {
    if (WORDS == 4) copy_16(to, from, 16);
    if (WORDS == 2) copy_8(to, from);
    if (WORDS == 1) copy_4(to, from, 4);
}
