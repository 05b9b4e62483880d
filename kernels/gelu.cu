// GELU and its gradient, exact and in its tanh form. Contract and derivation stand in gelu.py.
//
// Rungs (predicted for an H200: a copy moves 4.3 TB/s; nothing here has been measured yet)
//   1. One pass in 16-byte accesses, 4 to 6 on their way per thread: 4 bytes per bf16 element forward, 6 backward.
//      32,768 rows of 3072: 0.094 and 0.140 ms.
//   2. The tanh form by one exponential and one division, both fast: predicted at least 80 percent of that. The exact
//      form calls erfcf, whose 40 instructions are more than the time for a bf16 element; predicted half.
// Inputs leave the cache first; outputs stay, for the product that reads them next.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr float ROOT = 0.7978845608028654f, CUBE = 0.044715f;  // sqrt(2 / pi)

// s(2u) and s(-2u), u = ROOT (x + CUBE x^3): neither by 1 - the other, which would cancel
__device__ __forceinline__ void logistic(float x, float& s, float& rest) {
    const float u2 = 2 * ROOT * x * (1 + CUBE * x * x), e = __expf(-fmaxf(u2, -u2));
    const float large = __fdividef(1.f, 1 + e), small = e * large;
    s = u2 >= 0 ? large : small;
    rest = u2 >= 0 ? small : large;
}

template <bool TANH> __device__ __forceinline__ float gelu(float x) {
    if constexpr (TANH) {
        float s, rest;
        logistic(x, s, rest);
        return x * s;
    }
    return x * 0.5f * erfcf(-x * 0.7071067811865476f);
}

template <bool TANH> __device__ __forceinline__ float slope(float x) {
    if constexpr (TANH) {
        float s, rest;
        logistic(x, s, rest);
        return s * (1 + x * rest * (2 * ROOT + 6 * ROOT * CUBE * x * x));
    }
    return 0.5f * erfcf(-x * 0.7071067811865476f) + x * __expf(-0.5f * x * x) * 0.3989422804014327f;
}

// n elements, a multiple of N, LOADS packs of them to a thread
template <typename T, int N, bool TANH>
__global__ void __launch_bounds__(THREADS)
forward(const T* x, long long n, T* y) {
    constexpr int LOADS = 4;
    const long long first = (static_cast<long long>(blockIdx.x) * LOADS * THREADS + threadIdx.x) * N;
    Pack<T, N> xs[LOADS];
#pragma unroll
    for (int u = 0; u < LOADS; ++u)
        if (first + u * THREADS * N < n) xs[u] = load_pack_streaming<N>(x + first + u * THREADS * N);
#pragma unroll
    for (int u = 0; u < LOADS; ++u) {
        if (first + u * THREADS * N >= n) return;
#pragma unroll
        for (int k = 0; k < N; ++k) xs[u].v[k] = from_float<T>(gelu<TANH>(to_float(xs[u].v[k])));
        store_pack(y + first + u * THREADS * N, xs[u]);
    }
}

template <typename T, int N, bool TANH>
__global__ void __launch_bounds__(THREADS)
backward(const T* dy, const T* x, long long n, T* dx) {
    constexpr int LOADS = 3;
    const long long first = (static_cast<long long>(blockIdx.x) * LOADS * THREADS + threadIdx.x) * N;
    Pack<T, N> dys[LOADS], xs[LOADS];
#pragma unroll
    for (int u = 0; u < LOADS; ++u)
        if (first + u * THREADS * N < n) {
            dys[u] = load_pack_streaming<N>(dy + first + u * THREADS * N);
            xs[u] = load_pack_streaming<N>(x + first + u * THREADS * N);
        }
#pragma unroll
    for (int u = 0; u < LOADS; ++u) {
        if (first + u * THREADS * N >= n) return;
#pragma unroll
        for (int k = 0; k < N; ++k)
            xs[u].v[k] = from_float<T>(to_float(dys[u].v[k]) * slope<TANH>(to_float(xs[u].v[k])));
        store_pack(dx + first + u * THREADS * N, xs[u]);
    }
}
