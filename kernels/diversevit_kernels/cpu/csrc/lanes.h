// Vectors of any processor, written once: the compiler chooses the instructions (-march=native).
//
// S is the type of a tensor's elements: float, double or bfloat16. T is the type of the arithmetic: S, or float for
// bfloat16. E is the type of a product's operands: T, or a Pair of bfloat16, multiplied and summed in one step.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <class T> struct VectorOf { typedef T type __attribute__((vector_size(VECTOR_BYTES))); };
template <class T> using Vector = typename VectorOf<T>::type;
template <class T> constexpr ptrdiff_t LANES = VECTOR_BYTES / sizeof(T);

template <class T> inline Vector<T> load(const T* p) {
    Vector<T> x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
template <class T> inline void store(T* p, Vector<T> x) { std::memcpy(p, &x, sizeof x); }

struct bfloat16 { uint16_t bits; };
typedef uint32_t Pair;  // the first in the low half

template <class S> struct TypesOf { using Arithmetic = S; using Operand = S; };
template <> struct TypesOf<bfloat16> { using Arithmetic = float; using Operand = Pair; };
template <class S> using Arithmetic = typename TypesOf<S>::Arithmetic;
template <class S> using Operand = typename TypesOf<S>::Operand;
template <class S> constexpr ptrdiff_t DEPTH = sizeof(Operand<S>) / sizeof(S);

template <class To, class From> inline To bits_of(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

// x rounded to bfloat16 (to nearest, ties to even), in the high half of each lane; NaN stays NaN.
inline Vector<Pair> rounded(Vector<float> x) {
    const Vector<Pair> bits = bits_of<Vector<Pair>>(x);
    return x == x ? bits + 0x7fff + ((bits >> 16) & 1) : Vector<Pair>{} + 0x7fc00000;
}

inline Vector<float> as_bfloat16(Vector<float> x) { return bits_of<Vector<float>>(rounded(x) & 0xffff0000); }

// Stores the first n lanes as S. (A copy of constant size is one instruction, any other a call.)
template <class S> inline void store_some(S* p, Vector<S> x, ptrdiff_t n) {
    if (n == LANES<S>)
        store(p, x);
    else
        std::memcpy(p, &x, n * sizeof(S));
}
inline void store_some(bfloat16* p, Vector<float> x, ptrdiff_t n) {
#if defined(__AVX512BF16__)
    const auto y = _mm512_cvtneps_pbh((__m512)x);
#else
    typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
    const Halves y = __builtin_convertvector(rounded(x) >> 16, Halves);
#endif
    if (n == LANES<float>)
        std::memcpy(p, &y, sizeof y);
    else
        std::memcpy(p, &y, n * sizeof(bfloat16));
}

// Loads n elements; zeros in the other lanes.
inline Vector<float> load_some(const float* p, ptrdiff_t n) {
    if (n == LANES<float>) return load(p);
    Vector<float> x{};
    std::memcpy(&x, p, n * sizeof(float));
    return x;
}
inline Vector<float> load_some(const bfloat16* p, ptrdiff_t n) {
    typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
    Halves x{};
    if (n == LANES<float>)
        std::memcpy(&x, p, sizeof x);
    else
        std::memcpy(&x, p, n * sizeof(bfloat16));
    return bits_of<Vector<float>>(__builtin_convertvector(x, Vector<Pair>) << 16);
}
inline void add_some(float* p, Vector<float> x, ptrdiff_t n) { store_some(p, load_some(p, n) + x, n); }

// x in the first n lanes, zeros in the others.
inline Vector<float> only(Vector<float> x, ptrdiff_t n) {
    for (ptrdiff_t l = n; l < LANES<float>; l++) x[l] = 0;
    return x;
}

// 1 / x for x in [1, 1e30], accurate to about an ulp.
inline Vector<float> reciprocal(Vector<float> x) {
#if defined(__AVX512F__)
    const Vector<float> y = (Vector<float>)_mm512_rcp14_ps((__m512)x);
    return y + y * (1.0f - x * y);
#else
    return 1.0f / x;
#endif
}

// Stores two vectors rounded to bfloat16: as two rows, or as one row of pairs.
#if defined(__AVX512BF16__)
inline __m512i rows_of(Vector<float> first, Vector<float> second) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
inline void store_rows(Vector<float> first, Vector<float> second, Pair* row, Pair* next) {
    const __m512i rows = rows_of(first, second);
    _mm256_storeu_si256((__m256i*)row, _mm512_castsi512_si256(rows));
    _mm256_storeu_si256((__m256i*)next, _mm512_extracti64x4_epi64(rows, 1));
}
inline void store_pairs(Vector<float> first, Vector<float> second, Pair* both) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(both, _mm512_permutexvar_epi16(order, rows_of(first, second)));
}
#else
inline void store_rows(Vector<float> first, Vector<float> second, Pair* row, Pair* next) {
    store_some(reinterpret_cast<bfloat16*>(row), first, LANES<float>);
    store_some(reinterpret_cast<bfloat16*>(next), second, LANES<float>);
}
inline void store_pairs(Vector<float> first, Vector<float> second, Pair* both) {
    store(both, rounded(first) >> 16 | (rounded(second) & 0xffff0000));
}
#endif

// a * b, rounded by itself: a compiler may not fold it into the sum that follows (fused multiply-add).
template <class V, class T> inline V product_of(V a, T b) {
    V c = a * b;
#if defined(__x86_64__)
    asm("" : "+v"(c));
#elif defined(__aarch64__)
    asm("" : "+w"(c));
#else
    asm("" : "+m"(c));
#endif
    return c;
}

// a0 b0 a1 b1 ...: the first LANES elements of that, or the second.
template <bool SECOND, class E, size_t... I>
inline Vector<E> zip(Vector<E> a, Vector<E> b, std::index_sequence<I...>) {
    constexpr int lanes = LANES<E>, from = SECOND ? lanes / 2 : 0;
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (int(I / 2) + from + (I % 2 ? lanes : 0))...);
#else
    typedef std::conditional_t<sizeof(E) == 8, int64_t, int32_t> Index;
    return __builtin_shuffle(a, b, Vector<Index>{(Index(I / 2) + from + (I % 2 ? lanes : 0))...});
#endif
}
template <bool SECOND, class E> inline Vector<E> zip(Vector<E> a, Vector<E> b) {
    return zip<SECOND, E>(a, b, std::make_index_sequence<LANES<E>>{});
}

// exp(x) for x <= 88: 2^(x / log 2), from the integer part and a polynomial in the rest (error 2e-9). The error is a
// few ulps of 1 + |x|, what rounding x alone would cause. Below -87.3 the result is 0; NaN stays NaN.
inline Vector<float> exponential(Vector<float> x) {
    constexpr float magic = 12582912.0f, scale = 1.44269504f;  // 1.5 * 2^23: adding it rounds to an integer
    const Vector<float> shifted = x * scale + magic, n = shifted - magic, f = x * scale - n;
    Vector<float> y = f * 0.000153458094f + 0.00133999312f;
    y = y * f + 0.00961848897f;
    y = y * f + 0.0555032878f;
    y = y * f + 0.240226469f;
    y = y * f + 0.693147206f;
    y = y * f + 1.0f;
    const Vector<Pair> power = (bits_of<Vector<Pair>>(shifted) << 23) + 0x3f800000;  // 2^n
    return x < -87.3f ? Vector<float>{} : y * bits_of<Vector<float>>(power);
}
inline Vector<double> exponential(Vector<double> x) {
    for (int i = 0; i < LANES<double>; i++) x[i] = std::exp(x[i]);
    return x;
}

// Scratch memory of a thread, kept between calls: slot i grows to the largest size asked for. Contents are undefined.
template <class T> inline T* scratch(int slot, ptrdiff_t elements) {
    struct Slot {
        void* memory = nullptr;
        size_t bytes = 0;
        ~Slot() { std::free(memory); }
    };
    static thread_local Slot slots[64];
    Slot& s = slots[slot];
    const size_t bytes = (elements * sizeof(T) + 4095) / 4096 * 4096;
    if (s.bytes < bytes) {
        std::free(s.memory);
        s.memory = std::aligned_alloc(4096, bytes);
        if (!s.memory) std::abort();
        s.bytes = bytes;
    }
    return static_cast<T*>(s.memory);
}
