// C (+)= A B for pairs of bfloat16 on the matrix unit of x86 processors (AMX). Its registers are tiles of 16 rows of 64
// bytes; one instruction multiplies A [16, 16 pairs] by B [16 pairs, 16] and adds the product to C [16, 16].
#pragma once

#include "lanes.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace matrix_unit {

constexpr ptrdiff_t SIDE = 16;

// Returns whether the system lets this process use the matrix unit; asks once.
inline bool allowed() {
    constexpr long request_permission = 0x1023, tile_data = 18;
    static const bool yes = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return yes;
}

// While an object of this type lives, the thread's tiles are configured as above.
struct Configured {
    Configured() {
        alignas(64) static const struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        if (allowed()) _tile_loadconfig(&shape);
    }
    ~Configured() {
        if (allowed()) _tile_release();
    }
};

// A block of HIGH x WIDE tiles of C, in tile registers 0 to 3.
template <int HIGH, int WIDE>
inline void block(ptrdiff_t depth, const Pair* a, ptrdiff_t a_row, const Pair* b, ptrdiff_t b_row, float* c,
                  ptrdiff_t c_row, bool add) {
    const ptrdiff_t a_bytes = a_row * sizeof(Pair), b_bytes = b_row * sizeof(Pair), c_bytes = c_row * sizeof(float);
    float* low = c + SIDE * c_row;
    if (add) {
        _tile_loadd(0, c, c_bytes);
        if constexpr (WIDE > 1) _tile_loadd(1, c + SIDE, c_bytes);
        if constexpr (HIGH > 1) _tile_loadd(2, low, c_bytes);
        if constexpr (HIGH > 1 && WIDE > 1) _tile_loadd(3, low + SIDE, c_bytes);
    } else {
        _tile_zero(0);
        if constexpr (WIDE > 1) _tile_zero(1);
        if constexpr (HIGH > 1) _tile_zero(2);
        if constexpr (HIGH > 1 && WIDE > 1) _tile_zero(3);
    }
    for (ptrdiff_t k = 0; k < depth; k += SIDE) {
        _tile_loadd(4, a + k, a_bytes);
        _tile_loadd(6, b + k * b_row, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (WIDE > 1) _tile_loadd(7, b + k * b_row + SIDE, b_bytes);
        if constexpr (WIDE > 1) _tile_dpbf16ps(1, 4, 7);
        if constexpr (HIGH > 1) _tile_loadd(5, a + SIDE * a_row + k, a_bytes);
        if constexpr (HIGH > 1) _tile_dpbf16ps(2, 5, 6);
        if constexpr (HIGH > 1 && WIDE > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (WIDE > 1) _tile_stored(1, c + SIDE, c_bytes);
    if constexpr (HIGH > 1) _tile_stored(2, low, c_bytes);
    if constexpr (HIGH > 1 && WIDE > 1) _tile_stored(3, low + SIDE, c_bytes);
}

// rows, columns and depth are multiples of 16.
inline void product(ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t depth, const Pair* a, ptrdiff_t a_row, const Pair* b,
                    ptrdiff_t b_row, float* c, ptrdiff_t c_row, bool add) {
    asm volatile("" ::: "memory");  // the instructions below do not say which memory they read
    for (ptrdiff_t n = 0; n < columns; n += 2 * SIDE)
        for (ptrdiff_t m = 0; m < rows; m += 2 * SIDE) {
            const bool high = m + SIDE < rows, wide = n + SIDE < columns;
            const auto run = high ? (wide ? block<2, 2> : block<2, 1>) : (wide ? block<1, 2> : block<1, 1>);
            run(depth, a + m * a_row, a_row, b + n, b_row, c + m * c_row + n, c_row, add);
        }
    asm volatile("" ::: "memory");
}

}  // namespace matrix_unit
#else
namespace matrix_unit {

struct Configured {};
inline bool allowed() { return false; }
inline void product(ptrdiff_t, ptrdiff_t, ptrdiff_t, const Pair*, ptrdiff_t, const Pair*, ptrdiff_t, float*, ptrdiff_t,
                    bool) {}

}  // namespace matrix_unit
#endif
