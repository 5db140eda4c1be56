// What value_sweep.cu and key_sweep.cu share: how a block walks its tokens, the state that it carries, S and the sums Z and
// zk of the normaliser, and how float16 holds them.
//
// One block a (head, segment), 16 tokens a warp in a chunk and as many warps as there are 16 value columns; WIDE (capability
// 9.0): the products with the state are wgmma's, which four warps make at once, and warps come in whole fours.

#define CHUNK (WIDE ? (V + 63) / 64 * 64 : V)
#define WARPS (CHUNK / 16)
#define THREADS (32 * WARPS)
// A token's 16-bit numbers in shared memory: 16 dims or V value columns, and 16 bytes that keep rows off each other's banks.
#define ROW_X 24
#define ROW_Y (V + 8)
#define STAGES 2
// Sources stand over their divisors.
#define WEIGHED (REVERSE && NORMALIZE)

// Where a lane has its row for load_matrix of a [16, 16] tile's four matrices, the tile's rows `row` numbers apart: those of
// a column first, which makes a first operand of the tile, transposed a second one; or those of a row first, the other way.
DEVICE int down_first(int lane, int row) { return lane % 16 * row + lane / 16 * 8; }
DEVICE int across_first(int lane, int row) { return (lane % 8 + lane / 16 * 8) * row + lane / 8 % 2 * 8; }

// The tokens that a block sweeps: from `first` to `last` of a document that has `length`, from token `begin` of row `batch`
// on; `chunks` chunks from token `start` on, `stride` apart. idle: nothing is to be read or written, since no document needs
// the segment (packed rows have room for more than they can have; its state was never written) or nobody reads what it adds.
struct Span {
    i64 document, batch, begin;
    int length, first, last, chunks, start, stride;
    bool idle;
    // Whether the sweep ends where the document does, and so writes the state after it.
    DEVICE bool ends() const { return REVERSE ? first == 0 : last == length && (chunks > 0 || first == 0); }
};
template <typename Given>
DEVICE Span span_of(const Given& g, i64 segment) {
    Span span = {segment, segment, 0, g.tokens, 0, g.tokens};
#if SPLIT
#if PACKED
    span.document = g.segment_document[segment];
    span.first = g.segment_start[segment];
#else
    span.document = segment / g.per_row;
    span.first = int(segment % g.per_row) * g.segment_tokens;
#endif
#endif
    span.batch = span.document;
#if PACKED
    span.batch = 0;
    span.begin = min(max(g.cu_seqlens[span.document], 0), g.tokens);
    span.length = int(min(max((i64)g.cu_seqlens[span.document + 1], span.begin), (i64)g.tokens) - span.begin);
#endif
    span.last = SPLIT ? min(span.length, span.first + g.segment_tokens) : span.length;
    span.chunks = max((span.last - span.first + CHUNK - 1) / CHUNK, 0);
    span.start = span.first + (REVERSE ? (span.chunks - 1) * CHUNK : 0);
    span.stride = REVERSE ? -CHUNK : CHUNK;
#if SPLIT
    span.idle = PACKED && span.first > 0 && span.first >= span.length;
    if (FINAL == 2 && g.part) {
        // As adds_for_nobody in core/triton_parts.py.
        const int index = span.first / g.segment_tokens, behind = (index / g.part + 1) * g.part;
        span.idle |= REVERSE ? index < g.part : (i64)behind * g.segment_tokens >= span.length;
    }
#endif
    return span;
}

// The power of two that sums are divided by to be held in 16 bits: float16 ends at 65504, which sums over a long text pass.
template <int N>
DEVICE float lift_of(const float (&sums)[N][4]) {
#if HALF_IS_BF16
    return 1.f;
#else
    float most = 1.f;
#pragma unroll
    for (int i = 0; i < 4 * N; i++) most = fmaxf(most, fabsf(sums[i / 4][i % 4]));
    return power_of_two(fmaxf(ceilf(log_of_two(largest(most))) - 14.f, 0.f));
#endif
}

// The largest share's power of two, by which float16 has do / den divided to hold it.
DEVICE float unit_of(const float* shares, int lane) {
#if HALF_IS_BF16
    return 1.f;
#else
    float most = 0.f;
    for (int i = lane; i < CHUNK; i += 32) most = fmaxf(most, shares[i]);
    return power_of_two(ceilf(log_of_two(fmaxf(largest(most), 1e-30f))));
#endif
}

// Where the State keeps each product of S, -1 where it does not; what it has of it, and the other way.
struct Layout {
    int places[8 * GROUPS];
    float shares[8 * GROUPS], wholes[8 * GROUPS];
    DEVICE void fill(float scale) {
        if (!INITIAL && !FINAL) return;
        for (int i = thread_index(); i < 8 * GROUPS; i += THREADS) {
            float share;
            places[i] = place(i / 8, i % 8, share);
            // In reverse the State's gradient is that of phi(scale q), but the sums are of phi(q): scale is the reader's.
            if (REVERSE) share *= weight_of(i / 8, i % 8, scale);
            shares[i] = share;
            wholes[i] = 1.f / share;
        }
    }
};

// A warp's 16 value columns of the state: S[group][i] is of product 8 group + 2 (lane % 4) + i % 2 and of column
// lane / 4 + i / 2 * 8. from, to: the first column of the State's first product, `stride` numbers from one to the next.
DEVICE void load_state(float (&S)[GROUPS][4], const float* from, i64 stride, const Layout& layout, int lane) {
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int n = 8 * group + 2 * (lane % 4) + i, p = layout.places[n];
            const float* at = from + p * stride + lane / 4;
            const bool live = !has_gaps(group) || p >= 0;
            S[group][i] = live ? at[0] * layout.wholes[n] : 0.f;
            S[group][i + 2] = live ? at[8] * layout.wholes[n] : 0.f;
        }
}
DEVICE void store_state(const float (&S)[GROUPS][4], float* to, i64 stride, const Layout& layout, int lane) {
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int n = 8 * group + 2 * (lane % 4) + i, p = layout.places[n];
            if (has_gaps(group) && p < 0) continue;
            float* at = to + p * stride + lane / 4;
            at[0] = S[group][i] * layout.shares[n];
            at[8] = S[group][i + 2] * layout.shares[n];
        }
}

// A chunk's products as second operands: of each warp's 16 sources fragments of two groups at a time; WIDE: pieces
// [8 tokens][group].
typedef Quad Products[WARPS][PAIRS][32];

// rows: a warp's x^T, as load_matrix_transposed gives it.
DEVICE void store_products(Products& products, const u32 (&rows)[4], int warp, int lane) {
#if WIDE
    const Spot to = spot_of((Quad*)products + 2 * warp * GROUPS * 8 + lane);
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
#else
    SourceFeatures early, late;
    early.rotate(rows[0], rows[2], lane);
    late.rotate(rows[1], rows[3], lane);
#pragma unroll
    for (int m = 0; m < PAIRS; m++)
        products[warp][m][lane] = Quad{early[2 * m], late[2 * m], early[2 * m + 1], late[2 * m + 1]};
#endif
}

// A chunk's values of this warp's 16 columns, times factor and the sources' shares where WEIGHED; zeros beyond V.
DEVICE void load_values(u32 (&values)[WARPS][4], const u16* y, const float* shares, float factor, int warp, int lane) {
    const Spot from = spot_of(y + across_first(lane, ROW_Y) + 16 * warp);
#pragma unroll
    for (int s = 0; s < WARPS; s++) {
        if (CHUNK != V && 16 * warp >= V) {
            values[s][0] = values[s][1] = values[s][2] = values[s][3] = 0u;
            continue;
        }
        load_matrix_transposed(values[s], from + 32 * ROW_Y * s);
#if WEIGHED
        float share[4];
#pragma unroll
        for (int i = 0; i < 4; i++) share[i] = shares[16 * s + 2 * (lane % 4) + i % 2 + i / 2 * 8] * factor;
#pragma unroll
        for (int i = 0; i < 4; i++)
            values[s][i] =
                pack(clear_of(values[s][i], 0) * share[i / 2 * 2], clear_of(values[s][i], 1) * share[i / 2 * 2 + 1]);
#endif
    }
}

// Adds a chunk's products times values to S; WIDE: when wide_wait has come back.
DEVICE void add_products(float (&S)[GROUPS][4], const u32 (&values)[WARPS][4], const Products& products, int lane) {
#if WIDE
    const Pieces pieces = describe(products, 128 * GROUPS, 128);
    wide_begin();
#pragma unroll
    for (int s = 0; s < WARPS; s++) wide_mma(S, values[s], ahead(pieces, 256 * GROUPS * s), false);
    wide_commit();
#else
#pragma unroll
    for (int s = 0; s < WARPS; s++)
#pragma unroll
        for (int m = 0; m < PAIRS; m++) {
            const Quad phi = products[s][m][lane];
            mma(S[2 * m], values[s][0], values[s][1], values[s][2], values[s][3], phi.x, phi.y);
            mma(S[2 * m + 1], values[s][0], values[s][1], values[s][2], values[s][3], phi.z, phi.w);
        }
#endif
}

DEVICE void multiply_all(float (&S)[GROUPS][4], float factor) {
    if (factor == 1.f) return;
#pragma unroll
    for (int i = 0; i < 4 * GROUPS; i++) S[i / 4][i % 4] *= factor;
}

// What z . phi(q) reads: n + q . zk + q Z q / 2 with Z and zk sums of e x x^T and e x, as one warp's accumulators.
// Z[block] at dims (lane / 4 and 8 on, 8 block + 2 (lane % 4) + {0, 1}), zk at dims lane / 4 and 8 on, in two parts where
// lane % 4 is 0. order: what a factor of x is multiplied by that the State has not.
struct Form {
    float Z[2][4], zk[4];
    DEVICE void keep(float (&to)[12][32], int lane) const {
#pragma unroll
        for (int i = 0; i < 12; i++) to[i][lane] = i < 8 ? Z[i / 4][i % 4] : zk[i - 8];
    }
    DEVICE void recall(const float (&from)[12][32], int lane) {
#pragma unroll
        for (int i = 0; i < 12; i++) (i < 8 ? Z[i / 4][i % 4] : zk[i - 8]) = from[i][lane];
    }
    // from, to: n, zk, Z as the State has them.
    DEVICE void load(const float* from, float order, int lane) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int j = i / 4 * 8 + 2 * (lane % 4) + i % 2, k = lane / 4 + i % 4 / 2 * 8;
            Z[i / 4][i % 4] = from[place_of(j, k)] * order * order * (j == k ? 1.41421356237309505f : 1.f);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) zk[2 * half] = from[1 + lane / 4 + 8 * half] * order;
    }
    DEVICE void store(float* to, float order, int lane) const {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int j = i / 4 * 8 + 2 * (lane % 4) + i % 2, k = lane / 4 + i % 4 / 2 * 8;
            if (j <= k) to[place_of(j, k)] = Z[i / 4][i % 4] / (order * order) * (j == k ? 0.70710678118654752f : 1.f);
        }
        if (lane % 4 == 0) {
            to[1 + lane / 4] = (zk[0] + zk[1]) / order;
            to[9 + lane / 4] = (zk[2] + zk[3]) / order;
        }
    }
    // Adds 16 sources. rows: x^T as load_matrix_transposed gives it, zeros behind the end, so that e need not say which
    // tokens there are. e is share delta where WEIGHED, and then added to n; otherwise 1.
    DEVICE void add(const u32 (&rows)[4], const float* share, const float* delta, float& n, int lane) {
        u32 weighed[4] = {rows[0], rows[1], rows[2], rows[3]}, ends[2] = {ONES, ONES};
        const bool second_part = lane & 4;
#if WEIGHED
        float e[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int t = 2 * (lane % 4) + i % 2 + i / 2 * 8;
            e[i] = delta[t] * share[t];
        }
        n += row_sum(e[0] + e[1] + e[2] + e[3]);
        // e in two parts: what 16 bits hold, and in the columns of odd rows what that lost.
        ends[0] = pack(e[0], e[1]);
        ends[1] = pack(e[2], e[3]);
#pragma unroll
        for (int i = 0; i < 4; i++) weighed[i] = multiply(rows[i], ends[i % 2]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u32 rest = pack(e[2 * i] - clear_of(ends[i], 0), e[2 * i + 1] - clear_of(ends[i], 1));
            ends[i] = second_part ? rest : ends[i];
        }
#else
        if (second_part) ends[0] = ends[1] = 0u;
#endif
        mma(Z[0], weighed[0], weighed[2], weighed[1], weighed[3], rows[0], rows[1]);
        mma(Z[1], weighed[0], weighed[2], weighed[1], weighed[3], rows[2], rows[3]);
        mma(zk, rows[0], rows[2], rows[1], rows[3], ends[0], ends[1]);
    }
};

// The same in shared memory, for readers: Z over lift as second operand, lane by lane, rounded and what that lost; zk.
struct FormOperand {
    u32 square[8][32];
    Two linear[8];
    float lift;
    DEVICE void fill(const Form& form, int lane) {
        const float power = lift_of(form.Z), less = 1.f / power;
        if (!HALF_IS_BF16) lift = power;
        // Z's rows, as they are held, are its columns, as they are wanted.
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int block = i / 2, side = i % 2;
            const float a = form.Z[side][2 * block] * less, b = form.Z[side][2 * block + 1] * less;
            const u32 rounded = pack(a, b);
            square[4 * block + side][lane] = rounded;
            square[4 * block + 2 + side][lane] = pack(a - clear_of(rounded, 0), b - clear_of(rounded, 1));
        }
        if (lane % 4 == 0) {
            ((float*)linear)[lane / 4] = form.zk[0] + form.zk[1];
            ((float*)linear)[lane / 4 + 8] = form.zk[2] + form.zk[3];
        }
    }
    // c = readers' rows times 8 columns of Z / lift.
    DEVICE void times_Z(float (&c)[4], const u32 (&rows)[4], int block, int lane) const {
        const u32(*held)[32] = square + 4 * block;
        mma_first(c, rows[0], rows[1], rows[2], rows[3], held[0][lane], held[1][lane]);
        mma(c, rows[0], rows[1], rows[2], rows[3], held[2][lane], held[3][lane]);
    }
    DEVICE float lifted() const { return HALF_IS_BF16 ? 1.f : lift; }
};
