// out_t = gradient in r_t of  sum over s of w(r_t, x_s) (w_t . y_s + d_t e_s),  s up to t (or from t on: REVERSE).
//
//     dq     source (k, v, 1), reader (q, do, delta), divided by den
//     dk     source (q, do / den, delta / den), reader (k, v, 1), REVERSE
//
// One block a (head, segment), a warp for each 16 value columns, V tokens a chunk, like value_sweep.cu. Of a chunk a warp
//     makes the products of 16 sources, for all warps to use;
//     finds the gradients of 16 readers: w times the state, which all warps left in shared memory, is the gradient of the
//     reader's products, and by the chain rule, in registers, of the reader; then that of the weights inside the chunk;
//     adds all sources to its own 16 columns of the state, [16, 160] in registers, and leaves them in 16 bits.
// A reader's gradient is whole in one warp, so that no parts meet. Two warps for each 16 columns, of 80 products each, hide
// more of each other's waits, but both read the values, and half of each gradient changes warps: 0.26 and 0.29 ms where
// one took 0.21 and 0.22 (dq and dk of 32 x 2048, 16 heads, V 64).
// What the normaliser adds is the gradient of the quadratic form of value_sweep.cu, delta scale (zk + scale Z q): Z and zk
// are kept by the warp that has least to do inside the chunk.
//
// WIDE (V = 64, capability 9.0): the products with the state are wgmma's, which read shared memory once for four warps.
//
// Defined where compiled: V, HALF_IS_BF16, WIDE, RESIDENT (blocks on a multiprocessor), ONES, REVERSE, NORMALIZE, PACKED,
// SPLIT, INITIAL, FINAL (0 or 1: the state after each document, which in reverse is the gradient of the initial one).

// Two stages of readers do not fit at V = 96 on capability 8.0, V = 128 on 9.0: the one is fetched when all have read it.
#define READER_STAGES (V > 80 ? 1 : 2)
#define FORM (NORMALIZE || (REVERSE && (INITIAL || FINAL)))
#define FORMS (NORMALIZE ? 2 : 1)

struct Arguments {
    const u16 *x, *y, *r, *w;
    u16* out;
    const float *share, *delta, *S_in, *z_in;
    float *S_out, *z_out;
    const int *cu_seqlens, *segment_document, *segment_start;
    i64 x_n, x_t, x_h, y_n, y_t, y_h, r_n, r_t, r_h, w_n, w_t, w_h, out_n, out_t, out_h, share_n, share_h;
    i64 in_n, in_h, in_p, zin_n, zin_h, S_n, S_h, S_p, z_n, z_h;
    int tokens, segment_tokens, per_row, part, x_group, y_group, r_group, w_group, state_group;
    float scale;
};

// Of a chunk: x, y and share, or r, w and delta.
struct Stage {
    u16 features[CHUNK * ROW_X], values[CHUNK * ROW_Y];
    float scalars[CHUNK];
};

struct Shared {
    Stage sources[STAGES], readers[READER_STAGES];
    Products products;
    // Of each warp's columns fragments of two groups at a time; WIDE: pieces [8 columns][group].
    Quad state[WARPS][PAIRS][32];
    // For this chunk's readers and the next one's.
    FormOperand forms[FORMS];
    float lifts[WARPS], sums[12][32];
    Layout layout;
};

// The gradient of two readers from that of their products, as an accumulator has both: tokens lane / 4 and 8 on, dims
// 2 (lane % 4) + {0, 1} of a block.
struct Chain {
    // [block][lanes ahead of this one that it belongs to]: what is another lane's goes there when it is known whole.
    float to[2][4][4] = {}, linear[2][4];
    DEVICE void add(int group, const float (&c)[4], const ReaderFeatures (&r)[2]) {
        const int left = group >= 5 && group < 10, right = group >= 5, d = group < 10 ? group % 5 : group - 10;
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int i = n % 2, token = n / 2;
            if (group >= 18) {
                linear[group - 18][n] = c[n];
                continue;
            }
            // The constant stands where group 4 has no product.
            const float gradient = group == 4 && !r[token].keep ? 0.f : c[n];
            to[left][0][n] += gradient * clear_of(right ? r[token].b[d] : r[token].a[d], i);
            // A square weighs 1/2 and has one factor twice: once is enough.
            if (left != right || d > 0)
                to[right][(i + d) / 2 % 4][2 * token + (i + d) % 2] +=
                    gradient * clear_of(left ? r[token].b[0] : r[token].a[0], i);
        }
    }
    // o[block] = the gradient over scale.
    DEVICE void gather(float scale, int lane, float (&o)[2][4]) const {
#pragma unroll
        for (int block = 0; block < 2; block++)
#pragma unroll
            for (int n = 0; n < 4; n++) {
                float sum = to[block][0][n];
                // Products of a with a end at d = 4, two lanes ahead.
#pragma unroll
                for (int ahead = 1; ahead < (block ? 4 : 3); ahead++)
                    sum += shuffle(to[block][ahead][n], (lane & ~3) + ((lane - ahead) & 3));
                o[block][n] = linear[block][n] + scale * sum;
            }
    }
};

EXTERN void __launch_bounds__(THREADS, RESIDENT) key_sweep(const Arguments g) {
    DYNAMIC_SHARED(Shared, shared);
    const int warp = warp_index(), lane = thread_index() % 32, row = lane / 4, pair = 2 * (lane % 4);
    const int h = block_index(0);
    const i64 segment = block_index(1);

    const Span span = span_of(g, segment);
    if (span.idle) return;
    const i64 batch = span.batch, begin = span.begin;
    const int last = span.last, chunks = span.chunks, start = span.start, stride = span.stride;
    const i64 at_share = batch * g.share_n + begin + h * g.share_h;

    // What this thread fetches of each chunk, in pieces of 16 bytes: one of x and r, and one of y and w every 16 tokens.
    const int x_token = thread_index() / 2, x_column = thread_index() % 2 * 8;
    const int y_token = thread_index() / (V / 8), y_column = thread_index() % (V / 8) * 8;
    const u16* x = g.x + batch * g.x_n + (begin + start + x_token) * g.x_t + (h / g.x_group) * g.x_h + x_column;
    const u16* r = g.r + batch * g.r_n + (begin + start + x_token) * g.r_t + (h / g.r_group) * g.r_h + x_column;
    const u16* y = g.y + batch * g.y_n + (begin + start + y_token) * g.y_t + (h / g.y_group) * g.y_h + y_column;
    const u16* w = g.w + batch * g.w_n + (begin + start + y_token) * g.w_t + (h / g.w_group) * g.w_h + y_column;
    auto fetch = [&](int step, Stage& to, const u16*& features, i64 features_t, const u16*& values, i64 values_t,
                     const float* scalars) {
        if (step >= chunks) return;
        const int left = last - (start + step * stride);
        copy_16(to.features + x_token * ROW_X + x_column, features, x_token < left);
#pragma unroll
        for (int i = 0; i < WARPS; i++)
            copy_16(to.values + (y_token + 16 * i) * ROW_Y + y_column, values + 16 * i * values_t, y_token + 16 * i < left);
        features += stride * features_t;
        values += stride * values_t;
        const int t = thread_index();
        if (NORMALIZE && t < CHUNK)
            copy_4(to.scalars + t, scalars + at_share + (t < left ? start + step * stride + t : 0), t < left);
    };
    auto fetch_sources = [&](int step) { fetch(step, shared.sources[step % STAGES], x, g.x_t, y, g.y_t, g.share); };
    auto fetch_readers = [&](int step) { fetch(step, shared.readers[step % READER_STAGES], r, g.r_t, w, g.w_t, g.delta); };

    shared.layout.fill(g.scale);
    sync_block();

    const i64 head = h / g.state_group;
    float S[GROUPS][4] = {};
    if (INITIAL) load_state(S, g.S_in + segment * g.in_n + head * g.in_h + 16 * warp, g.in_p, shared.layout, lane);

    // Blocks take their readers in opposite orders, so that the warp with most weights is not always on one scheduler.
    const int reader = h % 2 ? WARPS - 1 - warp : warp;
    const bool forms = FORM && reader == (REVERSE ? WARPS - 1 : 0);
    const float order = REVERSE ? 1.f / g.scale : 1.f;
    float count = 0.f;

    // Keeps Z and zk, and leaves them for the readers of chunk `step`.
    auto leave_form = [&](const Form& form, int step) {
        form.keep(shared.sums, lane);
        shared.forms[step % FORMS].fill(form, lane);
    };
    if (forms) {
        Form form = {};
#if INITIAL
        const float* from = g.z_in + segment * g.zin_n + head * g.zin_h;
        count = from[0];
        form.load(from, order, lane);
#endif
        leave_form(form, 0);
    }

    // Leaves this warp's columns of the state for the next chunk's readers.
    auto leave = [&] {
        const float lift = lift_of(S), less = 1.f / lift;
        if (!HALF_IS_BF16) shared.lifts[warp] = lift;
#pragma unroll
        for (int m = 0; m < PAIRS; m++) {
            u32 held[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                held[i] = pack(S[2 * m + i / 2][i % 2 * 2] * less, S[2 * m + i / 2][i % 2 * 2 + 1] * less);
#if WIDE
            const int columns = 2 * warp + lane / 8 % 2, group = 2 * m + lane / 16;
            store_matrix_transposed((Quad*)shared.state + (columns * GROUPS + group) * 8 + lane % 8, held[0], held[1],
                                    held[2], held[3]);
#else
            shared.state[warp][m][lane] =
                Quad{transpose(held[0]), transpose(held[1]), transpose(held[2]), transpose(held[3])};
#endif
        }
        if (WIDE) show_to_wide();
    };

    u16* out = g.out + batch * g.out_n + (begin + start + 16 * reader + row) * g.out_t + h * g.out_h + pair;
#if WIDE
    const Pieces state = describe(shared.state, 128 * GROUPS, 128);
#endif

    leave();
    fetch_sources(0);
    fetch_readers(0);
    commit_copies();
    for (int step = 0; step < chunks; step++) {
        wait_for_copies<0>();
        sync_block();
        const Stage &now = shared.sources[step % STAGES], &reads = shared.readers[step % READER_STAGES];
        const int t0 = start + step * stride;

        const float unit = WEIGHED ? unit_of(now.scalars, lane) : 1.f, per_unit = 1.f / unit;
        {
            u32 rows[4];
            load_matrix_transposed(rows, now.features + 16 * warp * ROW_X + down_first(lane, ROW_X));
            store_products(shared.products, rows, warp, lane);
        }
        // The fence waits for a thread's copies and stores: they are issued behind it, to be done by the next.
        fetch_sources(step + 1);
        if (READER_STAGES > 1) fetch_readers(step + 1);
        commit_copies();

        {
            u32 rows[4], columns[WARPS][4];
            load_matrix(rows, reads.features + 16 * reader * ROW_X + down_first(lane, ROW_X));
#pragma unroll
            for (int k = 0; k < WARPS; k++)
                load_matrix(columns[k], reads.values + 16 * reader * ROW_Y + down_first(lane, ROW_Y) + 16 * k);
            float o[2][4];
            {
                float lift = 1.f;
                u32 left[WARPS][4];
#pragma unroll
                for (int i = 0; i < 4 * WARPS; i++) left[i / 4][i % 4] = columns[i / 4][i % 4];
#if !HALF_IS_BF16
                // Each warp's columns of the state were divided by their own lift.
#pragma unroll
                for (int k = 0; k < WARPS; k++) lift = fmaxf(lift, shared.lifts[k]);
#pragma unroll
                for (int k = 0; k < WARPS; k++) {
                    const float part = shared.lifts[k] / lift;
#pragma unroll
                    for (int i = 0; i < 4; i++) left[k][i] = multiply(left[k][i], pack(part, part));
                }
#endif
                ReaderFeatures r[2];
                r[0].rotate(rows[0], rows[2], lane, g.scale);
                r[1].rotate(rows[1], rows[3], lane, g.scale);
                Chain chain;
#if WIDE
                // In halves: all products' gradients at once would be 80 registers beside the state's 80.
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float c[PAIRS][4];
                    wide_begin();
#pragma unroll
                    for (int k = 0; k < WARPS; k++)
                        wide_mma(c, left[k], ahead(state, 128 * (2 * k * GROUPS + half * PAIRS)), k == 0);
                    wide_commit();
                    wide_wait(c);
#pragma unroll
                    for (int n = 0; n < PAIRS; n++) chain.add(half * PAIRS + n, c[n], r);
                }
#else
#pragma unroll
                for (int m = 0; m < PAIRS; m++) {
                    float low[4], high[4];
#pragma unroll
                    for (int k = 0; k < WARPS; k++) {
                        const u32(&a)[4] = left[k];
                        const Quad held = shared.state[k][m][lane];
                        if (k == 0) {
                            mma_first(low, a[0], a[1], a[2], a[3], held.x, held.y);
                            mma_first(high, a[0], a[1], a[2], a[3], held.z, held.w);
                        } else {
                            mma(low, a[0], a[1], a[2], a[3], held.x, held.y);
                            mma(high, a[0], a[1], a[2], a[3], held.z, held.w);
                        }
                    }
                    chain.add(2 * m, low, r);
                    chain.add(2 * m + 1, high, r);
                }
#endif
                chain.gather(g.scale, lane, o);
#pragma unroll
                for (int i = 0; i < 8; i++) o[i / 4][i % 4] *= lift * per_unit;
            }

            for (int s = REVERSE ? reader : 0; s < (REVERSE ? WARPS : reader + 1); s++) {
                u32 source[4], weights[4];
                load_matrix(source, now.features + 16 * s * ROW_X + across_first(lane, ROW_X));
                float dp[2][4];
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    dp[i / 4][i % 4] = 0.f;
#if NORMALIZE
                    const int at_source = 16 * s + i / 4 * 8 + pair + i % 2, at_reader = 16 * reader + row + i % 4 / 2 * 8;
                    dp[i / 4][i % 4] = reads.scalars[REVERSE ? at_source : at_reader];
#endif
                }
#pragma unroll
                for (int k = 0; k < WARPS; k++) {
                    const u32(&a)[4] = columns[k];
                    u32 values[4];
                    load_matrix(values, now.values + 16 * s * ROW_Y + across_first(lane, ROW_Y) + 16 * k);
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        mma(dp[half], a[0], a[1], a[2], a[3], values[2 * half], values[2 * half + 1]);
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float u[4];
                    mma_first(u, rows[0], rows[1], rows[2], rows[3], source[2 * half], source[2 * half + 1]);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int at_reader = row + i / 2 * 8, at_source = 8 * half + pair + i % 2;
                        u[i] = dp[half][i] * (u[i] * g.scale + 1.f);
#if WEIGHED
                        u[i] *= now.scalars[16 * s + at_source] * per_unit;
#endif
                        const bool seen = REVERSE ? at_source >= at_reader : at_source <= at_reader;
                        if (s == reader && !seen) u[i] = 0.f;
                    }
                    weights[2 * half] = pack(u[0], u[1]);
                    weights[2 * half + 1] = pack(u[2], u[3]);
                }
                load_matrix_transposed(source, now.features + 16 * s * ROW_X + down_first(lane, ROW_X));
#pragma unroll
                for (int block = 0; block < 2; block++)
                    mma(o[block], weights[0], weights[1], weights[2], weights[3], source[2 * block], source[2 * block + 1]);
            }

#pragma unroll
            for (int block = 0; block < 2; block++) {
#if FORM
                const FormOperand& form = shared.forms[step % FORMS];
                const Two linear = form.linear[4 * block + pair / 2];
                float read[4];
                form.times_Z(read, rows, block, lane);
#endif
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int t = 16 * reader + 8 * half + row;
                    const float times = NORMALIZE && !REVERSE ? g.scale * now.scalars[t] : g.scale;
                    float total[2];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        total[i] = o[block][2 * half + i] * unit;
#if FORM
                        const float whole =
                            (i ? linear.second : linear.first) + g.scale * (form.lifted() * read[2 * half + i]);
                        total[i] += REVERSE ? whole : whole * reads.scalars[t];
#endif
                    }
                    if (t0 + t < last)
                        *(u32*)(out + 8 * half * g.out_t + 8 * block) = pack(total[0] * times, total[1] * times);
                }
            }
            out += stride * g.out_t;
        }
        if (NORMALIZE && forms) {
            Form sums;
            sums.recall(shared.sums, lane);
#pragma unroll
            for (int s = 0; s < WARPS; s++) {
                u32 others[4];
                load_matrix_transposed(others, now.features + 16 * s * ROW_X + down_first(lane, ROW_X));
                sums.add(others, now.scalars + 16 * s, reads.scalars + 16 * s, count, lane);
            }
            if (!REVERSE) count += min(CHUNK, last - t0);
            leave_form(sums, step + 1);
        }
        sync_block();
        if (READER_STAGES == 1) {
            fetch_readers(step + 1);
            commit_copies();
        }

        u32 values[WARPS][4];
        load_values(values, now.values, now.scalars, per_unit, warp, lane);
        multiply_all(S, per_unit);
        add_products(S, values, shared.products, lane);
#if WIDE
        wide_wait(S);
#endif
        multiply_all(S, unit);
        leave();
    }

#if FINAL
    if (span.ends() && h % g.state_group == 0) {
        store_state(S, g.S_out + span.document * g.S_n + head * g.S_h + 16 * warp, g.S_p, shared.layout, lane);
        if (forms) {
            float* to = g.z_out + span.document * g.z_n + head * g.z_h;
            if (lane == 0) to[0] = count;
            Form form;
            form.recall(shared.sums, lane);
            form.store(to, order, lane);
        }
    }
#endif
}
