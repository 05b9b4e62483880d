// AdamW over flat memory, and the sum of squares for the gradients' norm. The contract stands in adamw.py.
//
// Rungs (predicted for an H200: a copy moves 4.3 TB/s; nothing here has been measured yet)
//   1. One pass for everything: p, m, v and g are read and p, m, v written, 28 bytes per parameter; array code would
//      move three times that. 124 million parameters: 3.5 GB, 0.81 ms.
//   2. The bfloat16 copy that the next forward multiplies with is written in the same pass: 2 bytes more instead of 6.
//   3. 16-byte accesses, 8 of them on their way per thread, that leave the cache first: nothing of it is needed soon.
//      Predicted at least 85 percent of a copy. The exact root and division are free: 190 instructions would fit.
//   4. The factor that clips the gradients stays on the device: nothing waits for the norm (4 bytes per parameter).
//      What a schedule changes can be read from there, too: a CUDA graph holds the update.
#include "common.cuh"

constexpr int THREADS = 256, PACKS = 2;  // packs of each array per thread

struct Constants {
    float keep, rate, beta1, rest1, beta2, rest2, eps, root, scale;

    // One parameter's update; in the same order as the Numba version's.
    __device__ __forceinline__ void step(float& p, float& m, float& v, float g) const {
        g *= scale;
        m = beta1 * m + rest1 * g;
        v = beta2 * v + rest2 * g * g;
        p = keep * p - rate * m / (sqrtf(v) * root + eps);
    }
};

// The update of n parameters, in packs of N and what is left one by one. A scale that is not finite changes nothing.
// `copy` may be null, and so may what otherwise takes the place of numbers: `device_scale` that of `scale`, `schedule`
// (3,) that of `keep`, `rate` and `root`.
template <int N>
__global__ void __launch_bounds__(THREADS)
step(float* p, float* m, float* v, const float* g, long long n, float keep, float rate, float beta1, float rest1,
     float beta2, float rest2, float eps, float root, float scale, const float* device_scale, const float* schedule,
     bf16* copy) {
    if (device_scale) scale = *device_scale;
    if (schedule) keep = schedule[0], rate = schedule[1], root = schedule[2];
    if (scale - scale != 0) return;
    const Constants constants = {keep, rate, beta1, rest1, beta2, rest2, eps, root, scale};
    const long long first = (static_cast<long long>(blockIdx.x) * (PACKS * THREADS) + threadIdx.x) * N;
    Pack<float, N> ps[PACKS], ms[PACKS], vs[PACKS], gs[PACKS];
#pragma unroll
    for (int u = 0; u < PACKS; ++u) {
        const long long j = first + u * THREADS * N;
        if (j + N <= n) {
            ps[u] = load_pack_streaming<N>(p + j), ms[u] = load_pack_streaming<N>(m + j);
            vs[u] = load_pack_streaming<N>(v + j), gs[u] = load_pack_streaming<N>(g + j);
        }
    }
#pragma unroll
    for (int u = 0; u < PACKS; ++u) {
        const long long j = first + u * THREADS * N;
        if (j + N <= n) {
            Pack<bf16, N> rounded;
#pragma unroll
            for (int k = 0; k < N; ++k) {
                constants.step(ps[u].v[k], ms[u].v[k], vs[u].v[k], gs[u].v[k]);
                rounded.v[k] = from_float<bf16>(ps[u].v[k]);
            }
            store_pack_streaming(p + j, ps[u]), store_pack_streaming(m + j, ms[u]), store_pack_streaming(v + j, vs[u]);
            if (copy) store_pack(copy + j, rounded);
        }
    }
    const int rest = n % N;
    if (blockIdx.x == gridDim.x - 1 && threadIdx.x < rest) {
        const long long j = n - rest + threadIdx.x;
        constants.step(p[j], m[j], v[j], g[j]);
        if (copy) copy[j] = from_float<bf16>(p[j]);
    }
}

// The sum of squares of each block's part of x. Which part is a matter of the grid and so of n alone, not of the GPU.
template <typename T, int N>
__global__ void __launch_bounds__(THREADS)
squares(const T* x, long long n, float* partial) {
    SHARED(float, sums, THREADS / 32);
    constexpr int LOADS = 4;
    const long long stride = static_cast<long long>(gridDim.x) * THREADS * N;
    float total[LOADS] = {};
    const long long first = (static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x) * N;
    for (long long j0 = first; j0 < n; j0 += LOADS * stride) {
        Pack<T, N> packs[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; ++u) {
            const long long j = j0 + u * stride;
            packs[u] = j + N <= n ? load_pack_streaming<N>(x + j) : Pack<T, N>{};
        }
#pragma unroll
        for (int u = 0; u < LOADS; ++u)
#pragma unroll
            for (int k = 0; k < N; ++k) total[u] = fmaf(to_float(packs[u].v[k]), to_float(packs[u].v[k]), total[u]);
    }
    const int rest = n % N;
    if (blockIdx.x == 0 && threadIdx.x < rest) {
        const float last = to_float(x[n - rest + threadIdx.x]);
        total[0] = fmaf(last, last, total[0]);
    }
    const float sum = block_sum<THREADS>((total[0] + total[1]) + (total[2] + total[3]), sums);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block of 1024 threads adds at most as many parts.
__global__ void __launch_bounds__(1024)
add_parts(const float* partial, int parts, float* total) {
    SHARED(float, sums, 32);
    const float sum = block_sum<1024>(threadIdx.x < parts ? partial[threadIdx.x] : 0.f, sums);
    if (threadIdx.x == 0) total[0] = sum;
}
