// C (+)= A B for matrices that lie in the caches, a block of C at a time held in registers.
#pragma once

#include "lanes.h"

// A matrix read element by element: element (i, k) lies at data[i * row + k * column].
template <class T> struct Scalars {
    const T* data;
    ptrdiff_t row, column;
};

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int WIDEST = 4;  // vectors of a row of a block: 32 registers hold 24 of C
#else
constexpr int WIDEST = 2;  // 16 registers hold 12
#endif
constexpr int TALLEST = 6;
constexpr ptrdiff_t DEEPEST = 128;  // rows of B at a time: they stay in the L1 cache

template <class T, int ROWS, int VECTORS>
inline void block(ptrdiff_t depth, Scalars<T> a, const T* b, ptrdiff_t b_row, T* c, ptrdiff_t c_row, bool add) {
    Vector<T> total[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++)
            total[i][j] = add ? load(c + i * c_row + j * LANES<T>) : Vector<T>{};
    for (ptrdiff_t k = 0; k < depth; k++) {
        Vector<T> row[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) row[j] = load(b + k * b_row + j * LANES<T>);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            const T x = a.data[i * a.row + k * a.column];
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) total[i][j] += x * row[j];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) store(c + i * c_row + j * LANES<T>, total[i][j]);
}

template <class T, int VECTORS>
inline void panel(ptrdiff_t rows, ptrdiff_t depth, Scalars<T> a, const T* b, ptrdiff_t b_row, T* c, ptrdiff_t c_row,
                  bool add) {
    constexpr int HIGH = TALLEST * WIDEST / VECTORS;  // as many registers whatever the width
    ptrdiff_t i = 0;
    auto at = [&](ptrdiff_t i) { return Scalars<T>{a.data + i * a.row, a.row, a.column}; };
    for (; i + HIGH <= rows; i += HIGH) block<T, HIGH, VECTORS>(depth, at(i), b, b_row, c + i * c_row, c_row, add);
    for (; i + 4 <= rows; i += 4) block<T, 4, VECTORS>(depth, at(i), b, b_row, c + i * c_row, c_row, add);
    for (; i < rows; i++) block<T, 1, VECTORS>(depth, at(i), b, b_row, c + i * c_row, c_row, add);
}

// C [rows, columns] (+)= A [rows, depth] B [depth, columns]; columns a multiple of the lanes, B and C dense along them.
template <class T>
void product(ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t depth, Scalars<T> a, const T* b, ptrdiff_t b_row, T* c,
             ptrdiff_t c_row, bool add) {
    for (ptrdiff_t k = 0; k < depth; k += DEEPEST) {
        const ptrdiff_t deep = std::min(DEEPEST, depth - k);
        const Scalars<T> part{a.data + k * a.column, a.row, a.column};
        const ptrdiff_t vectors = columns / LANES<T>, panels = (vectors + WIDEST - 1) / WIDEST;
        for (ptrdiff_t p = 0; p < panels; p++) {
            const ptrdiff_t begin = vectors * p / panels, wide = vectors * (p + 1) / panels - begin;
            const T* bp = b + k * b_row + begin * LANES<T>;
            T* cp = c + begin * LANES<T>;
            const bool more = add || k > 0;
            if (wide == 1) panel<T, 1>(rows, deep, part, bp, b_row, cp, c_row, more);
            if (wide == 2) panel<T, 2>(rows, deep, part, bp, b_row, cp, c_row, more);
#if defined(__AVX512F__) || defined(__aarch64__)
            if (wide == 3) panel<T, 3>(rows, deep, part, bp, b_row, cp, c_row, more);
            if (wide == 4) panel<T, 4>(rows, deep, part, bp, b_row, cp, c_row, more);
#endif
        }
    }
}
