// Rotary position embedding. Contract and derivation stand in rope.py.
//
// Rungs (predicted for an H200: a copy moves 4.3 TB/s; nothing here has been measured yet)
//   1. q|k|v is read where it lies, as the fused projection left it: 4 bytes per bf16 element. 32,768 tokens of 2304
//      elements: 0.070 ms; predicted at least 80 percent of that.
//   2. 16-byte accesses to both halves of a head, 4 on their way per thread. The angles are float32 and the same for
//      all heads of a token: 4 bytes per element, but from the L1 cache.
#include "common.cuh"

constexpr int THREADS = 256, PAIRS = 2;

// Each of the tokens has H x half pairs, which are a row here. batch, token and head are x's strides.
template <typename T, int N>
__global__ void __launch_bounds__(THREADS, 4)
rotate(const T* x, long long batch, long long token, long long head, const float* cos, const float* sin, float way,
       int tokens_per_block, int tokens, int length, int H, int heads, int half, T* y) {
    Pack<T, N> low[PAIRS], high[PAIRS];
    each_of_rows<N, PAIRS, THREADS>(
        tokens_per_block, tokens, H * half,
        [&](int u, int i, int pair) {
            const T* from = x + i / length * batch + i % length * token + pair / half * head + pair % half;
            low[u] = load_pack_streaming<N>(from);
            high[u] = load_pack_streaming<N>(from + half);
        },
        [&](int u, int i, int pair) {
            const int d = pair % half;
            const long long row = i, angle = static_cast<long long>(i % length) * half + d;
            if (pair / half < heads) {
                const Pack<float, N> c = load_pack<N>(cos + angle), s = load_pack<N>(sin + angle);
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    const float a = to_float(low[u].v[k]), b = to_float(high[u].v[k]), sine = way * s.v[k];
                    low[u].v[k] = from_float<T>(a * c.v[k] - b * sine);
                    high[u].v[k] = from_float<T>(b * c.v[k] + a * sine);
                }
            }
            T* to = y + (row * H + pair / half) * 2 * half + d;
            store_pack(to, low[u]);
            store_pack(to + half, high[u]);
        });
}
