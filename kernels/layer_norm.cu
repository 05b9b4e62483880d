// LayerNorm and its gradient. Contract and derivation stand in layer_norm.py.
//
// Rungs (predicted for an H200: a copy moves 4.3 TB/s; nothing here has been measured yet)
//   As RMSNorm's (rms_norm.cu): a row in the registers of a warp or a block, so that the mean and then the variance
//   around it take one read; dweight and dbias in registers over all rows of a warp or block, added in order at the end.
//   4 bytes per bf16 element forward, 6 backward: 32,768 rows of 768 in 0.023 and 0.035 ms; predicted at least 80 percent
//   of a copy forward, and 70 backward, where the two gradients' sums leave registers for fewer warps.
#include "common.cuh"

template <typename T, typename W, int N, int THREADS>
__global__ void __launch_bounds__(BLOCK<THREADS>)
forward(const T* x, const W* weight, const W* bias, int rows, int D, float eps, T* y, float* u, float* r) {
    constexpr int WARPS = THREADS / 32;
    SHARED(float, partial, 2 * WARPS);
    const long long i = row_of_thread<THREADS>();
    if (i >= rows) return;
    const Row<T, N, THREADS> row(x + i * D, D);

    float sum = 0;
    each_pack(
        D,
        [&](int, int, const Pack<T, N>& x) {
#pragma unroll
            for (int k = 0; k < N; ++k) sum += to_float(x.v[k]);
        },
        row);
    const float mean = row_sum<THREADS>(sum, partial) / D;

    float squares = 0;
    each_pack(
        D,
        [&](int, int, const Pack<T, N>& x) {
#pragma unroll
            for (int k = 0; k < N; ++k) squares = fmaf(to_float(x.v[k]) - mean, to_float(x.v[k]) - mean, squares);
        },
        row);
    const float r_i = 1 / sqrtf(row_sum<THREADS>(squares, partial + WARPS) / D + eps);

    each_pack(
        D,
        [&](int, int j, const Pack<T, N>& x) {
            const Pack<W, N> w = load_pack<N>(weight + j), b = load_pack<N>(bias + j);
            Pack<T, N> to;
#pragma unroll
            for (int k = 0; k < N; ++k)
                to.v[k] = from_float<T>((to_float(x.v[k]) - mean) * r_i * to_float(w.v[k]) + to_float(b.v[k]));
            store_pack(y + i * D + j, to);
        },
        row);
    if (thread_of_row<THREADS>() == 0) u[i] = mean, r[i] = r_i;
}

// dx, and of each block the sums of dweight and dbias over its rows, partial (blocks, 2, D). Dynamic shared memory: 2 D
// floats for each warp that has rows of its own.
template <typename T, typename W, int N, int THREADS>
__global__ void __launch_bounds__(BLOCK<THREADS>, 2)
backward(const T* dy, const T* x, const W* weight, const float* u, const float* r, int rows, int D, T* dx,
         float* partial) {
    constexpr int ROWS = BLOCK<THREADS> / THREADS, WARPS = THREADS / 32, KEEP = KEPT<N, THREADS>;
    SHARED(float, sums, 4 * WARPS);
    DYNAMIC_SHARED(memory, 128);
    float* of_block = partial + 2LL * blockIdx.x * D;
    const Row<W, N, THREADS> weights(weight, D);
    float dweight[KEEP][N], dbias[KEEP][N];  // of the packs that are kept; what lies beyond is added up in global memory
    each_pack(
        D,
        [&](int p, int j, const Pack<W, N>&) {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                (p < KEEP ? dweight[p % KEEP][k] : of_block[j + k]) = 0;
                (p < KEEP ? dbias[p % KEEP][k] : of_block[D + j + k]) = 0;
            }
        },
        weights);

    int turn = 0;  // two places for a row's sums, so that the barriers within them are enough
    for (long long i = row_of_thread<THREADS>(); i < rows; i += gridDim.x * ROWS, turn ^= 2 * WARPS) {
        const Row<T, N, THREADS> from(dy + i * D, D), row(x + i * D, D);
        const float u_i = u[i], r_i = r[i];
        float h_sum = 0, h_n = 0;
        each_pack(
            D,
            [&](int, int, const Pack<T, N>& dy, const Pack<T, N>& x, const Pack<W, N>& w) {
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    const float h = to_float(dy.v[k]) * to_float(w.v[k]), n = (to_float(x.v[k]) - u_i) * r_i;
                    h_sum += h;
                    h_n = fmaf(h, n, h_n);
                }
            },
            from, row, weights);
        const float mean_h = row_sum<THREADS>(h_sum, sums + turn) / D;
        const float mean_hn = row_sum<THREADS>(h_n, sums + turn + WARPS) / D;

        each_pack(
            D,
            [&](int p, int j, const Pack<T, N>& dy, const Pack<T, N>& x, const Pack<W, N>& w) {
                Pack<T, N> to;
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    const float g = to_float(dy.v[k]), n = (to_float(x.v[k]) - u_i) * r_i;
                    to.v[k] = from_float<T>(r_i * (g * to_float(w.v[k]) - mean_h - n * mean_hn));
                    (p < KEEP ? dweight[p % KEEP][k] : of_block[j + k]) += g * n;
                    (p < KEEP ? dbias[p % KEEP][k] : of_block[D + j + k]) += g;
                }
                store_pack(dx + i * D + j, to);
            },
            from, row, weights);
    }

    float* of_warp = of_block;
    if constexpr (THREADS == 32) of_warp = reinterpret_cast<float*>(memory) + 2 * row_of_block<THREADS>() * D;
    each_pack(
        D,
        [&](int p, int j, const Pack<W, N>&) {
            if (p < KEEP)
#pragma unroll
                for (int k = 0; k < N; ++k)
                    of_warp[j + k] = dweight[p % KEEP][k], of_warp[D + j + k] = dbias[p % KEEP][k];
        },
        weights);
    if constexpr (THREADS == 32) {  // the block's warps, in order
        __syncthreads();
        const float* all = reinterpret_cast<const float*>(memory);
        for (int d = threadIdx.x; d < 2 * D; d += BLOCK<THREADS>) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < ROWS; ++w) sum += all[2 * w * D + d];
            of_block[d] = sum;
        }
    }
}

// dweight and dbias, one behind the other
template <typename W> __global__ void __launch_bounds__(1024)
sum_partial(const float* partial, int blocks, int D, W* dweight_dbias) {
    sum_columns(partial, blocks, 2 * D, dweight_dbias);
}
