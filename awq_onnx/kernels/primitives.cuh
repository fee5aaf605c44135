// What the kernels need of a GPU beyond plain C++, one function each: copies that run on, barriers, tensor cores,
// arithmetic on pairs of 16-bit floats. Nothing is included, so NVRTC alone compiles the kernels; the tests put
// another file of this name before it, which computes the same on a CPU.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
// A kernel of at most `threads` in a block, registers so few that `blocks` of them fit on a multiprocessor.
#define KERNEL(name, threads, blocks)                                                                                  \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const awq_params p)

// Words that are read at once.
template <int WORDS>
struct alignas(4 * WORDS) Pack {
    u32 word[WORDS];
};
typedef Pack<4> Words4;

DEVICE u8 *shared_memory() {
    extern __shared__ Words4 dynamic[];
    return reinterpret_cast<u8 *>(dynamic);
}

DEVICE u32 shared_address(const void *pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// Copies from device to shared memory: `bytes` of the width, zeros for the rest. They land at the latest when
// wait_for_copies<n> returns, all but those of the n youngest groups, for the thread that asked for them.
// 16 bytes pass by L1, and L2 fetches the line of 128 bytes that the next stages want.
DEVICE void copy_16(void *to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(bytes));
}

DEVICE void copy_8(void *to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(to)), "l"(from));
}

DEVICE void copy_4(void *to, const void *from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes));
}

DEVICE void close_group_of_copies() { asm volatile("cp.async.commit_group;"); }

template <int YOUNGEST>
DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(YOUNGEST) : "memory");
}

DEVICE void warp_barrier() { __syncwarp(); }

DEVICE void block_barrier() { __syncthreads(); }

// Sixteen bytes of memory that nothing writes while the kernel runs.
DEVICE Words4 load_16(const void *from) {
    Words4 read;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(read.word[0]), "=r"(read.word[1]), "=r"(read.word[2]), "=r"(read.word[3])
        : "l"(from));
    return read;
}

// Two of the eight bytes of {low, high}, twice: `which` has a number 0..7 in each half byte, the lowest first.
DEVICE u32 select_bytes(u32 low, u32 high, u32 which) { return __byte_perm(low, high, which); }

// The words {high, low}, shifted right by 0 to 31 bits: the lower one.
DEVICE u32 right(u32 low, u32 high, u32 bits) { return __funnelshift_r(low, high, bits); }

// (word & MASK) | BITS in one instruction: left to itself, the compiler takes two for two constants.
template <u32 MASK, u32 BITS>
DEVICE u32 bits_under(u32 word) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "n"(MASK), "r"(BITS));
    return result;
}

DEVICE float sum_of_warp(float value) {
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// float16. Pairs are two numbers in 32 bits. multiply_add rounds once.
struct Half {
    static DEVICE float wide(u16 bits) {
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
        return value;
    }
    static DEVICE u16 narrow(float value) {
        u16 bits;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
    }
    static DEVICE u32 multiply(u32 x, u32 y) {
        u32 product;
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(x), "r"(y));
        return product;
    }
    static DEVICE u32 multiply_add(u32 x, u32 y, u32 z) {
        u32 sum;
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(x), "r"(y), "r"(z));
        return sum;
    }
    // sums (16, 8) += a (16, 16) b (16, 8), a warp together. Of a, the lane 4 g + t holds the pairs (row g, inputs
    // 2t), (row g + 8, 2t), (row g, 2t + 8), (row g + 8, 2t + 8); of b, column g, the pairs 2t and 2t + 8; of the sums
    // row g, columns 2t and 2t + 1, and row g + 8 (PTX ISA, "Matrix Fragments for mma.m16n8k16").
    static DEVICE void multiply_tiles(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

// bfloat16, likewise.
struct Bfloat {
    static DEVICE float wide(u16 bits) { return __uint_as_float(static_cast<u32>(bits) << 16); }
    static DEVICE u16 narrow(float value) {
        u16 bits;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
    }
    static DEVICE u32 multiply_add(u32 x, u32 y, u32 z) {
        u32 sum;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(x), "r"(y), "r"(z));
        return sum;
    }
    static DEVICE u32 multiply(u32 x, u32 y) { return multiply_add(x, y, 0x80008000u); }  // sm_80 has no product alone
    static DEVICE void multiply_tiles(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};
