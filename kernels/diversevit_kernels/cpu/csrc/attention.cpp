// Attention on a CPU: forward, backward and double backward, equations (1)-(9) and (53)-(57) of kernels/README.md.
//
// A thread computes a (sample, key head) pair at a time. It keeps the pair's keys and values, goes through the query
// rows of the pair's heads block by block, and adds up key-side gradients in order: same bits on any number of threads.
// Tiles of scores are stored transposed, [keys, rows]: the softmax then runs down the columns, with a row per lane, and
// a tile is without conversion the left operand of products over the rows and the right operand of products over the
// keys.
//
// bfloat16 is multiplied as such and summed in float. Scores and statistics are float; probabilities and gradients of
// scores are rounded to bfloat16 when they become operands.
#include "dropout.h"
#include "layout.h"
#include "mask_gradient.h"
#include "product.h"
#include "sums.h"

namespace {

struct Tensor {  // [B, heads, N, width], dense along the width
    void* data;
    int64_t sample, head, row;
};
struct Call {
    int64_t B, H, Hkv, Nq, Nk, d, dv, causal, threads;
    double scale;
    Mask mask, ddmask, gmask;                  // the last is a result of the backward passes, zeroed
    void* softmax;                             // [B, H, 2, Nq], dense, (1a), in the dtype of the arithmetic
    Tensor q, k, v, o, dout, ddq, ddk, ddv;    // data is null where a cotangent is absent
    Tensor gq, gk, gv, gdout;                  // results of the backward passes
    const uint64_t* seed;                      // of the weights that are kept; null: all are
    uint64_t threshold;                        // (57): of 32 bits
    double larger;                             // what a kept weight is multiplied by
};

template <class S> using T = Arithmetic<S>;
template <class S> using E = Operand<S>;

constexpr ptrdiff_t TILE_BYTES = 1 << 20;  // of all tiles of a block

enum Slot { KEYS, VALUES = KEYS + 3, DDK = VALUES + 3, DDV = DDK + 3, SUM_K = DDV + 3, SUM_V,
            QUERIES, DOUT = QUERIES + 3, DDQ = DOUT + 3, STATISTICS = DDQ + 3, RESULT,
            SCORES, DP = SCORES + 3, DDS = DP + 3, Y = DDS + 3, WORDS = Y + 3 };

template <class S> inline S* at(const Tensor& x, int64_t b, int64_t h, int64_t n = 0) {
    return static_cast<S*>(x.data) + b * x.sample + h * x.head + n * x.row;
}

// One block of query rows of one head.
struct Block {
    int64_t b, h, row, number;
    ptrdiff_t rows, lanes, keys;  // lanes: rows, padded; keys: those the block may attend to
    ptrdiff_t stride;             // between the keys of a tile
};

// Rows of an operand, [n, width], in the two layouts of layout.h, n padded to a multiple of a grain.
template <class S> struct Rows {
    E<S>*as_it_is, *paired;
    ptrdiff_t high, wide;

    Rows(int slot, const S* x, int64_t stride, ptrdiff_t n, ptrdiff_t grain, ptrdiff_t width)
        : high(multiple(n, grain)), wide(padded<S>(width)) {
        as_it_is = scratch<E<S>>(slot, high * wide / DEPTH<S>);
        ::as_it_is(x, stride, n, high, width, as_it_is);
        paired = as_it_is;
        if constexpr (DEPTH<S> > 1) {
            paired = scratch<Pair>(slot + 1, high * wide / 2);
            ::paired(as_it_is, high, wide / 2, paired, wide);
        }
    }
};

// Keys, values or their cotangents, as left operands.
template <class S> struct Keys {
    Left<E<S>> over_width{}, over_keys{};  // [keys, width], [width, keys]
    explicit operator bool() const { return over_width.data; }

    Keys(int slot, const Tensor& x, int64_t b, int64_t h, ptrdiff_t Nk, ptrdiff_t width) {
        if (!x.data) return;
        const Rows<S> rows(slot, at<S>(x, b, h), x.row, Nk, STEP<S>, width);
        over_width = {rows.as_it_is, rows.wide / DEPTH<S>, 1};
        over_keys = {rows.as_it_is, 1, rows.wide};
        if constexpr (DEPTH<S> > 1) {  // products of pairs read their left operand along rows
            Pair* turned = scratch<Pair>(slot + 2, rows.high * rows.wide / 2);
            transposed(rows.paired, rows.high / 2, rows.wide, turned, rows.high / 2);
            over_keys = {turned, rows.high / 2, 1};
        }
    }
};

// A block's rows of queries, output gradients or cotangents of queries, as right operands.
template <class S> struct Queries {
    const E<S>*over_width = nullptr, *over_rows = nullptr;  // [width, lanes], [lanes, width]
    explicit operator bool() const { return over_width; }

    Queries(int slot, const Tensor& x, const Block& t, ptrdiff_t width) {
        if (!x.data) return;
        const Rows<S> rows(slot, at<S>(x, t.b, t.h, t.row), x.row, t.rows, UNIT<S>, width);
        E<S>* turned = scratch<E<S>>(slot + 2, rows.high * rows.wide / DEPTH<S>);
        transposed(rows.as_it_is, rows.high, rows.wide / DEPTH<S>, turned, rows.high);
        over_width = turned;
        over_rows = rows.paired;
    }
};

enum Sides { LEFT = 1, RIGHT = 2, BOTH = 3 };  // LEFT of products over the rows, RIGHT of products over the keys

// A block's tile [keys, lanes]: its values, and the same as left and right operands. Where operands are not pairs, all
// three are the same memory.
template <class S> struct Tile {
    T<S>* values;
    E<S>*left = nullptr, *right = nullptr;
    ptrdiff_t stride, left_stride;

    Tile(int slot, const Block& t, Sides sides) : stride(t.stride), left_stride(t.stride) {
        const ptrdiff_t keys = run<S>(t.keys);
        values = scratch<T<S>>(slot, keys * stride);
        if constexpr (DEPTH<S> == 1) {
            left = right = values;
        } else {
            left_stride = odd_vectors<Pair>(t.lanes / 2);
            if (sides & LEFT) left = scratch<Pair>(slot + 1, keys * left_stride);
            if (sides & RIGHT) right = scratch<Pair>(slot + 2, keys / 2 * stride);
        }
    }
    T<S>* at(ptrdiff_t j, ptrdiff_t i) const { return values + j * stride + i; }
    // Stores the vectors of DEPTH keys, from the j-th on, as operands.
    void put(ptrdiff_t j, ptrdiff_t i, const Vector<T<S>>* x) const {
        if constexpr (DEPTH<S> == 1) {
            store(at(j, i), x[0]);
        } else {
            if (left) store_rows(x[0], x[1], left + j * left_stride + i / 2, left + (j + 1) * left_stride + i / 2);
            if (right) store_pairs(x[0], x[1], right + j / 2 * stride + i);
        }
    }
};

// Returns zeros for sums over query rows, [keys, width] padded.
template <class S> T<S>* sums(int slot, ptrdiff_t Nk, ptrdiff_t width) {
    const ptrdiff_t elements = padded<S>(Nk) * padded<S>(width);
    T<S>* total = scratch<T<S>>(slot, elements);
    std::fill_n(total, elements, T<S>(0));
    return total;
}

// tile [keys, lanes] (+)= K [keys, width] Q^T [width, lanes]
template <class S>
void scores(const Block& t, const Keys<S>& k, const Queries<S>& q, ptrdiff_t width, const Tile<S>& tile,
            bool add = false) {
    product(run<S>(t.keys), t.lanes, run<S>(width) / DEPTH<S>, k.over_width, q.over_width, t.lanes, tile.values,
            t.stride, add);
}
// out [width, lanes] (+)= K^T [width, keys] tile
template <class S>
void to_rows(const Block& t, const Tile<S>& tile, const Keys<S>& k, ptrdiff_t width, T<S>* out, bool add) {
    product(run<S>(width), t.lanes, run<S>(t.keys) / DEPTH<S>, k.over_keys, tile.right, t.stride, out, t.lanes, add);
}
// total [keys, width] += tile Q
template <class S>
void to_keys(const Block& t, const Tile<S>& tile, const Queries<S>& q, ptrdiff_t width, T<S>* total) {
    const ptrdiff_t wide = padded<S>(width);
    const Left<E<S>> left{tile.left, tile.left_stride, 1};
    product(run<S>(t.keys), wide, run<S>(t.rows) / DEPTH<S>, left, q.over_rows, wide, total, wide, true);
}

// (1): masked scores of the block, up to a factor, which is returned.
template <class S> T<S> masked_scores(const Call& c, const Block& t, const Keys<S>& k, const Queries<S>& q, Tile<S>& s) {
    using T = Arithmetic<S>;
    scores(t, k, q, c.d, s);
    const Mask& m = c.mask;
    const bool scaled = m.kind == 2;
    // 0 times minus infinity would be NaN; the smallest number gives the same softmax of finite scores as 0.
    const T scale = T(c.scale), factor = scaled ? T(1) : scale == 0 ? std::numeric_limits<T>::min() : scale;
    const T never = -std::copysign(std::numeric_limits<T>::infinity(), factor);
    const int64_t first = t.b * m.sample + t.h * m.head + t.row * m.row;
    for (ptrdiff_t j = 0; m.kind && j < t.keys; j++)
        for (ptrdiff_t i = 0; i < t.rows; i++) {
            const int64_t where = first + i * m.row + j * m.key;
            T& x = *s.at(j, i);
            if (scaled)
                x = x * scale + static_cast<const T*>(m.data)[where];
            else
                x = static_cast<const bool*>(m.data)[where] ? x : never;
        }
    for (ptrdiff_t j = t.row + 1; c.causal && j < t.keys; j++)
        std::fill_n(s.at(j, 0), std::min<ptrdiff_t>(t.rows, j - t.row), never);
    if constexpr (DEPTH<S> > 1) {  // products read the padding
        for (ptrdiff_t j = 0; j < t.keys; j++) std::fill(s.at(j, t.rows), s.at(j, t.lanes), never);
        std::fill(s.at(t.keys, 0), s.at(run<S>(t.keys), 0), never);
    }
    return factor;
}

// The dropout of the block's rows.
template <class T> Dropout<T> dropout_of(const Call& c, const Block& t) {
    uint32_t* words = scratch<uint32_t>(WORDS, 2 * t.lanes);
    const uint64_t row = (t.b * c.H + t.h) * c.Nq + t.row;
    for (ptrdiff_t i = 0; i < t.lanes; i++) row_words(*c.seed, row + i, words[i], words[t.lanes + i]);
    return {words, words + t.lanes, uint32_t(c.threshold), T(c.larger)};
}

// Calls run with the block's dropout, an object whose type says whether there is any.
template <class T, class Run> void with_dropout(const Call& c, const Block& t, Run run) {
    if (c.seed)
        run(dropout_of<T>(c, t));
    else
        run(All{});
}

// rho of (1a): one over the sum of a row's weights, 1 where it attends to nothing.
template <class V> inline V share_of(V total) { return 1 / (total == V{} ? V{} + 1 : total); }

// Scores as (1a) compares them. Rounded before the largest is taken off, which leaves 0 where they are the largest: the
// weights of a row with one key are exactly 1, and its gradients exactly 0.
template <class T> inline Vector<T> scored(const T* s, T factor) { return product_of(load(s), factor); }

// (1a), (53), down the lanes: s becomes exp(factor s - top), times Z. Writes the largest scores to tops, plus infinity where a row
// attends to nothing, and the shares, one over the sum of a row's weights.
template <class S, class Z>
void softmax(const Block& t, Tile<S>& s, T<S> factor, T<S>* tops, T<S>* shares, const Z& dropout) {
    using T = Arithmetic<S>;
    constexpr T infinity = std::numeric_limits<T>::infinity();
    const ptrdiff_t keys = run<S>(t.keys);
    for (ptrdiff_t i = 0; i < t.lanes; i += LANES<T>) {
        Vector<T> top = Vector<T>{} - infinity;
        Sum<Vector<T>> all;
        for (ptrdiff_t j = 0; j < keys; j++) {
            const Vector<T> x = scored(s.at(j, i), factor);
            top = x > top ? x : top;
        }
        top = top == -infinity ? Vector<T>{} : top;
        in_runs(keys, [&](ptrdiff_t first, ptrdiff_t end) {
            Vector<T> some{}, p[DEPTH<S>];
            for (ptrdiff_t j = first; j < end; j += DEPTH<S>) {
                for (ptrdiff_t u = 0; u < DEPTH<S>; u++) {
                    p[u] = exponential(scored(s.at(j + u, i), factor) - top);
                    some += p[u];
                    if constexpr (Z::DROPS) p[u] = dropout.dropped(p[u], dropout.marked(p[u], j + u, i));
                }
                s.put(j, i, p);
            }
            all += some;
        });
        const Vector<T> total = all.value();
        store(tops + i, total == Vector<T>{} ? Vector<T>{} + infinity : top);
        store(shares + i, share_of(total));
    }
}

template <class T> T* tops_of(const Call& c, const Block& t) {
    return static_cast<T*>(c.softmax) + 2 * (t.b * c.H + t.h) * c.Nq + t.row;
}

// Returns the block's largest scores, plus infinity in lanes without a row, whose probabilities are then 0.
template <class T> const T* tops(const Call& c, const Block& t) {
    T* top = scratch<T>(STATISTICS, t.lanes);
    std::copy_n(tops_of<T>(c, t), t.rows, top);
    std::fill(top + t.rows, top + t.lanes, std::numeric_limits<T>::infinity());
    return top;
}

// How many blocks the query rows of a head are cut into, so that a block's tiles fit the cache.
template <class S> ptrdiff_t blocks_of_head(const Call& c, int tiles) {
    const ptrdiff_t units = multiple(c.Nq, UNIT<S>) / UNIT<S>, widest = WIDEST * STEP<S> / UNIT<S>;
    const ptrdiff_t bytes = sizeof(T<S>) + (DEPTH<S> > 1 ? 2 * sizeof(S) : 0);
    const ptrdiff_t fit = TILE_BYTES / (tiles * run<S>(c.Nk) * UNIT<S> * bytes);
    const ptrdiff_t most = std::clamp<ptrdiff_t>(fit, STEP<S> / UNIT<S>, widest);
    return (units + most - 1) / most;
}

// For every (sample, key head) pair: state = begin(b, hk), each(state, block) for every block, end(state, b, hk).
template <class S, class Begin, class Each, class End>
void blocks(const Call& c, int tiles, Begin begin, Each each, End end) {
    const ptrdiff_t units = multiple(c.Nq, UNIT<S>) / UNIT<S>, count = blocks_of_head<S>(c, tiles);
    const int64_t pairs = c.B * c.Hkv, group = c.H / c.Hkv;
#pragma omp parallel for schedule(dynamic) num_threads(c.threads)
    for (int64_t pair = 0; pair < pairs; pair++) {
        const matrix_unit::Configured configured;
        const int64_t b = pair / c.Hkv, hk = pair % c.Hkv;
        auto state = begin(b, hk);
        for (int64_t h = hk * group; h < (hk + 1) * group; h++)
            for (ptrdiff_t n = 0; n < count; n++) {
                const ptrdiff_t row = units * n / count * UNIT<S>, stop = units * (n + 1) / count * UNIT<S>;
                const ptrdiff_t rows = std::min<ptrdiff_t>(stop, c.Nq) - row;
                const ptrdiff_t seen = c.causal ? std::min<ptrdiff_t>(c.Nk, row + rows) : c.Nk;
                each(state, Block{b, h, row, n, rows, stop - row, seen, odd_vectors<T<S>>(stop - row)});
            }
        end(state, b, hk);
    }
}

template <class S> struct KeySide {
    Keys<S> k, v, ddk, ddv;
    T<S>*sum_k, *sum_v;

    KeySide(const Call& c, int64_t b, int64_t hk, bool sum)
        : k(KEYS, c.k, b, hk, c.Nk, c.d),
          v(VALUES, c.v, b, hk, c.Nk, c.dv),
          ddk(DDK, c.ddk, b, hk, c.Nk, c.d),
          ddv(DDV, c.ddv, b, hk, c.Nk, c.dv),
          sum_k(sum ? sums<S>(SUM_K, c.Nk, c.d) : nullptr),
          sum_v(sum ? sums<S>(SUM_V, c.Nk, c.dv) : nullptr) {}
};

template <class S> void write_sums(const Call& c, const KeySide<S>& p, int64_t b, int64_t hk) {
    scatter(p.sum_k, c.Nk, c.d, T<S>(c.scale), at<S>(c.gk, b, hk), c.gk.row);
    scatter(p.sum_v, c.Nk, c.dv, T<S>(1), at<S>(c.gv, b, hk), c.gv.row);
}

// Writes a block's result [width, lanes], times a factor, to its rows of x.
template <class S> void write_rows(const Block& t, const T<S>* result, ptrdiff_t width, T<S> factor, const Tensor& x) {
    T<S>* factors = scratch<T<S>>(STATISTICS, t.lanes);
    std::fill_n(factors, t.lanes, factor);
    scatter_transposed(result, t.lanes, t.rows, width, factors, at<S>(x, t.b, t.h, t.row), x.row);
}

template <class S> T<S>* result_of(const Block& t, ptrdiff_t width) {
    return scratch<T<S>>(RESULT, padded<S>(width) * t.lanes);
}

template <class S> void forward(const Call& c) {
    using T = Arithmetic<S>;
    blocks<S>(
        c, 1, [&](int64_t b, int64_t hk) { return KeySide<S>(c, b, hk, false); },
        [&](const KeySide<S>& pair, const Block& t) {
            const Queries<S> q(QUERIES, c.q, t, c.d);
            Tile<S> p(SCORES, t, RIGHT);
            const T factor = masked_scores(c, t, pair.k, q, p);
            T *top = scratch<T>(STATISTICS, 2 * t.lanes), *share = top + t.lanes;
            with_dropout<T>(c, t, [&](const auto& dropout) { softmax(t, p, factor, top, share, dropout); });
            T* o = result_of<S>(t, c.dv);
            to_rows(t, p, pair.v, c.dv, o, false);
            scatter_transposed(o, t.lanes, t.rows, c.dv, share, at<S>(c.o, t.b, t.h, t.row), c.o.row);
            std::copy_n(top, t.rows, tops_of<T>(c, t));
            std::copy_n(share, t.rows, tops_of<T>(c, t) + c.Nq);
        },
        [](const KeySide<S>&, int64_t, int64_t) {});
}

// (3)-(4), (53)-(54), down the lanes: s and dp, still without Z, become P o Z and dS; ``keep``: dS as values too, not
// only as operands.
template <class S, class Z>
void softmax_backward(const Block& t, const T<S>* tops, T<S> factor, Tile<S>& s, Tile<S>& dp, bool keep,
                      const Z& dropout) {
    using T = Arithmetic<S>;
    const ptrdiff_t keys = run<S>(t.keys);
    for (ptrdiff_t i = 0; i < t.lanes; i += LANES<T>) {
        const Vector<T> top = load(tops + i);
        Vector<T> p[DEPTH<S>], ds[DEPTH<S>];
        Sum<Vector<T>> all, deltas;
        in_runs(keys, [&](ptrdiff_t first, ptrdiff_t end) {
            Vector<T> some{}, some_delta{};
            for (ptrdiff_t j = first; j < end; j++) {
                const Vector<T> x = exponential(scored(s.at(j, i), factor) - top);
                some += x;
                if constexpr (Z::DROPS) {
                    const Vector<T> m = dropout.marked(x, j, i);
                    store(s.at(j, i), m);
                    store(dp.at(j, i), dropout.dropped(load(dp.at(j, i)), m));
                } else {
                    store(s.at(j, i), x);
                }
                some_delta += x * load(dp.at(j, i));
            }
            all += some;
            deltas += some_delta;
        });
        const Vector<T> share = share_of(all.value()), delta = deltas.value() * share;
        for (ptrdiff_t j = 0; j < keys; j += DEPTH<S>) {
            for (ptrdiff_t u = 0; u < DEPTH<S>; u++) {
                p[u] = load(s.at(j + u, i)) * share;
                ds[u] = unmarked<Z>(p[u]) * (load(dp.at(j + u, i)) - delta);
                if constexpr (Z::DROPS) p[u] = dropout.dropped(p[u], p[u]);
                if (keep) store(dp.at(j + u, i), ds[u]);
            }
            s.put(j, i, p);
            dp.put(j, i, ds);
        }
    }
}

// dmask += dS, gmask += gS: a tile's values, summed over the mask's broadcast axes.
template <class S> void add_to_mask(const Call& c, const Block& t, Turns& turns, const Tile<S>& tile) {
    const Mask& m = c.gmask;
    if (!m.kind) return;
    T<S>* total = static_cast<T<S>*>(m.data) + t.b * m.sample + t.h * m.head + t.row * m.row;
    turns.take(t.b, t.h, t.number, [&] { ::add_to_mask(total, m.row, m.key, tile.values, t.stride, t.keys, t.rows); });
}

template <class S> void backward(const Call& c) {
    using T = Arithmetic<S>;
    Turns turns(c.gmask, c.B, c.H, blocks_of_head<S>(c, 2));
    blocks<S>(
        c, 2, [&](int64_t b, int64_t hk) { return KeySide<S>(c, b, hk, true); },
        [&](const KeySide<S>& pair, const Block& t) {
            const Queries<S> q(QUERIES, c.q, t, c.d), dout(DOUT, c.dout, t, c.dv);
            Tile<S> p(SCORES, t, LEFT), ds(DP, t, BOTH);
            const T factor = masked_scores(c, t, pair.k, q, p);
            scores(t, pair.v, dout, c.dv, ds);
            with_dropout<T>(c, t, [&](const auto& dropout) {
                softmax_backward(t, tops<T>(c, t), factor, p, ds, c.gmask.kind, dropout);
            });
            add_to_mask(c, t, turns, ds);
            to_keys(t, p, dout, c.dv, pair.sum_v);
            to_keys(t, ds, q, c.d, pair.sum_k);
            T* dq = result_of<S>(t, c.d);
            to_rows(t, ds, pair.k, c.d, dq, false);
            write_rows<S>(t, dq, c.d, T(c.scale), c.gq);
        },
        [&](const KeySide<S>& pair, int64_t b, int64_t hk) { write_sums<S>(c, pair, b, hk); });
}

// (7)-(8), (53)-(54), down the lanes: s, dp, dds, y become P o Z, dS, ddP o Z and gS; dds comes without the factor
// ``scale``, dp and y without Z. ``keep``: gS as values too, not only as operands.
template <class S, class Z>
void softmax_double_backward(const Block& t, const T<S>* tops, T<S> factor, T<S> scale, Tile<S>& s, Tile<S>& dp,
                             Tile<S>& dds, Tile<S>& y, bool keep, const Z& dropout) {
    using T = Arithmetic<S>;
    const ptrdiff_t keys = run<S>(t.keys);
    for (ptrdiff_t i = 0; i < t.lanes; i += LANES<T>) {
        const Vector<T> top = load(tops + i);
        Vector<T> p[DEPTH<S>], ds[DEPTH<S>], ddp[DEPTH<S>], gs[DEPTH<S>];
        Sum<Vector<T>> all, deltas, etas, totals;
        in_runs(keys, [&](ptrdiff_t first, ptrdiff_t end) {
            Vector<T> some{}, some_delta{}, some_eta{};
            for (ptrdiff_t j = first; j < end; j++) {
                const Vector<T> w = exponential(scored(s.at(j, i), factor) - top);
                some += w;
                if constexpr (Z::DROPS) {
                    const Vector<T> m = dropout.marked(w, j, i);
                    store(s.at(j, i), m);
                    store(dp.at(j, i), dropout.dropped(load(dp.at(j, i)), m));
                } else {
                    store(s.at(j, i), w);
                }
                some_delta += w * load(dp.at(j, i));
                some_eta += w * load(dds.at(j, i));
            }
            all += some;
            deltas += some_delta;
            etas += some_eta;
        });
        const Vector<T> share = share_of(all.value()), delta = deltas.value() * share, eta = etas.value() * share;
        in_runs(keys, [&](ptrdiff_t first, ptrdiff_t end) {
            Vector<T> some{};
            for (ptrdiff_t j = first; j < end; j += DEPTH<S>) {
                for (ptrdiff_t u = 0; u < DEPTH<S>; u++) {
                    Vector<T> m = load(s.at(j + u, i)) * share, yu = load(y.at(j + u, i));
                    store(s.at(j + u, i), m);
                    p[u] = unmarked<Z>(m);
                    ds[u] = p[u] * (load(dp.at(j + u, i)) - delta);
                    const Vector<T> centred = (load(dds.at(j + u, i)) - eta) * scale;
                    ddp[u] = p[u] * centred;
                    if constexpr (Z::DROPS) {
                        yu = dropout.dropped(yu, m);
                        ddp[u] = dropout.dropped(ddp[u], m);
                    }
                    gs[u] = p[u] * yu + ds[u] * centred;
                    some += gs[u];
                    store(y.at(j + u, i), gs[u]);
                }
                if constexpr (!Z::DROPS) s.put(j, i, p);
                dp.put(j, i, ds);
                dds.put(j, i, ddp);
            }
            totals += some;
        });
        const Vector<T> total = totals.value();
        for (ptrdiff_t j = 0; j < keys; j += DEPTH<S>) {
            for (ptrdiff_t u = 0; u < DEPTH<S>; u++) {
                const Vector<T> m = load(s.at(j + u, i));
                gs[u] = load(y.at(j + u, i)) - unmarked<Z>(m) * total;
                if constexpr (Z::DROPS) p[u] = dropout.dropped(m, m);
                if (keep) store(y.at(j + u, i), gs[u]);
            }
            if constexpr (Z::DROPS) s.put(j, i, p);
            y.put(j, i, gs);
        }
    }
}

// (6): dds, which comes without the factor scale, becomes ddS.
template <class S> void add_mask_cotangent(const Call& c, const Block& t, Tile<S>& dds) {
    const Mask& m = c.ddmask;
    const T<S>* first = static_cast<const T<S>*>(m.data) + t.b * m.sample + t.h * m.head + t.row * m.row;
    for (ptrdiff_t j = 0; j < t.keys; j++)
        for (ptrdiff_t i = 0; i < t.rows; i++)
            *dds.at(j, i) = *dds.at(j, i) * T<S>(c.scale) + first[i * m.row + j * m.key];
}

template <class S> void double_backward(const Call& c) {
    using T = Arithmetic<S>;
    Turns turns(c.gmask, c.B, c.H, blocks_of_head<S>(c, 4));
    blocks<S>(
        c, 4, [&](int64_t b, int64_t hk) { return KeySide<S>(c, b, hk, true); },
        [&](const KeySide<S>& pair, const Block& t) {
            const Queries<S> q(QUERIES, c.q, t, c.d), dout(DOUT, c.dout, t, c.dv), ddq(DDQ, c.ddq, t, c.d);
            const bool products = ddq || pair.ddk, has_dds = products || c.ddmask.kind;
            Tile<S> s(SCORES, t, RIGHT), dp(DP, t, BOTH), dds(DDS, t, BOTH), y(Y, t, BOTH);
            const T factor = masked_scores(c, t, pair.k, q, s);
            scores(t, pair.v, dout, c.dv, dp);
            if (ddq) scores(t, pair.k, ddq, c.d, dds);
            if (pair.ddk) scores(t, pair.ddk, q, c.d, dds, bool(ddq));
            if (!products) std::fill_n(dds.values, run<S>(t.keys) * t.stride, T(0));
            if (c.ddmask.kind) add_mask_cotangent(c, t, dds);
            if (pair.ddv)
                scores(t, pair.ddv, dout, c.dv, y);
            else
                std::fill_n(y.values, run<S>(t.keys) * t.stride, T(0));
            const T scale = c.ddmask.kind ? T(1) : T(c.scale);
            with_dropout<T>(c, t, [&](const auto& dropout) {
                softmax_double_backward(t, tops<T>(c, t), factor, scale, s, dp, dds, y, c.gmask.kind, dropout);
            });
            add_to_mask(c, t, turns, y);

            to_keys(t, y, q, c.d, pair.sum_k);
            if (ddq) to_keys(t, dp, ddq, c.d, pair.sum_k);
            if (has_dds) to_keys(t, dds, dout, c.dv, pair.sum_v);
            T* g = result_of<S>(t, std::max(c.d, c.dv));
            to_rows(t, y, pair.k, c.d, g, false);
            if (pair.ddk) to_rows(t, dp, pair.ddk, c.d, g, true);
            write_rows<S>(t, g, c.d, T(c.scale), c.gq);
            to_rows(t, dds, pair.v, c.dv, g, false);
            if (pair.ddv) to_rows(t, s, pair.ddv, c.dv, g, true);
            write_rows<S>(t, g, c.dv, T(1), c.gdout);
        },
        [&](const KeySide<S>& pair, int64_t b, int64_t hk) { write_sums<S>(c, pair, b, hk); });
}

}  // namespace

#define EXPORT(S)                                                              \
    extern "C" void attention_forward_##S(const Call* c) { forward<S>(*c); }   \
    extern "C" void attention_backward_##S(const Call* c) { backward<S>(*c); } \
    extern "C" void attention_double_backward_##S(const Call* c) { double_backward<S>(*c); }
typedef float float32;
typedef double float64;
EXPORT(float32)
EXPORT(float64)
EXPORT(bfloat16)
