// out_t = sum over s of w(r_t, x_s) y_s, s up to t (or from t on: REVERSE), w = 1 + u + u^2/2, u = scale r . x.
//
//     y      source (k, v), reader q, divided by the sum of weights (NORMALIZE)
//     dv     source (q, do / den), reader k, REVERSE
//     sums   of a source, without a reader (no OUTPUT): what a segment adds to the state
//
// One block a (head, segment), a warp for each 16 value columns, 16 tokens a warp in a chunk. Of a chunk every warp
//     makes the products of 16 sources, for all warps to use;
//     finds the outputs of 16 readers: products of the readers times the state, which all warps left in shared memory,
//     then weights inside the chunk times values, and the divisor;
//     adds all sources to its own 16 columns of the state, [16, 160] in registers, and leaves them in 16 bits.
// What z . phi(q) reads (SUMS) is a quadratic form, n + q . zk + q Z q / 2, of which Z and zk are sums of e x x^T and e x:
// products of fragments that are there already, since Z is symmetric. The warp with least to read inside a chunk keeps
// them; without OUTPUT each warp sums up its own 16 tokens, and the warps' sums are added at the end.
//
// WIDE (capability 9.0): the products with the state are wgmma's, which read shared memory once for four warps. There are
// as many warps as make whole fours: those beyond V's columns make products and outputs, and keep no state. Readers'
// products are under way while the sources' are made.
//
// Defined where compiled: V, HALF_IS_BF16, WIDE, RESIDENT (blocks on a multiprocessor), ONES, REVERSE, NORMALIZE, SUMS, OUTPUT,
// PACKED, SPLIT, INITIAL, FINAL (0 nothing, 1 after each document, 2 after each segment).

#define CHUNK (WIDE ? (V + 63) / 64 * 64 : V)
#define WARPS (CHUNK / 16)
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

// Z[block] at dims (row and row + 8, 8 block + pair), and zk at dims row and row + 8, in two parts where pair is 0.
struct Form {
    float Z[2][4], zk[4];
    DEVICE void keep(float (*to)[32], int lane) const {
#pragma unroll
        for (int i = 0; i < 12; i++) to[i][lane] = i < 8 ? Z[i / 4][i % 4] : zk[i - 8];
    }
    DEVICE void recall(const float (*from)[32], int lane) {
#pragma unroll
        for (int i = 0; i < 12; i++) (i < 8 ? Z[i / 4][i % 4] : zk[i - 8]) = from[i][lane];
    }
};

struct Shared {
    Stage stages[STAGES];
    // Fragments of two groups at a time; WIDE: pieces [8 tokens][group] and, of the state, [group][8 columns].
    Quad products[WARPS][PAIRS][32];
#if OUTPUT
    Quad state[PAIRS][V / 16][32];
    u16 slabs[WARPS][16 * ROW_Y];
    // For this chunk's readers and the next one's: Z as second operand, lane by lane, rounded and what that lost; zk.
    u32 form[2][8][32];
    Two linear[2][8];
    float form_lift[2], lifts[V / 16];
#endif
    // Sums of one warp, or without OUTPUT of each.
    float sums[OUTPUT ? 1 : WARPS][12][32], counts[WARPS];
    int places[8 * GROUPS];
    // What the State has of an entry of S, and the other way.
    float shares[8 * GROUPS], wholes[8 * GROUPS];
};

EXTERN void __launch_bounds__(THREADS, RESIDENT) value_sweep(const Arguments g) {
    DYNAMIC_SHARED(Shared, shared);
    const int warp = warp_index(), lane = thread_index() % 32, row = lane / 4, pair = 2 * (lane % 4);
    const int h = block_index(0);
    const i64 segment = block_index(1);

    const Span span = span_of(g, segment);
    const i64 document = span.document, batch = span.batch, begin = span.begin;
    const int length = span.length, first = span.first, last = span.last;
    const int chunks = max((last - first + CHUNK - 1) / CHUNK, 0);
    const int start = first + (REVERSE ? (chunks - 1) * CHUNK : 0), stride = REVERSE ? -CHUNK : CHUNK;
    const i64 at_share = batch * g.share_n + begin + h * g.share_h;

    // Which columns of the state this warp keeps, if any.
    const bool keeps = CHUNK == V || 16 * warp < V;

    // What this thread fetches of each chunk, in pieces of 16 bytes: one of x, one of r, and one of y every 16 tokens.
    const int x_token = thread_index() / 2, x_column = thread_index() % 2 * 8;
    const int y_token = thread_index() / (CHUNK / 8), y_column = thread_index() % (CHUNK / 8) * 8;
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
            copy_16(to.x + x_token * ROW_X + x_column, x, live);
            x += stride * g.x_t;
#if OUTPUT
            copy_16(to.r + x_token * ROW_X + x_column, r, live);
            r += stride * g.r_t;
#endif
            if (CHUNK == V || y_column < V) {
#pragma unroll
                for (int i = 0; i < WARPS; i++)
                    copy_16(spot_of(to.y + y_token * ROW_Y + y_column) + 32 * ROW_Y * i, y + 16 * i * g.y_t,
                            y_token + 16 * i < left);
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

    fetch(0);
    for (int i = thread_index(); i < 8 * GROUPS; i += THREADS) {
        float share;
        shared.places[i] = place(i / 8, i % 8, share);
        // In reverse the State's gradient is that of phi(scale q), but the sums are of phi(q): scale is put on the reader.
        if (REVERSE) share *= weight_of(i / 8, i % 8, g.scale);
        shared.shares[i] = share;
        shared.wholes[i] = 1.f / share;
    }
    sync_block();

    const i64 head = h / g.state_group;
    float S[GROUPS][4];
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int n = 8 * group + pair + i % 2, v = 16 * warp + row + i / 2 * 8;
            const int p = INITIAL && keeps ? shared.places[n] : -1;
            S[group][i] = p < 0 ? 0.f : g.S_in[segment * g.in_n + head * g.in_h + p * g.in_p + v] * shared.wholes[n];
        }
    }
    Form form = {};
    float count = 0.f;
    const float order = REVERSE ? 1.f / g.scale : 1.f;
#if INITIAL && SUMS
    {
        const float* from = g.z_in + segment * g.zin_n + head * g.zin_h;
        count = from[0];
        load_form(form.Z, from, order, lane);
#pragma unroll
        for (int half = 0; half < 2; half++) form.zk[2 * half] = from[1 + row + 8 * half] * order;
    }
#endif

    // Leaves this warp's columns of the state for the next chunk's readers.
    auto leave = [&] {
#if OUTPUT
        if (!keeps) return;
        const float lift = lift_of(S), less = 1.f / lift;
        if (!HALF_IS_BF16) shared.lifts[warp] = lift;
        const Spot to = spot_of((Quad*)shared.state + (lane / 16 * (V / 8) + 2 * warp + lane / 8 % 2) * 8 + lane % 8);
#pragma unroll
        for (int m = 0; m < PAIRS; m++) {
            const float(&a)[4] = S[2 * m], (&b)[4] = S[2 * m + 1];
            const Quad held = {pack(a[0] * less, a[1] * less), pack(b[0] * less, b[1] * less),
                               pack(a[2] * less, a[3] * less), pack(b[2] * less, b[3] * less)};
            if (WIDE) {
                store_matrix(to + 32 * V * m, held.x, held.z, held.y, held.w);
            } else {
                shared.state[m][warp][lane] = held;
            }
        }
        if (WIDE) show_to_wide();
#endif
    };

    // Keeps Z and zk, and leaves them for the readers of chunk `step`.
    auto leave_form = [&](const Form& form, int step) {
#if OUTPUT
        const float(&Z)[2][4] = form.Z, (&zk)[4] = form.zk;
        form.keep(shared.sums[0], lane);
        const float lift = lift_of(Z), shrink = 1.f / lift;
        if (!HALF_IS_BF16) shared.form_lift[step % 2] = lift;
        u32(*to)[32] = shared.form[step % 2];
        // Z's rows, as they are held, are its columns, as they are wanted.
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int block = i / 2, side = i % 2;
            const float a = Z[side][2 * block] * shrink, b = Z[side][2 * block + 1] * shrink;
            const u32 rounded = pack(a, b);
            to[4 * block + side][lane] = rounded;
            to[4 * block + 2 + side][lane] = pack(a - clear_of(rounded, 0), b - clear_of(rounded, 1));
        }
        if (pair == 0) {
            float* linear = (float*)shared.linear[step % 2];
            linear[row] = zk[0] + zk[1];
            linear[row + 8] = zk[2] + zk[3];
        }
#endif
    };

    // Adds 16 tokens' e x x^T, e x and e to Z, zk and n. rows: x^T of tokens 16 s on, of stage `now`, as load_matrix_transposed
    // gives them; zeros behind the end, so that e need not say which tokens there are.
    auto sum_up = [&](Form& form, const u32 (&rows)[4], const Stage& now, int s) {
        u32 weighed[4] = {rows[0], rows[1], rows[2], rows[3]}, ends[2] = {ONES, ONES};
#if WEIGHED
        float e[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int t = 16 * s + pair + i % 2 + i / 2 * 8;
            e[i] = now.delta[t] * now.share[t];
        }
        count += row_sum(e[0] + e[1] + e[2] + e[3]);
        // e in two parts: what 16 bits hold, and in the columns of odd rows what that lost.
        ends[0] = pack(e[0], e[1]);
        ends[1] = pack(e[2], e[3]);
#pragma unroll
        for (int i = 0; i < 4; i++) weighed[i] = multiply(rows[i], ends[i % 2]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u32 rest = pack(e[2 * i] - clear_of(ends[i], 0), e[2 * i + 1] - clear_of(ends[i], 1));
            ends[i] = row % 2 ? rest : ends[i];
        }
#else
        // The second part is nothing.
        if (row % 2) ends[0] = ends[1] = 0u;
#endif
        mma(form.Z[0], weighed[0], weighed[2], weighed[1], weighed[3], rows[0], rows[1]);
        mma(form.Z[1], weighed[0], weighed[2], weighed[1], weighed[3], rows[2], rows[3]);
        mma(form.zk, rows[0], rows[2], rows[1], rows[3], ends[0], ends[1]);
    };

    // Warps w and w + 4 are on one scheduler: of eight, those two read as much as any other two. Blocks take their readers in
    // opposite orders, so that the warp with most weights is not always on one scheduler.
    const int in_order = WARPS == 8 && warp >= 4 ? 11 - warp : warp, reader = h % 2 ? WARPS - 1 - in_order : in_order;
    const bool forms = reader == 0;
    // The triangle within a diagonal block of weights: source pair, pair + 1 against reader row.
    const u32 reads = REVERSE ? (pair >= row ? 0xffffu : 0u) | (pair + 1 >= row ? 0xffff0000u : 0u)
                              : (pair <= row ? 0xffffu : 0u) | (pair + 1 <= row ? 0xffff0000u : 0u);
#if OUTPUT
    u16* slab = shared.slabs[warp];
    u16* out = g.out + batch * g.out_n + (begin + start + 16 * reader + lane / (V / 8)) * g.out_t + h * g.out_h +
               lane % (V / 8) * 8;
    // Writes this warp's outputs of chunk `step`, which wait in its slab.
    auto write = [&](int step) {
        // V / 8 lanes a token; those that are no whole token are idle.
        const int together = 32 / (V / 8), t = lane / (V / 8), c = lane % (V / 8) * 8;
        const int left = last - (start + step * stride + 16 * reader);
#pragma unroll
        for (int i = 0; i < 16; i += together)
            if (t < min(together, 16 - i) && i + t < left) copy_out(out + i * g.out_t, slab + (i + t) * ROW_Y + c);
        out += stride * g.out_t;
        sync_warp();
    };
#endif
#if WIDE
    const Pieces products = describe(shared.products, 128 * GROUPS, 128);
#if OUTPUT
    const Pieces state = describe(shared.state, 16 * V, 128);
#endif
#endif

    leave();
    if (SUMS && forms) leave_form(form, 0);
    for (int step = 0; step < chunks; step++) {
        wait_for_copies<0>();
        sync_block();
        const Stage& now = shared.stages[step % STAGES];
        const int t0 = start + step * stride;

        const float unit = WEIGHED ? unit_of(now.share, CHUNK, lane) : 1.f;
#if OUTPUT
        float o[V / 8][4];
        u32 read[4];
        load_matrix(read, now.r + (16 * reader + lane % 16) * ROW_X + lane / 16 * 8);
        {
            ReaderFeatures phi[2];
            phi[0].rotate(read[0], read[2], lane, g.scale);
            phi[1].rotate(read[1], read[3], lane, g.scale);
#if WIDE
            u32 a[PAIRS][4];
#pragma unroll
            for (int m = 0; m < PAIRS; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) a[m][i] = phi[i % 2][2 * m + i / 2];
            wide_begin();
#pragma unroll
            for (int m = 0; m < PAIRS; m++) wide_mma(o, a[m], ahead(state, 32 * V * m), m == 0);
            wide_commit();
#else
#pragma unroll
            for (int m = 0; m < PAIRS; m++) {
                const u32 a0 = phi[0][2 * m], a1 = phi[1][2 * m], a2 = phi[0][2 * m + 1], a3 = phi[1][2 * m + 1];
#pragma unroll
                for (int column = 0; column < V / 16; column++) {
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
#endif

        u32 rows[4];
        load_matrix_transposed(rows, now.x + (16 * warp + lane % 16) * ROW_X + lane / 16 * 8);
#if WIDE
        {
            const Spot to = spot_of((Quad*)shared.products + 2 * warp * GROUPS * 8 + lane);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                SourceFeatures source;
                source.rotate(rows[half], rows[2 + half], lane);
#pragma unroll
                for (int group = 0; group < GROUPS; group += 4)
                    store_matrix(to + 128 * (GROUPS * half + group), source[group], source[group + 1], source[group + 2],
                                 source[group + 3]);
            }
            show_to_wide();
        }
#else
        {
            SourceFeatures early, late;
            early.rotate(rows[0], rows[2], lane);
            late.rotate(rows[1], rows[3], lane);
#pragma unroll
            for (int m = 0; m < PAIRS; m++)
                shared.products[warp][m][lane] = Quad{early[2 * m], late[2 * m], early[2 * m + 1], late[2 * m + 1]};
        }
#endif
        fetch(step + 1);

#if OUTPUT
#if WIDE
        wide_wait(o);
#endif
        {
            float sum[2] = {0.f, 0.f};
#if !HALF_IS_BF16
#pragma unroll
            for (int j = 0; j < V / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) o[j][i] *= shared.lifts[j / 2] / unit;
#endif
            // Weights of one or two blocks of 16 sources, times their values.
            auto inside = [&](int first_source, int blocks) __attribute__((always_inline)) {
                const Spot from = spot_of(now.y + (16 * first_source + lane % 16) * ROW_Y + lane / 16 * 8);
                u32 weights[2][4];
#pragma unroll
                for (int k = 0; k < blocks; k++) {
                    const int s = first_source + k;
                    u32 source[4];
                    load_matrix(source, now.x + (16 * s + lane % 8 + lane / 16 * 8) * ROW_X + lane / 8 % 2 * 8);
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float u[4], share[2] = {1.f, 1.f};
#if WEIGHED
#pragma unroll
                        for (int i = 0; i < 2; i++) share[i] = now.share[16 * s + 8 * half + pair + i] / unit;
#endif
                        mma_first(u, read[0], read[1], read[2], read[3], source[2 * half], source[2 * half + 1]);
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const float plus = u[i] * g.scale + 1.f;
                            u[i] = plus * plus * 0.5f + 0.5f;
                            if (WEIGHED) u[i] *= share[i % 2];
                        }
                        weights[k][2 * half] = pack(u[0], u[1]);
                        weights[k][2 * half + 1] = pack(u[2], u[3]);
                    }
                    if (s == reader) {
                        weights[k][0] &= reads;
                        weights[k][3] &= reads;
                        weights[k][REVERSE ? 1 : 2] = 0u;
                    }
                    if (NORMALIZE && !REVERSE)
#pragma unroll
                        for (int i = 0; i < 4; i++) sum[i % 2] += clear_of(weights[k][i], 0) + clear_of(weights[k][i], 1);
                }
#pragma unroll
                for (int k = 0; k < blocks; k++)
#pragma unroll
                    for (int column = 0; column < V / 16; column++) {
                        const u32(&w)[4] = weights[k];
                        u32 values[4];
                        load_matrix_transposed(values, from + 32 * ROW_Y * k + 32 * column);
                        mma(o[2 * column], w[0], w[1], w[2], w[3], values[0], values[1]);
                        mma(o[2 * column + 1], w[0], w[1], w[2], w[3], values[2], values[3]);
                    }
            };
            // Two blocks at a time, which do not wait for each other.
            int s = REVERSE ? reader : 0;
            const int end = REVERSE ? WARPS : reader + 1;
            if ((end - s) % 2) inside(s++, 1);
            for (; s < end; s += 2) inside(s, 2);
            // Behind the weights, the last chunk's stores cost V = 112 8% less than in front of them (0.559 to 0.606 ms).
            if (step) write(step - 1);
            float divide[2] = {unit, unit};
#if NORMALIZE && !REVERSE
            float terms[2] = {0.f, 0.f}, lift = 1.f;
            const u32(*held)[32] = shared.form[step % 2];
#if !HALF_IS_BF16
            lift = shared.form_lift[step % 2];
#endif
#pragma unroll
            for (int block = 0; block < 2; block++) {
                float c[4];
                mma_first(c, read[0], read[1], read[2], read[3], held[4 * block][lane], held[4 * block + 1][lane]);
                mma(c, read[0], read[1], read[2], read[3], held[4 * block + 2][lane], held[4 * block + 3][lane]);
                const Two linear = shared.linear[step % 2][4 * block + pair / 2];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    terms[i / 2] += clear_of(read[2 * block + i / 2], i % 2) *
                                   ((i % 2 ? linear.second : linear.first) + 0.5f * g.scale * lift * c[i]);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int t = 16 * reader + 8 * half + row;
                const float total = count + row_sum(sum[half] + g.scale * terms[half]);
                divide[half] = reciprocal(total);
                if (pair == 0 && t0 + t < last) g.share[at_share + t0 + t] = divide[half];
            }
#endif
#pragma unroll
            for (int j = 0; j < V / 8; j++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    *(u32*)(slab + (8 * half + row) * ROW_Y + 8 * j + pair) =
                        pack(o[j][2 * half] * divide[half], o[j][2 * half + 1] * divide[half]);
        }
        if (SUMS && forms) {
            Form sums;
            sums.recall(shared.sums[0], lane);
#pragma unroll
            for (int s = 0; s < WARPS; s++) {
                u32 others[4];
                load_matrix_transposed(others, spot_of(now.x + lane % 16 * ROW_X + lane / 16 * 8) + 32 * ROW_X * s);
                sum_up(sums, others, now, s);
            }
            leave_form(sums, step + 1);
        }
#endif
        sync_block();
        if (!REVERSE) count += min(CHUNK, last - t0);

        u32 values[WARPS][4];
        const Spot from = spot_of(now.y + (lane % 8 + lane / 16 * 8) * ROW_Y + 16 * warp + lane / 8 % 2 * 8);
#pragma unroll
        for (int s = 0; s < WARPS; s++) {
            if (!keeps) {
                values[s][0] = values[s][1] = values[s][2] = values[s][3] = 0u;
                continue;
            }
            load_matrix_transposed(values[s], from + 32 * ROW_Y * s);
            if (WEIGHED) weigh(values[s], now.share + 16 * s, unit, lane);
        }
        if (unit != 1.f) {
#pragma unroll
            for (int i = 0; i < 4 * GROUPS; i++) S[i / 4][i % 4] /= unit;
        }
#if WIDE
        wide_begin();
#pragma unroll
        for (int s = 0; s < WARPS; s++) wide_mma(S, values[s], ahead(products, 256 * GROUPS * s), false);
        wide_commit();
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
        if (SUMS && !OUTPUT && (NORMALIZE || !REVERSE)) sum_up(form, rows, now, warp);
#if WIDE
        wide_wait(S);
#endif
        if (unit != 1.f) {
#pragma unroll
            for (int i = 0; i < 4 * GROUPS; i++) S[i / 4][i % 4] *= unit;
        }
        leave();
    }
#if OUTPUT
    if (chunks) write(chunks - 1);
    if (SUMS && forms) form.recall(shared.sums[0], lane);
#else
    form.keep(shared.sums[warp], lane);
    if (lane == 0) shared.counts[warp] = count;
    sync_block();
    for (int other = 1; other < (warp == 0 ? WARPS : 0); other++) {
        Form more;
        more.recall(shared.sums[other], lane);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            form.Z[0][i] += more.Z[0][i];
            form.Z[1][i] += more.Z[1][i];
            form.zk[i] += more.zk[i];
        }
        // Forward each warp has counted all tokens.
        if (REVERSE) count += shared.counts[other];
    }
#endif

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
                if (p >= 0 && keeps) g.S_out[slot * g.S_n + head * g.S_h + p * g.S_p + v] = S[group][i] * shared.shares[n];
            }
        }
        if (SUMS && (OUTPUT ? forms : warp == 0)) {
            float* to = g.z_out + slot * g.z_n + head * g.z_h;
            if (lane == 0) to[0] = count;
            store_form(form.Z, to, order, lane);
            if (pair == 0) {
                to[1 + row] = (form.zk[0] + form.zk[1]) / order;
                to[9 + row] = (form.zk[2] + form.zk[3]) / order;
            }
        }
    }
#endif
}
