// Which weights attention's dropout keeps, (55)-(57) of kernels/README.md: the bits of common/dropout.py, with a row of
// scores per lane.
#pragma once

#include "lanes.h"

// As many words of 32 bits as there are lanes of T.
template <class T> struct WordsOf;
template <> struct WordsOf<float> { typedef uint32_t type __attribute__((vector_size(VECTOR_BYTES))); };
template <> struct WordsOf<double> { typedef uint32_t type __attribute__((vector_size(VECTOR_BYTES / 2))); };
template <class T> using Words = typename WordsOf<T>::type;

// (55): the two words of a row, of Philox4x32-10 (Salmon et al. 2011).
inline void row_words(uint64_t seed, uint64_t row, uint32_t& first, uint32_t& second) {
    uint32_t c0 = uint32_t(row), c1 = uint32_t(row >> 32), c2 = 0, c3 = 0, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
        const uint64_t x = uint64_t(0xD2511F53) * c0, y = uint64_t(0xCD9E8D57) * c2;
        c0 = uint32_t(y >> 32) ^ c1 ^ k0;
        c1 = uint32_t(y);
        c2 = uint32_t(x >> 32) ^ c3 ^ k1;
        c3 = uint32_t(x);
    }
    first = c0;
    second = c1;
}

// No dropout.
struct All {
    static constexpr bool DROPS = false;
};

// Dropout of some rows in a lane each. Beside a weight, which is not negative, its sign says that it is dropped.
template <class T> struct Dropout {
    static constexpr bool DROPS = true;
    const uint32_t *first, *second;  // [lanes], (55)
    uint32_t threshold;
    T larger;  // 1 / (1 - p)

    // x >= 0 in the lanes from the i-th on, of key j; with the sign set where it is dropped, (56)-(57).
    Vector<T> marked(Vector<T> x, ptrdiff_t j, ptrdiff_t i) const {
        Words<T> w, added;
        std::memcpy(&w, first + i, sizeof w);
        std::memcpy(&added, second + i, sizeof added);
        w += uint32_t(j) * 0x9E3779B9;
        w = (w ^ w >> 16) * 0x21F0AAAD;
        w = ((w ^ w >> 15) + added) * 0x735A2D97;
        w ^= w >> 15;
        return keeps(w) ? x : -x;
    }
    // (53): x, multiplied by Z of the lanes that are marked in m.
    Vector<T> dropped(Vector<T> x, Vector<T> m) const { return m > 0 ? x * larger : Vector<T>{}; }

  private:
    auto keeps(Words<T> w) const {
        if constexpr (sizeof(T) == sizeof(uint32_t))
            return w >= threshold;
        else
            return __builtin_convertvector(w >= threshold, decltype(Vector<T>{} > Vector<T>{}));
    }
};

// The size of a weight that may be marked.
template <class Z, class V> inline V unmarked(V x) {
    if constexpr (Z::DROPS)
        return x < 0 ? -x : x;
    else
        return x;
}
