// SiLU, SwiGLU and their gradients. Contract and derivation stand in swiglu.py.
//
// Rungs (predicted for an H200: a copy moves 4.3 TB/s; nothing here has been measured yet)
//   1. One pass with s made again in the backward: per bf16 element of SwiGLU 6 bytes forward, 10 backward. 32,768 rows
//      of 2048: 0.094 and 0.156 ms; predicted at least 85 percent of that.
//   2. gate and up are read where they lie, halves of a fused projection, and their gradients are written so: copies
//      would cost 8 bytes more each way.
//   3. 16-byte accesses, 4 to 6 of them on their way per thread. A block has as many rows as make about 4 accesses per
//      thread, so that rows of 1408 do not leave a third of it idle.
//   4. s by the fast exponential and division: two special instructions per element, a third of what there is time for.
// Inputs leave the cache first; outputs stay, for the product that reads them next.
#include "common.cuh"

constexpr int THREADS = 256;

__device__ __forceinline__ float logistic(float x) { return __fdividef(1.f, 1 + __expf(-x)); }

template <typename T, int N>
__global__ void __launch_bounds__(THREADS, 4)
silu_forward(const T* x, long long x_stride, int rows_per_block, int rows, int F, T* y) {
    Pack<T, N> xs[4];
    each_of_rows<N, 4, THREADS>(
        rows_per_block, rows, F,
        [&](int u, long long i, int f) { xs[u] = load_pack_streaming<N>(x + i * x_stride + f); },
        [&](int u, long long i, int f) {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const float a = to_float(xs[u].v[k]);
                xs[u].v[k] = from_float<T>(a * logistic(a));
            }
            store_pack(y + i * F + f, xs[u]);
        });
}

template <typename T, int N>
__global__ void __launch_bounds__(THREADS, 4)
silu_backward(const T* dy, long long dy_stride, const T* x, long long x_stride, int rows_per_block, int rows, int F,
              T* dx) {
    Pack<T, N> dys[2], xs[2];
    each_of_rows<N, 2, THREADS>(
        rows_per_block, rows, F,
        [&](int u, long long i, int f) {
            dys[u] = load_pack_streaming<N>(dy + i * dy_stride + f);
            xs[u] = load_pack_streaming<N>(x + i * x_stride + f);
        },
        [&](int u, long long i, int f) {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const float a = to_float(xs[u].v[k]), s = logistic(a);
                xs[u].v[k] = from_float<T>(to_float(dys[u].v[k]) * s * (1 + a * (1 - s)));
            }
            store_pack(dx + i * F + f, xs[u]);
        });
}

template <typename T, int N>
__global__ void __launch_bounds__(THREADS, 4)
forward(const T* gate, long long gate_stride, const T* up, long long up_stride, int rows_per_block, int rows, int F,
        T* y) {
    Pack<T, N> gates[2], ups[2];
    each_of_rows<N, 2, THREADS>(
        rows_per_block, rows, F,
        [&](int u, long long i, int f) {
            gates[u] = load_pack_streaming<N>(gate + i * gate_stride + f);
            ups[u] = load_pack_streaming<N>(up + i * up_stride + f);
        },
        [&](int u, long long i, int f) {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const float a = to_float(gates[u].v[k]);
                gates[u].v[k] = from_float<T>(a * logistic(a) * to_float(ups[u].v[k]));
            }
            store_pack(y + i * F + f, gates[u]);
        });
}

// dgate and dup are the halves of rows of 2 F.
template <typename T, int N>
__global__ void __launch_bounds__(THREADS, 4)
backward(const T* dy, long long dy_stride, const T* gate, long long gate_stride, const T* up, long long up_stride,
         int rows_per_block, int rows, int F, T* dgate, T* dup) {
    Pack<T, N> dys[2], gates[2], ups[2];
    each_of_rows<N, 2, THREADS>(
        rows_per_block, rows, F,
        [&](int u, long long i, int f) {
            dys[u] = load_pack_streaming<N>(dy + i * dy_stride + f);
            gates[u] = load_pack_streaming<N>(gate + i * gate_stride + f);
            ups[u] = load_pack_streaming<N>(up + i * up_stride + f);
        },
        [&](int u, long long i, int f) {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const float a = to_float(gates[u].v[k]), s = logistic(a), gs = to_float(dys[u].v[k]) * s;
                gates[u].v[k] = from_float<T>(gs * to_float(ups[u].v[k]) * (1 + a * (1 - s)));
                ups[u].v[k] = from_float<T>(gs * a);
            }
            store_pack(dgate + i * 2 * F + f, gates[u]);
            store_pack(dup + i * 2 * F + f, ups[u]);
        });
}
