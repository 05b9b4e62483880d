// What the CUDA kernels share: numbers, 16-byte accesses, reductions, and the tensor cores' instructions by name.
//
// A kernel never writes `asm`: each instruction stands here once, behind a function that says what it does. Without a
// GPU the tests include a header of their own before this file, which gives every name below its meaning on a CPU; so a
// kernel may use, of CUDA, what that header knows, and from this file everything.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

typedef __nv_bfloat16 bf16;
typedef __half fp16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 FULL_WARP = 0xffffffffu;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
#define INF __int_as_float(0x7f800000)

// ------------------------------------------------------------------ shared memory

#ifdef __CUDACC__
// SHARED(float, sums, 32): float sums[32], one per block. DYNAMIC_SHARED(name, 128): bytes of which the launch says how
// many, from a multiple of 128.
#define SHARED(type, name, size) __shared__ type name[size]
#define DYNAMIC_SHARED(name, alignment) extern __shared__ __align__(alignment) unsigned char name[]
#endif

// ------------------------------------------------------------------ numbers

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ fp16 from_float<fp16>(float x) { return __float2half_rn(x); }

// Neighbours that are moved together: 16 bytes of T, the widest access a thread has, if nothing else is said. COUNT is
// a power of two, and the address a multiple of the pack's size, or of 16 where it is larger (two accesses and more).
template <typename T, int COUNT = 16 / sizeof(T)> struct alignas(COUNT * sizeof(T) < 16 ? COUNT * sizeof(T) : 16) Pack {
    static constexpr int N = COUNT;
    T v[N];
};

template <typename T> __device__ __forceinline__ Pack<T> load_pack(const T* p) {
    return *reinterpret_cast<const Pack<T>*>(p);
}

template <int COUNT, typename T> __device__ __forceinline__ Pack<T, COUNT> load_pack(const T* p) {
    return *reinterpret_cast<const Pack<T, COUNT>*>(p);
}

template <typename T, int COUNT> __device__ __forceinline__ void store_pack(T* p, const Pack<T, COUNT>& x) {
    *reinterpret_cast<Pack<T, COUNT>*>(p) = x;
}

// The same for memory that is read or written once: it leaves the cache first (ld.global.cs, st.global.cs).
template <typename T> __device__ __forceinline__ Pack<T> load_pack_streaming(const T* p) {
    uint4 bits = __ldcs(reinterpret_cast<const uint4*>(p));
    return *reinterpret_cast<Pack<T>*>(&bits);
}

template <int COUNT, typename T> __device__ __forceinline__ Pack<T, COUNT> load_pack_streaming(const T* p) {
    if constexpr (COUNT * sizeof(T) == 16) return load_pack_streaming(p);
    return load_pack<COUNT>(p);
}

template <typename T, int COUNT> __device__ __forceinline__ void store_pack_streaming(T* p, const Pack<T, COUNT>& x) {
    if constexpr (COUNT * sizeof(T) == 16) {
        __stcs(reinterpret_cast<uint4*>(p), *reinterpret_cast<const uint4*>(&x));
    } else {
        store_pack(p, x);
    }
}

// ------------------------------------------------------------------ warps and blocks

// Over the `width` neighbouring lanes that share a result: 32 is the whole warp. Every lane gets it, in one order.
template <int width = 32> __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lanes = width / 2; lanes; lanes /= 2) x += __shfl_xor_sync(FULL_WARP, x, lanes);
    return x;
}

template <int width = 32> __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int lanes = width / 2; lanes; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, lanes));
    return x;
}

// Over a block of THREADS threads; `partial` has THREADS / 32 floats and may be used again after the next barrier.
template <int THREADS> __device__ __forceinline__ float block_sum(float x, float* partial) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) x += partial[w];
    return x;
}

// Rows shared out to THREADS threads each: 32, a warp, of which a block has four, or as many as the block has. A warp
// needs no barrier, and so a row that a warp can hold costs only its bytes.
template <int THREADS> constexpr int BLOCK = THREADS == 32 ? 128 : THREADS;
template <int THREADS> __device__ __forceinline__ int thread_of_row() { return threadIdx.x % THREADS; }
template <int THREADS> __device__ __forceinline__ int row_of_block() { return threadIdx.x / THREADS; }

// The row of this thread; threads of the last block may have none. 64 bits: rows times columns may be beyond 2^31.
template <int THREADS> __device__ __forceinline__ long long row_of_thread() {
    return static_cast<long long>(blockIdx.x) * (BLOCK<THREADS> / THREADS) + row_of_block<THREADS>();
}

// The sum and the maximum over the threads of a row; `partial` as in block_sum.
template <int THREADS> __device__ __forceinline__ float row_sum(float x, float* partial) {
    if constexpr (THREADS == 32) return warp_sum(x);
    return block_sum<THREADS>(x, partial);
}

template <int THREADS> __device__ __forceinline__ float row_max(float x, float* partial) {
    x = warp_max(x);
    if constexpr (THREADS > 32) {
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
        __syncthreads();
#pragma unroll
        for (int w = 0; w < THREADS / 32; ++w) x = fmaxf(x, partial[w]);
    }
    return x;
}

// A row of D elements in the registers of its threads: thread t has the packs t, t + THREADS, ... of N elements. KEPT
// of them are there, 1024 elements for a warp and 4096 for a block; what a longer row has beyond is read again where it
// is used, and comes from the cache. Rows of a warp are not longer.
template <int N, int THREADS> constexpr int KEPT = (THREADS == 32 ? 1024 : 4096) / (THREADS * N);

template <typename T, int N, int THREADS> struct Row {
    const T* from;
    Pack<T, N> kept[KEPT<N, THREADS>];

    __device__ __forceinline__ Row(const T* from, int D) : from(from) {
#pragma unroll
        for (int u = 0; u < KEPT<N, THREADS>; ++u) {  // all on their way before one is used
            const int j = (thread_of_row<THREADS>() + u * THREADS) * N;
            kept[u] = j < D ? load_pack<N>(from + j) : Pack<T, N>{};
        }
    }
};

// use(u, j, pack of each row) for every pack of this thread: elements j, j + 1, ..., kept as number u (KEPT: not kept).
template <int N, int THREADS, typename Use, typename... T>
__device__ __forceinline__ void each_pack(int D, Use use, const Row<T, N, THREADS>&... rows) {
    constexpr int COUNT = KEPT<N, THREADS>;
#pragma unroll
    for (int u = 0; u < COUNT; ++u) {
        const int j = (thread_of_row<THREADS>() + u * THREADS) * N;
        if (j < D) use(u, j, rows.kept[u]...);
    }
    if constexpr (THREADS > 32) {
#pragma unroll 1
        for (int j = (thread_of_row<THREADS>() + COUNT * THREADS) * N; j < D; j += THREADS * N)
            use(COUNT, j, load_pack<N>(rows.from + j)...);
    }
}

// out = the sums down the columns of partial (rows, D). A block of 1024 threads has 32 columns, and each of its warps
// every 32nd row; the grid is D / 32 blocks.
template <typename T> __device__ __forceinline__ void sum_columns(const float* partial, int rows, int D, T* out) {
    SHARED(float, sums, 32 * 33);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, d = blockIdx.x * 32 + lane;
    float sum = 0;
    if (d < D) {
#pragma unroll 8
        for (int i = warp; i < rows; i += 32) sum += partial[static_cast<long long>(i) * D + d];
    }
    sums[lane * 33 + warp] = sum;
    __syncthreads();
    sum = warp_sum(sums[warp * 33 + lane]);  // of column `warp`
    if (lane == 0 && blockIdx.x * 32 + warp < D) out[blockIdx.x * 32 + warp] = from_float<T>(sum);
}

// Elementwise work on `rows` rows of F, of which a block of THREADS has rows_per_block. For every pack of N elements
// that is this thread's, LOADS at a time: load(u, row, column) for u = 0, 1, ... and then use(u, row, column).
template <int N, int LOADS, int THREADS, typename Load, typename Use>
__device__ __forceinline__ void each_of_rows(int rows_per_block, int rows, int F, Load load, Use use) {
    const long long first = static_cast<long long>(blockIdx.x) * rows_per_block;
    const int per_row = F / N, packs = min(static_cast<long long>(rows_per_block), rows - first) * per_row;
    for (int i0 = threadIdx.x; i0 < packs; i0 += LOADS * THREADS) {
#pragma unroll
        for (int u = 0; u < LOADS; ++u) {
            const int i = i0 + u * THREADS;
            if (i < packs) load(u, first + i / per_row, i % per_row * N);
        }
#pragma unroll
        for (int u = 0; u < LOADS; ++u) {
            const int i = i0 + u * THREADS;
            if (i < packs) use(u, first + i / per_row, i % per_row * N);
        }
    }
}

// The softmax of part of a row: its maximum, and the sum of e^(x - maximum). Two parts merge into one of their union
// (Milakov and Gimelshein 2018, eq. 4). The empty part has maximum -inf and sum 0.
struct Softmax {
    float m, total;
};

__device__ __forceinline__ Softmax merge(Softmax a, Softmax b) {
    float m = fmaxf(a.m, b.m);
    float at = m == -INF ? 0 : m;  // two empty parts: e^(-inf - 0) is 0, e^(-inf + inf) would be NaN
    return {m, a.total * __expf(a.m - at) + b.total * __expf(b.m - at)};
}

// ------------------------------------------------------------------ instructions

// An operand of wgmma in shared memory, a panel: rows of 128 bytes after each other, from a multiple of 1024 bytes on; in
// row r, chunk c of 16 bytes lies where chunk c ^ r % 8 would. What is beyond 128 bytes of a row is in another panel,
// `panel` bytes further on. To begin n bytes later, add n / 16. (PTX ISA, matrix descriptor: the lower half of one. The
// upper half is the same for all: 8 rows take 1024 bytes, and they are swizzled by 128.)
__device__ __forceinline__ u32 wgmma_operand(u32 address, u32 panel) { return address >> 4 | panel >> 4 << 16; }
__device__ __forceinline__ u64 wgmma_descriptor(u32 operand) { return operand | u64(1024 >> 4 | 1u << 30) << 32; }

#ifdef __CUDACC__

// 2^x, to 2 units in the last place, results below 2^-126 flushed to 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A 32-bit address in shared memory, which the instructions below take.
__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// Two floats as two 16-bit numbers, the first in the low half: what an operand register of mma holds.
template <typename T> __device__ __forceinline__ u32 pack_two(float low, float high);
template <> __device__ __forceinline__ u32 pack_two<bf16>(float low, float high) {
    __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<u32*>(&two);
}
template <> __device__ __forceinline__ u32 pack_two<fp16>(float low, float high) {
    __half2 two = __floats2half2_rn(low, high);
    return *reinterpret_cast<u32*>(&two);
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory. Lane l gives the address of row l % 8 (16 bytes, aligned) of
// matrix l / 8, and gets of each matrix the elements (l / 4, 2 (l % 4)) and the one after it.
__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// The same of the transposed matrices: elements (2 (l % 4), l / 4) and the one below it.
__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// c (16 x 8, float) += a (16 x 16) b (16 x 8), by a warp. With g = l / 4 and t = l % 4, lane l holds
//     c[0..3] = c(g, 2t), c(g, 2t + 1), c(g + 8, 2t), c(g + 8, 2t + 1)
//     a[0..3] = the pairs that start at a(g, 2t), a(g + 8, 2t), a(g, 2t + 8), a(g + 8, 2t + 8)
//     b[0..1] = the pairs down the column that start at b(2t, g), b(2t + 8, g)
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <>
__device__ __forceinline__ void mma_16x8x16<bf16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_16x8x16<fp16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory, or 16 zero bytes where `valid` is false (nothing is read then). It has arrived
// for this thread after cp_async_wait, and for the others after the barrier behind that.
__device__ __forceinline__ void cp_async_16(u32 shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
// What was asked for since the last commit is one group; cp_async_wait<N> waits until at most the N newest are pending.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Hopper's products, which four warps (a warpgroup) ask for together and the tensor cores do meanwhile, reading
// operands from shared memory themselves. Warp w of the four has the rows 16 w to 16 w + 15 of c and of a, in its lanes'
// registers as mma_16x8x16 has them. What is asked for stands in this order:
//     fence_proxy_async   by those that wrote operands to shared memory, before the barrier behind which they are read
//     wgmma_fence         c, and a where it is in registers, are as the following wgmma are to find them
//     wgmma ...           several, each adding to what the one before left in c
//     wgmma_commit        these are one group
//     wgmma_wait<N>       all but the N newest groups are done: c is there, and operands may be overwritten
// Fence and wait are given the registers they are about: else the compiler may touch these on the other side of them.
__device__ __forceinline__ void settle(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void settle(u32& x) { asm volatile("" : "+r"(x)::"memory"); }
template <typename T, int N> __device__ __forceinline__ void settle(T (&x)[N]) {
#pragma unroll
    for (int n = 0; n < N; ++n) settle(x[n]);
}
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
template <typename... Registers> __device__ __forceinline__ void wgmma_fence(Registers&... registers) {
    (settle(registers), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N, typename... Registers> __device__ __forceinline__ void wgmma_wait(Registers&... registers) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
    (settle(registers), ...);
}

// wgmma_rows: c (64 x 8 N) = a b^T, or added to c, where both operands are 16 columns (32 bytes) of such rows.
// wgmma_sums: c (64 x 8 N) += a b, where b is 16 such rows, of 8 N columns, and a (64 x 16) is in registers.
template <typename T, int N> __device__ __forceinline__ void wgmma_rows(float (&c)[N][4], u32 a, u32 b, bool add);
template <typename T, int N> __device__ __forceinline__ void wgmma_sums(float (&c)[N][4], const u32 (&a)[4], u32 b);

#define REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_24 REGISTERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define REGISTERS_32 REGISTERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_40 REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define REGISTERS_48 REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define REGISTERS_64 REGISTERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_4(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define SUMS_16(c, n) SUMS_4(c, n), SUMS_4(c, n + 1), SUMS_4(c, n + 2), SUMS_4(c, n + 3)
#define SUMS_24(c, n) SUMS_16(c, n), SUMS_4(c, n + 4), SUMS_4(c, n + 5)
#define SUMS_32(c, n) SUMS_16(c, n), SUMS_16(c, n + 4)
#define SUMS_40(c, n) SUMS_32(c, n), SUMS_4(c, n + 8), SUMS_4(c, n + 9)
#define SUMS_48(c, n) SUMS_32(c, n), SUMS_16(c, n + 8)
#define SUMS_64(c, n) SUMS_32(c, n), SUMS_32(c, n + 8)
// The operands' numbers follow those of the R = 4 N registers of c.
#define WGMMA_INSTRUCTIONS(T, NAME, COLUMNS, R, i0, i1, i2, i3, i4, i5)                                              \
    template <>                                                                                                      \
    __device__ __forceinline__ void wgmma_rows<T, COLUMNS / 8>(float (&c)[COLUMNS / 8][4], u32 a, u32 b, bool add) { \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %" #i2 ", 0; wgmma.mma_async.sync.aligned.m64n" #COLUMNS         \
                     "k16.f32." NAME "." NAME " {" REGISTERS_##R "}, %" #i0 ", %" #i1 ", p, 1, 1, 0, 0;}"            \
                     : SUMS_##R(c, 0) : "l"(wgmma_descriptor(a)), "l"(wgmma_descriptor(b)), "r"(int(add)));          \
    }                                                                                                                \
    template <>                                                                                                      \
    __device__ __forceinline__ void wgmma_sums<T, COLUMNS / 8>(float (&c)[COLUMNS / 8][4], const u32 (&a)[4],        \
                                                               u32 b) {                                              \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %" #i5 ", 0; wgmma.mma_async.sync.aligned.m64n" #COLUMNS         \
                     "k16.f32." NAME "." NAME " {" REGISTERS_##R "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %"    \
                     #i4 ", p, 1, 1, 1;}"                                                                            \
                     : SUMS_##R(c, 0)                                                                                \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(wgmma_descriptor(b)), "r"(1));                \
    }
#define WGMMA_OF(T, NAME)                                         \
    WGMMA_INSTRUCTIONS(T, NAME, 48, 24, 24, 25, 26, 27, 28, 29)   \
    WGMMA_INSTRUCTIONS(T, NAME, 64, 32, 32, 33, 34, 35, 36, 37)   \
    WGMMA_INSTRUCTIONS(T, NAME, 80, 40, 40, 41, 42, 43, 44, 45)   \
    WGMMA_INSTRUCTIONS(T, NAME, 96, 48, 48, 49, 50, 51, 52, 53)   \
    WGMMA_INSTRUCTIONS(T, NAME, 128, 64, 64, 65, 66, 67, 68, 69)
WGMMA_OF(bf16, "bf16")
WGMMA_OF(fp16, "f16")

// p[0] += x and p[1] += y, each atomic; p a multiple of 8 bytes.
__device__ __forceinline__ void atomic_add_two(float* p, float x, float y) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(x), "f"(y) : "memory");
#else
    atomicAdd(p, x);
    atomicAdd(p + 1, y);
#endif
}

#endif  // __CUDACC__
