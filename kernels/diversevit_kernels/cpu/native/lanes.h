// Vectors of the processor at hand, written once: the compiler picks the instructions (-march=native).
//
// T is the type of the arithmetic, float or double. S is a type of tensors: T itself, or bfloat16 with T = float.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

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

template <class T> constexpr ptrdiff_t padded(ptrdiff_t n) { return (n + LANES<T> - 1) / LANES<T> * LANES<T>; }

template <class T> inline Vector<T> load(const T* p) {
    Vector<T> x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
template <class T> inline void store(T* p, Vector<T> x) { std::memcpy(p, &x, sizeof x); }

struct bfloat16 { uint16_t bits; };

template <class T> inline T widen(T x) { return x; }
inline float widen(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}
template <class S> struct ArithmeticOf { using type = S; };
template <> struct ArithmeticOf<bfloat16> { using type = float; };
template <class S> using Arithmetic = typename ArithmeticOf<S>::type;

template <class S> inline S narrow(Arithmetic<S> x) { return x; }
template <> inline bfloat16 narrow<bfloat16>(float x) {  // to nearest, ties to even; NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {uint16_t(x != x ? 0x7fc0 : rounded)};
}

// exp(x) for x <= 88, to about an ulp; below -87.3 it is 0. NaN stays NaN.
inline Vector<float> exponential(Vector<float> x) {
    typedef int32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const Vector<float> shifted = x * 1.44269504f + magic, n = shifted - magic;
    const Vector<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Vector<float> y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    Bits power;
    std::memcpy(&power, &shifted, sizeof power);
    power = (power - 0x4b400000 + 127) << 23;
    Vector<float> scale;
    std::memcpy(&scale, &power, sizeof scale);
    return x < -87.3f ? Vector<float>{} : y * scale;
}
inline Vector<double> exponential(Vector<double> x) {
    for (int i = 0; i < LANES<double>; i++) x[i] = std::exp(x[i]);
    return x;
}

// Memory of a thread, kept between calls: slot i grows to the largest size asked for. Contents are undefined.
template <class T> inline T* scratch(int slot, ptrdiff_t elements) {
    struct Slot {
        void* memory = nullptr;
        size_t bytes = 0;
        ~Slot() { std::free(memory); }
    };
    static thread_local Slot slots[32];
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
