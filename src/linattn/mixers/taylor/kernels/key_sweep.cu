// out_t = gradient in r_t of  sum over s of w(r_t, x_s) (w_t . y_s + d_t e_s),  s up to t (or from t on: REVERSE).
//
//     dq     source (k, v, 1), reader (q, do, delta), divided by den
//     dk     source (q, do / den, delta / den), reader (k, v, 1), REVERSE
//
// One block a (head, segment). Warp m keeps the state of the m-th pair of groups of products, [16, V] in registers. What
// the warps find of a chunk's gradient meets in shared memory: a part from each pair of groups, one from each 16 x 8 block
// of weights inside the chunk (warps 0 to 5), one from the normaliser's quadratic form (warps 6 and 7, see value_sweep.cu).
//
// Defined where compiled: V, HALF_IS_BF16, ONES, REVERSE, NORMALIZE, PACKED, SPLIT, INITIAL, FINAL (0 or 1: the state after
// each document, which in reverse is the gradient of the initial one).

#define CHUNK 32
#define WARPS (GROUPS / 2)
#define THREADS (32 * WARPS)
#define ROW_X 24
#define ROW_Y (V + 8)
#define STAGES 2
#define WEIGHED (REVERSE && NORMALIZE)
#define FORM (NORMALIZE || (REVERSE && INITIAL))
#define FORM_WARP 6
#define PITCH (CHUNK + 4)

struct Arguments {
    const u16 *x, *y, *r, *w;
    u16* out;
    const float *share, *delta, *S_in, *z_in;
    float *S_out, *z_out;
    const int *cu_seqlens, *segment_document, *segment_start;
    i64 x_n, x_t, x_h, y_n, y_t, y_h, r_n, r_t, r_h, w_n, w_t, w_h, out_n, out_t, out_h, share_n, share_h;
    i64 in_n, in_h, in_p, zin_n, zin_h, S_n, S_h, S_p, z_n, z_h;
    int tokens, segment_tokens, per_row, x_group, y_group, r_group, w_group, state_group;
    float scale;
};

struct Stage {
    u16 x[CHUNK * ROW_X], r[CHUNK * ROW_X], y[CHUNK * ROW_Y], w[CHUNK * ROW_Y];
    float share[CHUNK], delta[CHUNK];
};

// What a chunk's gradient is summed from, and multiplied by.
struct Parts {
    float products[WARPS][16][PITCH];
    float inside[6][16][20], form[2][16][20];
    float share[CHUNK];
};

struct Shared {
    Stage stages[STAGES];
    Parts parts[2];
    // Z and zk of the two warps that need them, lane by lane.
    float sums[2][4][4][32];
};

// Which products one of a warp's two groups is made of, in the layout (n = lane / 4, two tokens).
struct Group {
    int from, back;
    u32 keep, constant;
    float weight;
    DEVICE Group(int group, int lane, float scale) {
        const int n = lane / 4, low = lane % 4, d = group >= 18 ? 0 : group >= 10 ? group - 10 : group % 5;
        from = (n + d) % 8 * 4 + low;
        back = (n + 8 - d) % 8 * 4 + low;
        const bool kept = group >= 10 || d < 4 || n < 4;
        keep = kept ? 0xffffffffu : 0u;
        constant = group == 4 && n == 4 ? ONES : 0u;
        weight = !kept ? 0.f : group >= 18 ? scale : group < 10 && d == 0 ? 0.5f * scale * scale : scale * scale;
    }
    // left, right: the blocks of dims that are multiplied; LINEAR: left alone.
    template <bool LINEAR>
    DEVICE u32 product(u32 left, u32 right) const {
        return LINEAR ? left : (multiply(left, shuffle(right, from)) & keep) | constant;
    }
    // Adds what the gradient c of the products at two tokens is for the two blocks.
    template <bool LINEAR>
    DEVICE void chain(const float* c, float lift, u32 left, u32 right, float (&to_left)[2], float (&to_right)[2]) const {
        const u32 rotated = LINEAR ? 0u : shuffle(right, from);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float gradient = c[i] * (weight * lift);
            to_left[i] += LINEAR ? gradient : gradient * clear_of(rotated, i);
            if (!LINEAR) to_right[i] += shuffle(gradient * clear_of(left, i), back);
        }
    }
};

// Calls work(pair of group and blocks) as the warp's two groups have it: aa, aa and bb, bb, ab, or a and b alone.
#define BOTH(what, LINEAR, l0, r0, l1, r1) what(0, LINEAR, l0, r0) what(1, LINEAR, l1, r1)
#define AS_ITS_GROUPS_ARE(what)                  \
    if (warp < 2) { BOTH(what, false, a, a, a, a) } \
    else if (warp == 2) { BOTH(what, false, a, a, b, b) } \
    else if (warp < 5) { BOTH(what, false, b, b, b, b) } \
    else if (warp < 9) { BOTH(what, false, a, b, a, b) } \
    else { BOTH(what, true, a, a, b, b) }

EXTERN void __launch_bounds__(THREADS, V <= 64 ? 2 : 1) key_sweep(const Arguments g) {
    DYNAMIC_SHARED(Shared, shared);
    const int warp = warp_index(), lane = thread_index() % 32, row = lane / 4, pair = 2 * (lane % 4);
    const int h = block_index(0);
    const i64 segment = block_index(1);

    i64 document = segment;
    int first = 0;
#if SPLIT
#if PACKED
    document = g.segment_document[segment];
    first = g.segment_start[segment];
#else
    document = segment / g.per_row;
    first = int(segment % g.per_row) * g.segment_tokens;
#endif
#endif
    i64 batch = document, begin = 0;
    int length = g.tokens;
#if PACKED
    batch = 0;
    begin = min(max(g.cu_seqlens[document], 0), g.tokens);
    length = int(min(max((i64)g.cu_seqlens[document + 1], begin), (i64)g.tokens) - begin);
#endif
    const int last = SPLIT ? min(length, first + g.segment_tokens) : length;
    const int chunks = max((last - first + CHUNK - 1) / CHUNK, 0);
    const int start = first + (REVERSE ? (chunks - 1) * CHUNK : 0), stride = REVERSE ? -CHUNK : CHUNK;

    const i64 at_out = batch * g.out_n + (begin + start) * g.out_t + h * g.out_h;
    const i64 at_share = batch * g.share_n + begin + h * g.share_h;

    // What this thread fetches of each chunk: pieces of 16 bytes of y and of w, and in four warps one of x or r.
    const u16* y = g.y + batch * g.y_n + (begin + start) * g.y_t + (h / g.y_group) * g.y_h;
    const u16* w = g.w + batch * g.w_n + (begin + start) * g.w_t + (h / g.w_group) * g.w_h;
    const int x_token = thread_index() / 2 % CHUNK, x_column = lane % 2 * 8;
    const u16* x = warp < 2 ? g.x + batch * g.x_n + (begin + start + x_token) * g.x_t + (h / g.x_group) * g.x_h
                            : g.r + batch * g.r_n + (begin + start + x_token) * g.r_t + (h / g.r_group) * g.r_h;
    const i64 x_stride = stride * (warp < 2 ? g.x_t : g.r_t);
    x += x_column;
    auto fetch = [&](int step) {
        if (step < chunks) {
            Stage& to = shared.stages[step % STAGES];
            const int t0 = start + step * stride;
#pragma unroll
            for (int first_piece = 0; first_piece < CHUNK * V / 8; first_piece += THREADS) {
                const int i = first_piece + thread_index(), t = i / (V / 8), c = i % (V / 8) * 8;
                if (first_piece + THREADS > CHUNK * V / 8 && i >= CHUNK * V / 8) continue;
                const bool live = t0 + t < last;
                copy_16(to.y + t * ROW_Y + c, live ? y + t * g.y_t + c : g.y, live);
                copy_16(to.w + t * ROW_Y + c, live ? w + t * g.w_t + c : g.w, live);
            }
            if (warp < 4) {
                const bool live = t0 + x_token < last;
                copy_16((warp < 2 ? to.x : to.r) + x_token * ROW_X + x_column, live ? x : g.x, live);
            } else if (NORMALIZE && warp >= WARPS - 2) {
                const bool live = t0 + lane < last, of_share = warp == WARPS - 1;
                const i64 from = at_share + (live ? t0 + lane : 0);
                copy_4((of_share ? to.share : to.delta) + lane, (of_share ? g.share : g.delta) + from, live);
            }
            x += x_stride;
            y += stride * g.y_t;
            w += stride * g.w_t;
        }
        commit_copies();
    };

    // Sums the parts that `step` left. They wait for the next chunk's barrier.
    auto reduce = [&](int step) {
        const Parts& parts = shared.parts[step % 2];
        const int i = thread_index(), t = i / 8, dim = i % 8 * 2, reader = t / 16, in = t % 16;
        if (i >= CHUNK * 8 || start + step * stride + t >= last) return;
        // Blocks of weights stand in the order of `block` below: the reader that has one of them, then the other.
        const bool one = REVERSE ? reader == 1 : reader == 0;
        const int from = REVERSE ? (one ? 4 : 0) : (one ? 0 : 2);
        float total[2];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            float sum = FORM ? parts.form[reader][dim + k][in] : 0.f;
#pragma unroll
            for (int m = 0; m < WARPS; m++) sum += parts.products[m][dim + k][t];
            sum += parts.inside[from][dim + k][in] + parts.inside[from + 1][dim + k][in];
            if (!one) sum += parts.inside[from + 2][dim + k][in] + parts.inside[from + 3][dim + k][in];
            if (NORMALIZE && !REVERSE) sum *= parts.share[t];
            total[k] = sum;
        }
        *(u32*)(g.out + at_out + (step * stride + t) * g.out_t + dim) = pack(total[0], total[1]);
    };

    const Group groups[2] = {Group(2 * warp, lane, g.scale), Group(2 * warp + 1, lane, g.scale)};
    const i64 head = h / g.state_group;
    const float order = REVERSE ? 1.f / g.scale : 1.f;
    int places[2];
    float factors[2];
    float S[V / 8][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int group = 2 * warp + half;
        places[half] = place(group, row, factors[half]);
        // In reverse the State's gradient is that of phi(scale q), but the sums are of phi(q): scale is put on the reader.
        if (REVERSE) factors[half] *= weight_of(group, row, g.scale);
#pragma unroll
        for (int j = 0; j < V / 8; j++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                S[j][2 * half + i] = !INITIAL || places[half] < 0 ? 0.f
                    : g.S_in[segment * g.in_n + head * g.in_h + places[half] * g.in_p + 8 * j + pair + i] / factors[half];
    }
    const bool forms = warp == FORM_WARP || warp == FORM_WARP + 1;
    float count = 0.f;
    float(*const sums)[4][32] = shared.sums[warp % 2];
    if (forms) {
#pragma unroll
        for (int block = 0; block < 2; block++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float z = 0.f, linear = 0.f;
#if INITIAL
                const float* from = g.z_in + segment * g.zin_n + head * g.zin_h;
                const int j = 8 * block + pair + i % 2, k = row + i / 2 * 8;
                count = from[0];
                if (i < 2) linear = from[1 + j] * order;
                z = from[place_of(j, k)] * order * order * (j == k ? 1.41421356237309505f : 1.f);
#endif
                sums[block][i][lane] = z;
                sums[2 + block][i][lane] = linear;
            }
    }

    fetch(0);
    for (int step = 0; step < chunks; step++) {
        wait_for_copies<0>();
        sync_block();
        fetch(step + 1);
        if (step) reduce(step - 1);
        const Stage& now = shared.stages[step % STAGES];
        Parts& parts = shared.parts[step % 2];
        const int t0 = start + step * stride;

        float unit = 1.f;
#if WEIGHED && !HALF_IS_BF16
        // float16 holds do / den only after division by the largest share's power of two.
        {
            const float most = largest(now.share[lane]);
            unit = power_of_two(ceilf(log_of_two(fmaxf(most, 1e-30f))));
        }
#endif

        // Through the state: the gradient of this warp's 16 products at 8 tokens at a time, then of r.
        {
            u32 state[V / 16][4];
            float lift = 1.f;
#if !HALF_IS_BF16
            // float16 ends at 65504, which sums over a long text pass.
            float most = 1.f;
#pragma unroll
            for (int j = 0; j < V / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) most = fmaxf(most, fabsf(S[j][i]));
            lift = power_of_two(fmaxf(ceilf(log_of_two(largest(most))) - 14.f, 0.f));
#endif
#pragma unroll
            for (int j = 0; j < V / 8; j++) {
                state[j / 2][j % 2 * 2] = pack(S[j][0] * (1.f / lift), S[j][1] * (1.f / lift));
                state[j / 2][j % 2 * 2 + 1] = pack(S[j][2] * (1.f / lift), S[j][3] * (1.f / lift));
            }
#pragma unroll
            for (int block = 0; block < CHUNK / 16; block++) {
                u32 rows[4];
                load_matrix_transposed(rows, now.r + (16 * block + lane % 16) * ROW_X + lane / 16 * 8);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float c[4];
#pragma unroll
                    for (int j = 0; j < V / 16; j++) {
                        u32 columns[2];
                        load_matrix_pair(columns, now.w + (16 * block + 8 * half + lane % 8) * ROW_Y + 16 * j +
                                                      lane / 8 % 2 * 8);
                        if (j == 0)
                            mma_first(c, state[0][0], state[0][1], state[0][2], state[0][3], columns[0], columns[1]);
                        else
                            mma(c, state[j][0], state[j][1], state[j][2], state[j][3], columns[0], columns[1]);
                    }
                    const u32 a = rows[half], b = rows[2 + half];
                    float to_a[2] = {0.f, 0.f}, to_b[2] = {0.f, 0.f};
#define CHAIN(which, LINEAR, left, right) \
    groups[which].template chain<LINEAR>(c + 2 * which, lift, left, right, to_##left, to_##right);
                    AS_ITS_GROUPS_ARE(CHAIN)
                    const int t = 16 * block + 8 * half + pair;
                    *(Two*)&parts.products[warp][row][t] = Two{to_a[0], to_a[1]};
                    *(Two*)&parts.products[warp][8 + row][t] = Two{to_b[0], to_b[1]};
                }
            }
        }

        // Inside the chunk: readers 16 `reader`.., sources 8 `eighth`.. of each of the three blocks with any weight.
        if (warp < 6) {
            const int block = warp / 2, eighth = warp % 2;
            const int reader = REVERSE ? block == 2 : block > 0, s = REVERSE ? block > 0 : block == 2;
            u32 rows[4], source[2], columns[2];
            float u[4], dp[4];
            load_matrix(rows, now.r + (16 * reader + lane % 16) * ROW_X + lane / 16 * 8);
            load_matrix_pair(source, now.x + (16 * s + 8 * eighth + lane % 8) * ROW_X + lane / 8 % 2 * 8);
            mma_first(u, rows[0], rows[1], rows[2], rows[3], source[0], source[1]);
#pragma unroll
            for (int j = 0; j < V / 16; j++) {
                u32 left[4], right[2];
                load_matrix(left, now.w + (16 * reader + lane % 16) * ROW_Y + 16 * j + lane / 16 * 8);
                load_matrix_pair(right, now.y + (16 * s + 8 * eighth + lane % 8) * ROW_Y + 16 * j + lane / 8 % 2 * 8);
                if (j == 0) mma_first(dp, left[0], left[1], left[2], left[3], right[0], right[1]);
                else mma(dp, left[0], left[1], left[2], left[3], right[0], right[1]);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int at_reader = 16 * reader + row + i / 2 * 8, at_source = 16 * s + 8 * eighth + pair + i % 2;
                float gradient = dp[i];
#if NORMALIZE
                gradient += now.delta[REVERSE ? at_source : at_reader];
#endif
#if WEIGHED
                gradient *= now.share[at_source] / unit;
#endif
                const bool reads = REVERSE ? at_source >= at_reader && t0 + at_source < last : at_source <= at_reader;
                u[i] = reads ? gradient * (u[i] * g.scale + 1.f) : 0.f;
            }
            const u32 upper = pack(u[0], u[1]), lower = pack(u[2], u[3]);
            load_matrix_transposed_pair(columns, now.x + (16 * s + 8 * eighth + lane % 8) * ROW_X + lane / 8 % 2 * 8);
#pragma unroll
            for (int dims = 0; dims < 2; dims++) {
                float c[4];
                mma_first(c, upper, lower, 0u, 0u, columns[dims], 0u);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    parts.inside[warp][8 * dims + pair + i % 2][row + i / 2 * 8] = c[i] * (g.scale * unit);
            }
        }
#if FORM
        if (forms) {
            const int reader = warp - FORM_WARP;
            u32 rows[4];
            load_matrix(rows, now.r + (16 * reader + lane % 16) * ROW_X + lane / 16 * 8);
#pragma unroll
            for (int block = 0; block < 2; block++) {
                const float left[2] = {sums[0][2 * block][lane], sums[0][2 * block + 1][lane]};
                const float right[2] = {sums[1][2 * block][lane], sums[1][2 * block + 1][lane]};
                float most = 1.f, read[4];
#if !HALF_IS_BF16
#pragma unroll
                for (int i = 0; i < 2; i++) most = fmaxf(most, fmaxf(fabsf(left[i]), fabsf(right[i])));
                most = power_of_two(fmaxf(ceilf(log_of_two(largest(most))) - 14.f, 0.f));
#endif
                const float less = 1.f / most;
                const u32 low = pack(left[0] * less, left[1] * less), high = pack(right[0] * less, right[1] * less);
                mma_first(read, rows[0], rows[1], rows[2], rows[3], low, high);
                mma(read, rows[0], rows[1], rows[2], rows[3],
                    pack(left[0] * less - clear_of(low, 0), left[1] * less - clear_of(low, 1)),
                    pack(right[0] * less - clear_of(high, 0), right[1] * less - clear_of(high, 1)));
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float linear = sums[2 + block][i % 2][lane] + sums[2 + block][i % 2 + 2][lane];
                    const float d = REVERSE ? 1.f : now.delta[16 * reader + row + i / 2 * 8];
                    parts.form[reader][8 * block + pair + i % 2][row + i / 2 * 8] =
                        d * g.scale * (linear + g.scale * most * read[i]);
                }
            }
        }
#endif

        // Into the state.
#pragma unroll
        for (int s = 0; s < CHUNK / 16; s++) {
            u32 rows[4], phi[4];
            load_matrix_transposed(rows, now.x + (16 * s + lane % 16) * ROW_X + lane / 16 * 8);
            float share[4] = {1.f, 1.f, 1.f, 1.f};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 a = rows[half], b = rows[2 + half];
#define PRODUCT(which, LINEAR, left, right) phi[2 * half + which] = groups[which].template product<LINEAR>(left, right);
                AS_ITS_GROUPS_ARE(PRODUCT)
            }
#if WEIGHED
#pragma unroll
            for (int i = 0; i < 4; i++) share[i] = now.share[16 * s + pair + i % 2 + i / 2 * 8] / unit;
#pragma unroll
            for (int i = 0; i < 4; i++)
                phi[i] = pack(clear_of(phi[i], 0) * share[i / 2 * 2], clear_of(phi[i], 1) * share[i / 2 * 2 + 1]);
#endif
#pragma unroll
            for (int j = 0; j < V / 16; j++) {
                u32 columns[4];
                load_matrix_transposed(columns, now.y + (16 * s + lane % 16) * ROW_Y + 16 * j + lane / 16 * 8);
#pragma unroll
                for (int half = 0; half < 2; half++) {
#if WEIGHED && !HALF_IS_BF16
                    float c[4];
                    mma_first(c, phi[0], phi[1], phi[2], phi[3], columns[2 * half], columns[2 * half + 1]);
#pragma unroll
                    for (int i = 0; i < 4; i++) S[2 * j + half][i] += c[i] * unit;
#else
                    mma(S[2 * j + half], phi[0], phi[1], phi[2], phi[3], columns[2 * half], columns[2 * half + 1]);
#endif
                }
            }
#if NORMALIZE
            if (forms) {
                float e[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int t = 16 * s + pair + i % 2 + i / 2 * 8;
                    e[i] = REVERSE ? now.delta[t] * share[i] * unit : t0 + t < last ? 1.f : 0.f;
                }
                const u32 here = pack(e[0], e[1]), there = pack(e[2], e[3]);
                u32 here_rest = 0u, there_rest = 0u, weighed[4] = {rows[0], rows[1], rows[2], rows[3]};
                if (WEIGHED) {
                    here_rest = pack(e[0] - clear_of(here, 0), e[1] - clear_of(here, 1));
                    there_rest = pack(e[2] - clear_of(there, 0), e[3] - clear_of(there, 1));
#pragma unroll
                    for (int i = 0; i < 4; i++) weighed[i] = multiply(rows[i], i % 2 ? there : here);
                }
                count += row_sum(e[0] + e[1] + e[2] + e[3]);
#pragma unroll
                for (int block = 0; block < 2; block++) {
                    const u32 low = rows[2 * block], high = rows[2 * block + 1];
                    float z[4], linear[4];
                    mma_first(z, weighed[0], weighed[2], weighed[1], weighed[3], low, high);
                    mma_first(linear, here, here_rest, there, there_rest, low, high);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        sums[block][i][lane] += z[i];
                        sums[2 + block][i][lane] += linear[i];
                    }
                }
            }
#endif
        }

        if (NORMALIZE && !REVERSE && warp == WARPS - 1) parts.share[lane] = now.share[lane];
    }
    sync_block();
    if (chunks) reduce(chunks - 1);

#if FINAL
    const bool ends = REVERSE ? first == 0 : last == length && (chunks > 0 || first == 0);
    if (ends && h % g.state_group == 0) {
#pragma unroll
        for (int half = 0; half < 2; half++)
            if (places[half] >= 0)
#pragma unroll
                for (int j = 0; j < V / 8; j++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        g.S_out[document * g.S_n + head * g.S_h + places[half] * g.S_p + 8 * j + pair + i] =
                            S[j][2 * half + i] * factors[half];
        if (warp == FORM_WARP) {
            float* to = g.z_out + document * g.z_n + head * g.z_h;
            if (lane == 0) to[0] = count;
#pragma unroll
            for (int block = 0; block < 2; block++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int j = 8 * block + pair + i % 2, k = row + i / 2 * 8;
                    if (row == 0 && i < 2) to[1 + j] = (sums[2 + block][i][lane] + sums[2 + block][i + 2][lane]) / order;
                    if (j <= k) to[place_of(j, k)] = sums[block][i][lane] / (order * order) * (j == k ? 0.70710678118654752f : 1.f);
                }
        }
    }
#endif
}
