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

struct Arguments {
    const u16 *x, *y, *r;
    u16* out;
    float* share;  // 1 / den
    const float *delta, *S_in, *z_in;
    float *S_out, *z_out;
    const int *cu_seqlens, *segment_document, *segment_start;
    i64 x_n, x_t, x_h, y_n, y_t, y_h, r_n, r_t, r_h, out_n, out_t, out_h, share_n, share_h;
    i64 in_n, in_h, in_p, zin_n, zin_h, S_n, S_h, S_p, z_n, z_h;
    int tokens, segment_tokens, per_row, part, x_group, y_group, r_group, state_group;
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
    Products products;
#if OUTPUT
    // Fragments of two groups at a time; WIDE: pieces [group][8 columns].
    Quad state[PAIRS][V / 16][32];
    u16 slabs[WARPS][16 * ROW_Y];
    // For this chunk's readers and the next one's.
    FormOperand forms[2];
    float lifts[V / 16];
#endif
    // Sums of one warp, or without OUTPUT of each.
    float sums[OUTPUT ? 1 : WARPS][12][32], counts[WARPS];
    Layout layout;
};

EXTERN void __launch_bounds__(THREADS, RESIDENT) value_sweep(const Arguments g) {
    DYNAMIC_SHARED(Shared, shared);
    const int warp = warp_index(), lane = thread_index() % 32, row = lane / 4, pair = 2 * (lane % 4);
    const int h = block_index(0);
    const i64 segment = block_index(1);

    const Span span = span_of(g, segment);
    if (span.idle) return;
    const i64 batch = span.batch, begin = span.begin;
    const int last = span.last, chunks = span.chunks, start = span.start, stride = span.stride;
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
    shared.layout.fill(g.scale);
    sync_block();

    const i64 head = h / g.state_group;
    float S[GROUPS][4] = {};
    if (INITIAL && keeps)
        load_state(S, g.S_in + segment * g.in_n + head * g.in_h + 16 * warp, g.in_p, shared.layout, lane);
    Form form = {};
    float count = 0.f;
    const float order = REVERSE ? 1.f / g.scale : 1.f;
#if INITIAL && SUMS
    {
        const float* from = g.z_in + segment * g.zin_n + head * g.zin_h;
        count = from[0];
        form.load(from, order, lane);
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
        form.keep(shared.sums[0], lane);
        shared.forms[step % 2].fill(form, lane);
#endif
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
#if WIDE && OUTPUT
    const Pieces state = describe(shared.state, 16 * V, 128);
#endif

    leave();
    if (SUMS && forms) leave_form(form, 0);
    for (int step = 0; step < chunks; step++) {
        wait_for_copies<0>();
        sync_block();
        const Stage& now = shared.stages[step % STAGES];
        const int t0 = start + step * stride;

        const float unit = WEIGHED ? unit_of(now.share, lane) : 1.f, per_unit = 1.f / unit;
#if OUTPUT
        float o[V / 8][4];
        u32 read[4];
        load_matrix(read, now.r + 16 * reader * ROW_X + down_first(lane, ROW_X));
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
        load_matrix_transposed(rows, now.x + 16 * warp * ROW_X + down_first(lane, ROW_X));
        store_products(shared.products, rows, warp, lane);
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
                for (int i = 0; i < 4; i++) o[j][i] *= shared.lifts[j / 2] * per_unit;
#endif
            // Weights of one or two blocks of 16 sources, times their values.
            auto inside = [&](int first_source, int blocks) __attribute__((always_inline)) {
                const Spot from = spot_of(now.y + 16 * first_source * ROW_Y + down_first(lane, ROW_Y));
                u32 weights[2][4];
#pragma unroll
                for (int k = 0; k < blocks; k++) {
                    const int s = first_source + k;
                    u32 source[4];
                    load_matrix(source, now.x + 16 * s * ROW_X + across_first(lane, ROW_X));
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float u[4], share[2] = {1.f, 1.f};
#if WEIGHED
#pragma unroll
                        for (int i = 0; i < 2; i++) share[i] = now.share[16 * s + 8 * half + pair + i] * per_unit;
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
            float terms[2] = {0.f, 0.f};
            const FormOperand& here = shared.forms[step % 2];
#pragma unroll
            for (int block = 0; block < 2; block++) {
                float c[4];
                here.times_Z(c, read, block, lane);
                const Two linear = here.linear[4 * block + pair / 2];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    terms[i / 2] += clear_of(read[2 * block + i / 2], i % 2) *
                                   ((i % 2 ? linear.second : linear.first) + 0.5f * g.scale * here.lifted() * c[i]);
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
                load_matrix_transposed(others, spot_of(now.x + down_first(lane, ROW_X)) + 32 * ROW_X * s);
                sums.add(others, now.share + 16 * s, now.delta + 16 * s, count, lane);
            }
            leave_form(sums, step + 1);
        }
#endif
        sync_block();
        if (!REVERSE) count += min(CHUNK, last - t0);

        u32 values[WARPS][4];
        load_values(values, now.y, now.share, per_unit, warp, lane);
        multiply_all(S, per_unit);
        add_products(S, values, shared.products, lane);
        if (SUMS && !OUTPUT && (NORMALIZE || !REVERSE))
            form.add(rows, now.share + 16 * warp, now.delta + 16 * warp, count, lane);
#if WIDE
        wide_wait(S);
#endif
        multiply_all(S, unit);
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
    const bool ends = FINAL == 2 || span.ends();
    const i64 slot = FINAL == 2 ? segment : span.document;
    if (ends && h % g.state_group == 0) {
        if (keeps) store_state(S, g.S_out + slot * g.S_n + head * g.S_h + 16 * warp, g.S_p, shared.layout, lane);
        if (SUMS && (OUTPUT ? forms : warp == 0)) {
            float* to = g.z_out + slot * g.z_n + head * g.z_h;
            if (lane == 0) to[0] = count;
            form.store(to, order, lane);
        }
    }
#endif
}
