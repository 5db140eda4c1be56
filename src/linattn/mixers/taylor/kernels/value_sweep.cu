// out_t = sum over s of w(r_t, x_s) y_s, s up to t (or from t on: REVERSE), w = 1 + u + u^2/2, u = scale r . x.
//
//     y      source (k, v), reader q, divided by the sum of weights (NORMALIZE)
//     dv     source (q, do / den), reader k, REVERSE
//     sums   of a source, without a reader (no OUTPUT): what a segment adds to the state
//
// One block a (head, segment), a warp for each 16 value columns, V tokens a chunk. Of a chunk every warp
//     makes the products of 16 sources, for all warps to use;
//     finds the outputs of 16 readers: products of the readers times the state, which all warps left in shared memory,
//     then weights inside the chunk times values, and the divisor;
//     adds all sources to its own 16 columns of the state, [16, 160] in registers, and leaves them in 16 bits.
// What z . phi(q) reads (SUMS) is a quadratic form, n + q . zk + q Z q / 2, of which Z and zk are sums of e x x^T and e x:
// products of fragments that are there already, since Z is symmetric. Warp 0 keeps them.
//
// WIDE (V = 64, capability 9.0): the products with the state are wgmma's, which read shared memory once for four warps.
//
// Defined where compiled: V, HALF_IS_BF16, WIDE, ONES, REVERSE, NORMALIZE, SUMS, OUTPUT, PACKED, SPLIT, INITIAL, FINAL (0 nothing,
// 1 after each document, 2 after each segment).

#define CHUNK V
#define WARPS (V / 16)
#define THREADS (32 * WARPS)
#define ROW_X 24
#define ROW_Y (V + 8)
#define STAGES 2
#define WEIGHED (REVERSE && NORMALIZE)
#define PAIRS (GROUPS / 2)

struct Arguments {
    const u16 *x, *y, *r;
    u16* out;
    float* share;  // 1 / den
    const float *delta, *S_in, *z_in;
    float *S_out, *z_out;
    const int *cu_seqlens, *segment_document, *segment_start;
    i64 x_n, x_t, x_h, y_n, y_t, y_h, r_n, r_t, r_h, out_n, out_t, out_h, share_n, share_h;
    i64 in_n, in_h, in_p, zin_n, zin_h, S_n, S_h, S_p, z_n, z_h;
    int tokens, segment_tokens, per_row, x_group, y_group, r_group, state_group;
    float scale;
};

struct Stage {
    u16 x[CHUNK * ROW_X], y[CHUNK * ROW_Y];
#if OUTPUT
    u16 r[CHUNK * ROW_X];
#endif
    float share[CHUNK], delta[CHUNK];
};

struct Shared {
    Stage stages[STAGES];
    // Fragments of two groups at a time; WIDE: pieces [8 tokens][group] and, of the state, [group][8 columns].
    Quad products[WARPS][PAIRS][32];
#if OUTPUT
    Quad state[PAIRS][WARPS][32];
    u16 slabs[WARPS][16 * ROW_Y];
    float lifts[WARPS];
    // Z as second operand, rounded and what that lost, and zk: lane by lane.
    u32 form[8][32];
    float linear[4][32], form_lift;
#endif
    int places[8 * GROUPS];
    float factors[8 * GROUPS];
};

EXTERN void __launch_bounds__(THREADS, V <= 64 ? 2 : 1) value_sweep(const Arguments g) {
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
    const i64 at_share = batch * g.share_n + begin + h * g.share_h;

    // What this thread fetches of each chunk, in pieces of 16 bytes: one of x, one of r, and one of y every 16 tokens.
    const int x_token = thread_index() / 2, x_column = thread_index() % 2 * 8;
    const int y_token = thread_index() / (V / 8), y_column = thread_index() % (V / 8) * 8;
    const u16* x = g.x + batch * g.x_n + (begin + start + x_token) * g.x_t + (h / g.x_group) * g.x_h + x_column;
    const u16* y = g.y + batch * g.y_n + (begin + start + y_token) * g.y_t + (h / g.y_group) * g.y_h + y_column;
#if OUTPUT
    const u16* r = g.r + batch * g.r_n + (begin + start + x_token) * g.r_t + (h / g.r_group) * g.r_h + x_column;
#endif
    auto fetch = [&](int step) {
        if (step < chunks) {
            Stage& to = shared.stages[step % STAGES];
            const int left = last - (start + step * stride);
            const bool live = x_token < left;
            copy_16(to.x + x_token * ROW_X + x_column, live ? x : g.x, live);
            x += stride * g.x_t;
#if OUTPUT
            copy_16(to.r + x_token * ROW_X + x_column, live ? r : g.r, live);
            r += stride * g.r_t;
#endif
#pragma unroll
            for (int i = 0; i < WARPS; i++) {
                const bool lives = y_token + 16 * i < left;
                copy_16(to.y + (y_token + 16 * i) * ROW_Y + y_column, lives ? y + 16 * i * g.y_t : g.y, lives);
            }
            y += stride * g.y_t;
#if WEIGHED
            const int t = thread_index() % CHUNK;
            const i64 from = at_share + start + step * stride + (t < left ? t : 0);
            const bool of_share = thread_index() < CHUNK;
            copy_4((of_share ? to.share : to.delta) + t, (of_share ? g.share : g.delta) + (t < left ? from : at_share), t < left);
#endif
        }
        commit_copies();
    };

    for (int i = thread_index(); i < 8 * GROUPS; i += THREADS) {
        shared.places[i] = place(i / 8, i % 8, shared.factors[i]);
        // In reverse the State's gradient is that of phi(scale q), but the sums are of phi(q): scale is put on the reader.
        if (REVERSE) shared.factors[i] *= weight_of(i / 8, i % 8, g.scale);
    }
    sync_block();

    const i64 head = h / g.state_group;
    float S[GROUPS][4];
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int n = 8 * group + pair + i % 2, v = 16 * warp + row + i / 2 * 8, p = INITIAL ? shared.places[n] : -1;
            S[group][i] = p < 0 ? 0.f : g.S_in[segment * g.in_n + head * g.in_h + p * g.in_p + v] / shared.factors[n];
        }
    }
    // Z[block] at dims (row and row + 8, 8 block + pair); zk[block] at dims 8 block + pair, in parts to be added; n.
    float Z[2][4], zk[2][4], count = 0.f;
    const float order = REVERSE ? 1.f / g.scale : 1.f;
#pragma unroll
    for (int block = 0; block < 2; block++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            Z[block][i] = zk[block][i] = 0.f;
#if INITIAL && SUMS
            const float* from = g.z_in + segment * g.zin_n + head * g.zin_h;
            const int j = 8 * block + pair + i % 2, k = row + i / 2 * 8;
            count = from[0];
            if (i < 2) zk[block][i] = from[1 + j] * order;
            Z[block][i] = from[place_of(j, k)] * order * order * (j == k ? 1.41421356237309505f : 1.f);
#endif
        }

    // Leaves this warp's columns of the state, and warp 0 Z and zk, for the next chunk's readers.
    auto leave = [&] {
#if OUTPUT
        float lift = 1.f;
#if !HALF_IS_BF16
        // float16 ends at 65504, which sums over a long text pass.
        float most = 1.f;
#pragma unroll
        for (int group = 0; group < GROUPS; group++)
#pragma unroll
            for (int i = 0; i < 4; i++) most = fmaxf(most, fabsf(S[group][i]));
        lift = power_of_two(fmaxf(ceilf(log_of_two(largest(most))) - 14.f, 0.f));
        shared.lifts[warp] = lift;
#endif
        const float less = 1.f / lift;
#pragma unroll
        for (int m = 0; m < PAIRS; m++) {
            const float(&a)[4] = S[2 * m], (&b)[4] = S[2 * m + 1];
            const Quad held = {pack(a[0] * less, a[1] * less), pack(b[0] * less, b[1] * less),
                               pack(a[2] * less, a[3] * less), pack(b[2] * less, b[3] * less)};
            if (WIDE) {
                const int group = 2 * m + lane / 16, columns = 2 * warp + lane / 8 % 2;
                store_matrix((Quad*)shared.state + (group * V / 8 + columns) * 8 + lane % 8, held.x, held.z, held.y, held.w);
            } else {
                shared.state[m][warp][lane] = held;
            }
        }
        if (WIDE) show_to_wide();
        if (SUMS && NORMALIZE && warp == 0) {
            float shrink = 1.f;
#if !HALF_IS_BF16
            float largest_z = 1.f;
#pragma unroll
            for (int i = 0; i < 8; i++) largest_z = fmaxf(largest_z, fabsf(Z[i / 4][i % 4]));
            const float lift_z = power_of_two(fmaxf(ceilf(log_of_two(largest(largest_z))) - 14.f, 0.f));
            shared.form_lift = lift_z;
            shrink = 1.f / lift_z;
#endif
#pragma unroll
            for (int block = 0; block < 2; block++) {
                // Z's rows, as they are held, are its columns, as they are wanted.
#pragma unroll
                for (int side = 0; side < 2; side++) {
                    const float a = Z[side][2 * block] * shrink, b = Z[side][2 * block + 1] * shrink;
                    const u32 rounded = pack(a, b);
                    shared.form[4 * block + side][lane] = rounded;
                    shared.form[4 * block + 2 + side][lane] = pack(a - clear_of(rounded, 0), b - clear_of(rounded, 1));
                }
#pragma unroll
                for (int i = 0; i < 2; i++) shared.linear[2 * block + i][lane] = zk[block][i] + zk[block][i + 2];
            }
        }
#endif
    };

    // Blocks take their readers in opposite orders, so that the warp with most weights is not always on one scheduler.
    const int reader = h % 2 ? WARPS - 1 - warp : warp;
    // The triangle within a diagonal block of weights: source pair, pair + 1 against reader row.
    const u32 reads = REVERSE ? (pair >= row ? 0xffffu : 0u) | (pair + 1 >= row ? 0xffff0000u : 0u)
                              : (pair <= row ? 0xffffu : 0u) | (pair + 1 <= row ? 0xffff0000u : 0u);
#if OUTPUT
    u16* out = g.out + batch * g.out_n + (begin + start + 16 * reader + lane / (V / 8)) * g.out_t + h * g.out_h +
               lane % (V / 8) * 8;
#endif

    leave();
    fetch(0);
    for (int step = 0; step < chunks; step++) {
        wait_for_copies<0>();
        sync_block();
        fetch(step + 1);
        const Stage& now = shared.stages[step % STAGES];
        const int t0 = start + step * stride;

        float unit = 1.f;
#if WEIGHED && !HALF_IS_BF16
        // float16 holds do / den only after division by the largest share's power of two.
        {
            float most = 0.f;
            for (int i = lane; i < CHUNK; i += 32) most = fmaxf(most, now.share[i]);
            unit = power_of_two(ceilf(log_of_two(fmaxf(largest(most), 1e-30f))));
        }
#endif
        {
            u32 rows[4];
            load_matrix_transposed(rows, now.x + (16 * warp + lane % 16) * ROW_X + lane / 16 * 8);
            SourceFeatures early, late;
            early.rotate(rows[0], rows[2], lane);
            late.rotate(rows[1], rows[3], lane);
#pragma unroll
            for (int m = 0; m < PAIRS; m++) {
                if (WIDE) {
                    const int tokens = 2 * warp + lane / 16, group = 2 * m + lane / 8 % 2;
                    store_matrix((Quad*)shared.products + (tokens * GROUPS + group) * 8 + lane % 8, early[2 * m],
                                 early[2 * m + 1], late[2 * m], late[2 * m + 1]);
                } else {
                    shared.products[warp][m][lane] = Quad{early[2 * m], late[2 * m], early[2 * m + 1], late[2 * m + 1]};
                }
            }
            if (WIDE) show_to_wide();
        }

#if OUTPUT
        {
            float o[V / 8][4], sum[2] = {0.f, 0.f};
            u32 rows[4];
            load_matrix(rows, now.r + (16 * reader + lane % 16) * ROW_X + lane / 16 * 8);
            {
                ReaderFeatures phi[2];
                phi[0].rotate(rows[0], rows[2], lane, g.scale);
                phi[1].rotate(rows[1], rows[3], lane, g.scale);
#if WIDE
                u32 a[PAIRS][4];
#pragma unroll
                for (int m = 0; m < PAIRS; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) a[m][i] = phi[i % 2][2 * m + i / 2];
                wide_begin();
#pragma unroll
                for (int m = 0; m < PAIRS; m++)
                    wide_mma(o, a[m], (Quad*)shared.state + 2 * m * V, 16 * V, 128, m == 0);
                wide_end();
#else
#pragma unroll
                for (int m = 0; m < PAIRS; m++) {
                    const u32 a0 = phi[0][2 * m], a1 = phi[1][2 * m], a2 = phi[0][2 * m + 1], a3 = phi[1][2 * m + 1];
#pragma unroll
                    for (int column = 0; column < WARPS; column++) {
                        const Quad held = shared.state[m][column][lane];
                        float(&low)[4] = o[2 * column], (&high)[4] = o[2 * column + 1];
                        if (m == 0) {
                            mma_first(low, a0, a1, a2, a3, held.x, held.y);
                            mma_first(high, a0, a1, a2, a3, held.z, held.w);
                        } else {
                            mma(low, a0, a1, a2, a3, held.x, held.y);
                            mma(high, a0, a1, a2, a3, held.z, held.w);
                        }
                    }
                }
#endif
            }
#if !HALF_IS_BF16
#pragma unroll
            for (int j = 0; j < V / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) o[j][i] *= shared.lifts[j / 2] / unit;
#endif
            for (int s = REVERSE ? reader : 0; s < (REVERSE ? WARPS : reader + 1); s++) {
                u32 source[4], weights[4];
                load_matrix(source, now.x + (16 * s + lane % 8 + lane / 16 * 8) * ROW_X + lane / 8 % 2 * 8);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float u[4], share[2] = {1.f, 1.f};
#if WEIGHED
#pragma unroll
                    for (int i = 0; i < 2; i++) share[i] = now.share[16 * s + 8 * half + pair + i] / unit;
#endif
                    mma_first(u, rows[0], rows[1], rows[2], rows[3], source[2 * half], source[2 * half + 1]);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float plus = u[i] * g.scale + 1.f;
                        u[i] = plus * plus * 0.5f + 0.5f;
                        if (WEIGHED) u[i] *= share[i % 2];
                    }
                    weights[2 * half] = pack(u[0], u[1]);
                    weights[2 * half + 1] = pack(u[2], u[3]);
                }
                if (s == reader) {
                    weights[0] &= reads;
                    weights[3] &= reads;
                    weights[REVERSE ? 1 : 2] = 0u;
                }
                if (NORMALIZE && !REVERSE)
#pragma unroll
                    for (int i = 0; i < 4; i++) sum[i % 2] += clear_of(weights[i], 0) + clear_of(weights[i], 1);
#pragma unroll
                for (int column = 0; column < WARPS; column++) {
                    u32 values[4];
                    load_matrix_transposed(values, now.y + (16 * s + lane % 16) * ROW_Y + 16 * column + lane / 16 * 8);
                    mma(o[2 * column], weights[0], weights[1], weights[2], weights[3], values[0], values[1]);
                    mma(o[2 * column + 1], weights[0], weights[1], weights[2], weights[3], values[2], values[3]);
                }
            }
            float divide[2] = {unit, unit};
#if NORMALIZE && !REVERSE
            float form[2] = {0.f, 0.f}, lift = 1.f;
#if !HALF_IS_BF16
            lift = shared.form_lift;
#endif
#pragma unroll
            for (int block = 0; block < 2; block++) {
                float read[4];
                mma_first(read, rows[0], rows[1], rows[2], rows[3], shared.form[4 * block][lane],
                          shared.form[4 * block + 1][lane]);
                mma(read, rows[0], rows[1], rows[2], rows[3], shared.form[4 * block + 2][lane],
                    shared.form[4 * block + 3][lane]);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    form[i / 2] += clear_of(rows[2 * block + i / 2], i % 2) *
                                   (shared.linear[2 * block + i % 2][lane] + 0.5f * g.scale * lift * read[i]);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int t = 16 * reader + 8 * half + row;
                const float total = count + row_sum(sum[half] + g.scale * form[half]);
                divide[half] = reciprocal(total);
                if (pair == 0 && t0 + t < last) g.share[at_share + t0 + t] = divide[half];
            }
#endif
            u16* slab = shared.slabs[warp];
#pragma unroll
            for (int j = 0; j < V / 8; j++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    *(u32*)(slab + (8 * half + row) * ROW_Y + 8 * j + pair) =
                        pack(o[j][2 * half] * divide[half], o[j][2 * half + 1] * divide[half]);
            sync_warp();
#pragma unroll
            for (int i = 0; i < 2 * V; i += 32) {
                // V / 8 lanes a token; where that does not divide 32, a lane's place is found anew.
                const int piece = i + lane, t = piece / (V / 8), c = piece % (V / 8) * 8;
                const i64 ahead = (i64)(t - lane / (V / 8)) * g.out_t + c - lane % (V / 8) * 8;
                if (t0 + 16 * reader + t < last) copy_out(out + ahead, slab + t * ROW_Y + c);
            }
            out += stride * g.out_t;
        }
        sync_block();
#else
        sync_block();
#endif
        if (!REVERSE) count += min(CHUNK, last - t0);

        u32 values[WARPS][4];
#pragma unroll
        for (int s = 0; s < WARPS; s++) {
            load_matrix_transposed(
                values[s], now.y + (16 * s + lane % 8 + lane / 16 * 8) * ROW_Y + 16 * warp + lane / 8 % 2 * 8);
#if WEIGHED
            float share[4];
#pragma unroll
            for (int i = 0; i < 4; i++) share[i] = now.share[16 * s + pair + i % 2 + i / 2 * 8] / unit;
#pragma unroll
            for (int i = 0; i < 4; i++)
                values[s][i] =
                    pack(clear_of(values[s][i], 0) * share[i / 2 * 2], clear_of(values[s][i], 1) * share[i / 2 * 2 + 1]);
#endif
        }
        if (unit != 1.f) {
#pragma unroll
            for (int i = 0; i < 4 * GROUPS; i++) S[i / 4][i % 4] /= unit;
        }
#if WIDE
        wide_begin();
#pragma unroll
        for (int s = 0; s < WARPS; s++)
            wide_mma(S, values[s], (Quad*)shared.products + 16 * s * GROUPS, 128 * GROUPS, 128, false);
        wide_end();
#else
#pragma unroll
        for (int s = 0; s < WARPS; s++)
#pragma unroll
            for (int m = 0; m < PAIRS; m++) {
                const Quad phi = shared.products[s][m][lane];
                mma(S[2 * m], values[s][0], values[s][1], values[s][2], values[s][3], phi.x, phi.y);
                mma(S[2 * m + 1], values[s][0], values[s][1], values[s][2], values[s][3], phi.z, phi.w);
            }
#endif
        if (unit != 1.f) {
#pragma unroll
            for (int i = 0; i < 4 * GROUPS; i++) S[i / 4][i % 4] *= unit;
        }
        if (SUMS && (NORMALIZE || !REVERSE) && warp == 0) {
#pragma unroll
            for (int s = 0; s < WARPS; s++) {
                u32 rows[4];
                load_matrix_transposed(rows, now.x + (16 * s + lane % 16) * ROW_X + lane / 16 * 8);
                float e[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int t = 16 * s + pair + i % 2 + i / 2 * 8;
                    e[i] = t0 + t < last ? 1.f : 0.f;
#if WEIGHED
                    e[i] = now.delta[t] * now.share[t];
#endif
                }
                const u32 here = pack(e[0], e[1]), there = pack(e[2], e[3]);
                u32 here_rest = 0u, there_rest = 0u, weighed[4] = {rows[0], rows[1], rows[2], rows[3]};
                if (WEIGHED) {
                    here_rest = pack(e[0] - clear_of(here, 0), e[1] - clear_of(here, 1));
                    there_rest = pack(e[2] - clear_of(there, 0), e[3] - clear_of(there, 1));
#pragma unroll
                    for (int i = 0; i < 4; i++) weighed[i] = multiply(rows[i], i % 2 ? there : here);
                    count += row_sum(e[0] + e[1] + e[2] + e[3]);
                }
#pragma unroll
                for (int block = 0; block < 2; block++) {
                    const u32 low = rows[2 * block], high = rows[2 * block + 1];
                    mma(Z[block], weighed[0], weighed[2], weighed[1], weighed[3], low, high);
                    mma(zk[block], here, here_rest, there, there_rest, low, high);
                }
            }
        }
        leave();
    }

#if FINAL
    bool ends = true;
    i64 slot = segment;
    if (FINAL == 1) {
        slot = document;
        ends = REVERSE ? first == 0 : last == length && (chunks > 0 || first == 0);
    }
    if (ends && h % g.state_group == 0) {
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int n = 8 * group + pair + i % 2, v = 16 * warp + row + i / 2 * 8, p = shared.places[n];
                if (p >= 0) g.S_out[slot * g.S_n + head * g.S_h + p * g.S_p + v] = S[group][i] * shared.factors[n];
            }
        }
        if (SUMS && warp == 0) {
            float* to = g.z_out + slot * g.z_n + head * g.z_h;
            if (lane == 0) to[0] = count;
#pragma unroll
            for (int block = 0; block < 2; block++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int j = 8 * block + pair + i % 2, k = row + i / 2 * 8;
                    if (row == 0 && i < 2) to[1 + j] = (zk[block][i] + zk[block][i + 2]) / order;
                    if (j <= k) to[place_of(j, k)] = Z[block][i] / (order * order) * (j == k ? 0.70710678118654752f : 1.f);
                }
        }
    }
#endif
}
