// LayerNorm on a CPU: forward, backward and double backward, equations (10)-(19) of kernels/README.md.
//
// A thread computes a row at a time, which stays in the L1 cache for the two or three passes over it: first the sums
// over the row, then what depends on them. For sums over all rows, the rows are divided into a fixed number of parts;
// each part is summed in order, and so are the parts: same bits on any number of threads.
//
// bfloat16 is read and written as such and computed in float.
#include "lanes.h"

namespace {

struct Call {
    int64_t rows, width, threads;
    double eps;
    const void *x, *dy, *ddx;              // [rows, width]; ddx may be absent
    const float *w, *b, *ddw, *ddb;        // [width]; each may be absent
    float *mean, *rstd;                    // [rows]
    void *y, *dx, *gx, *gdy;               // [rows, width]
    float *dw, *db, *gw;                   // [width]; each may be absent
};

typedef Vector<float> V;
constexpr int64_t LANE = LANES<float>, WORTH = 1 << 15;  // fewer elements do not repay several threads
constexpr int64_t PARTS = 64, MIN_ROWS = 16;             // parts of the rows; rows of a part

enum Slot { GXH, XH, FIRST, SECOND };

inline float total(V x) {
    float sum = 0;
    for (int64_t l = 0; l < LANE; l++) sum += x[l];
    return sum;
}

// A sum over a row, in several vectors: one alone would wait for the latency of each addition.
constexpr int SUMS = 4;
struct Sum {
    V parts[SUMS] = {};
    V& operator[](int u) { return parts[u]; }
    float over(float share) const { return total((parts[0] + parts[1]) + (parts[2] + parts[3])) * share; }
};

// Calls f(first column, columns, which vector of a Sum) for every vector of a row; the last one may be partial.
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

// Calls f(row, part) for every row; a thread computes whole parts.
template <class F> inline void each(const Call& c, F f) {
    const int64_t parts = std::clamp<int64_t>(c.rows / MIN_ROWS, 1, PARTS);
#pragma omp parallel for schedule(static) num_threads(c.rows * c.width < WORTH ? 1 : c.threads)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t row = c.rows * part / parts; row < c.rows * (part + 1) / parts; row++) f(row, part);
}

// Returns zeros for partial sums over the rows, [PARTS, width]; null if the result is not asked for.
inline float* partial(Slot slot, const Call& c, const float* result) {
    if (!result) return nullptr;
    float* sums = scratch<float>(slot, PARTS * c.width);
    std::fill_n(sums, PARTS * c.width, 0.0f);
    return sums;
}

// Adds up the partial sums.
inline void finish(const Call& c, const float* sums, float* result) {
    if (!result) return;
    std::copy_n(sums, c.width, result);
    for (int64_t part = 1; part < PARTS; part++)
        for (int64_t i = 0; i < c.width; i++) result[i] += sums[part * c.width + i];
}

// Returns a row of [rows, width].
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
            const V dxh = d * parameter(c.w, i, n, 1);
            sum[u] += dxh;
            dot[u] += dxh * xh;
            if (dw) add_some(dw + part * c.width + i, d * xh, n);
            if (db) add_some(db + part * c.width + i, d, n);
        });
        const float mean_dxh = sum.over(share), alpha2 = dot.over(share);
        columns(c.width, [&](int64_t i, int64_t n, int) {
            const V xh = (load_some(x + i, n) - mean) * rstd;
            const V dxh = load_some(dy + i, n) * parameter(c.w, i, n, 1);
            store_some(row_of<S>(c.dx, c, row) + i, (dxh - mean_dxh - xh * alpha2) * rstd, n);
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
        const S* ddxs = c.ddx ? row_of<S>(c.ddx, c, row) : nullptr;
        const float mean = c.mean[row], rstd = c.rstd[row];
        float *gxhs = scratch<float>(GXH, c.width + LANE), *xhs = scratch<float>(XH, c.width + LANE);
        const auto ddx_at = [&](int64_t i, int64_t n) { return ddxs ? load_some(ddxs + i, n) : V{}; };
        Sum sum, dot, other;
        columns(c.width, [&](int64_t i, int64_t n, int u) {
            const V xh = (load_some(x + i, n) - mean) * rstd, ddx = ddx_at(i, n);
            sum[u] += ddx;
            dot[u] += ddx * xh;
            other[u] += load_some(dy + i, n) * parameter(c.w, i, n, 1) * xh;
            store(xhs + i, xh);
        });
        const float mean_ddx = sum.over(share), alpha1 = dot.over(share), alpha2 = other.over(share);
        Sum sum_gxh, sum_along;
        columns(c.width, [&](int64_t i, int64_t n, int u) {
            const V xh = load(xhs + i), ddx = ddx_at(i, n), d = load_some(dy + i, n), w = parameter(c.w, i, n, 1);
            const V ddxh = only((ddx - mean_ddx - xh * alpha1) * rstd, n), dxh = d * w;
            V gxh = (ddx * alpha2 + dxh * alpha1) * -rstd, gdy = ddxh * w;
            if (c.ddw) {
                const V ddw = load_some(c.ddw + i, n);
                gxh += d * ddw;
                gdy += xh * ddw;
            }
            if (c.ddb) gdy += load_some(c.ddb + i, n);
            store_some(row_of<S>(c.gdy, c, row) + i, gdy, n);
            if (gw) add_some(gw + part * c.width + i, d * ddxh, n);
            sum_gxh[u] += gxh;
            sum_along[u] += gxh * xh + dxh * ddxh;
            store(gxhs + i, gxh);
        });
        // along: mean(gxh xh) of J and alpha3 of (18), which both multiply xh
        const float mean_gxh = sum_gxh.over(share), along = sum_along.over(share);
        columns(c.width, [&](int64_t i, int64_t n, int) {
            store_some(row_of<S>(c.gx, c, row) + i, (load(gxhs + i) - mean_gxh - load(xhs + i) * along) * rstd, n);
        });
    });
    finish(c, gw, c.gw);
}

}  // namespace

#define EXPORT(S)                                                               \
    extern "C" void layer_norm_forward_##S(const Call* c) { forward<S>(*c); }   \
    extern "C" void layer_norm_backward_##S(const Call* c) { backward<S>(*c); } \
    extern "C" void layer_norm_double_backward_##S(const Call* c) { double_backward<S>(*c); }
typedef float float32;
EXPORT(float32)
EXPORT(bfloat16)
