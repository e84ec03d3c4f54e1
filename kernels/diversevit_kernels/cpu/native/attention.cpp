// Attention on a CPU: forward, backward and double backward, equations (1)-(9) of kernels/README.md.
//
// A thread owns a (sample, key head) pair. It holds the pair's keys and values, goes through the query rows of the
// pair's heads a block at a time, and adds up key-side results in order: same bits on any number of threads. A block
// has as many rows as a few vectors have lanes, and its tiles of scores are kept transposed, [keys, rows]: softmax
// then runs down the columns, a row per lane, and of all operands of a product only the block's own need transposing.
//
// Scores are s Q K^T with s in a scaled copy of the queries, so dK = dS^T (s Q) needs no s of its own.
#include "product.h"

namespace {

struct Tensor {  // [B, heads, N, width], dense along the width
    void* data;
    int64_t sample, head, row;
};
struct Mask {  // [B, H, Nq, Nk], broadcast by strides of 0
    const void* data;
    int64_t sample, head, row, key;
    int64_t kind;  // 0: none, 1: bool, 2: added, in the dtype of the arithmetic
};
struct Call {
    int64_t B, H, Hkv, Nq, Nk, d, dv, causal, threads;
    double scale;
    Mask mask;
    void* lse;                                 // [B, H, Nq], dense, in the dtype of the arithmetic
    Tensor q, k, v, o, dout, ddq, ddk, ddv;    // data is null where a cotangent is absent
    Tensor gq, gk, gv, gdout;                  // results of the backward passes
};

constexpr ptrdiff_t TILE_BYTES = 1 << 19;

enum Slot { KEYS, VALUES, DDK, DDV, SUM_K, SUM_V, QUERY, QUERY_T, DOUT, DOUT_T, DDQ, DDQ_T, S, DP, X, Y, STATISTICS, RESULT };

template <class S> using T = Arithmetic<S>;

template <class S> inline S* at(const Tensor& x, int64_t b, int64_t h, int64_t n = 0) {
    return static_cast<S*>(x.data) + b * x.sample + h * x.head + n * x.row;
}

// rows [rows, width] -> out [rows, padded width], zeros in the padding.
template <class S> void gather(const S* in, int64_t stride, ptrdiff_t rows, ptrdiff_t width, T<S> factor, T<S>* out) {
    const ptrdiff_t wide = padded<T<S>>(width);
    for (ptrdiff_t i = 0; i < rows; i++) {
        const S* from = in + i * stride;
        T<S>* to = out + i * wide;
        for (ptrdiff_t c = 0; c < width; c++) to[c] = widen(from[c]) * factor;
        for (ptrdiff_t c = width; c < wide; c++) to[c] = 0;
    }
}

template <class S> void scatter(const T<S>* in, ptrdiff_t rows, ptrdiff_t width, T<S> factor, S* out, int64_t stride) {
    const ptrdiff_t wide = padded<T<S>>(width);
    for (ptrdiff_t i = 0; i < rows; i++)
        for (ptrdiff_t c = 0; c < width; c++) out[i * stride + c] = narrow<S>(in[i * wide + c] * factor);
}

// [rows, padded width] -> [width, lanes], zeros beyond the rows.
template <class T> void transpose(const T* in, ptrdiff_t rows, ptrdiff_t width, ptrdiff_t lanes, T* out) {
    const ptrdiff_t wide = padded<T>(width);
    for (ptrdiff_t i = 0; i < lanes; i += LANES<T>)
        for (ptrdiff_t c = 0; c < width; c++) {
            Vector<T> x{};
            for (ptrdiff_t j = 0; j < std::min(LANES<T>, rows - i); j++) x[j] = in[(i + j) * wide + c];
            store(out + c * lanes + i, x);
        }
}

// One block of query rows of one head.
struct Block {
    int64_t b, h, row;
    ptrdiff_t rows, lanes, keys;  // lanes: rows, padded; keys: those the block may look at
};

// A block's rows of one operand, and the same transposed.
template <class S> struct Side {
    T<S>*rows, *columns;

    Side(int slot, const Tensor& x, const Block& t, ptrdiff_t width, T<S> factor) {
        rows = scratch<T<S>>(slot, t.lanes * padded<T<S>>(width));
        columns = scratch<T<S>>(slot + 1, t.lanes * width);
        gather(at<S>(x, t.b, t.h, t.row), x.row, t.rows, width, factor, rows);
        transpose(rows, t.rows, width, t.lanes, columns);
    }
};

template <class S> T<S>* keys(int slot, const Tensor& x, int64_t b, int64_t h, ptrdiff_t Nk, ptrdiff_t width) {
    if (!x.data) return nullptr;
    T<S>* out = scratch<T<S>>(slot, Nk * padded<T<S>>(width));
    gather(at<S>(x, b, h), x.row, Nk, width, T<S>(1), out);
    return out;
}

template <class T> T* sums(int slot, ptrdiff_t Nk, ptrdiff_t width) {
    T* total = scratch<T>(slot, Nk * padded<T>(width));
    std::fill_n(total, Nk * padded<T>(width), T(0));
    return total;
}

// tile [keys, lanes] (+)= K [keys, width] Q^T [width, lanes]
template <class T> void scores(const Block& t, const T* k, const T* q, ptrdiff_t width, T* tile, bool add = false) {
    product<T>(t.keys, t.lanes, width, {k, padded<T>(width), 1}, q, t.lanes, tile, t.lanes, add);
}
// out [rows, width] (+)= tile^T K
template <class T> void to_rows(const Block& t, const T* tile, const T* k, ptrdiff_t width, T* out, bool add) {
    const ptrdiff_t wide = padded<T>(width);
    product<T>(t.rows, wide, t.keys, {tile, 1, t.lanes}, k, wide, out, wide, add);
}
// total [keys, width] += tile Q
template <class T> void to_keys(const Block& t, const T* tile, const T* q, ptrdiff_t width, T* total) {
    const ptrdiff_t wide = padded<T>(width);
    product<T>(t.keys, wide, t.rows, {tile, t.lanes, 1}, q, wide, total, wide, true);
}

template <class T> void apply_mask(const Call& call, const Block& t, T* tile) {
    constexpr T never = -std::numeric_limits<T>::infinity();
    const Mask& m = call.mask;
    const int64_t first = t.b * m.sample + t.h * m.head + t.row * m.row;
    for (ptrdiff_t j = 0; m.kind && j < t.keys; j++)
        for (ptrdiff_t i = 0; i < t.rows; i++) {
            const int64_t where = first + i * m.row + j * m.key;
            T& s = tile[j * t.lanes + i];
            if (m.kind == 1)
                s = static_cast<const bool*>(m.data)[where] ? s : never;
            else
                s += static_cast<const T*>(m.data)[where];
        }
    for (ptrdiff_t j = t.row + 1; call.causal && j < t.keys; j++)
        for (ptrdiff_t i = 0; i < std::min<ptrdiff_t>(t.rows, j - t.row); i++) tile[j * t.lanes + i] = never;
}

// (1): the block's scores, masked.
template <class T> T* masked_scores(const Call& call, const Block& t, const T* k, const T* q) {
    T* s = scratch<T>(S, t.keys * t.lanes);
    scores(t, k, q, call.d, s);
    apply_mask(call, t, s);
    return s;
}

// (1)-(2) in a column of lanes: s becomes exp(s - top); returns its sum, and the log-sum-exp.
template <class T> void softmax(const Block& t, T* s, T* total, T* lse) {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    for (ptrdiff_t i = 0; i < t.lanes; i += LANES<T>) {
        Vector<T> top = Vector<T>{} - infinity, all{};
        for (ptrdiff_t j = 0; j < t.keys; j++) {
            const Vector<T> x = load(s + j * t.lanes + i);
            top = x > top ? x : top;
        }
        top = top == -infinity ? Vector<T>{} : top;
        for (ptrdiff_t j = 0; j < t.keys; j++) {
            const Vector<T> p = exponential(load(s + j * t.lanes + i) - top);
            store(s + j * t.lanes + i, p);
            all += p;
        }
        for (ptrdiff_t l = 0; l < LANES<T>; l++) {
            total[i + l] = all[l];
            lse[i + l] = all[l] == 0 ? infinity : top[l] + std::log(all[l]);
        }
    }
}

// The block's log-sum-exp, plus infinity in lanes without a row: their probabilities are 0.
template <class T> const T* statistics(const Call& call, const Block& t) {
    T* lse = scratch<T>(STATISTICS, t.lanes);
    std::copy_n(static_cast<const T*>(call.lse) + (t.b * call.H + t.h) * call.Nq + t.row, t.rows, lse);
    std::fill(lse + t.rows, lse + t.lanes, std::numeric_limits<T>::infinity());
    return lse;
}

// Every block of every pair of heads: begin(b, hk), block(t), end(b, hk).
template <class T, class Begin, class Each, class End>
void blocks(const Call& c, int tiles, Begin begin, Each each, End end) {
    const ptrdiff_t vectors = padded<T>(c.Nq) / LANES<T>;
    const ptrdiff_t fit = TILE_BYTES / (tiles * c.Nk * ptrdiff_t(VECTOR_BYTES));
    const ptrdiff_t most = std::clamp<ptrdiff_t>(fit, 1, WIDEST), count = (vectors + most - 1) / most;
    const int64_t pairs = c.B * c.Hkv, group = c.H / c.Hkv;
#pragma omp parallel for schedule(dynamic) num_threads(c.threads)
    for (int64_t pair = 0; pair < pairs; pair++) {
        const int64_t b = pair / c.Hkv, hk = pair % c.Hkv;
        auto state = begin(b, hk);
        for (int64_t h = hk * group; h < (hk + 1) * group; h++)
            for (ptrdiff_t n = 0; n < count; n++) {
                const ptrdiff_t row = vectors * n / count * LANES<T>, stop = vectors * (n + 1) / count * LANES<T>;
                const ptrdiff_t rows = std::min<ptrdiff_t>(stop, c.Nq) - row;
                const ptrdiff_t seen = c.causal ? std::min<ptrdiff_t>(c.Nk, row + rows) : c.Nk;
                each(state, Block{b, h, row, rows, stop - row, seen});
            }
        end(state, b, hk);
    }
}

template <class T> struct Pair {
    const T *k, *v, *ddk, *ddv;
    T *sum_k, *sum_v;
};

template <class S> Pair<T<S>> pair_of(const Call& c, int64_t b, int64_t hk, bool sum) {
    using T = Arithmetic<S>;
    return {keys<S>(KEYS, c.k, b, hk, c.Nk, c.d),
            keys<S>(VALUES, c.v, b, hk, c.Nk, c.dv),
            keys<S>(DDK, c.ddk, b, hk, c.Nk, c.d),
            keys<S>(DDV, c.ddv, b, hk, c.Nk, c.dv),
            sum ? sums<T>(SUM_K, c.Nk, c.d) : nullptr,
            sum ? sums<T>(SUM_V, c.Nk, c.dv) : nullptr};
}

template <class S> void write_sums(const Call& c, const Pair<T<S>>& p, int64_t b, int64_t hk) {
    scatter(p.sum_k, c.Nk, c.d, T<S>(1), at<S>(c.gk, b, hk), c.gk.row);
    scatter(p.sum_v, c.Nk, c.dv, T<S>(1), at<S>(c.gv, b, hk), c.gv.row);
}

template <class S> void forward(const Call& c) {
    using T = Arithmetic<S>;
    blocks<T>(
        c, 1, [&](int64_t b, int64_t hk) { return pair_of<S>(c, b, hk, false); },
        [&](const Pair<T>& pair, const Block& t) {
            const Side<S> q(QUERY, c.q, t, c.d, T(c.scale));
            T* p = masked_scores(c, t, pair.k, q.columns);
            T *total = scratch<T>(STATISTICS, 2 * t.lanes), *lse = total + t.lanes;
            softmax(t, p, total, lse);
            T* o = scratch<T>(RESULT, t.rows * padded<T>(c.dv));
            to_rows(t, p, pair.v, c.dv, o, false);
            for (ptrdiff_t i = 0; i < t.rows; i++) {
                const T share = total[i] == 0 ? T(0) : T(1) / total[i];
                scatter(o + i * padded<T>(c.dv), 1, c.dv, share, at<S>(c.o, t.b, t.h, t.row + i), c.o.row);
            }
            std::copy_n(lse, t.rows, static_cast<T*>(c.lse) + (t.b * c.H + t.h) * c.Nq + t.row);
        },
        [](const Pair<T>&, int64_t, int64_t) {});
}

template <class S> void backward(const Call& c) {
    using T = Arithmetic<S>;
    blocks<T>(
        c, 2, [&](int64_t b, int64_t hk) { return pair_of<S>(c, b, hk, true); },
        [&](const Pair<T>& pair, const Block& t) {
            const Side<S> q(QUERY, c.q, t, c.d, T(c.scale)), dout(DOUT, c.dout, t, c.dv, T(1));
            T *p = masked_scores(c, t, pair.k, q.columns), *ds = scratch<T>(DP, t.keys * t.lanes);
            scores(t, pair.v, dout.columns, c.dv, ds);
            const T* lse = statistics<T>(c, t);
            for (ptrdiff_t i = 0; i < t.lanes; i += LANES<T>) {  // (3)-(4)
                const Vector<T> l = load(lse + i);
                Vector<T> delta{};
                for (ptrdiff_t n = i; n < t.keys * t.lanes; n += t.lanes) {
                    const Vector<T> pn = exponential(load(p + n) - l);
                    store(p + n, pn);
                    delta += pn * load(ds + n);
                }
                for (ptrdiff_t n = i; n < t.keys * t.lanes; n += t.lanes)
                    store(ds + n, load(p + n) * (load(ds + n) - delta));
            }
            to_keys(t, p, dout.rows, c.dv, pair.sum_v);
            to_keys(t, ds, q.rows, c.d, pair.sum_k);
            T* dq = scratch<T>(RESULT, t.rows * padded<T>(c.d));
            to_rows(t, ds, pair.k, c.d, dq, false);
            scatter(dq, t.rows, c.d, T(c.scale), at<S>(c.gq, t.b, t.h, t.row), c.gq.row);
        },
        [&](const Pair<T>& pair, int64_t b, int64_t hk) { write_sums<S>(c, pair, b, hk); });
}

// (6)-(8) down the lanes: s, dp, x, y become P, dS, E and R. Without a cotangent x or y is zero.
template <class T> void curvature(const Block& t, const T* lse, T* s, T* dp, T* x, T* y) {
    const ptrdiff_t end = t.keys * t.lanes;
    for (ptrdiff_t i = 0; i < t.lanes; i += LANES<T>) {
        const Vector<T> l = load(lse + i);
        Vector<T> delta{}, mean{}, total{};
        for (ptrdiff_t n = i; n < end; n += t.lanes) {
            const Vector<T> p = exponential(load(s + n) - l);
            store(s + n, p);
            delta += p * load(dp + n);
            mean += p * load(x + n);
        }
        for (ptrdiff_t n = i; n < end; n += t.lanes) {
            const Vector<T> p = load(s + n), ds = p * (load(dp + n) - delta), centred = load(x + n) - mean;
            const Vector<T> r = p * load(y + n) + ds * centred;
            store(dp + n, ds);
            store(x + n, p * centred);
            store(y + n, r);
            total += r;
        }
        for (ptrdiff_t n = i; n < end; n += t.lanes) store(y + n, load(y + n) - load(s + n) * total);
    }
}

template <class S> void double_backward(const Call& c) {
    using T = Arithmetic<S>;
    blocks<T>(
        c, 4, [&](int64_t b, int64_t hk) { return pair_of<S>(c, b, hk, true); },
        [&](const Pair<T>& pair, const Block& t) {
            const bool by_q = c.ddq.data, by_x = by_q || pair.ddk;
            const ptrdiff_t tile = t.keys * t.lanes;
            const Side<S> q(QUERY, c.q, t, c.d, T(c.scale)), dout(DOUT, c.dout, t, c.dv, T(1));
            T *s = masked_scores(c, t, pair.k, q.columns), *dp = scratch<T>(DP, tile);
            T *x = scratch<T>(X, tile), *y = scratch<T>(Y, tile);
            scores(t, pair.v, dout.columns, c.dv, dp);
            const T* a = nullptr;
            if (by_q) {
                const Side<S> ddq(DDQ, c.ddq, t, c.d, T(c.scale));
                a = ddq.rows;
                scores(t, pair.k, ddq.columns, c.d, x);
            }
            if (pair.ddk) scores(t, pair.ddk, q.columns, c.d, x, by_q);
            if (!by_x) std::fill_n(x, tile, T(0));
            if (pair.ddv)
                scores(t, pair.ddv, dout.columns, c.dv, y);
            else
                std::fill_n(y, tile, T(0));
            curvature(t, statistics<T>(c, t), s, dp, x, y);

            to_keys(t, y, q.rows, c.d, pair.sum_k);
            if (a) to_keys(t, dp, a, c.d, pair.sum_k);
            if (by_x) to_keys(t, x, dout.rows, c.dv, pair.sum_v);
            T* g = scratch<T>(RESULT, t.rows * padded<T>(std::max(c.d, c.dv)));
            to_rows(t, y, pair.k, c.d, g, false);
            if (pair.ddk) to_rows(t, dp, pair.ddk, c.d, g, true);
            scatter(g, t.rows, c.d, T(c.scale), at<S>(c.gq, t.b, t.h, t.row), c.gq.row);
            to_rows(t, x, pair.v, c.dv, g, false);
            if (pair.ddv) to_rows(t, s, pair.ddv, c.dv, g, true);
            scatter(g, t.rows, c.dv, T(1), at<S>(c.gdout, t.b, t.h, t.row), c.gdout.row);
        },
        [&](const Pair<T>& pair, int64_t b, int64_t hk) { write_sums<S>(c, pair, b, hk); });
}

}  // namespace

#define RUNGS(S)                                                                      \
    extern "C" void attention_forward_##S(const Call* c) { forward<S>(*c); }          \
    extern "C" void attention_backward_##S(const Call* c) { backward<S>(*c); }        \
    extern "C" void attention_double_backward_##S(const Call* c) { double_backward<S>(*c); }
typedef float float32;
typedef double float64;
RUNGS(float32)
RUNGS(float64)
RUNGS(bfloat16)
