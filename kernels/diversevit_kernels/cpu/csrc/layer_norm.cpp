// LayerNorm on a CPU: forward, backward and double backward, equations (10)-(19) of kernels/README.md.
//
// A thread owns a row, which stays in the L1 cache for the few times it is read: sums over it first, then what needs
// them. Sums over all rows are kept for a fixed number of parts of the rows, each in order, and added in order: same bits
// on any number of threads.
//
// bfloat16 is read and written as such and computed in float.
#include "lanes.h"

namespace {

struct Call {
    int64_t rows, width, threads;
    double eps;
    const void *x, *dy, *ddx;              // [rows, width]; dy, ddx of the backward passes; ddx may be absent
    const float *w, *b, *ddw, *ddb;        // [width]; each may be absent
    float *mean, *rstd;                    // [rows]
    void *y, *dx, *gx, *gdy;               // [rows, width]
    float *dw, *db, *gw;                   // [width]; each may be absent
};

typedef Vector<float> V;
constexpr int64_t LANE = LANES<float>, WORTH = 1 << 15;  // elements for which threads are worth it
constexpr int64_t PARTS = 64, LEAST_ROWS = 16;           // of all rows; of a part

enum Slot { H, XH, FIRST, SECOND };

inline float total(V x) {
    float sum = 0;
    for (int64_t l = 0; l < LANE; l++) sum += x[l];
    return sum;
}

// A sum over a row, in as many vectors as hide how long an addition takes.
constexpr int SUMS = 4;
struct Sum {
    V parts[SUMS] = {};
    V& operator[](int u) { return parts[u]; }
    float over(float share) const { return total((parts[0] + parts[1]) + (parts[2] + parts[3])) * share; }
};

// f(first column, columns, which of a sum's vectors) for every vector of a row, the last of which may be partial.
template <class F> inline void columns(int64_t width, F f) {
    int64_t i = 0;
    for (; i + SUMS * LANE <= width; i += SUMS * LANE)
#pragma GCC unroll 4
        for (int u = 0; u < SUMS; u++) f(i + u * LANE, LANE, u);
    for (; i + LANE <= width; i += LANE) f(i, LANE, 0);
    if (i < width) f(i, width - i, 0);
}

inline V parameter(const float* p, int64_t i, int64_t n, float absent) {
    return p ? load_some(p + i, n) : V{} + absent;
}

// Every row, a part of them after the other in each thread: f(row, part).
template <class F> inline void each(const Call& c, F f) {
    const int64_t parts = std::clamp<int64_t>(c.rows / LEAST_ROWS, 1, PARTS);
#pragma omp parallel for schedule(static) num_threads(c.rows * c.width < WORTH ? 1 : c.threads)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t row = c.rows * part / parts; row < c.rows * (part + 1) / parts; row++) f(row, part);
}

// Sums over all rows, [PARTS, width], zero; nothing where the result is not asked for.
inline float* partial(Slot slot, const Call& c, const float* result) {
    if (!result) return nullptr;
    float* sums = scratch<float>(slot, PARTS * c.width);
    std::fill_n(sums, PARTS * c.width, 0.0f);
    return sums;
}

inline void finish(const Call& c, const float* sums, float* result) {
    if (!result) return;
    std::copy_n(sums, c.width, result);
    for (int64_t part = 1; part < PARTS; part++)
        for (int64_t i = 0; i < c.width; i++) result[i] += sums[part * c.width + i];
}

// A row of [rows, width].
template <class S> inline const S* row_of(const void* x, const Call& c, int64_t row) {
    return static_cast<const S*>(x) + row * c.width;
}
template <class S> inline S* row_of(void* x, const Call& c, int64_t row) { return static_cast<S*>(x) + row * c.width; }

// (10)-(12).
template <class S> void forward(const Call& c) {
    const float share = 1.0f / c.width;
    each(c, [&](int64_t row, int64_t) {
        const S* x = row_of<S>(c.x, c, row);
        Sum sum, square;
        columns(c.width, [&](int64_t i, int64_t n, int u) { sum[u] += load_some(x + i, n); });
        const float mean = sum.over(share);
        columns(c.width, [&](int64_t i, int64_t n, int u) {
            const V d = only(load_some(x + i, n) - mean, n);
            square[u] += d * d;
        });
        const float rstd = 1.0f / std::sqrt(square.over(share) + float(c.eps));
        c.mean[row] = mean;
        c.rstd[row] = rstd;
        columns(c.width, [&](int64_t i, int64_t n, int) {
            const V xh = (load_some(x + i, n) - mean) * rstd;
            store_some(row_of<S>(c.y, c, row) + i, xh * parameter(c.w, i, n, 1) + parameter(c.b, i, n, 0), n);
        });
    });
}

// (13)-(14).
template <class S> void backward(const Call& c) {
    const float share = 1.0f / c.width;
    float *dw = partial(FIRST, c, c.dw), *db = partial(SECOND, c, c.db);
    each(c, [&](int64_t row, int64_t part) {
        const S *x = row_of<S>(c.x, c, row), *dy = row_of<S>(c.dy, c, row);
        const float mean = c.mean[row], rstd = c.rstd[row];
        Sum sum, dot;
        columns(c.width, [&](int64_t i, int64_t n, int u) {
            const V xh = (load_some(x + i, n) - mean) * rstd, d = load_some(dy + i, n);
            const V g = d * parameter(c.w, i, n, 1);
            sum[u] += g;
            dot[u] += g * xh;
            if (dw) add_some(dw + part * c.width + i, d * xh, n);
            if (db) add_some(db + part * c.width + i, d, n);
        });
        const float g1 = sum.over(share), g2 = dot.over(share);
        columns(c.width, [&](int64_t i, int64_t n, int) {
            const V xh = (load_some(x + i, n) - mean) * rstd;
            const V g = load_some(dy + i, n) * parameter(c.w, i, n, 1);
            store_some(row_of<S>(c.dx, c, row) + i, (g - g1 - xh * g2) * rstd, n);
        });
    });
    finish(c, dw, c.dw);
    finish(c, db, c.db);
}

// (15)-(19).
template <class S> void double_backward(const Call& c) {
    const float share = 1.0f / c.width;
    float* gw = partial(FIRST, c, c.gw);
    each(c, [&](int64_t row, int64_t part) {
        const S *x = row_of<S>(c.x, c, row), *dy = row_of<S>(c.dy, c, row);
        const S* ddx = c.ddx ? row_of<S>(c.ddx, c, row) : nullptr;
        const float mean = c.mean[row], rstd = c.rstd[row];
        float *hs = scratch<float>(H, c.width + LANE), *xhs = scratch<float>(XH, c.width + LANE);
        const auto a_at = [&](int64_t i, int64_t n) { return ddx ? load_some(ddx + i, n) : V{}; };
        Sum sum, dot, other;
        columns(c.width, [&](int64_t i, int64_t n, int u) {
            const V xh = (load_some(x + i, n) - mean) * rstd, a = a_at(i, n);
            sum[u] += a;
            dot[u] += a * xh;
            other[u] += load_some(dy + i, n) * parameter(c.w, i, n, 1) * xh;
            store(xhs + i, xh);
        });
        const float a1 = sum.over(share), a2 = dot.over(share), c2 = other.over(share);
        Sum sum_h, sum_along;
        columns(c.width, [&](int64_t i, int64_t n, int u) {
            const V xh = load(xhs + i), a = a_at(i, n), d = load_some(dy + i, n), w = parameter(c.w, i, n, 1);
            const V s = only((a - a1 - xh * a2) * rstd, n), g = d * w;
            V h = (a * c2 + g * a2) * -rstd, gdy = s * w;
            if (c.ddw) {
                const V ddw = load_some(c.ddw + i, n);
                h += d * ddw;
                gdy += xh * ddw;
            }
            if (c.ddb) gdy += load_some(c.ddb + i, n);
            store_some(row_of<S>(c.gdy, c, row) + i, gdy, n);
            if (gw) add_some(gw + part * c.width + i, d * s, n);
            sum_h[u] += h;
            sum_along[u] += h * xh + g * s;
            store(hs + i, h);
        });
        const float h1 = sum_h.over(share), along = sum_along.over(share);
        columns(c.width, [&](int64_t i, int64_t n, int) {
            store_some(row_of<S>(c.gx, c, row) + i, (load(hs + i) - h1 - load(xhs + i) * along) * rstd, n);
        });
    });
    finish(c, gw, c.gw);
}

}  // namespace

#define RUNGS(S)                                                                       \
    extern "C" void layer_norm_forward_##S(const Call* c) { forward<S>(*c); }          \
    extern "C" void layer_norm_backward_##S(const Call* c) { backward<S>(*c); }        \
    extern "C" void layer_norm_double_backward_##S(const Call* c) { double_backward<S>(*c); }
typedef float float32;
RUNGS(float32)
RUNGS(bfloat16)
