// The gradient of a mask: tiles of score gradients, summed over the axes along which the mask is broadcast.
//
// Tiles that share elements of the mask are added in the order of (sample, head, block of rows), whichever thread
// computed them: same bits on any number of threads, and no memory but the gradient's own.
#pragma once

#include <atomic>
#include <memory>
#include <thread>

#include "layout.h"
#include "sums.h"

struct Mask {  // [B, H, Nq, Nk], broadcast by strides of 0
    void* data;
    int64_t sample, head, row, key;
    int64_t kind;  // 0: none, 1: bool, 2: additive, in the dtype of the arithmetic
};

// Lets each tile wait until those before it have been added. The first of those that are not never waits, and threads
// are given pairs in order, so there is always one that goes on.
class Turns {
  public:
    Turns(const Mask& m, int64_t B, int64_t H, int64_t blocks) : m(m), H(H), blocks(blocks) {
        if (m.kind && !(m.sample && m.head && m.row)) {
            const int64_t places = (m.sample ? B : 1) * (m.head ? H : 1) * (m.row ? blocks : 1);
            next = std::make_unique<std::atomic<int64_t>[]>(places);
        }
    }
    template <class Add> void take(int64_t b, int64_t h, int64_t block, Add add) {
        if (!next) return add();
        int64_t place = 0, turn = 0;
        for (auto [stride, index, size] : {Axis{m.sample, b, 1}, Axis{m.head, h, H}, Axis{m.row, block, blocks}})
            (stride ? place : turn) = (stride ? place : turn) * size + index;
        std::atomic<int64_t>& now = next[place];
        while (now.load(std::memory_order_acquire) != turn) std::this_thread::yield();
        add();
        now.store(turn + 1, std::memory_order_release);
    }

  private:
    struct Axis {
        int64_t stride, index, size;
    };
    const Mask& m;
    int64_t H, blocks;
    std::unique_ptr<std::atomic<int64_t>[]> next;
};

// total += tile [keys, rows], whose columns are stride apart, summed over axes where total has stride 0.
template <class T>
void add_to_mask(T* total, int64_t row, int64_t key, const T* tile, ptrdiff_t stride, ptrdiff_t keys, ptrdiff_t rows) {
    for (ptrdiff_t i = 0; i < rows; i += LANES<T>) {
        const ptrdiff_t some = std::min(LANES<T>, rows - i);
        if (key == 0) {
            Sum<Vector<T>> all;
            in_runs(keys, [&](ptrdiff_t first, ptrdiff_t end) {
                Vector<T> part{};
                for (ptrdiff_t j = first; j < end; j++) part += load(tile + j * stride + i);
                all += part;
            });
            const Vector<T> x = all.value();
            for (ptrdiff_t l = 0; l < some; l++) total[(i + l) * row] += x[l];
        } else if (row == 0) {
            for (ptrdiff_t j = 0; j < keys; j++) {
                const Vector<T> x = load(tile + j * stride + i);
                T part = 0;
                for (ptrdiff_t l = 0; l < some; l++) part += x[l];
                total[j * key] += part;
            }
        } else {
            for (ptrdiff_t j = 0; j < keys; j += LANES<T>) {
                Vector<T> block[LANES<T>];
                for (ptrdiff_t u = 0; u < LANES<T>; u++)
                    block[u] = j + u < keys ? load(tile + (j + u) * stride + i) : Vector<T>{};
                transpose<T>(block);
                const ptrdiff_t wide = std::min(LANES<T>, keys - j);
                for (ptrdiff_t l = 0; l < some; l++) {
                    T* to = total + (i + l) * row + j * key;
                    if (key == 1 && wide == LANES<T>)
                        store(to, load(to) + block[l]);
                    else
                        for (ptrdiff_t u = 0; u < wide; u++) to[u * key] += block[l][u];
                }
            }
        }
    }
}
