// Sums down the lanes that are accurate to an ulp.
#pragma once

#include "lanes.h"

// A compensated sum: keeps the rounding errors of its additions (Knuth's TwoSum).
template <class V> struct Sum {
    V sum{}, lost{};
    void operator+=(V x) {
        const V next = sum + x, added = next - sum;
        lost += (sum - (next - added)) + (x - added);
        sum = next;
    }
    V value() const { return sum + lost; }
};

// Calls each(first, end) for short runs of keys. A run is summed by itself and then added to a Sum: accurate to an ulp.
template <class Each> inline void in_runs(ptrdiff_t keys, Each each) {
    constexpr ptrdiff_t RUN = 8;
    for (ptrdiff_t first = 0; first < keys; first += RUN) each(first, std::min(keys, first + RUN));
}
