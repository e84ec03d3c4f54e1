// The routed penalty on a CPU: Gram matrices of the input gradients u_h = r_h W_h, and the backward du = M u, dr, dW:
// (40)-(42) of kernels/README.md. The H x H algebra between the two is the caller's.
//
// Tokens are divided into blocks, and blocks into chunks; what is computed for a chunk, mainly u [H, tokens, D], stays
// in the shared cache. Work is divided among threads in three ways. Where weights are read (u = r W, dr = du W^T), a
// thread takes one head of block after block, so that the head's weights stay in its own cache. Where heads are
// combined (Gram matrix, du = M u), it takes a block. In the sum over tokens, dW = r^T du, it takes some rows of a
// head. Every sum runs in order: same bits on any number of threads.
//
// bfloat16 is multiplied as such and summed in float. u is float; du is multiplied as the sum of two bfloat16: du
// rounded, and the rest.
#include "layout.h"
#include "product.h"

namespace {

struct Routes {  // [B, N, 3, H, d], dense along d
    void* data;
    int64_t sample, token, part, head;
};
struct Weight {  // [3, H, d, D], dense along D
    const void* data;
    int64_t part, head, row;
};
struct Call {
    int64_t B, N, H, d, D, by_token, threads;
    Routes r, dr;
    Weight w;
    void* gram;     // [B, N, H, H] by token, [B, parts, H, H] by sample; dense, in the dtype of the arithmetic
    const void* m;  // [B, N, H, H] by token, [B, H, H] by sample; likewise
    void* dw;       // [3, H, d, D]; likewise
};

constexpr ptrdiff_t CHUNK_BYTES = 4 << 20;  // of a chunk's u
constexpr ptrdiff_t MAX_TOKENS = 64;        // of a block
constexpr ptrdiff_t TALL = 96;              // rows of dW that a thread computes at a time

template <class S> constexpr ptrdiff_t TERMS = DEPTH<S>;  // summands that du is multiplied as

enum Slot { ROWS, PAIRS, RESULT, WEIGHTS, NUMBERS, OPERANDS, SUMS };  // the last four: shared, the caller's

template <class S> using T = Arithmetic<S>;
template <class S> using E = Operand<S>;

// How tokens are divided, and the padded sizes.
template <class S> struct Plan {
    ptrdiff_t in, wide, most, high;      // padded: 3d, D, tokens of a block, of a sample
    ptrdiff_t in_row, wide_row;          // distance between rows of right operands
    ptrdiff_t per_sample, count, chunk;  // blocks of a sample, of all samples, of a chunk

    explicit Plan(const Call& c)
        : in(padded<S>(3 * c.d)), wide(padded<S>(c.D)), most(padded<S>(MAX_TOKENS)), high(padded<S>(c.N)) {
        in_row = odd_vectors<E<S>>(in);
        wide_row = odd_vectors<E<S>>(wide);
        per_sample = (high + most - 1) / most;
        count = c.B * per_sample;
        chunk = std::clamp<ptrdiff_t>(CHUNK_BYTES / (c.H * wide * most * ptrdiff_t(sizeof(T<S>))), 1, count);
    }
    // Returns the first token of a block, counted over all padded samples.
    ptrdiff_t position(ptrdiff_t block) const {
        const ptrdiff_t steps = high / STEP<S>;
        return block / per_sample * high + block % per_sample * steps / per_sample * STEP<S>;
    }
};

struct Block {
    int64_t b, token;
    ptrdiff_t tokens, high, begin;  // high: tokens, padded; begin: its first token's position in the chunk
};

template <class S> Block block_of(const Call& c, const Plan<S>& plan, ptrdiff_t index) {
    const ptrdiff_t begin = plan.position(index), b = index / plan.per_sample, token = begin - b * plan.high;
    const ptrdiff_t high = plan.position(index + 1) - begin, chunk = plan.position(index / plan.chunk * plan.chunk);
    return {b, token, std::min<ptrdiff_t>(c.N - token, high), high, begin - chunk};
}

// The weights of each head as right operands: of products over 3d, [3d, D], and over D, [D, 3d].
template <class S> struct Weights {
    E<S>*over_in, *over_wide = nullptr;
    ptrdiff_t in_size, wide_size;  // of a head

    Weights(const Call& c, const Plan<S>& plan, bool both)
        : in_size(plan.in / DEPTH<S> * plan.wide_row), wide_size(plan.wide / DEPTH<S> * plan.in_row) {
        over_in = scratch<E<S>>(WEIGHTS, c.H * (in_size + (both ? wide_size : 0)));
        if (both) over_wide = over_in + c.H * in_size;
    }
    void fill(const Call& c, const Plan<S>& plan, int64_t h) const {
        E<S>* rows = scratch<E<S>>(ROWS, plan.in * plan.wide / DEPTH<S>);
        S* to = reinterpret_cast<S*>(rows);
        for (ptrdiff_t i = 0; i < plan.in; i++, to += plan.wide) {
            const S* from = static_cast<const S*>(c.w.data) + i / c.d * c.w.part + h * c.w.head + i % c.d * c.w.row;
            const ptrdiff_t filled = i < 3 * c.d ? c.D : 0;
            if (filled) std::memcpy(to, from, filled * sizeof(S));
            std::memset(to + filled, 0, (plan.wide - filled) * sizeof(S));
        }
        E<S>* in = over_in + h * in_size;
        if constexpr (DEPTH<S> == 1)
            for (ptrdiff_t i = 0; i < plan.in; i++) std::copy_n(rows + i * plan.wide, plan.wide, in + i * plan.wide_row);
        else
            paired(rows, plan.in, plan.wide / 2, in, plan.wide_row);
        if (over_wide) transposed(rows, plan.in, plan.wide / DEPTH<S>, over_wide + h * wide_size, plan.in_row);
    }
};

// Copies r of a block and a head, [tokens, 3d], with zeros in the padding.
template <class S> void routes(const Call& c, const Plan<S>& plan, const Block& t, int64_t h, E<S>* out) {
    S* to = reinterpret_cast<S*>(out);
    std::memset(to, 0, t.high * plan.in * sizeof(S));
    for (ptrdiff_t i = 0; i < t.tokens; i++, to += plan.in)
        for (int64_t part = 0; part < 3; part++) {
            const S* from = static_cast<const S*>(c.r.data) + t.b * c.r.sample + (t.token + i) * c.r.token;
            std::memcpy(to + part * c.d, from + part * c.r.part + h * c.r.head, c.d * sizeof(S));
        }
}

template <class T> inline T total(Vector<T> x) {
    T sum = 0;
    for (ptrdiff_t l = 0; l < LANES<T>; l++) sum += x[l];
    return sum;
}

// Gram matrix [H, H], summed over tokens. Head h of token n is at u + h * head + n * wide.
template <class T>
void gram_of(ptrdiff_t H, const T* u, ptrdiff_t head, ptrdiff_t tokens, ptrdiff_t wide, T* gram) {
    constexpr ptrdiff_t side = 4;
    for (ptrdiff_t h = 0; h < H; h += side)
        for (ptrdiff_t k = 0; k <= h; k += side) {
            const T *left[side], *right[side];
            for (ptrdiff_t i = 0; i < side; i++) {
                left[i] = u + std::min(h + i, H - 1) * head;
                right[i] = u + std::min(k + i, H - 1) * head;
            }
            Vector<T> sum[side][side]{};
            for (ptrdiff_t c = 0; c < tokens * wide; c += LANES<T>) {
                Vector<T> y[side];
#pragma GCC unroll 4
                for (ptrdiff_t j = 0; j < side; j++) y[j] = load(right[j] + c);
#pragma GCC unroll 4
                for (ptrdiff_t i = 0; i < side; i++) {
                    const Vector<T> x = load(left[i] + c);
#pragma GCC unroll 4
                    for (ptrdiff_t j = 0; j < side; j++) sum[i][j] += x * y[j];
                }
            }
            for (ptrdiff_t i = 0; i < std::min(side, H - h); i++)
                for (ptrdiff_t j = 0; j < std::min(side, H - k); j++)
                    gram[(h + i) * H + k + j] = gram[(k + j) * H + h + i] = total<T>(sum[i][j]);
        }
}

// Memory for a chunk's tokens, by head. The distance between heads is a little more than a multiple of a page, so that
// rows of all heads, which are read and written together, fall into different sets of the cache.
template <class S> struct Chunk {
    ptrdiff_t tokens, in, wide, left_row, du_row;  // tokens: at most this many
    ptrdiff_t u_head, r_head, left_head, du_head;
    T<S>* u;             // [tokens, D]
    E<S>*r, *left, *du;  // r: left operand over tokens; left: du as left operand over D; du: as right one over tokens

    Chunk(const Call& c, const Plan<S>& plan, bool back)
        : tokens(plan.chunk * plan.most), in(plan.in / DEPTH<S>), wide(plan.wide / DEPTH<S>) {
        u_head = apart<T<S>>(tokens * plan.wide);
        r_head = apart<E<S>>(tokens * in);
        du_row = plan.wide_row;
        left_row = DEPTH<S> == 1 ? du_row : wide;
        left_head = apart<E<S>>(tokens * left_row);
        du_head = apart<E<S>>(tokens / DEPTH<S> * du_row);
        u = scratch<T<S>>(NUMBERS, c.H * u_head);
        r = scratch<E<S>>(OPERANDS, back ? c.H * (r_head + TERMS<S> * (left_head + du_head)) + 12 * LANES<E<S>> : 0);
        left = r + c.H * r_head + 5 * LANES<E<S>>;
        du = DEPTH<S> == 1 ? left : left + c.H * TERMS<S> * left_head + 7 * LANES<E<S>>;
    }
    template <class A> static ptrdiff_t apart(ptrdiff_t elements) {
        constexpr ptrdiff_t page = 4096 / sizeof(A);
        return (elements + page - 1) / page * page + 11 * LANES<A>;
    }
    T<S>* u_of(int64_t h, ptrdiff_t begin) const { return u + h * u_head + begin * wide * DEPTH<S>; }
    E<S>* left_of(int64_t h, ptrdiff_t term, ptrdiff_t begin) const {
        return left + (h * TERMS<S> + term) * left_head + begin * left_row;
    }
    E<S>* du_of(int64_t h, ptrdiff_t term, ptrdiff_t begin) const {
        return du + (h * TERMS<S> + term) * du_head + begin / DEPTH<S> * du_row;
    }
    // [tokens, 3d]; where elements are pairs, transposed, [3d, tokens].
    E<S>* r_of(int64_t h, ptrdiff_t begin) const {
        return r + h * r_head + (DEPTH<S> == 1 ? begin * in : begin / DEPTH<S>);
    }
    Left<E<S>> r_left(int64_t h, ptrdiff_t row) const {
        const ptrdiff_t far = tokens / DEPTH<S>;
        return DEPTH<S> == 1 ? Left<E<S>>{r_of(h, 0) + row, 1, in} : Left<E<S>>{r_of(h, 0) + row * far, far, 1};
    }
};

// (40): u of a block and a head; r is kept if dW will need it.
template <class S>
void route(const Call& c, const Plan<S>& plan, const Weights<S>& w, const Chunk<S>& chunk, const Block& t, int64_t h,
           bool keep) {
    const ptrdiff_t size = t.high * chunk.in;
    E<S>* r = keep && DEPTH<S> == 1 ? chunk.r_of(h, t.begin) : scratch<E<S>>(ROWS, size);
    routes(c, plan, t, h, r);
    if constexpr (DEPTH<S> > 1)
        if (keep) {
            Pair* pairs = scratch<Pair>(PAIRS, size);
            paired(r, t.high, chunk.in, pairs, plan.in);
            transposed(pairs, t.high / 2, plan.in, chunk.r_of(h, t.begin), chunk.tokens / 2);
        }
    product(t.high, plan.wide, chunk.in, Left<E<S>>{r, chunk.in, 1}, w.over_in + h * w.in_size, plan.wide_row,
            chunk.u_of(h, t.begin), plan.wide, false);
}

template <class S> void gram(const Call& c) {
    using T = Arithmetic<S>;
    const Plan<S> plan(c);
    const Weights<S> w(c, plan, false);
    const Chunk<S> chunk(c, plan, false);
    const ptrdiff_t head = chunk.u_head, square = c.H * c.H;
#pragma omp parallel num_threads(c.threads)
    {
        const matrix_unit::Configured configured;
#pragma omp for schedule(dynamic)
        for (int64_t h = 0; h < c.H; h++) w.fill(c, plan, h);
        for (ptrdiff_t first = 0; first < plan.count; first += plan.chunk) {
            const ptrdiff_t blocks = std::min(plan.chunk, plan.count - first);
#pragma omp for schedule(dynamic)
            for (ptrdiff_t task = 0; task < c.H * blocks; task++)
                route(c, plan, w, chunk, block_of(c, plan, first + task % blocks), task / blocks, false);
#pragma omp for schedule(dynamic)
            for (ptrdiff_t index = first; index < first + blocks; index++) {
                const Block t = block_of(c, plan, index);
                const T* u = chunk.u_of(0, t.begin);
                T* out = static_cast<T*>(c.gram) + (c.by_token ? t.b * c.N + t.token : index) * square;
                if (!c.by_token) gram_of(c.H, u, head, t.tokens, plan.wide, out);
                for (ptrdiff_t n = 0; c.by_token && n < t.tokens; n++)
                    gram_of(c.H, u + n * plan.wide, head, 1, plan.wide, out + n * square);
            }
        }
    }
}

// (42): du = M u for HEADS heads from h on, of one token, or of two where operands are pairs. Zeros where M is null.
template <class S, int HEADS>
void mix(const Call& c, const Chunk<S>& chunk, const T<S>* const* m, ptrdiff_t token, int64_t h) {
    using T = Arithmetic<S>;
    const ptrdiff_t wide = chunk.wide * DEPTH<S>;
    const T* u = chunk.u_of(0, token);
    for (ptrdiff_t i = 0; i < wide; i += LANES<T>) {
        Vector<T> du[DEPTH<S>][HEADS]{};
        for (ptrdiff_t n = 0; n < DEPTH<S>; n++)
            for (int64_t k = 0; m[n] && k < c.H; k++) {
                const Vector<T> x = load(u + k * chunk.u_head + n * wide + i);
#pragma GCC unroll 4
                for (int j = 0; j < HEADS; j++) du[n][j] += m[n][(h + j) * c.H + k] * x;
            }
        for (int j = 0; j < HEADS; j++)
            for (ptrdiff_t term = 0; term < TERMS<S>; term++) {
                E<S>*left = chunk.left_of(h + j, term, token), *right = chunk.du_of(h + j, term, token);
                if constexpr (DEPTH<S> == 1) {
                    store(right + i, du[0][j]);
                } else {
                    store_rows(du[0][j], du[1][j], left + i / 2, left + chunk.left_row + i / 2);
                    store_pairs(du[0][j], du[1][j], right + i);
                    for (auto& x : du) x[j] -= as_bfloat16(x[j]);
                }
            }
    }
}

// (42): du of a block, all heads.
template <class S> void mix_block(const Call& c, const Chunk<S>& chunk, const Block& t) {
    using T = Arithmetic<S>;
    for (ptrdiff_t n = 0; n < t.high; n += DEPTH<S>) {
        const T* m[DEPTH<S>];
        for (ptrdiff_t i = 0; i < DEPTH<S>; i++) {
            const int64_t group = c.by_token ? t.b * c.N + t.token + n + i : t.b;
            m[i] = n + i < t.tokens ? static_cast<const T*>(c.m) + group * c.H * c.H : nullptr;
        }
        int64_t h = 0;
        for (; h + 4 <= c.H; h += 4) mix<S, 4>(c, chunk, m, t.begin + n, h);
        for (; h < c.H; h++) mix<S, 1>(c, chunk, m, t.begin + n, h);
    }
}

// (42): dr of a block and a head.
template <class S>
void back(const Call& c, const Plan<S>& plan, const Weights<S>& w, const Chunk<S>& chunk, const Block& t, int64_t h) {
    using T = Arithmetic<S>;
    T* dr = scratch<T>(RESULT, t.high * plan.in);
    for (ptrdiff_t term = 0; term < TERMS<S>; term++)
        product(t.high, plan.in, chunk.wide, Left<E<S>>{chunk.left_of(h, term, t.begin), chunk.left_row, 1},
                w.over_wide + h * w.wide_size, plan.in_row, dr, plan.in, term > 0);
    for (ptrdiff_t n = 0; n < t.tokens; n++)
        for (int64_t part = 0; part < 3; part++) {
            S* to = static_cast<S*>(c.dr.data) + t.b * c.dr.sample + (t.token + n) * c.dr.token + part * c.dr.part;
            for (ptrdiff_t i = 0; i < c.d; i += LANES<T>)
                store_some(to + h * c.dr.head + i, load(dr + n * plan.in + part * c.d + i),
                           std::min<ptrdiff_t>(LANES<T>, c.d - i));
        }
}

template <class S> void backward(const Call& c) {
    using T = Arithmetic<S>;
    const Plan<S> plan(c);
    T* sums = scratch<T>(SUMS, c.H * plan.in * plan.wide);
    const Weights<S> w(c, plan, true);
    const Chunk<S> chunk(c, plan, true);
    const ptrdiff_t panels = (plan.in + TALL - 1) / TALL;
#pragma omp parallel num_threads(c.threads)
    {
        const matrix_unit::Configured configured;
#pragma omp for schedule(dynamic)
        for (int64_t h = 0; h < c.H; h++) w.fill(c, plan, h);
        for (ptrdiff_t first = 0; first < plan.count; first += plan.chunk) {
            const ptrdiff_t blocks = std::min(plan.chunk, plan.count - first);
            const ptrdiff_t tokens = plan.position(first + blocks) - plan.position(first);
#pragma omp for schedule(dynamic)
            for (ptrdiff_t task = 0; task < c.H * blocks; task++)
                route(c, plan, w, chunk, block_of(c, plan, first + task % blocks), task / blocks, true);
#pragma omp for schedule(dynamic)
            for (ptrdiff_t index = first; index < first + blocks; index++)
                mix_block(c, chunk, block_of(c, plan, index));
#pragma omp for schedule(dynamic) nowait
            for (ptrdiff_t task = 0; task < c.H * blocks; task++)
                back(c, plan, w, chunk, block_of(c, plan, first + task % blocks), task / blocks);
#pragma omp for schedule(dynamic)
            for (ptrdiff_t task = 0; task < c.H * panels; task++) {
                const ptrdiff_t h = task / panels, row = task % panels * TALL;
                for (ptrdiff_t term = 0; term < TERMS<S>; term++)
                    product(std::min(TALL, plan.in - row), plan.wide, tokens / DEPTH<S>, chunk.r_left(h, row),
                            chunk.du_of(h, term, 0), plan.wide_row, sums + (h * plan.in + row) * plan.wide, plan.wide,
                            first + term > 0);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < 3 * c.H * c.d; i++) {
            const int64_t part = i / (c.H * c.d), h = i / c.d % c.H, row = part * c.d + i % c.d;
            std::copy_n(sums + (h * plan.in + row) * plan.wide, c.D, static_cast<T*>(c.dw) + i * c.D);
        }
    }
}

}  // namespace

#define EXPORT(S)                                                                                       \
    extern "C" int routed_head_penalty_parts_##S(const Call* c) { return int(Plan<S>(*c).per_sample); } \
    extern "C" void routed_head_penalty_gram_##S(const Call* c) { gram<S>(*c); }                        \
    extern "C" void routed_head_penalty_backward_##S(const Call* c) { backward<S>(*c); }
typedef float float32;
typedef double float64;
EXPORT(float32)
EXPORT(float64)
EXPORT(bfloat16)
