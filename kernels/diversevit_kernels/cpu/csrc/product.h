// C (+)= A B for matrices that fit the caches; a block of C at a time is kept in registers.
#pragma once

#include "matrix_unit.h"

// A matrix that is read element by element: (i, k) is data[i * row + k * column].
template <class E> struct Left {
    const E* data;
    ptrdiff_t row, column;
};

// total += x b: an element of the left operand times a row of the right one.
template <class T> inline void multiply_add(Vector<T>& total, T x, Vector<T> b) { total += x * b; }
inline void multiply_add(Vector<float>& total, Pair x, Vector<Pair> b) {
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)  // processors with AMX are slow at these
    total = (Vector<float>)_mm512_dpbf16_ps((__m512)total, (__m512bh)(Vector<Pair>{} + x), (__m512bh)b);
#else
    total += bits_of<float>(x << 16) * bits_of<Vector<float>>(b << 16);
    total += bits_of<float>(x & 0xffff0000) * bits_of<Vector<float>>(b & 0xffff0000);
#endif
}
template <class E> using Total = std::conditional_t<std::is_same_v<E, Pair>, float, E>;

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int WIDEST = 4;  // vectors of a row of a block: 32 registers hold 24 of C
#else
constexpr int WIDEST = 2;  // 16 registers hold 12
#endif
constexpr int TALLEST = 6;
constexpr ptrdiff_t DEEPEST = 128;  // about how many rows of B at a time, so that they stay in the L1 cache

// A block with fewer than WIDEST vectors uses the free registers for several partial sums of each element: step k of
// the depth goes to sum k modulo PARTS. Products with few columns are then as accurate as a vectorised dot product.
template <class E, int ROWS, int VECTORS, class T = Total<E>>
inline void block(ptrdiff_t depth, Left<E> a, const E* b, ptrdiff_t b_row, T* c, ptrdiff_t c_row, bool add) {
    constexpr int PARTS = WIDEST / VECTORS;
    Vector<T> total[PARTS][ROWS][VECTORS]{};
    const auto step = [&](ptrdiff_t k, int part) {
        Vector<E> row[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) row[j] = load(b + k * b_row + j * LANES<E>);
#pragma GCC unroll 24
        for (int i = 0; i < ROWS; i++) {
            const E x = a.data[i * a.row + k * a.column];
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) multiply_add(total[part][i][j], x, row[j]);
        }
    };
    ptrdiff_t k = 0;
    for (; k + PARTS <= depth; k += PARTS)
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++) step(k + part, part);
    for (; k < depth; k++) step(k, 0);
#pragma GCC unroll 24
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) {
            T* to = c + i * c_row + j * LANES<T>;
            Vector<T> all = total[0][i][j];
#pragma GCC unroll 4
            for (int part = 1; part < PARTS; part++) all += total[part][i][j];
            store(to, add ? load(to) + all : all);
        }
}

template <class E, int VECTORS, class T = Total<E>>
inline void panel(ptrdiff_t rows, ptrdiff_t depth, Left<E> a, const E* b, ptrdiff_t b_row, T* c, ptrdiff_t c_row,
                  bool add) {
    ptrdiff_t i = 0;
    auto at = [&](ptrdiff_t i) { return Left<E>{a.data + i * a.row, a.row, a.column}; };
    for (; i + TALLEST <= rows; i += TALLEST)
        block<E, TALLEST, VECTORS>(depth, at(i), b, b_row, c + i * c_row, c_row, add);
    for (; i + 4 <= rows; i += 4) block<E, 4, VECTORS>(depth, at(i), b, b_row, c + i * c_row, c_row, add);
    for (; i + 2 <= rows; i += 2) block<E, 2, VECTORS>(depth, at(i), b, b_row, c + i * c_row, c_row, add);
    for (; i < rows; i++) block<E, 1, VECTORS>(depth, at(i), b, b_row, c + i * c_row, c_row, add);
}

// C [rows, columns] (+)= A [rows, depth] B [depth, columns]; columns are a multiple of the lanes, and B and C
// contiguous along them. For pairs, A is contiguous along its rows; for the matrix unit, every size is a multiple of
// the lanes.
template <class E, class T = Total<E>>
void product(ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t depth, Left<E> a, const E* b, ptrdiff_t b_row, T* c,
             ptrdiff_t c_row, bool add) {
    if constexpr (std::is_same_v<E, Pair>)
        if (matrix_unit::allowed())
            return matrix_unit::product(rows, columns, depth, a.data, a.row, b, b_row, c, c_row, add);
    const ptrdiff_t parts = std::max<ptrdiff_t>(1, (depth + DEEPEST / 2) / DEEPEST);
    for (ptrdiff_t n = 0; n < parts; n++) {
        const ptrdiff_t k = depth * n / parts, deep = depth * (n + 1) / parts - k;
        const Left<E> part{a.data + k * a.column, a.row, a.column};
        const ptrdiff_t vectors = columns / LANES<E>, panels = (vectors + WIDEST - 1) / WIDEST;
        for (ptrdiff_t p = 0; p < panels; p++) {
            const ptrdiff_t begin = vectors * p / panels, wide = vectors * (p + 1) / panels - begin;
            const E* bp = b + k * b_row + begin * LANES<E>;
            T* cp = c + begin * LANES<E>;
            const bool more = add || k > 0;
            if (wide == 1) panel<E, 1>(rows, deep, part, bp, b_row, cp, c_row, more);
            if (wide == 2) panel<E, 2>(rows, deep, part, bp, b_row, cp, c_row, more);
#if defined(__AVX512F__) || defined(__aarch64__)
            if (wide == 3) panel<E, 3>(rows, deep, part, bp, b_row, cp, c_row, more);
            if (wide == 4) panel<E, 4>(rows, deep, part, bp, b_row, cp, c_row, more);
#endif
        }
    }
}
