// GELU on a CPU: forward, backward and double backward, equations (20)-(26) of kernels/README.md, an element a lane.
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

constexpr float FLAT_BEYOND = 40;  // |x| from which y'' is 0; clamping there keeps powers of x finite
constexpr float K = 0.797884561f;  // sqrt(2 / pi), of (23)
constexpr float C = 0.044715f;     // of (23)

constexpr int DEGREE = 9;  // of P
constexpr float COEFFICIENTS[DEGREE + 1] = {0.39999789f,   0.400096918f, 0.334221841f, 0.225241281f,  -0.0517679053f,
                                            0.260596484f, -0.877757198f, 0.903197945f, -0.415282827f, 0.0747696627f};

struct Derivatives {
    V share, first, second;  // y / x, y', y''
};

inline V size_of(V x) { return bits_of<V>(bits_of<Vector<Pair>>(x) & 0x7fffffff); }
inline V at_most(V x, float most) { return x > most ? V{} + most : x; }

// (20)-(22). The tail of the normal distribution is its density times the Mills ratio, here t P(t) with
// t = 1 / (1 + 0.4 |x|): its relative deviation is least on [0, 40] for this degree, 4e-8.
inline Derivatives of_erf(V x) {
    const V size = at_most(size_of(x), FLAT_BEYOND), square = size * size;
    const V density = exponential(square * -0.5f) * 0.398942280f;
    const V t = reciprocal(size * 0.4f + 1.0f);
    V p = V{} + COEFFICIENTS[DEGREE];
    for (int i = DEGREE - 1; i >= 0; i--) p = p * t + COEFFICIENTS[i];
    const V tail = density * (p * t);
    const V below = tail - size * density;  // y' at -|x|
    return {x < 0 ? tail : 1.0f - tail, x < 0 ? below : 1.0f - below, density * (2.0f - square)};
}

// (23)-(25) from |x|: y'' is even and y' + y'(-x) = 1. s = sigmoid(2 u) = (1 + T) / 2 and its complement do not cancel
// where T is 1.
inline Derivatives of_tanh(V x) {
    const V size = at_most(size_of(x), FLAT_BEYOND), square = size * size;
    const V u = size * (square * (K * C) + K), slope = square * (3 * K * C) + K;
    const V e = exponential(u * -2.0f), s = reciprocal(e + 1.0f), rest = e * s, bump = s * rest * 2.0f;
    const V bent = square * (12 * K * C) + 2 * K - size * (s - rest) * (slope * slope) * 2.0f;
    const V below = rest - size * slope * bump;  // y' at -|x|
    return {x < 0 ? rest : s, x < 0 ? below : 1.0f - below, bump * bent};
}

// f for the lanes of every vector, the last of which may be partial: f(first element, elements).
template <class F> inline void each(const Call& c, F f) {
    constexpr int64_t lanes = LANES<float>, worth = 1 << 15;  // elements for which threads are worth it
    const int64_t whole = c.elements / lanes;
#pragma omp parallel for schedule(static) num_threads(c.elements < worth ? 1 : c.threads)
    for (int64_t i = 0; i < whole; i++) f(i * lanes, lanes);
    if (c.elements > whole * lanes) f(whole * lanes, c.elements - whole * lanes);
}

template <class S, Derivatives (*at)(V)> void forward(const Call& c) {
    each(c, [&](int64_t i, int64_t n) {
        const V x = load_some(static_cast<const S*>(c.x) + i, n);
        store_some(static_cast<S*>(c.y) + i, x * at(x).share, n);
    });
}

template <class S, Derivatives (*at)(V)> void backward(const Call& c) {
    each(c, [&](int64_t i, int64_t n) {
        const V x = load_some(static_cast<const S*>(c.x) + i, n), dy = load_some(static_cast<const S*>(c.dy) + i, n);
        store_some(static_cast<S*>(c.dx) + i, dy * at(x).first, n);
    });
}

template <class S, Derivatives (*at)(V)> void double_backward(const Call& c) {
    each(c, [&](int64_t i, int64_t n) {
        const V x = load_some(static_cast<const S*>(c.x) + i, n), dy = load_some(static_cast<const S*>(c.dy) + i, n);
        const V a = load_some(static_cast<const S*>(c.ddx) + i, n);
        const Derivatives y = at(x);
        store_some(static_cast<S*>(c.gx) + i, dy * a * y.second, n);
        store_some(static_cast<S*>(c.gdy) + i, a * y.first, n);
    });
}

}  // namespace

#define RUNG(NAME, S)                                                        \
    extern "C" void gelu_##NAME##_##S(const Call* c) {                       \
        c->tanh ? NAME<S, of_tanh>(*c) : NAME<S, of_erf>(*c);                \
    }
typedef float float32;
RUNG(forward, float32)
RUNG(backward, float32)
RUNG(double_backward, float32)
RUNG(forward, bfloat16)
RUNG(backward, bfloat16)
RUNG(double_backward, bfloat16)
