// What a warp of an NVIDIA GPU (compute capability 8.0 on) can do at once, by name. Compiled at run time: no headers.
// HALF_IS_BF16 says what a packed pair of 16-bit numbers is; the lower half of the word is the first of the two.

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#define DEVICE __device__ __forceinline__

// 16 and 8 bytes that one instruction moves.
struct __align__(16) Quad {
    u32 x, y, z, w;
};
struct __align__(16) Four {
    float x, y, z, w;
};
struct __align__(8) Eight {
    u32 x, y;
};
struct __align__(8) Two {
    float first, second;
};

// bfloat16, whatever HALF_IS_BF16 says.
DEVICE float bfloat16_of(u32 pair, int which) { return __uint_as_float(which ? pair & 0xffff0000u : pair << 16); }
DEVICE u32 bfloat16_pair(float first, float second) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

DEVICE float clear_of(u32 pair, int which) {
#if HALF_IS_BF16
    return bfloat16_of(pair, which);
#else
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((u16)(which ? pair >> 16 : pair & 0xffffu)));
    return x;
#endif
}

DEVICE u32 pack(float first, float second) {
#if HALF_IS_BF16
    return bfloat16_pair(first, second);
#else
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#endif
}

// One 16-bit number.
DEVICE float number_of(u16 x) { return clear_of(x, 0); }
DEVICE u16 half_of(float x) { return (u16)pack(x, 0.f); }

// Nothing is made of x before this: else the compiler converts a number where it is asked for, and waits for it there.
DEVICE void as_loaded(u16& x) { asm volatile("" : "+h"(x)); }

DEVICE u32 multiply(u32 a, u32 b) {
    u32 pair;
#if HALF_IS_BF16
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(0x80008000u));
#else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
#endif
    return pair;
}

// (second of a, first of b)
DEVICE u32 straddle(u32 a, u32 b) { return __byte_perm(a, b, 0x5432); }

// c [16 x 8] += a [16 x 16] b [16 x 8]
DEVICE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if HALF_IS_BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
#endif
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c [16 x 8] = a [16 x 16] b [16 x 8]
DEVICE void mma_first(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if HALF_IS_BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%10, %10, %10, %10};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%10, %10, %10, %10};"
#endif
                 : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.f));
}

#if HALF_IS_BF16
#define HALF_NAME "bf16"
#else
#define HALF_NAME "f16"
#endif

// Four warps at once, on compute capability 9.0: d [64 x N] (+)= a [64 x 16] b [16 x N]. A warp's 16 rows of a and d are held
// as mma holds them. b is in shared memory in pieces of 8 columns by 8 of the 16, 128 bytes a piece, a column 16 bytes;
// next_k and next_n: bytes from a piece to the next along the 16 and along the columns. Behind wide_begin; until
// wide_commit and wide_wait d is not there and a and b are still read.
#if WIDE
// Where b is, as the instruction wants it: below 2^18 bytes, in units of 16.
struct Pieces {
    u32 low, high;
};
DEVICE Pieces describe(const void* b, int next_k, int next_n) {
    const u32 at = (u32)__cvta_generic_to_shared(b);
    return {(at & 0x3ffff) >> 4 | (u32)(next_k >> 4) << 16, (u32)(next_n >> 4)};
}
DEVICE Pieces ahead(Pieces b, int bytes) { return {b.low + (bytes >> 4), b.high}; }
DEVICE void wide_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wide_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void wide_wait(float (&d)[N][4]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    // The compiler does not know that d arrives only now.
#pragma unroll
    for (int i = 0; i < 4 * N; i++) asm volatile("" : "+f"(d[i / 4][i % 4]) :: "memory");
}

#define HELD_64 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HELD_80 HELD_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define HELD_96 HELD_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define HELD_112 HELD_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define HELD_128 HELD_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define HELD_160 HELD_128 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define HELD(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define HOLD_64 HELD(0), HELD(1), HELD(2), HELD(3), HELD(4), HELD(5), HELD(6), HELD(7)
#define HOLD_80 HOLD_64, HELD(8), HELD(9)
#define HOLD_96 HOLD_80, HELD(10), HELD(11)
#define HOLD_112 HOLD_96, HELD(12), HELD(13)
#define HOLD_128 HOLD_112, HELD(14), HELD(15)
#define HOLD_160 HOLD_128, HELD(16), HELD(17), HELD(18), HELD(19)
#define WIDE_MMA(N, A0, A1, A2, A3, LOW, HIGH, FRESH)                                                          \
    DEVICE void wide_mma(float (&d)[N / 8][4], const u32 (&a)[4], Pieces b, bool fresh) {                      \
        asm volatile("{.reg .pred keep; .reg .b64 at; setp.eq.b32 keep, %" #FRESH ", 0; "                      \
                     "mov.b64 at, {%" #LOW ", %" #HIGH "}; "                                                   \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." HALF_NAME "." HALF_NAME " "             \
                     "{" HELD_##N "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, at, keep, 1, 1, 0;}"           \
                     : HOLD_##N                                                                                \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.low), "r"(b.high), "r"((int)fresh));  \
    }
WIDE_MMA(64, 32, 33, 34, 35, 36, 37, 38)
WIDE_MMA(80, 40, 41, 42, 43, 44, 45, 46)
WIDE_MMA(96, 48, 49, 50, 51, 52, 53, 54)
WIDE_MMA(112, 56, 57, 58, 59, 60, 61, 62)
WIDE_MMA(128, 64, 65, 66, 67, 68, 69, 70)
WIDE_MMA(160, 80, 81, 82, 83, 84, 85, 86)
#endif

// What this thread has written to shared memory is seen by wide_mma behind the next barrier.
DEVICE void show_to_wide() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// An address in shared memory, to which bytes are added. Of several at fixed distances the compiler keeps one register; of
// as many pointers it keeps each.
typedef u32 Spot;
DEVICE Spot spot_of(const void* at) { return (u32)__cvta_generic_to_shared(at); }

// Four 8 x 8 matrices of registers to shared memory, addresses as for load_matrix.
DEVICE void store_matrix(Spot row, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(row), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
DEVICE void store_matrix(void* row, u32 a, u32 b, u32 c, u32 d) { store_matrix(spot_of(row), a, b, c, d); }

// The same, each matrix transposed.
DEVICE void store_matrix_transposed(void* row, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"((u32)__cvta_generic_to_shared(row)), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// An 8 x 8 matrix of registers, transposed.
DEVICE u32 transpose(u32 a) {
    u32 b;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(b) : "r"(a));
    return b;
}

// Four 8 x 8 matrices from shared memory, lane l giving the address of row l % 8 of matrix l / 8.
DEVICE void load_matrix(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((u32)__cvta_generic_to_shared(row)) : "memory");
}

DEVICE void load_matrix_transposed(u32 (&r)[4], Spot row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
DEVICE void load_matrix_transposed(u32 (&r)[4], const void* row) { load_matrix_transposed(r, spot_of(row)); }

// 16 (or 4) bytes from global to shared memory without waiting; zeros where not live, and then nothing is read.
DEVICE void copy_16(Spot to, const void* from, bool live) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(live ? 16 : 0) : "memory");
}
DEVICE void copy_16(void* to, const void* from, bool live) { copy_16(spot_of(to), from, live); }

DEVICE void copy_4(void* to, const void* from, bool live) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(live ? 4 : 0) : "memory");
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory"); }

DEVICE u32 shuffle(u32 x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE float largest(float x) {
    for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// The sum over the four lanes that hold a row of an accumulator.
DEVICE float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
DEVICE float power_of_two(float x) { return exp2f(x); }
DEVICE float log_of_two(float x) { return log2f(x); }
DEVICE void copy_out(void* to, const void* from) { *(uint4*)to = *(const uint4*)from; }
DEVICE int thread_index() { return threadIdx.x; }
// The same in all of a warp's threads, and known to be.
DEVICE int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }
DEVICE int block_index(int axis) { return axis ? blockIdx.y : blockIdx.x; }

#define DYNAMIC_SHARED(Type, name)                  \
    extern __shared__ __align__(16) char memory[]; \
    Type& name = *(Type*)memory
#define STATIC_SHARED(Type, name) __shared__ Type name
#define EXTERN extern "C" __global__
