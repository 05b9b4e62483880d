// RMSNorm and its gradient. Contract and derivation stand in rms_norm.py.
//
// Rungs (predicted for an H200: a copy moves 4.3 TB/s; nothing here has been measured yet)
//   1. A block per row with a barrier for its sum: at D = 768 most threads have one access and then wait.
//   2. A warp per row of at most 1024 elements, no barrier, the row in registers: read once, 4 bytes per bf16 element
//      forward and 6 backward. 32,768 rows of 768: 0.023 and 0.035 ms at 4.3 TB/s; predicted at least 80 percent of it.
//   3. 16-byte accesses, all of a row's on their way at once (3 per lane at D = 768, of 48 warps and more).
//   4. dweight in registers too, over all rows that a warp has; then one sum per block, and a second small kernel adds
//      those in order. No atomics, so two runs give the same bits, whatever the GPU: the number of blocks is fixed.
//      Atomics would cost 4 bytes per element, and more where they meet.
// Streaming accesses are not used: what a norm reads and writes its neighbours in the network read again.
#include "common.cuh"

template <typename T, typename W, int N, int THREADS>
__global__ void __launch_bounds__(BLOCK<THREADS>)
forward(const T* x, const W* weight, int rows, int D, float eps, T* y, float* r) {
    SHARED(float, partial, THREADS / 32);
    const long long i = row_of_thread<THREADS>();
    if (i >= rows) return;
    const Row<T, N, THREADS> row(x + i * D, D);

    float squares = 0;
    each_pack(
        D,
        [&](int, int, const Pack<T, N>& x) {
#pragma unroll
            for (int k = 0; k < N; ++k) squares = fmaf(to_float(x.v[k]), to_float(x.v[k]), squares);
        },
        row);
    const float r_i = 1 / sqrtf(row_sum<THREADS>(squares, partial) / D + eps);

    each_pack(
        D,
        [&](int, int j, const Pack<T, N>& x) {
            const Pack<W, N> w = load_pack<N>(weight + j);
            Pack<T, N> to;
#pragma unroll
            for (int k = 0; k < N; ++k) to.v[k] = from_float<T>(to_float(x.v[k]) * r_i * to_float(w.v[k]));
            store_pack(y + i * D + j, to);
        },
        row);
    if (thread_of_row<THREADS>() == 0) r[i] = r_i;
}

// dx, and of each block the sum of dweight over its rows, partial (blocks, D). Dynamic shared memory: D floats for each
// warp that has rows of its own.
template <typename T, typename W, int N, int THREADS>
__global__ void __launch_bounds__(BLOCK<THREADS>, THREADS == 32 ? 3 : 2)
backward(const T* dy, const T* x, const W* weight, const float* r, int rows, int D, T* dx, float* partial) {
    constexpr int ROWS = BLOCK<THREADS> / THREADS, KEEP = KEPT<N, THREADS>;
    SHARED(float, sums, 2 * THREADS / 32);
    DYNAMIC_SHARED(memory, 128);
    float* block_dweight = partial + static_cast<long long>(blockIdx.x) * D;
    const Row<W, N, THREADS> weights(weight, D);
    float dweight[KEEP][N];  // of the packs that are kept; what lies beyond is added up in global memory
    each_pack(
        D,
        [&](int u, int j, const Pack<W, N>&) {
#pragma unroll
            for (int k = 0; k < N; ++k) (u < KEEP ? dweight[u % KEEP][k] : block_dweight[j + k]) = 0;
        },
        weights);

    int turn = 0;  // two places for a row's sum, so that one barrier per row is enough
    for (long long i = row_of_thread<THREADS>(); i < rows; i += gridDim.x * ROWS, turn ^= THREADS / 32) {
        const Row<T, N, THREADS> from(dy + i * D, D), row(x + i * D, D);
        const float r_i = r[i];
        float h_x = 0;  // sum_d h_d x_d
        each_pack(
            D,
            [&](int, int, const Pack<T, N>& dy, const Pack<T, N>& x, const Pack<W, N>& w) {
#pragma unroll
                for (int k = 0; k < N; ++k) h_x = fmaf(to_float(dy.v[k]) * to_float(w.v[k]), to_float(x.v[k]), h_x);
            },
            from, row, weights);
        const float shared = row_sum<THREADS>(h_x, sums + turn) * r_i * r_i / D;  // mean(h n) r, since n = x r

        each_pack(
            D,
            [&](int u, int j, const Pack<T, N>& dy, const Pack<T, N>& x, const Pack<W, N>& w) {
                Pack<T, N> to;
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    const float g = to_float(dy.v[k]), x_k = to_float(x.v[k]);
                    to.v[k] = from_float<T>(r_i * (g * to_float(w.v[k]) - x_k * shared));
                    (u < KEEP ? dweight[u % KEEP][k] : block_dweight[j + k]) += g * x_k * r_i;
                }
                store_pack(dx + i * D + j, to);
            },
            from, row, weights);
    }

    float* warp_dweight = block_dweight;
    if constexpr (THREADS == 32) warp_dweight = reinterpret_cast<float*>(memory) + row_of_block<THREADS>() * D;
    each_pack(
        D,
        [&](int u, int j, const Pack<W, N>&) {
            if (u < KEEP)
#pragma unroll
                for (int k = 0; k < N; ++k) warp_dweight[j + k] = dweight[u % KEEP][k];
        },
        weights);
    if constexpr (THREADS == 32) {  // the block's warps, in order
        __syncthreads();
        const float* all = reinterpret_cast<const float*>(memory);
        for (int d = threadIdx.x; d < D; d += BLOCK<THREADS>) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < ROWS; ++w) sum += all[w * D + d];
            block_dweight[d] = sum;
        }
    }
}

template <typename W> __global__ void __launch_bounds__(1024)
sum_partial(const float* partial, int blocks, int D, W* dweight) {
    sum_columns(partial, blocks, D, dweight);
}
