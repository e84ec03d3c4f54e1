// Memory layouts of the operands of products, and conversions into and out of them.
//
// A product's left operand is contiguous along the depth, its right operand along the columns. An element E of either
// holds DEPTH neighbours along the depth. A matrix x [n, width] of a tensor is therefore stored, in a product that sums
//
//   over the width:  left   [n, width / DEPTH]   rows as they are          right  its transpose
//   over the rows:   right  [n / DEPTH, width]   rows paired               left   its transpose
//
// with both sizes padded by zeros to a multiple of STEP; the rows of a block only to a multiple of UNIT.
#pragma once

#include "lanes.h"

template <class S> constexpr ptrdiff_t STEP = LANES<Operand<S>> * DEPTH<S>;

constexpr ptrdiff_t multiple(ptrdiff_t n, ptrdiff_t of) { return (n + of - 1) / of * of; }
template <class S> constexpr ptrdiff_t padded(ptrdiff_t n) { return multiple(n, STEP<S>); }

#if defined(__AMX_BF16__)  // the matrix unit multiplies whole tiles
template <class S> constexpr ptrdiff_t UNIT = STEP<S>;
template <class S> constexpr ptrdiff_t GRAIN = DEPTH<S> == 1 ? 1 : STEP<S>;
#else
template <class S> constexpr ptrdiff_t UNIT = LANES<Operand<S>>;
template <class S> constexpr ptrdiff_t GRAIN = DEPTH<S>;
#endif

// How far a product runs over an axis of size n: into the padding, where elements are pairs.
template <class S> constexpr ptrdiff_t run(ptrdiff_t n) { return multiple(n, GRAIN<S>); }

// At least n, and an odd number of vectors: a column with this stride is spread over all sets of a cache.
template <class E> constexpr ptrdiff_t odd_vectors(ptrdiff_t n) { return ((n + LANES<E> - 1) / LANES<E> | 1) * LANES<E>; }

// x [n, width], rows stride apart -> out [high, padded width].
template <class S>
void as_it_is(const S* x, int64_t stride, ptrdiff_t n, ptrdiff_t high, ptrdiff_t width, Operand<S>* out) {
    const ptrdiff_t wide = padded<S>(width);
    S* to = reinterpret_cast<S*>(out);
    for (ptrdiff_t i = 0; i < high; i++, to += wide) {
        const ptrdiff_t filled = i < n ? width : 0;
        if (filled) std::memcpy(to, x + i * stride, filled * sizeof(S));
        std::memset(to + filled, 0, (wide - filled) * sizeof(S));
    }
}

// Pairs along the width, [n, columns] -> pairs along the rows, [n / 2, 2 columns], rows of out stride apart.
inline void paired(const Pair* x, ptrdiff_t n, ptrdiff_t columns, Pair* out, ptrdiff_t stride) {
    for (ptrdiff_t i = 0; i < n; i += 2, out += stride)
        for (ptrdiff_t c = 0; c < columns; c += LANES<Pair>) {
            const Vector<Pair> a = load(x + i * columns + c), b = load(x + (i + 1) * columns + c);
            const Vector<Pair> first = (a & 0xffff) | b << 16, second = a >> 16 | (b & 0xffff0000);
            store(out + 2 * c, zip<false, Pair>(first, second));
            store(out + 2 * c + LANES<Pair>, zip<true, Pair>(first, second));
        }
}

// Transposes LANES vectors of LANES elements in place.
template <class E> inline void transpose(Vector<E>* x) {
    constexpr int lanes = LANES<E>;
#pragma GCC unroll 4
    for (int stride = 1; stride < lanes; stride *= 2) {
        Vector<E> y[lanes];
#pragma GCC unroll 8
        for (int i = 0; i < lanes / 2; i++) {
            y[2 * i] = zip<false, E>(x[i], x[i + lanes / 2]);
            y[2 * i + 1] = zip<true, E>(x[i], x[i + lanes / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; i++) x[i] = y[i];
    }
}

// x [rows, columns] -> out [columns, rows], rows of out stride apart; both sizes a multiple of the lanes.
template <class E> void transposed(const E* x, ptrdiff_t rows, ptrdiff_t columns, E* out, ptrdiff_t stride) {
    for (ptrdiff_t i = 0; i < rows; i += LANES<E>)
        for (ptrdiff_t c = 0; c < columns; c += LANES<E>) {
            Vector<E> block[LANES<E>];
            for (ptrdiff_t j = 0; j < LANES<E>; j++) block[j] = load(x + (i + j) * columns + c);
            transpose<E>(block);
            for (ptrdiff_t j = 0; j < LANES<E>; j++) store(out + (c + j) * stride + i, block[j]);
        }
}

// x [width, lanes] -> out [n, width], rows of out stride apart, times a factor for each lane.
template <class S>
void scatter_transposed(const Arithmetic<S>* x, ptrdiff_t lanes, ptrdiff_t n, ptrdiff_t width,
                        const Arithmetic<S>* factors, S* out, int64_t stride) {
    using T = Arithmetic<S>;
    for (ptrdiff_t i = 0; i < n; i += LANES<T>) {
        const Vector<T> factor = load(factors + i);
        for (ptrdiff_t c = 0; c < width; c += LANES<T>) {
            Vector<T> block[LANES<T>];
            for (ptrdiff_t j = 0; j < LANES<T>; j++)
                block[j] = c + j < width ? load(x + (c + j) * lanes + i) * factor : Vector<T>{};
            transpose<T>(block);
            const ptrdiff_t some = std::min(LANES<T>, width - c);
            for (ptrdiff_t j = 0; j < std::min(LANES<T>, n - i); j++)
                store_some(out + (i + j) * stride + c, block[j], some);
        }
    }
}

// x [n, padded width] -> out [n, width], rows of out stride apart, times a factor.
template <class S>
void scatter(const Arithmetic<S>* x, ptrdiff_t n, ptrdiff_t width, Arithmetic<S> factor, S* out, int64_t stride) {
    using T = Arithmetic<S>;
    for (ptrdiff_t i = 0; i < n; i++, x += padded<S>(width))
        for (ptrdiff_t c = 0; c < width; c += LANES<T>)
            store_some(out + i * stride + c, load(x + c) * factor, std::min(LANES<T>, width - c));
}
