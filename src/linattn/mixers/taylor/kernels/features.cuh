// The 153 products of Taylor attention at F = 16, as 20 groups of 8 that one warp makes in registers.
//
// With a = x[0..8), b = x[8..16) and n = 0..7, group by group:
//     0..4    a_n a_(n+d) % 8,  d = 0..4         5..9    b_n b_(n+d) % 8,  d = 0..4
//     10..17  a_n b_(n+d) % 8,  d = 0..7         18, 19  a_n, b_n
// Each product stands once: of d = 4 only n < 4 count, the rest is 0, but n = 4 of group 4 is the constant 1.
// A product of d = 0 weighs 1/2 in phi(q) . phi(k), any other 1: the weights are put on the reader.

#define GROUPS 20
#define PAIRS (GROUPS / 2)

// Where the State keeps x_i x_j.
DEVICE int place_of(int i, int j) {
    const int low = i < j ? i : j, high = i < j ? j : i;
    return 17 + low * 16 - low * (low - 1) / 2 + high - low;
}

// Where the State keeps entry n of a group (chunked.features), -1 where there is none; and its share of the product.
DEVICE int place(int group, int n, float& share) {
    int i, j;
    share = 1.f;
    if (group >= 18) return 1 + 8 * (group - 18) + n;
    if (group < 10) {
        int d = group % 5, block = 8 * (group / 5);
        if (d == 4 && n >= 4) return group == 4 && n == 4 ? 0 : -1;
        i = block + n;
        j = block + (n + d) % 8;
        if (d == 0) share = 0.70710678118654752f;
    } else {
        i = n;
        j = 8 + (n + group - 10) % 8;
    }
    return place_of(i, j);
}

// Whether some entries have no place, those of d = 4 that are 0.
DEVICE bool has_gaps(int group) { return group == 4 || group == 9; }

// The order of an entry in q, for which its weight has as many factors of scale.
DEVICE float weight_of(int group, int n, float scale) {
    if (group >= 18) return scale;
    return group == 4 && n == 4 ? 1.f : scale * scale;
}

// Source rows. tokens: a^T, b^T at (n = lane / 4, two tokens). -> B (or A) fragments: product of lane / 4, two tokens.
struct SourceFeatures {
    u32 a[5], b[8];
    u32 keep, constant;
    DEVICE void rotate(u32 a0, u32 b0, int lane) {
        int n = lane / 4;
        a[0] = a0;
        b[0] = b0;
#pragma unroll
        for (int d = 1; d < 8; d++) {
            // A shuffle counts lanes modulo 32, and so n modulo 8.
            if (d < 5) a[d] = shuffle(a0, lane + 4 * d);
            b[d] = shuffle(b0, lane + 4 * d);
        }
        keep = n < 4 ? 0xffffffffu : 0u;
        constant = n == 4 ? ONES : 0u;
    }
    DEVICE u32 operator[](int group) const {
        if (group == 18) return a[0];
        if (group == 19) return b[0];
        if (group >= 10) return multiply(a[0], b[group - 10]);
        u32 product = group < 5 ? multiply(a[0], a[group]) : multiply(b[0], b[group - 5]);
        if (group == 4) return (product & keep) | constant;
        return group == 9 ? product & keep : product;
    }
};

// Reader rows. a, b at (token = lane / 4, dims 2 (lane % 4) + {0, 1}) -> B fragments: two products of the token.
struct ReaderFeatures {
    u32 a[5], b[8];
    u32 left_a, left_b, half_a, half_b, linear, keep, constant;
    DEVICE void rotate(u32 a0, u32 b0, int lane, float scale) {
        int first = lane & ~3, low = lane % 4;
        a[0] = a0;
        b[0] = b0;
#pragma unroll
        for (int d = 2; d < 8; d += 2) {
            int from = first + (low + d / 2) % 4;
            if (d < 5) a[d] = shuffle(a0, from);
            b[d] = shuffle(b0, from);
        }
        a[1] = straddle(a[0], a[2]);
        a[3] = straddle(a[2], a[4]);
        b[1] = straddle(b[0], b[2]);
        b[3] = straddle(b[2], b[4]);
        b[5] = straddle(b[4], b[6]);
        b[7] = straddle(b[6], b[0]);
        float square = scale * scale;
        u32 whole = pack(square, square), half = pack(0.5f * square, 0.5f * square);
        left_a = multiply(a0, whole);
        left_b = multiply(b0, whole);
        half_a = multiply(a0, half);
        half_b = multiply(b0, half);
        linear = pack(scale, scale);
        keep = low < 2 ? 0xffffffffu : 0u;
        constant = low == 2 ? ONES & 0xffffu : 0u;
    }
    DEVICE u32 operator[](int group) const {
        if (group == 18) return multiply(a[0], linear);
        if (group == 19) return multiply(b[0], linear);
        if (group == 0) return multiply(half_a, a[0]);
        if (group == 5) return multiply(half_b, b[0]);
        if (group >= 10) return multiply(left_a, b[group - 10]);
        u32 product = group < 5 ? multiply(left_a, a[group]) : multiply(left_b, b[group - 5]);
        if (group == 4) return (product & keep) | constant;
        return group == 9 ? product & keep : product;
    }
};
