// What warp.cuh provides, without a GPU: of a block's threads, which are fibers, and where a warp or the block acts as one
// see emulator.cpp. No headers, so that a kernel is compiled in half a second.
typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

extern "C" {
float ceilf(float) noexcept;
float exp2f(float) noexcept;
float fabsf(float) noexcept;
float fmaxf(float, float) noexcept;
float log2f(float) noexcept;
}
template <typename T>
inline T max(T a, T b) {
    return a < b ? b : a;
}
template <typename T>
inline T min(T a, T b) {
    return b < a ? b : a;
}

#define DEVICE inline
struct alignas(16) Quad {
    u32 x, y, z, w;
};
struct alignas(16) Four {
    float x, y, z, w;
};
struct alignas(8) Eight {
    u32 x, y;
};
struct alignas(8) Two {
    float first, second;
};
#define DYNAMIC_SHARED(Type, name) alignas(16) __attribute__((section("dynamic_shared"))) static Type name
#define STATIC_SHARED DYNAMIC_SHARED
#define EXTERN extern "C"
#define __launch_bounds__(...)

// Where the linker puts the section; null where there is none.
extern "C" {
extern char __start_dynamic_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_dynamic_shared[] __attribute__((weak, visibility("hidden")));
}

float clear_of(u32 pair, int which);
u32 pack(float first, float second);
inline float number_of(u16 x) { return clear_of(x, 0); }
inline u16 half_of(float x) { return (u16)pack(x, 0.f); }
inline void as_loaded(u16&) {}
float bfloat16_of(u32 pair, int which);
u32 bfloat16_pair(float first, float second);
inline float __uint_as_float(u32 x) { return __builtin_bit_cast(float, x); }
inline u32 __float_as_uint(float x) { return __builtin_bit_cast(u32, x); }
u32 multiply(u32 a, u32 b);
inline u32 straddle(u32 a, u32 b) { return a >> 16 | b << 16; }

void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1);
void mma_first(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1);

typedef char* Spot;
inline Spot spot_of(const void* at) { return (char*)at; }
void load_matrix(u32 (&r)[4], const void* row);
void load_matrix_transposed(u32 (&r)[4], const void* row);
void store_matrix(void* row, u32 a, u32 b, u32 c, u32 d);
u32 transpose(u32 a);
void store_matrix_transposed(void* row, u32 a, u32 b, u32 c, u32 d);

// Done when waited for; until then d is NaN, and a later write to b is seen.
struct Pieces {
    const char* at;
    int next_k, next_n;
};
inline Pieces describe(const void* b, int next_k, int next_n) { return {(const char*)b, next_k, next_n}; }
inline Pieces ahead(Pieces b, int bytes) { return {b.at + bytes, b.next_k, b.next_n}; }
inline void wide_begin() {}
inline void wide_commit() {}
inline void show_to_wide() {}
namespace emulated {
void start_wide(float (*d)[4], int N, const u32 (&a)[4], Pieces b, bool fresh);
void end_wides();
void end_copies(int pending);
}  // namespace emulated
template <int N>
inline void wide_mma(float (&d)[N][4], const u32 (&a)[4], Pieces b, bool fresh) {
    emulated::start_wide(d, N, a, b, fresh);
}
template <int N>
inline void wide_wait(float (&)[N][4]) {
    emulated::end_wides();
}

void copy_16(void* to, const void* from, bool live);
void copy_4(void* to, const void* from, bool live);
void copy_out(void* to, const void* from);
void commit_copies();
template <int PENDING>
inline void wait_for_copies() {
    emulated::end_copies(PENDING);
}

u32 shuffle(u32 x, int from);
float shuffle(float x, int from);
float largest(float x);
float row_sum(float x);
void sync_block();
void sync_warp();
inline float reciprocal(float x) { return 1.f / x; }
inline float power_of_two(float x) { return exp2f(x); }
inline float log_of_two(float x) { return log2f(x); }
int thread_index();
int warp_index();
int block_index(int axis);

namespace emulated {
// Runs `body` in every thread of every block; what a GPU would not do, in words, or null where all went well.
const char* launch(int grid_x, int grid_y, int threads, void (*body)(), char* shared, char* shared_end);
}  // namespace emulated
