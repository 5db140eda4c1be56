// A block's threads are fibers that meet where a warp or the block acts as one. Blocks run one after another, and so do a
// block's warps, each until it waits for the others. Shared memory is filled with NaN before each block, and a copy arrives
// when it is waited for.
#undef _FORTIFY_SOURCE  // its longjmp takes another fiber's stack for a fault
#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

namespace {
const int STACK = 1 << 17;
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
    Pieces b;
    bool fresh, under_way;
    float held[20][4];
};
struct Fiber {
    ucontext_t start;
    jmp_buf at;
    // Groups of copies under way, the oldest first; those of the last are not committed yet.
    std::deque<std::vector<Copy>> copies = {{}};
    std::vector<Wide> wides;
    bool begun = false, done = false;
};
jmp_buf scheduler;
std::vector<Fiber> fibers;
std::vector<std::unique_ptr<char[]>> stacks;
std::vector<Warp> warps;
Meeting block;
int thread, blocks[2], steps;
const char* wrong;
void (*body)();

void demand(bool right, const char* words) {
    if (!right && !wrong) wrong = words;
}
// Jumps, because swapcontext asks the kernel for the mask of signals each time.
void yield() {
    if (!_setjmp(fibers[thread].at)) _longjmp(scheduler, 1);
}
void resume() {
    Fiber& fiber = fibers[thread];
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.at, 1);
    fiber.begun = true;
    setcontext(&fiber.start);
}
template <typename Run>
void meet(Meeting& m, int size, Act act, const Run& run) {
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
Warp& warp() { return warps[thread / 32]; }
template <typename Run>
void together(Act act, const Run& run) {
    Warp& w = warp();
    meet(w.meeting, 32, act, [&] { run(w); });
}
void demand_aligned(const void* a, const void* b, int bytes) {
    demand((uintptr_t)a % bytes == 0 && (uintptr_t)b % bytes == 0, "an address off its alignment");
}
void copy_later(void* to, const void* from, int bytes, bool live) {
    demand_aligned(to, from, bytes);
    fibers[thread].copies.back().push_back({to, live ? from : nullptr, bytes});
    memset(to, 0xff, bytes);
}
float of_bfloat16(u16 bits) { return __uint_as_float((u32)bits << 16); }
u16 to_bfloat16(float x) {
    if (std::isnan(x)) return 0x7fc0;
    u32 word = __float_as_uint(x);
    word += 0x7fff + (word >> 16 & 1);
    return (u16)(word >> 16);
}
float of_half(u16 bits) {
#if HALF_IS_BF16
    return of_bfloat16(bits);
#else
    _Float16 x;
    memcpy(&x, &bits, 2);
    return (float)x;
#endif
}
u16 to_half(float x) {
#if HALF_IS_BF16
    return to_bfloat16(x);
#else
    _Float16 y = (_Float16)x;
    u16 bits;
    memcpy(&bits, &y, 2);
    return bits;
#endif
}
void load(u32 (&r)[4], const void* row, bool transposed) {
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
}  // namespace

// Where -fsanitize=alignment finds an address that its type does not allow.
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void*) { demand(false, "an address off its alignment"); }

float clear_of(u32 pair, int which) { return of_half((u16)(which ? pair >> 16 : pair & 0xffff)); }
u32 pack(float first, float second) { return (u32)to_half(first) | (u32)to_half(second) << 16; }
float bfloat16_of(u32 pair, int which) { return of_bfloat16((u16)(which ? pair >> 16 : pair & 0xffff)); }
u32 bfloat16_pair(float first, float second) { return (u32)to_bfloat16(first) | (u32)to_bfloat16(second) << 16; }
u32 multiply(u32 a, u32 b) { return pack(clear_of(a, 0) * clear_of(b, 0), clear_of(a, 1) * clear_of(b, 1)); }

void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
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
void mma_first(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    c[0] = c[1] = c[2] = c[3] = 0.f;
    mma(c, a0, a1, a2, a3, b0, b1);
}

void load_matrix(u32 (&r)[4], const void* row) { load(r, row, false); }
void load_matrix_transposed(u32 (&r)[4], const void* row) { load(r, row, true); }
void store_matrix(void* row, u32 a, u32 b, u32 c, u32 d) {
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
u32 transpose(u32 a) {
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
void store_matrix_transposed(void* row, u32 a, u32 b, u32 c, u32 d) {
    store_matrix(row, transpose(a), transpose(b), transpose(c), transpose(d));
}

void emulated::start_wide(float (*d)[4], int N, const u32 (&a)[4], Pieces b, bool fresh) {
    demand_aligned(b.at, b.at, 16);
    demand(b.next_k % 16 == 0 && b.next_n % 16 == 0, "an address off its alignment");
    auto& wides = fibers[thread].wides;
    bool under_way = false;
    for (const Wide& other : wides) under_way |= other.d == d;
    wides.push_back({d, N, {a[0], a[1], a[2], a[3]}, b, fresh, under_way});
    if (under_way) return;
    if (!fresh) memcpy(wides.back().held, d, 16 * N);
    memset(d, 0xff, 16 * N);
}
void emulated::end_wides() {
    const int lane = thread % 32;
    for (const Wide& w : fibers[thread].wides) {
        if (!w.under_way && !w.fresh) memcpy(w.d, w.held, 16 * w.N);
        for (int n = 0; n < w.N; n++) {
            const u32* low = (const u32*)(w.b.at + n * w.b.next_n);
            const u32* high = (const u32*)((const char*)low + w.b.next_k);
            (w.fresh ? mma_first : mma)(w.d[n], w.a[0], w.a[1], w.a[2], w.a[3], low[lane], high[lane]);
        }
    }
    fibers[thread].wides.clear();
}

void copy_16(void* to, const void* from, bool live) { copy_later(to, from, 16, live); }
void copy_4(void* to, const void* from, bool live) { copy_later(to, from, 4, live); }
void copy_out(void* to, const void* from) {
    demand_aligned(to, from, 16);
    memcpy(to, from, 16);
}
void commit_copies() { fibers[thread].copies.emplace_back(); }
void emulated::end_copies(int pending) {
    auto& groups = fibers[thread].copies;
    for (; (int)groups.size() > pending + 1; groups.pop_front())
        for (const Copy& c : groups.front())
            c.from ? (void)memcpy(c.to, c.from, c.bytes) : (void)memset(c.to, 0, c.bytes);
}

u32 shuffle(u32 x, int from) {
    Warp& w = warp();
    const int lane = thread % 32;
    w.in[lane][0] = x;
    w.in[lane][1] = (u32)from;
    together(SHUFFLE, [](Warp& w) {
        for (int l = 0; l < 32; l++) w.out[l][0] = w.in[w.in[l][1] & 31][0];
    });
    return w.out[lane][0];
}
float shuffle(float x, int from) {
    u32 bits;
    memcpy(&bits, &x, 4);
    bits = shuffle(bits, from);
    memcpy(&x, &bits, 4);
    return x;
}
float largest(float x) {
    for (int step = 16; step; step /= 2) x = fmaxf(x, shuffle(x, (thread % 32) ^ step));
    return x;
}
float row_sum(float x) {
    for (int step = 1; step < 4; step *= 2) x += shuffle(x, (thread % 32) ^ step);
    return x;
}
void sync_block() { meet(block, (int)fibers.size(), BLOCK, [] {}); }
void sync_warp() { together(WARP, [](Warp&) {}); }
int thread_index() { return thread; }
int warp_index() { return thread / 32; }
int block_index(int axis) { return blocks[axis]; }

namespace {
void enter() {
    body();
    fibers[thread].done = true;
    steps++;
    yield();
}
void start_block(int threads, char* shared, char* shared_end) {
    fibers.assign(threads, Fiber());
    warps.assign((threads + 31) / 32, Warp());
    block = Meeting();
    if (shared) memset(shared, 0xff, shared_end - shared);
    while ((int)stacks.size() < threads) stacks.emplace_back(new char[STACK]);
    for (int i = 0; i < threads; i++) {
        ucontext_t& start = fibers[i].start;
        getcontext(&start);
        start.uc_stack.ss_sp = stacks[i].get();
        start.uc_stack.ss_size = STACK;
        makecontext(&start, enter, 0);
    }
}
void run_block() {
    for (bool any = true; any && !wrong;) {
        const int before = steps;
        any = false;
        for (int first = 0; first < (int)fibers.size(); first += 32)
            for (int last = -1; last != steps;) {
                last = steps;
                for (thread = first; thread < min(first + 32, (int)fibers.size()); thread++) {
                    if (fibers[thread].done) continue;
                    any = true;
                    resume();
                }
            }
        demand(!any || steps != before, "threads wait for others that do not come");
    }
}
}  // namespace

const char* emulated::launch(int grid_x, int grid_y, int threads, void (*kernel)(), char* shared, char* shared_end) {
    body = kernel;
    wrong = nullptr;
    for (blocks[1] = 0; blocks[1] < grid_y; blocks[1]++)
        for (blocks[0] = 0; blocks[0] < grid_x && !wrong; blocks[0]++) {
            start_block(threads, shared, shared_end);
            run_block();
        }
    return wrong;
}
