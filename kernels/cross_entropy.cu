// Softmax cross-entropy: statistics of each row, its gradient, or both with the row read once. Contract and derivation
// stand in cross_entropy.py.
//
// Rungs (predicted for an H200: a copy moves 4.3 TB/s; nothing here has been measured yet)
//   1. A row per block, three passes over global memory (maximum, sum, gradient): 8 bytes per bf16 logit, at most half
//      of what a copy would do.
//   2. The sum in the same pass as the maximum (Milakov and Gimelshein 2018): 6 bytes. A larger maximum rescales the
//      sums once per 16 bytes instead of per element, which leaves 1 1/8 exponentials per logit: with the gradient's
//      one that is 60 percent of what the special-function units can do at 4.3 TB/s. Rescaled per element it would be
//      85 percent, and in the way.
//   3. 16-byte accesses, 4 of them on their way per thread, that leave the cache first; of a row of at most 1024 logits
//      a warp's 32 lanes, without a barrier. `forward` 2 bytes per logit, `backward` 4. A row has to begin at a multiple
//      of 16 bytes, and may end anywhere: those of GPT-2's 50,257 tokens lie `stride` = 50,264 bf16 numbers apart.
//   4. `fused`: the row waits in shared memory between its statistics and its gradient, so 4 bytes for both. 227 KB are
//      a row of 116,000 bf16 logits; of a longer row, the end is read again, from the L2 cache. 8192 rows of 50,304:
//      1.65 GB, 0.38 ms at 4.3 TB/s; predicted 80 to 88 percent of that.
#include "common.cuh"

constexpr float LOWEST = -3.402823466e38f;  // the lowest float: what a row is relative to before its first logit
constexpr float FLOOR = -1e30f;             // stands in for x = -inf in p x, where p is 0

// Of some of a row's logits, with d_j = logit_j - m and s = scale log2(e):
struct Statistics {
    float m = LOWEST;    // at least their maximum
    float total = 0;     // sum_j 2^(s d_j)
    float sum = 0;       // sum_j d_j
    float weighted = 0;  // sum_j 2^(s d_j) d_j
    float count = 0;     // how many they are

    // The same relative to a larger m.
    __device__ __forceinline__ void raise(float to, float s) {
        float by = fminf(to - m, -LOWEST), factor = exp2_fast(-by * s);
        weighted = factor == 0 ? 0 : factor * (weighted - by * total);  // 0 inf would be NaN
        total *= factor;
        sum -= count * by;
        m = to;
    }

    template <bool MEAN, typename T, int N> __device__ __forceinline__ void add(const Pack<T, N>& logits, float s) {
        float x[N], highest = -INF;
#pragma unroll
        for (int k = 0; k < N; ++k) x[k] = to_float(logits.v[k]), highest = fmaxf(highest, x[k]);
        if (highest > m) raise(highest, s);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            float d = x[k] - m, e = exp2_fast(d * s);
            total += e;
            sum += d;
            if constexpr (MEAN) weighted = fmaf(e, fmaxf(d, FLOOR), weighted);
        }
        count += N;
    }

    // Of the whole row, from its threads' parts; every thread gets it.
    template <int THREADS, bool MEAN> __device__ __forceinline__ void merge(float s, float* partial) {
        constexpr int WARPS = THREADS / 32;
        raise(row_max<THREADS>(m, partial), s);
        total = row_sum<THREADS>(total, partial + WARPS);
        sum = row_sum<THREADS>(sum, partial + 2 * WARPS);
        if constexpr (MEAN) weighted = row_sum<THREADS>(weighted, partial + 3 * WARPS);
    }
};

// One row's gradient: scale (p (a + b x) + c [j = target] + d), with everything that does not depend on j made before.
struct Gradient {
    float m, s, log2_total, a, b, c, d;
    int target;

    __device__ __forceinline__ Gradient(float m, float log_total, float a, float b, float c, float d, float scale,
                                        int target)
        : m(m), s(scale * LOG2E), log2_total(log_total * LOG2E), a(scale * a), b(scale * scale * b), c(scale * c),
          d(scale * d), target(target) {}

    template <typename T, int N> __device__ __forceinline__ Pack<T, N> of(const Pack<T, N>& logits, int j) const {
        float y[N];
#pragma unroll
        for (int k = 0; k < N; ++k) {
            float x = to_float(logits.v[k]) - m, p = exp2_fast(fmaf(x, s, -log2_total));
            y[k] = fmaf(p, fmaf(b, fmaxf(x, FLOOR), a), d);
        }
        if (target - j >= 0 && target - j < N) {  // added before rounding: where p is near 1, little is left of p - 1
#pragma unroll
            for (int k = 0; k < N; ++k)
                if (j + k == target) y[k] += c;
        }
        Pack<T, N> out;
#pragma unroll
        for (int k = 0; k < N; ++k) out.v[k] = from_float<T>(y[k]);
        return out;
    }
};

// use(j, load(j)) for every pack of this thread from `begin` on: logits j, j + 1, ...; LOADS of them are on their way at
// a time.
template <int N, int THREADS, int LOADS, typename Load, typename Use>
__device__ __forceinline__ void each_logit(int begin, int end, Load load, Use use) {
    constexpr int STEP = THREADS * N;
    for (int j0 = begin + thread_of_row<THREADS>() * N; j0 < end; j0 += LOADS * STEP) {
        decltype(load(0)) packs[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; ++u)
            if (j0 + u * STEP < end) packs[u] = load(j0 + u * STEP);
#pragma unroll
        for (int u = 0; u < LOADS; ++u)
            if (j0 + u * STEP < end) use(j0 + u * STEP, packs[u]);
    }
}

// A row need not end with a whole pack. `whole` of its V logits are in packs; those behind, fewer than a warp has
// threads, come last, one for each of the first threads. (The host tells `whole` where registers are short.)
template <int THREADS> __device__ __forceinline__ int behind_packs(int whole) {
    return whole + thread_of_row<THREADS>();
}

template <int N, int THREADS, typename T> __device__ __forceinline__ void clear_row(T* row, int V) {
    const int whole = V - V % N;
    for (int j = thread_of_row<THREADS>() * N; j < whole; j += THREADS * N) store_pack_streaming(row + j, Pack<T, N>{});
    if (const int j = behind_packs<THREADS>(whole); j < V) row[j] = from_float<T>(0);
}

// A target beyond the row is an error that is told of later (device.py, check_ids); nothing may be read there.
template <typename T> __device__ __forceinline__ float logit_of(const T* row, int target, int V) {
    return to_float(row[min(target, V - 1)]);
}

// 1024 threads and more share a multiprocessor, so that one block reads while another computes: 64 registers for each.
template <typename T, int N, int THREADS>
__global__ void __launch_bounds__(BLOCK<THREADS>, 1024 / BLOCK<THREADS>)
forward(const T* logits, const int* targets, int rows, int V, int whole, int stride, float scale, float* m,
        float* log_total, float* x_target, float* x_sum, float* x_mean) {
    SHARED(float, partial, 4 * THREADS / 32);
    const long long i = row_of_thread<THREADS>();
    if (i >= rows) return;
    const int target = targets[i];
    const T* row = logits + i * stride;
    Statistics of_row;
    float at_target = 0;
    if (target >= 0) {
        at_target = logit_of(row, target, V);
        each_logit<N, THREADS, 4>(
            0, whole, [&](int j) { return load_pack_streaming<N>(row + j); },
            [&](int, const Pack<T, N>& x) { of_row.add<true>(x, scale * LOG2E); });
        if (const int j = behind_packs<THREADS>(whole); j < V) of_row.add<true>(load_pack<1>(row + j), scale * LOG2E);
        of_row.merge<THREADS, true>(scale * LOG2E, partial);
    }
    if (thread_of_row<THREADS>() == 0) {
        const bool used = target >= 0;
        m[i] = used ? of_row.m : 0;
        log_total[i] = used ? logf(of_row.total) : 0;
        x_target[i] = used ? (at_target - of_row.m) * scale : 0;
        x_sum[i] = used ? of_row.sum * scale : 0;
        x_mean[i] = used ? of_row.weighted / of_row.total * scale : 0;
    }
}

// `out` may be `logits`: a thread writes what it alone has read.
template <typename T, int N, int THREADS>
__global__ void __launch_bounds__(BLOCK<THREADS>, 1024 / BLOCK<THREADS>)
backward(const T* logits, const int* targets, const float* m, const float* log_total, const float* a, const float* b,
         const float* c, const float* d, int rows, int V, int whole, int stride, float scale, T* out) {
    const long long i = row_of_thread<THREADS>();
    if (i >= rows) return;
    const int target = targets[i];
    const T* row = logits + i * stride;
    T* to = out + i * stride;
    if (target < 0) {
        clear_row<N, THREADS>(to, V);
        return;
    }
    const Gradient gradient(m[i], log_total[i], a[i], b[i], c[i], d[i], scale, target);
    each_logit<N, THREADS, 4>(
        0, whole, [&](int j) { return load_pack_streaming<N>(row + j); },
        [&](int j, const Pack<T, N>& x) { store_pack_streaming(to + j, gradient.of(x, j)); });
    if (const int j = behind_packs<THREADS>(whole); j < V) store_pack(to + j, gradient.of(load_pack<1>(row + j), j));
}

// Statistics and, in place of the logits, the gradient scale (p (a + z lse) + c [j = target] + d), lse = scale m +
// log_total. The first `staged` logits of a row (a multiple of N) wait in shared memory. A thread takes from there only
// what it has put there itself, so the barriers within `merge` are all that is needed.
template <typename T, int N, int THREADS>
__global__ void __launch_bounds__(BLOCK<THREADS>, 1024 / BLOCK<THREADS>)
fused(T* logits, const int* targets, const float* a, const float* z, const float* c, const float* d, int rows, int V,
      int whole, int stride, int staged, float scale, float* m, float* log_total, float* x_target, float* x_sum) {
    SHARED(float, partial, 4 * THREADS / 32);
    DYNAMIC_SHARED(memory, 128);
    const long long i = row_of_thread<THREADS>();
    if (i >= rows) return;
    const int target = targets[i];
    const bool first = thread_of_row<THREADS>() == 0;
    T* row = logits + i * stride;
    T* stage = reinterpret_cast<T*>(memory) + row_of_block<THREADS>() * staged;
    if (target < 0) {
        clear_row<N, THREADS>(row, V);
        if (first) m[i] = 0, log_total[i] = 0, x_target[i] = 0, x_sum[i] = 0;
        return;
    }

    Statistics of_row;
    each_logit<N, THREADS, 4>(
        0, whole, [&](int j) { return j < staged ? load_pack_streaming<N>(row + j) : load_pack<N>(row + j); },
        [&](int j, const Pack<T, N>& x) {
            if (j < staged) store_pack(stage + j, x);
            of_row.add<false>(x, scale * LOG2E);
        });
    if (const int j = behind_packs<THREADS>(whole); j < V) of_row.add<false>(load_pack<1>(row + j), scale * LOG2E);
    const float at_target = logit_of(row, target, V);  // before a barrier, behind which the others write; merge has one
    if constexpr (THREADS == 32) __syncwarp();         // for a block
    of_row.merge<THREADS, false>(scale * LOG2E, partial);

    const float log_of_row = logf(of_row.total), lse = fmaf(scale, of_row.m, log_of_row);
    if (first) {
        m[i] = of_row.m, log_total[i] = log_of_row;
        x_target[i] = (at_target - of_row.m) * scale, x_sum[i] = of_row.sum * scale;
    }
    const Gradient gradient(of_row.m, log_of_row, fmaf(z[i], lse, a[i]), 0, c[i], d[i], scale, target);
    const auto put = [&](int j, const Pack<T, N>& x) { store_pack_streaming(row + j, gradient.of(x, j)); };
    // Two loops: of one that takes from either, each load would first ask which memory its address is in. Shared memory
    // is near: one load at a time, and the registers suffice.
    each_logit<N, THREADS, 1>(0, staged, [&](int j) { return load_pack<N>(stage + j); }, put);
    each_logit<N, THREADS, 2>(staged, whole, [&](int j) { return load_pack<N>(row + j); }, put);
    if (const int j = behind_packs<THREADS>(whole); j < V) store_pack(row + j, gradient.of(load_pack<1>(row + j), j));
}
