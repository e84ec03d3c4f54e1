// GELU on a CPU: forward, backward and double backward, equations (20)-(26) of kernels/README.md; one element per lane.
//
// bfloat16 is read and written as such and computed in float.
#include "lanes.h"

namespace {

struct Call {
    int64_t elements, threads, tanh;
    const void *x, *dy, *ddx;
    void *y, *dx, *gx, *gdy;
};

typedef Vector<float> V;

constexpr double PI = 3.14159265358979324, KAPPA = 0.797884560802865356, C = 0.044715;  // kappa and c of (23)

inline V at_most(V x, float most) { return x > most ? V{} + most : x; }

// Approximates a function of |x| that is 0 from 7.6 on by polynomials in u = 4 |x| - j, one around each node j / 4. The
// coefficients are computed when the library is loaded, by interpolation in double. Its derivative is the polynomials'.
template <int DEGREE> struct Table {
    static constexpr int NODES = 32;  // as many as one instruction can look up in two registers

    alignas(64) float coefficients[DEGREE + 1][NODES];  // of u^k at a node

    template <class F> explicit Table(F f) {
        for (int node = 0; node < NODES; node++) {
            double at[DEGREE + 1], c[DEGREE + 1];  // at the roots of a Chebyshev polynomial, in Newton's form
            for (int i = 0; i <= DEGREE; i++) at[i] = 0.5 * std::cos(PI * (i + 0.5) / (DEGREE + 1));
            for (int i = 0; i <= DEGREE; i++) c[i] = node < NODES - 1 ? f(0.25 * (node + at[i])) : 0;
            for (int k = 1; k <= DEGREE; k++)
                for (int i = DEGREE; i >= k; i--) c[i] = (c[i] - c[i - 1]) / (at[i] - at[i - k]);
            for (int k = DEGREE - 1; k >= 0; k--)  // converted to powers of u
                for (int i = k; i < DEGREE; i++) c[i] -= at[k] * c[i + 1];
            for (int k = 0; k <= DEGREE; k++) coefficients[k][node] = float(c[k]);
        }
    }

    struct Place {
        Vector<Pair> node;  // in the lowest five bits
        V u;
    };
    static Place find(V x) {
        constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held by the lowest bits
        const V size = at_most(bits_of<V>(bits_of<Vector<Pair>>(x) & 0x7fffffff), 0.25f * (NODES - 1));
        const V shifted = size * 4.0f + magic;
        return {bits_of<Vector<Pair>>(shifted), size * 4.0f - (shifted - magic)};
    }

    V value(Place p) const {
        V y = of(DEGREE, p);
        for (int k = DEGREE - 1; k >= 0; k--) y = y * p.u + of(k, p);
        return y;
    }
    V value(Place p, V& slope) const {  // also the derivative in |x|
        V y = of(DEGREE, p), d{};
        for (int k = DEGREE - 1; k >= 0; k--) d = d * p.u + y, y = y * p.u + of(k, p);
        slope = d * 4.0f;
        return y;
    }

  private:
    V of(int k, Place p) const {
        const float* row = coefficients[k];
#if defined(__AVX512F__)
        return (V)_mm512_permutex2var_ps(_mm512_load_ps(row), (__m512i)p.node, _mm512_load_ps(row + 16));
#else
        V c;
        for (int l = 0; l < LANES<float>; l++) c[l] = row[p.node[l] % NODES];
        return c;
#endif
    }
};

// (20)-(21) at -|x|: share = y / x, and first = y'. At |x| each is 1 minus that; y'' is even.
struct Erf {
    static double share(double size) { return 0.5 * std::erfc(size * std::sqrt(0.5)); }
    static double first(double size) { return share(size) - size * std::exp(-0.5 * size * size) / std::sqrt(2 * PI); }
};
// (23)-(24) at -|x|.
struct Tanh {
    static double share(double size) { return 1 / (1 + std::exp(2 * KAPPA * (size + C * size * size * size))); }
    static double first(double size) {
        const double s = share(size);
        return s - size * 2 * s * (1 - s) * KAPPA * (1 + 3 * C * size * size);
    }
};

// High enough for the interpolation's error to be below the rounding of S.
template <class S> constexpr int DEGREE = std::is_same_v<S, float> ? 6 : 4;
template <class S, class Form> const Table<DEGREE<S>> SHARE(Form::share);
template <class S, class Form> const Table<DEGREE<S>> FIRST(Form::first);

inline V mirrored(V x, V y) { return x < 0 ? y : 1.0f - y; }

// Calls f(first element, elements) for every vector; the last one may be partial.
template <class F> inline void each(const Call& c, F f) {
    constexpr int64_t lanes = LANES<float>, worth = 1 << 15;  // fewer elements do not repay several threads
    const int64_t whole = c.elements / lanes;
#pragma omp parallel num_threads(c.elements < worth ? 1 : c.threads)
    {
        const F mine = f;  // a local copy, which no store can change: its tables stay in registers
#pragma omp for schedule(static)
        for (int64_t i = 0; i < whole; i++) mine(i * lanes, lanes);
    }
    if (c.elements > whole * lanes) f(whole * lanes, c.elements - whole * lanes);
}

template <class S, class Form> void forward(const Call& c) {
    each(c, [=, table = SHARE<S, Form>](int64_t i, int64_t n) {
        const V x = load_some(static_cast<const S*>(c.x) + i, n);
        store_some(static_cast<S*>(c.y) + i, x * mirrored(x, table.value(table.find(x))), n);
    });
}

template <class S, class Form> void backward(const Call& c) {
    each(c, [=, table = FIRST<S, Form>](int64_t i, int64_t n) {
        const V x = load_some(static_cast<const S*>(c.x) + i, n), dy = load_some(static_cast<const S*>(c.dy) + i, n);
        store_some(static_cast<S*>(c.dx) + i, dy * mirrored(x, table.value(table.find(x))), n);
    });
}

template <class S, class Form> void double_backward(const Call& c) {
    each(c, [=, table = FIRST<S, Form>](int64_t i, int64_t n) {
        const V x = load_some(static_cast<const S*>(c.x) + i, n), dy = load_some(static_cast<const S*>(c.dy) + i, n);
        const V ddx = load_some(static_cast<const S*>(c.ddx) + i, n);
        V falling;  // the derivative in |x| of y' at -|x|, which is -y''
        const V first = mirrored(x, table.value(table.find(x), falling));
        store_some(static_cast<S*>(c.gx) + i, dy * ddx * -falling, n);
        store_some(static_cast<S*>(c.gdy) + i, ddx * first, n);
    });
}

}  // namespace

#define EXPORT(NAME, S) \
    extern "C" void gelu_##NAME##_##S(const Call* c) { c->tanh ? NAME<S, Tanh>(*c) : NAME<S, Erf>(*c); }
typedef float float32;
EXPORT(forward, float32)
EXPORT(backward, float32)
EXPORT(double_backward, float32)
EXPORT(forward, bfloat16)
EXPORT(backward, bfloat16)
EXPORT(double_backward, bfloat16)
