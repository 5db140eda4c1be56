// What warp.cuh provides, without a GPU: a block's threads are fibers that meet where a warp or the block acts as one.
// Blocks run one after another, and so do a block's warps, each until it waits for the others. Shared memory is filled with
// NaN before each block, and a copy arrives when it is waited for.
// What a GPU would not do, it names: `launch` gives those words, null where all went well.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

using std::max;
using std::min;
typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#define DEVICE inline
struct alignas(16) Quad {
    u32 x, y, z, w;
};
struct alignas(8) Two {
    float first, second;
};
#define DYNAMIC_SHARED(Type, name) alignas(16) __attribute__((section("dynamic_shared"))) static Type name
#define EXTERN extern "C"
#define __launch_bounds__(...)

// Where the linker puts the section; null where there is none.
extern "C" {
extern char __start_dynamic_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_dynamic_shared[] __attribute__((weak, visibility("hidden")));
}

namespace emulated {
enum Act { PRODUCT, LOAD, SHUFFLE, WARP, BLOCK };
struct Meeting {
    int arrived = 0, generation = 0;
    Act act;
};
struct Copy {
    void* to;
    const void* from;
    int bytes;
};
struct Warp {
    Meeting meeting;
    u32 in[32][8];
    const void* rows[32];
    float c[32][4];
    u32 out[32][4];
};
// A product of four warps that is under way: its operands, and what d was before the first into the same d.
struct Wide {
    float (*d)[4];
    int N;
    u32 a[4];
    const char* b;
    int next_k, next_n;
    bool fresh, under_way;
    float held[20][4];
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    // Groups of copies under way, the oldest first; those of the last are not committed yet.
    std::deque<std::vector<Copy>> copies = {{}};
    std::vector<Wide> wides;
    bool done = false;
};
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Meeting block;
inline int thread, blocks[2], steps;
inline const char* wrong;

inline void demand(bool right, const char* words) {
    if (!right && !wrong) wrong = words;
}
inline void yield() { swapcontext(&fibers[thread].context, &scheduler); }
inline void meet(Meeting& m, int size, Act act, const std::function<void()>& run) {
    const int mine = m.generation;
    steps++;
    if (m.arrived == 0) m.act = act;
    demand(m.act == act, "threads of one warp came to different instructions");
    if (++m.arrived == size) {
        run();
        m.arrived = 0;
        m.generation++;
    } else {
        while (m.generation == mine) yield();
    }
}
inline Warp& warp() { return warps[thread / 32]; }
inline void together(Act act, const std::function<void(Warp&)>& run) {
    Warp& w = warp();
    meet(w.meeting, 32, act, [&] { run(w); });
}
inline void demand_aligned(const void* a, const void* b, int bytes) {
    demand((uintptr_t)a % bytes == 0 && (uintptr_t)b % bytes == 0, "an address off its alignment");
}
// Where -fsanitize=alignment finds an address that its type does not allow.
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void*) { demand(false, "an address off its alignment"); }
inline void copy_later(void* to, const void* from, int bytes, bool live) {
    demand_aligned(to, from, bytes);
    fibers[thread].copies.back().push_back({to, live ? from : nullptr, bytes});
    memset(to, 0xff, bytes);
}
inline float of_half(u16 bits) {
#if HALF_IS_BF16
    u32 word = (u32)bits << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
#else
    _Float16 x;
    memcpy(&x, &bits, 2);
    return (float)x;
#endif
}
inline u16 to_half(float x) {
#if HALF_IS_BF16
    u32 word;
    memcpy(&word, &x, 4);
    if (std::isnan(x)) return 0x7fc0;
    word += 0x7fff + (word >> 16 & 1);
    return (u16)(word >> 16);
#else
    _Float16 y = (_Float16)x;
    u16 bits;
    memcpy(&bits, &y, 2);
    return bits;
#endif
}
}  // namespace emulated

inline float clear_of(u32 pair, int which) { return emulated::of_half((u16)(which ? pair >> 16 : pair & 0xffff)); }
inline u32 pack(float first, float second) {
    return (u32)emulated::to_half(first) | (u32)emulated::to_half(second) << 16;
}
inline u32 multiply(u32 a, u32 b) {
    return pack(clear_of(a, 0) * clear_of(b, 0), clear_of(a, 1) * clear_of(b, 1));
}
inline u32 straddle(u32 a, u32 b) { return a >> 16 | b << 16; }

inline void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    using namespace emulated;
    const int lane = thread % 32;
    Warp& w = warp();
    const u32 in[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(w.in[lane], in, sizeof in);
    memcpy(w.c[lane], c, sizeof c);
    together(PRODUCT, [](Warp& w) {
        static float a[16][16], b[16][8];
        for (int l = 0; l < 32; l++)
            for (int e = 0; e < 2; e++) {
                const int g = l / 4, k = 2 * (l % 4) + e;
                a[g][k] = clear_of(w.in[l][0], e);
                a[g + 8][k] = clear_of(w.in[l][1], e);
                a[g][k + 8] = clear_of(w.in[l][2], e);
                a[g + 8][k + 8] = clear_of(w.in[l][3], e);
                b[k][g] = clear_of(w.in[l][4], e);
                b[k + 8][g] = clear_of(w.in[l][5], e);
            }
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) {
                const int m = l / 4 + i / 2 * 8, n = 2 * (l % 4) + i % 2;
                for (int k = 0; k < 16; k++) w.c[l][i] += a[m][k] * b[k][n];
            }
    });
    memcpy(c, w.c[lane], sizeof c);
}

inline void mma_first(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    c[0] = c[1] = c[2] = c[3] = 0.f;
    mma(c, a0, a1, a2, a3, b0, b1);
}

inline void load(u32 (&r)[4], const void* row, bool transposed) {
    using namespace emulated;
    Warp& w = warp();
    const int lane = thread % 32;
    demand_aligned(row, row, 16);
    w.rows[lane] = row;
    together(LOAD, [=](Warp& w) {
        for (int l = 0; l < 32; l++)
            for (int m = 0; m < 4; m++) {
                u16 pair[2];
                for (int e = 0; e < 2; e++) {
                    const int i = transposed ? 2 * (l % 4) + e : l / 4, j = transposed ? l / 4 : 2 * (l % 4) + e;
                    pair[e] = ((const u16*)w.rows[8 * m + i])[j];
                }
                w.out[l][m] = (u32)pair[0] | (u32)pair[1] << 16;
            }
    });
    memcpy(r, w.out[lane], sizeof r);
}
typedef char* Spot;
inline Spot spot_of(const void* at) { return (char*)at; }
inline void load_matrix(u32 (&r)[4], const void* row) { load(r, row, false); }
inline void load_matrix_transposed(u32 (&r)[4], const void* row) { load(r, row, true); }

inline void store_matrix(void* row, u32 a, u32 b, u32 c, u32 d) {
    using namespace emulated;
    Warp& w = warp();
    const int lane = thread % 32;
    const u32 in[4] = {a, b, c, d};
    demand_aligned(row, row, 16);
    memcpy(w.in[lane], in, sizeof in);
    w.rows[lane] = row;
    together(LOAD, [](Warp& w) {
        for (int l = 0; l < 32; l++)
            for (int m = 0; m < 4; m++) ((u32*)w.rows[8 * m + l / 4])[l % 4] = w.in[l][m];
    });
}

inline u32 transpose(u32 a) {
    using namespace emulated;
    Warp& w = warp();
    const int lane = thread % 32;
    w.in[lane][0] = a;
    together(LOAD, [](Warp& w) {
        for (int l = 0; l < 32; l++)
            for (int e = 0; e < 2; e++) {
                const int i = 2 * (l % 4) + e, j = l / 4;
                ((u16*)&w.out[l][0])[e] = ((const u16*)&w.in[4 * i + j / 2][0])[j % 2];
            }
    });
    return w.out[lane][0];
}
inline void store_matrix_transposed(void* row, u32 a, u32 b, u32 c, u32 d) {
    store_matrix(row, transpose(a), transpose(b), transpose(c), transpose(d));
}

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
template <int N>
inline void wide_mma(float (&d)[N][4], const u32 (&a)[4], Pieces b, bool fresh) {
    auto& wides = emulated::fibers[emulated::thread].wides;
    bool under_way = false;
    for (const emulated::Wide& other : wides) under_way |= other.d == d;
    wides.push_back({d, N, {a[0], a[1], a[2], a[3]}, b.at, b.next_k, b.next_n, fresh, under_way});
    if (under_way) return;
    if (!fresh) memcpy(wides.back().held, d, sizeof d);
    memset(d, 0xff, sizeof d);
}
template <int N>
inline void wide_wait(float (&)[N][4]) {
    const int lane = emulated::thread % 32;
    for (const emulated::Wide& w : emulated::fibers[emulated::thread].wides) {
        if (!w.under_way && !w.fresh) memcpy(w.d, w.held, 16 * w.N);
        for (int n = 0; n < w.N; n++) {
            const u32* low = (const u32*)(w.b + n * w.next_n);
            const u32* high = (const u32*)((const char*)low + w.next_k);
            (w.fresh ? mma_first : mma)(w.d[n], w.a[0], w.a[1], w.a[2], w.a[3], low[lane], high[lane]);
        }
    }
    emulated::fibers[emulated::thread].wides.clear();
}

inline void copy_16(void* to, const void* from, bool live) { emulated::copy_later(to, from, 16, live); }
inline void copy_4(void* to, const void* from, bool live) { emulated::copy_later(to, from, 4, live); }
inline void copy_out(void* to, const void* from) {
    emulated::demand_aligned(to, from, 16);
    memcpy(to, from, 16);
}
inline void commit_copies() { emulated::fibers[emulated::thread].copies.emplace_back(); }
template <int PENDING>
inline void wait_for_copies() {
    auto& groups = emulated::fibers[emulated::thread].copies;
    for (; groups.size() > PENDING + 1; groups.pop_front())
        for (const emulated::Copy& c : groups.front())
            c.from ? (void)memcpy(c.to, c.from, c.bytes) : (void)memset(c.to, 0, c.bytes);
}

inline u32 shuffle(u32 x, int from) {
    using namespace emulated;
    Warp& w = warp();
    const int lane = thread % 32;
    w.in[lane][0] = x;
    w.in[lane][1] = (u32)from;
    together(SHUFFLE, [](Warp& w) {
        for (int l = 0; l < 32; l++) w.out[l][0] = w.in[w.in[l][1] & 31][0];
    });
    return w.out[lane][0];
}
inline float shuffle(float x, int from) {
    u32 bits;
    memcpy(&bits, &x, 4);
    bits = shuffle(bits, from);
    memcpy(&x, &bits, 4);
    return x;
}
inline float largest(float x) {
    for (int step = 16; step; step /= 2) x = fmaxf(x, shuffle(x, (emulated::thread % 32) ^ step));
    return x;
}
inline float row_sum(float x) {
    for (int step = 1; step < 4; step *= 2) x += shuffle(x, (emulated::thread % 32) ^ step);
    return x;
}
inline void sync_block() { emulated::meet(emulated::block, (int)emulated::fibers.size(), emulated::BLOCK, [] {}); }
inline void sync_warp() { emulated::together(emulated::WARP, [](emulated::Warp&) {}); }
inline float reciprocal(float x) { return 1.f / x; }
inline float power_of_two(float x) { return exp2f(x); }
inline float log_of_two(float x) { return log2f(x); }
inline int thread_index() { return emulated::thread; }
inline int warp_index() { return emulated::thread / 32; }
inline int block_index(int axis) { return emulated::blocks[axis]; }

namespace emulated {
inline std::function<void()> body;
inline void enter() {
    body();
    fibers[thread].done = true;
    steps++;
    yield();
}
inline void spoil(char* from, char* to) {
    if (from) memset(from, 0xff, to - from);
}
inline void start_block(int threads) {
    fibers.assign(threads, Fiber());
    warps.assign((threads + 31) / 32, Warp());
    block = Meeting();
    spoil(__start_dynamic_shared, __stop_dynamic_shared);
    for (auto& f : fibers) {
        f.stack.resize(1 << 17);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        makecontext(&f.context, (void (*)())enter, 0);
    }
}
inline void run_block() {
    for (bool any = true; any && !wrong;) {
        const int before = steps;
        any = false;
        for (int first = 0; first < (int)fibers.size(); first += 32)
            for (int last = -1; last != steps;) {
                last = steps;
                for (thread = first; thread < min(first + 32, (int)fibers.size()); thread++) {
                    if (fibers[thread].done) continue;
                    any = true;
                    swapcontext(&scheduler, &fibers[thread].context);
                }
            }
        demand(!any || steps != before, "threads wait for others that do not come");
    }
}
inline const char* launch(int grid_x, int grid_y, int threads, std::function<void()> kernel) {
    body = kernel;
    wrong = nullptr;
    for (blocks[1] = 0; blocks[1] < grid_y; blocks[1]++)
        for (blocks[0] = 0; blocks[0] < grid_x && !wrong; blocks[0]++) {
            start_block(threads);
            run_block();
        }
    return wrong;
}
}  // namespace emulated
