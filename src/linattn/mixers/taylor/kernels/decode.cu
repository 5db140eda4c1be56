// One token a row: feature map, read, normaliser and update of a slot's State, whose F = 16.
//
//     S += phi(k) v^T,  z += phi(k),  y = phi(scale q) S / phi(scale q) . z
//
// WAITING: up to so many tokens stand beside S, which is only read until a slot has that many and they are folded in;
// till then y and the divisor have w = 1 + s + s^2/2 times each. COPY: what is only read is a 16-bit copy of S.
//
// One block a (head, row), which nobody else reads or writes. It has the whole S in registers, ROWS rows side by side and
// four columns a thread, asked for at once: a block that asks for a part, adds to it and asks for the next waits for
// memory as often. 512 such threads, two blocks at V 112 and four at V 64, take all registers of a multiprocessor.
//
// Defined where compiled: V, HALF_IS_BF16, ROWS, RESIDENT (blocks on a multiprocessor), SLOT (int or i64), READERS (heads of
// y that read one State), Q_GROUP, K_GROUP, V_GROUP (heads of y, for k and v of the State, that share one of theirs),
// NORMALIZE, WAITING (0: every token is folded), COPY.

#define F 16
#define P (1 + F + F * (F + 1) / 2)
#define COLUMNS (V / 4)
#define THREADS (ROWS * COLUMNS)
#define WARPS (THREADS / 32)
// This token, and those that may wait when it comes.
#define TOKENS (WAITING ? WAITING : 1)
#define OLD_TOKENS (TOKENS - 1)
// How much of a number of things a thread has.
#define SHARE(things) (((things) + THREADS - 1) / THREADS)
#define HELD ((P + ROWS - 1) / ROWS)

struct Arguments {
    const u16 *q, *k, *v;
    u16* out;
    float *S, *z;
    u16 *recent_k, *recent_v;
    int* count;
    u16* copy;
    const SLOT* slots;
    i64 q_n, q_h, k_n, k_h, v_n, v_h, S_n, S_h, z_n, z_h;
    i64 recent_k_n, recent_k_h, recent_v_n, recent_v_h, count_n, copy_n, copy_h;
    int heads, n_slots;
    float scale;
};

// Of tokens this one is the first.
struct Shared {
    float queries[READERS][F], keys[TOKENS][F], values[TOKENS][V];
    float read[READERS][P], written[TOKENS][P];
    float weights[READERS][TOKENS], divisors[READERS][WARPS];
    Four parts[ROWS][COLUMNS];
};

// phi's row p is x_i x_j, over sqrt(2) where i = j; a factor of -1 is 1.
struct Factors {
    int i, j;
    DEVICE float of(const float* x) const {
        const float product = (i < 0 ? 1.f : x[i]) * (j < 0 ? 1.f : x[j]);
        return i == j && i >= 0 ? product * 0.70710678118654752f : product;
    }
};
DEVICE Factors factors_of(int p) {
    if (p <= F) return {p - 1, -1};
    int i = 0, rest = p - 1 - F;
    while (rest >= F - i) rest -= F - i++;
    return {i, i + rest};
}

DEVICE void add(Four& to, float factor, const Four& x) {
    to.x += factor * x.x;
    to.y += factor * x.y;
    to.z += factor * x.z;
    to.w += factor * x.w;
}

// Eight 16-bit numbers.
DEVICE void unpack(float* to, const Quad& from) {
    const u32 pairs[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = clear_of(pairs[i / 2], i % 2);
}

EXTERN void __launch_bounds__(THREADS, RESIDENT) decode(const Arguments g) {
    STATIC_SHARED(Shared, shared);
    const int t = thread_index(), lane = t % 32, first = t / COLUMNS, column = t % COLUMNS;
    const int h = block_index(0);
    const i64 row = block_index(1);
    u16* out = g.out + (row * g.heads + h) * READERS * V;

    const i64 slot = g.slots[row];
    Factors factors[SHARE(P)];
#pragma unroll
    for (int m = 0; m < SHARE(P); m++) factors[m] = factors_of(min(t + m * THREADS, P - 1));
    if (slot < 0 || slot >= g.n_slots) {
        for (int n = t; n < READERS * V; n += THREADS) out[n] = 0;
        return;
    }
    float* z = g.z + slot * g.z_n + h * g.z_h;
    Four* S = (Four*)(g.S + slot * g.S_n + h * g.S_h) + t;
    Eight* copy = (Eight*)(g.copy + slot * g.copy_n + h * g.copy_h) + t;
    int* count = g.count + slot * g.count_n + h;
    u16* recent_k = g.recent_k + slot * g.recent_k_n + h * g.recent_k_h;
    u16* recent_v = g.recent_v + slot * g.recent_v_n + h * g.recent_v_h;

    // Everything is asked for before anything is waited for. What is small goes first where S is only read, since more
    // hangs on it; where S is written again, what comes before it is asked for is lost to the block.
    u16 my_key = 0, my_value = 0, my_queries[SHARE(READERS * F)] = {};
    float sums[SHARE(P)];
    auto ask_for_the_small = [&] {
        if (t < F) my_key = g.k[row * g.k_n + h / K_GROUP * g.k_h + t];
        if (t < V) my_value = g.v[row * g.v_n + h / V_GROUP * g.v_h + t];
#pragma unroll
        for (int m = 0; m < SHARE(READERS * F); m++) {
            const int n = t + m * THREADS;
            if (n < READERS * F) my_queries[m] = g.q[row * g.q_n + (h * READERS + n / F) / Q_GROUP * g.q_h + n % F];
        }
#pragma unroll
        for (int m = 0; m < SHARE(P); m++)
            if (t + m * THREADS < P) sums[m] = z[t + m * THREADS];
    };
    if (WAITING) ask_for_the_small();
    const int counted = WAITING ? *count : 0;
    Quad old_keys[SHARE(OLD_TOKENS * F / 8) + 1], old_values[SHARE(OLD_TOKENS * V / 8) + 1];
#pragma unroll
    for (int m = 0; m < SHARE(OLD_TOKENS * F / 8); m++)
        if (t + m * THREADS < OLD_TOKENS * F / 8) old_keys[m] = ((const Quad*)recent_k)[t + m * THREADS];
#pragma unroll
    for (int m = 0; m < SHARE(OLD_TOKENS * V / 8); m++)
        if (t + m * THREADS < OLD_TOKENS * V / 8) old_values[m] = ((const Quad*)recent_v)[t + m * THREADS];
    Four state[HELD];
#pragma unroll
    for (int m = 0; m < HELD; m++) {
        if (m * ROWS + first >= P) continue;
        if (COPY) {
            const Eight held = copy[m * THREADS];
            state[m].x = __uint_as_float(held.x);
            state[m].y = __uint_as_float(held.y);
        } else {
            state[m] = S[m * THREADS];
        }
    }
    // The compiler moves nothing across it.
    sync_warp();
    if (!WAITING) ask_for_the_small();
    as_loaded(my_key);
    as_loaded(my_value);
#pragma unroll
    for (int m = 0; m < SHARE(READERS * F); m++) as_loaded(my_queries[m]);

    if (t < F) shared.keys[0][t] = number_of(my_key);
    if (t < V) shared.values[0][t] = number_of(my_value);
#pragma unroll
    for (int m = 0; m < SHARE(READERS * F); m++)
        if (t + m * THREADS < READERS * F)
            shared.queries[0][t + m * THREADS] = number_of(my_queries[m]) * g.scale;
    sync_block();
#pragma unroll
    for (int m = 0; m < SHARE(P); m++) {
        const int p = t + m * THREADS;
        if (p >= P) break;
#pragma unroll
        for (int r = 0; r < READERS; r++) shared.read[r][p] = factors[m].of(shared.queries[r]);
        shared.written[0][p] = factors[m].of(shared.keys[0]);
    }

    // The tokens that wait; this one joins them, unless that makes so many that all are folded in.
    const int waiting = min(max(counted, 0), OLD_TOKENS);
    const bool fold = waiting == OLD_TOKENS;
    if (WAITING) {
#pragma unroll
        for (int m = 0; m < SHARE(OLD_TOKENS * F / 8); m++)
            if (t + m * THREADS < waiting * F / 8) unpack(shared.keys[1] + 8 * (t + m * THREADS), old_keys[m]);
#pragma unroll
        for (int m = 0; m < SHARE(OLD_TOKENS * V / 8); m++)
            if (t + m * THREADS < waiting * V / 8) unpack(shared.values[1] + 8 * (t + m * THREADS), old_values[m]);
        if (!fold && t < F) recent_k[waiting * F + t] = my_key;
        if (!fold && t < V) recent_v[waiting * V + t] = my_value;
        if (t == 0) *count = fold ? 0 : waiting + 1;
        sync_block();
        if (fold) {
#pragma unroll
            for (int m = 0; m < SHARE(P); m++)
                for (int n = 1; n <= waiting; n++)
                    if (t + m * THREADS < P) shared.written[n][t + m * THREADS] = factors[m].of(shared.keys[n]);
        } else {
            for (int n = t; n < READERS * (waiting + 1); n += THREADS) {
                const int r = n / (waiting + 1), token = n % (waiting + 1);
                float s = 0.f;
                for (int f = 0; f < F; f++) s += shared.queries[r][f] * shared.keys[token][f];
                shared.weights[r][token] = 1.f + s + 0.5f * s * s;
            }
        }
    }
    sync_block();

    if (COPY) {
#pragma unroll
        for (int m = 0; m < HELD; m++) {
            if (m * ROWS + first >= P) continue;
            const u32 low = __float_as_uint(state[m].x), high = __float_as_uint(state[m].y);
            state[m] = {bfloat16_of(low, 0), bfloat16_of(low, 1), bfloat16_of(high, 0), bfloat16_of(high, 1)};
            if (fold) state[m] = S[m * THREADS];
        }
    }
    if (fold) {
        for (int n = 0; n <= waiting; n++) {
            const Four x = *(const Four*)(shared.values[n] + 4 * column);
#pragma unroll
            for (int m = 0; m < HELD; m++)
                if (m * ROWS + first < P) add(state[m], shared.written[n][m * ROWS + first], x);
        }
#pragma unroll
        for (int m = 0; m < HELD; m++) {
            if (m * ROWS + first >= P) continue;
            S[m * THREADS] = state[m];
            if (COPY) copy[m * THREADS] = {bfloat16_pair(state[m].x, state[m].y), bfloat16_pair(state[m].z, state[m].w)};
        }
    }
    float divisor[READERS];
#pragma unroll
    for (int r = 0; r < READERS; r++) divisor[r] = 0.f;
#pragma unroll
    for (int m = 0; m < SHARE(P); m++) {
        const int p = t + m * THREADS;
        if (p >= P) break;
        if (fold) {
            for (int n = 0; n <= waiting; n++) sums[m] += shared.written[n][p];
            z[p] = sums[m];
        }
#pragma unroll
        for (int r = 0; r < READERS; r++) divisor[r] += shared.read[r][p] * sums[m];
    }
#pragma unroll
    for (int r = 0; r < READERS; r++) {
        for (int step = 16; step; step /= 2) divisor[r] += shuffle(divisor[r], lane ^ step);
        if (lane == 0) shared.divisors[r][t / 32] = divisor[r];
    }

#pragma unroll
    for (int r = 0; r < READERS; r++) {
        Four y = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int m = 0; m < HELD; m++)
            if (m * ROWS + first < P) add(y, shared.read[r][m * ROWS + first], state[m]);
        // The parts of the reader before have been read.
        if (r) sync_block();
        shared.parts[first][column] = y;
        sync_block();
        for (int n = t; n < V; n += THREADS) {
            float sum = 0.f, by = 0.f;
            for (int i = 0; i < ROWS; i++) sum += ((const float*)shared.parts[i])[n];
            for (int i = 0; i < WARPS; i++) by += shared.divisors[r][i];
            if (!fold)
                for (int token = 0; token <= waiting; token++) {
                    sum += shared.weights[r][token] * shared.values[token][n];
                    by += shared.weights[r][token];
                }
            out[r * V + n] = half_of(NORMALIZE ? sum / by : sum);
        }
    }
}
