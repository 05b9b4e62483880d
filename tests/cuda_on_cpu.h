// CUDA C++ on a CPU, for proofs: g++ -include cuda_on_cpu.h kernels/some.cu (see cuda_on_cpu.py).
//
// The threads of a block are fibers that one CPU thread runs in turns: each until it waits, for its warp or its block.
// So the order of the threads between two barriers is chosen here, and a missing barrier shows as another result.
//   * Shared memory is filled with NaN before each block, and ends at a page that can not be touched.
//   * A barrier or a warp's instruction that only some of the threads reach is an error, with the lines where they wait.
//   * cp.async makes its destination NaN at once, and the bytes arrive where the thread waits for their group.
//   * mma, ldmatrix and shuffles are done by the scheduler, when all 32 lanes have come, from the operands of all.
//   * wgmma makes its sums NaN at once, and they arrive where the warp waits for their group, made from what shared
//     memory holds then. An operand that a copy brought and no fence showed is an error, as are sums without a fence,
//     sums that nobody waits for, and warps of four that ask for different products.
#pragma once
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// ------------------------------------------------------------------ numbers

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline unsigned long long wgmma_descriptor(unsigned operand);  // of common.cuh

struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };

template <typename To, typename From> To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From), "");
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

inline float __int_as_float(int x) { return bits_as<float>(x); }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }

inline float __bfloat162float(__nv_bfloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t u = bits_as<uint32_t>(x);
    if (x != x) return {0x7fff};
    return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
inline float __half2float(__half x) {
    uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
    if (exponent == 31) return bits_as<float>(sign | 0x7f800000u | (mantissa << 13));
    float value = exponent ? std::ldexp(float(mantissa + 1024), int(exponent) - 25) : std::ldexp(float(mantissa), -24);
    return sign ? -value : value;
}
inline __half __float2half_rn(float x) {
    uint16_t sign = uint16_t((bits_as<uint32_t>(x) >> 16) & 0x8000);
    float a = std::fabs(x);
    if (x != x) return {0x7fff};
    if (a >= 65520.f) return {uint16_t(sign | 0x7c00)};
    if (a < 6.103515625e-05f) return {uint16_t(sign | uint16_t(std::nearbyint(std::ldexp(a, 24))))};
    int exponent = std::ilogb(a);
    int mantissa = int(std::nearbyint(std::ldexp(a, 10 - exponent)));  // 1024 to 2048, whose carry the sum below takes
    return {uint16_t(sign | (((exponent + 15) << 10) + mantissa - 1024))};
}

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float exp2_fast(float x) { return std::exp2(x); }
using std::max;
using std::min;
template <typename A, typename B> std::common_type_t<A, B> max(A a, B b) { return a > b ? a : b; }
template <typename A, typename B> std::common_type_t<A, B> min(A a, B b) { return a < b ? a : b; }

template <typename T> T __ldcs(const T* p) { return *p; }
template <typename T> T __ldg(const T* p) { return *p; }
template <typename T> void __stcs(T* p, T x) { *p = x; }
template <typename T> T atomicAdd(T* p, T x) {
    T old = *p;
    *p = old + x;
    return old;
}
inline void atomic_add_two(float* p, float x, float y) {
    if (uintptr_t(p) % 8) std::abort();
    p[0] += x;
    p[1] += y;
}

// ------------------------------------------------------------------ fibers

struct Index { unsigned x, y, z; };
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace on_cpu {

struct Fiber;
typedef void (*Together)(Fiber* lanes);  // what a warp's instruction does, once its 32 lanes have come

enum State { RUNNABLE, IN_WARP, IN_BLOCK, DONE };

struct Copy { unsigned char* to; const void* from; bool valid; int group; };

struct Wgmma {  // asked for by a warp, as one of its lanes holds it
    float* c;
    int columns, group, line;
    bool add, sums;
    unsigned a[4], b;  // a[0] is an operand in shared memory where these are no sums
    float (*number)(uint16_t);
};

struct Fiber {
    jmp_buf context;
    char* stack = nullptr;
    State state;
    int line;          // where it waits
    Together together;
    const void* operand;
    void* result;
    std::vector<Copy> copies;  // asked for, and not there yet
    int group;                 // of the copies asked for now
    std::vector<size_t> unseen;   // chunks that its copies brought, and no fence has shown to wgmma
    std::vector<Wgmma> products;  // asked for, and not done yet
    std::map<float*, std::vector<float>> in_flight;  // the sums that these add to
    int product_group;
    bool fenced;
    size_t asked;  // how many products so far
};

constexpr size_t STACK = 256 << 10, PAGE = 4096;
constexpr unsigned LARGEST_BLOCK = 1024;
inline Fiber fibers[LARGEST_BLOCK];
inline Fiber* current;
inline jmp_buf scheduler;
inline sigjmp_buf outside;
inline ucontext_t entry_context, return_context;
inline void (*body)(void*);
inline void* body_argument;
inline char complaint[512];
inline unsigned char* dynamic;  // the block's dynamic shared memory
inline size_t dynamic_size;

inline std::vector<bool> unseen;  // for each chunk of it, whether wgmma can not see yet what a copy brought
inline std::vector<Wgmma> asked_by[LARGEST_BLOCK / 128];  // the products of four warps, in their order

struct Region { void* p; size_t size; };
inline std::vector<Region> regions;  // the static shared arrays met so far

[[noreturn]] inline void fail(const char* what, int line, int other = 0) {
    int n = std::snprintf(complaint, sizeof complaint, "block (%u, %u, %u), thread %d: %s", blockIdx.x, blockIdx.y,
                          blockIdx.z, current ? int(current - fibers) : -1, what);
    if (line) n += std::snprintf(complaint + n, sizeof complaint - n, ", line %d", line);
    if (other) std::snprintf(complaint + n, sizeof complaint - n, " and line %d", other);
    siglongjmp(outside, 1);
}

__attribute__((noinline)) inline void wait(State state, int line) {
    current->state = state;
    current->line = line;
    if (!_setjmp(current->context)) _longjmp(scheduler, 1);
}

inline void run_fiber() {
    body(body_argument);
    current->state = DONE;
    _longjmp(scheduler, 1);
}

inline void set_thread(unsigned t) {
    current = &fibers[t];
    threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
}

__attribute__((noinline)) inline void resume(unsigned t, bool fresh) {
    set_thread(t);
    if (_setjmp(scheduler)) return;
    if (!fresh) _longjmp(fibers[t].context, 1);
    getcontext(&entry_context);
    entry_context.uc_stack.ss_sp = fibers[t].stack;
    entry_context.uc_stack.ss_size = STACK;
    entry_context.uc_link = nullptr;
    makecontext(&entry_context, run_fiber, 0);
    setcontext(&entry_context);
}

inline void run_block(unsigned threads, const unsigned* order) {
    std::memset(dynamic, 0xff, dynamic_size);
    for (auto& region : regions) std::memset(region.p, 0xff, region.size);
    for (unsigned t = 0; t < threads; ++t) {
        fibers[t].state = RUNNABLE;
        fibers[t].copies.clear();
        fibers[t].unseen.clear();
        fibers[t].products.clear();
        fibers[t].in_flight.clear();
        fibers[t].group = fibers[t].product_group = 0;
        fibers[t].fenced = false;
        fibers[t].asked = 0;
    }
    unseen.assign(dynamic_size / 16, false);
    for (auto& products : asked_by) products.clear();
    std::vector<bool> fresh(threads, true);
    for (;;) {
        bool ran = false, all_done = true;
        for (unsigned i = 0; i < threads; ++i) {
            unsigned t = order[i];
            if (fibers[t].state == RUNNABLE) {
                ran = true;
                bool first = fresh[t];
                fresh[t] = false;
                resume(t, first);
            }
            all_done &= fibers[t].state == DONE;
        }
        if (all_done) {
            for (unsigned t = 0; t < threads; ++t) {
                current = &fibers[t];
                if (!fibers[t].products.empty()) fail("a wgmma that is never waited for", fibers[t].products[0].line);
                if (fibers[t].asked != asked_by[t / 128].size()) fail("a wgmma that not all four warps ask for", 0);
            }
            return;
        }
        for (unsigned w = 0; w < threads; w += 32) {  // warps whose lanes have all come to one instruction
            unsigned waiting = 0;
            for (unsigned t = w; t < w + 32; ++t) waiting += fibers[t].state == IN_WARP;
            if (waiting < 32) continue;
            for (unsigned t = w; t < w + 32; ++t)
                if (fibers[t].together != fibers[w].together || fibers[t].line != fibers[w].line) {
                    current = &fibers[t];
                    fail("a warp's lanes are at different instructions", fibers[w].line, fibers[t].line);
                }
            current = &fibers[w];
            fibers[w].together(&fibers[w]);
            for (unsigned t = w; t < w + 32; ++t) fibers[t].state = RUNNABLE;
            ran = true;
        }
        if (ran) continue;
        int line = 0;
        for (unsigned t = 0; t < threads; ++t) {
            if (fibers[t].state == DONE) continue;
            current = &fibers[t];
            if (fibers[t].state == IN_WARP) fail("waits for lanes of its warp that never come", fibers[t].line);
            if (line && line != fibers[t].line) fail("divergent barrier: threads wait at", line, fibers[t].line);
            line = fibers[t].line;
        }
        for (unsigned t = 0; t < threads; ++t) {
            // A barrier that others have left by returning works on the GPU; it is never meant here.
            if (fibers[t].state == DONE) {
                current = &fibers[t];
                fail("divergent barrier: has returned while others wait", line);
            }
            fibers[t].state = RUNNABLE;
        }
    }
}

inline void touched(int, siginfo_t* info, void*) {
    current = current ? current : fibers;
    std::snprintf(complaint, sizeof complaint, "block (%u, %u, %u), thread %d: memory outside of every array (%p)",
                  blockIdx.x, blockIdx.y, blockIdx.z, int(current - fibers), info->si_addr);
    siglongjmp(outside, 1);
}

inline const char* launch(const unsigned* grid, unsigned threads, size_t shared, const unsigned* order, bool reversed,
                          void (*kernel)(void*), void* argument) {
    complaint[0] = 0;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {threads, 1, 1};
    current = nullptr;
    if (threads % 32 || threads > LARGEST_BLOCK) return "the block is not a number of whole warps, 1024 threads at most";
    for (unsigned t = 0; t < threads; ++t)
        if (!fibers[t].stack)
            fibers[t].stack = static_cast<char*>(
                mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    size_t room = (shared + 127) / 128 * 128, whole = (room + PAGE - 1) / PAGE * PAGE;
    // It ends where a page begins that can not be touched.
    auto base = static_cast<unsigned char*>(
        mmap(nullptr, whole + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base == MAP_FAILED) return "no memory for the block's shared memory";
    mprotect(base + whole, PAGE, PROT_NONE);
    dynamic = base + whole - room;
    dynamic_size = room;
    body = kernel;
    body_argument = argument;
    struct sigaction ours = {}, segv, bus;
    ours.sa_sigaction = touched;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &ours, &segv);
    sigaction(SIGBUS, &ours, &bus);
    if (!sigsetjmp(outside, 1)) {
        unsigned blocks = grid[0] * grid[1] * grid[2];
        for (unsigned i = 0; i < blocks; ++i) {
            unsigned b = reversed ? blocks - 1 - i : i;
            blockIdx = {b % grid[0], b / grid[0] % grid[1], b / (grid[0] * grid[1])};
            run_block(threads, order);
        }
    }
    sigaction(SIGSEGV, &segv, nullptr);
    sigaction(SIGBUS, &bus, nullptr);
    munmap(base, whole + PAGE);
    return complaint;
}

// ------------------------------------------------------------------ what a warp does together

template <typename In, typename Out> Out together(Together what, const In& operand, int line) {
    Out result;
    current->together = what;
    current->operand = &operand;
    current->result = &result;
    wait(IN_WARP, line);
    return result;
}

template <typename T> struct Shuffle { T value; int source; };

template <typename T> void shuffle(Fiber* lanes) {
    for (int l = 0; l < 32; ++l) {
        int source = static_cast<const Shuffle<T>*>(lanes[l].operand)->source;
        *static_cast<T*>(lanes[l].result) = static_cast<const Shuffle<T>*>(lanes[source].operand)->value;
    }
}

inline int lane() { return int(current - fibers) % 32; }

inline void full(unsigned mask, int line) {
    if (mask != 0xffffffffu) fail("a warp's instruction of some lanes only", line);
}

template <typename T> T shuffled(unsigned mask, T value, int source, int line) {
    full(mask, line);
    return together<Shuffle<T>, T>(shuffle<T>, {value, source}, line);
}

inline void nothing(Fiber*) {}

inline void ballot(Fiber* lanes) {
    unsigned votes = 0;
    for (int l = 0; l < 32; ++l) votes |= unsigned(*static_cast<const int*>(lanes[l].operand) != 0) << l;
    for (int l = 0; l < 32; ++l) *static_cast<unsigned*>(lanes[l].result) = votes;
}

// ------------------------------------------------------------------ shared memory and copies

inline void shared_array(void* p, size_t size) {
    for (auto& region : regions)
        if (region.p == p) return;
    regions.push_back({p, size});
    std::memset(p, 0xff, size);
}

inline unsigned char* in_dynamic(unsigned address, size_t alignment) {
    if (address % alignment) fail("an address in shared memory that is not a multiple of 16", 0);
    if (size_t(address) + 16 > dynamic_size) fail("an address beyond the block's shared memory", 0);
    return dynamic + address;
}

inline void arrive(Fiber& fiber, int newest_group) {
    auto still = fiber.copies.begin();
    for (auto& copy : fiber.copies) {
        if (copy.group > newest_group) {
            *still++ = copy;
            continue;
        }
        if (copy.valid) {
            std::memcpy(copy.to, copy.from, 16);
        } else {
            std::memset(copy.to, 0, 16);
        }
        fiber.unseen.push_back((copy.to - dynamic) / 16);
        unseen[fiber.unseen.back()] = true;
    }
    fiber.copies.erase(still, fiber.copies.end());
}

// ------------------------------------------------------------------ tensor cores

struct Four { unsigned r[4]; };

template <bool TRANSPOSED> void ldmatrix(Fiber* lanes) {
    uint16_t matrix[4][8][8];
    for (int l = 0; l < 32; ++l) {
        current = &lanes[l];
        std::memcpy(matrix[l / 8][l % 8], in_dynamic(*static_cast<const unsigned*>(lanes[l].operand), 16), 16);
    }
    for (int l = 0; l < 32; ++l)
        for (int m = 0; m < 4; ++m) {
            int row = l / 4, column = 2 * (l % 4);
            uint16_t low = TRANSPOSED ? matrix[m][column][row] : matrix[m][row][column];
            uint16_t high = TRANSPOSED ? matrix[m][column + 1][row] : matrix[m][row][column + 1];
            static_cast<Four*>(lanes[l].result)->r[m] = unsigned(low) | unsigned(high) << 16;
        }
}

struct Product { float c[4]; unsigned a[4], b[2]; };
struct Sums { float c[4]; };

inline float number(uint16_t bits, __nv_bfloat16) { return __bfloat162float({bits}); }
inline float number(uint16_t bits, __half) { return __half2float({bits}); }

template <typename T> void mma(Fiber* lanes) {
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; ++l) {
        auto operand = static_cast<const Product*>(lanes[l].operand);
        int g = l / 4, t = l % 4;
        for (int half = 0; half < 2; ++half) {
            for (int r = 0; r < 4; ++r)
                a[g + 8 * (r % 2)][2 * t + 8 * (r / 2) + half] = number(uint16_t(operand->a[r] >> 16 * half), T{});
            for (int r = 0; r < 2; ++r) b[2 * t + 8 * r + half][g] = number(uint16_t(operand->b[r] >> 16 * half), T{});
        }
    }
    for (int l = 0; l < 32; ++l)
        for (int r = 0; r < 4; ++r) {
            int i = l / 4 + 8 * (r / 2), j = 2 * (l % 4) + r % 2;
            double total = static_cast<const Product*>(lanes[l].operand)->c[r];
            for (int k = 0; k < 16; ++k) total += double(a[i][k]) * b[k][j];
            static_cast<Sums*>(lanes[l].result)->c[r] = float(total);
        }
}

// The number at (row, column) of an operand of wgmma, 128-byte swizzled. K-major (rows): 8 rows every `stride` bytes,
// 32 bytes to each. N-major (sums): 64 columns every `leading` bytes, 8 rows every `stride` (PTX ISA, canonical layouts).
inline uint16_t number_of(unsigned operand, bool sums, int row, int column, int line) {
    unsigned long long bits = wgmma_descriptor(operand);
    unsigned start = bits << 4 & 0x3fff0, leading = bits >> 12 & 0x3fff0, stride = bits >> 28 & 0x3fff0;
    if (bits >> 62 != 1 || bits >> 49 & 7) fail("an operand of wgmma that is not 128-byte swizzled", line);
    if (start & 0x380) fail("an operand of wgmma that does not begin with the first of 8 rows", line);
    unsigned at = start + row / 8 * stride + row % 8 * 128 + column % 64 * 2 + (sums ? column / 64 * leading : 0);
    at ^= (at >> 7 & 7) << 4;
    if (at + 2 > dynamic_size) fail("an operand of wgmma beyond the block's shared memory", line);
    if (unseen[at / 16]) fail("an operand of wgmma that no fence_proxy_async has shown to it", line);
    uint16_t number;
    std::memcpy(&number, dynamic + at, 2);
    return number;
}

// A warp asks: its lanes for the same, after a fence, and the four warps for the same in the same order.
inline void ask(Fiber* lanes) {
    auto& of_four = asked_by[(lanes - fibers) / 128];
    for (int l = 0; l < 32; ++l) {
        auto& one = *static_cast<const Wgmma*>(lanes[l].operand);
        current = &lanes[l];
        if (!lanes[l].fenced) fail("wgmma without a wgmma_fence before it", one.line);
        if (lanes[l].asked == of_four.size()) of_four.push_back(one);
        auto& other = of_four[lanes[l].asked++];
        if (one.line != other.line || one.b != other.b || one.add != other.add || (!one.sums && one.a[0] != other.a[0]))
            fail("lanes or warps that ask for different wgmma", one.line, other.line);
        lanes[l].products.push_back(one);
        lanes[l].products.back().group = lanes[l].product_group;
        if (!lanes[l].in_flight.count(one.c)) lanes[l].in_flight[one.c].assign(one.c, one.c + one.columns / 2);
        std::fill(one.c, one.c + one.columns / 2, __int_as_float(-1));
    }
}

// The products of a warp whose groups are waited for.
inline void finish(Fiber* lanes) {
    int newest_group = *static_cast<const int*>(lanes[0].operand), warp = int(lanes - fibers) / 32 % 4;
    while (!lanes[0].products.empty() && lanes[0].products[0].group <= newest_group) {
        auto& one = lanes[0].products[0];
        float a[16][16], b[256][16];
        for (int i = 0; i < 16; ++i)
            for (int k = 0; k < 16; ++k) {
                auto& of_lane = lanes[i % 8 * 4 + k % 8 / 2].products[0];
                unsigned two = of_lane.a[i / 8 + k / 8 * 2];
                a[i][k] = one.number(one.sums ? uint16_t(two >> k % 2 * 16)
                                              : number_of(one.a[0], false, warp * 16 + i, k, one.line));
            }
        for (int j = 0; j < one.columns; ++j)
            for (int k = 0; k < 16; ++k)
                b[j][k] = one.number(number_of(one.b, one.sums, one.sums ? k : j, one.sums ? j : k, one.line));
        for (int l = 0; l < 32; ++l) {
            float* c = lanes[l].in_flight[lanes[l].products[0].c].data();
            for (int n = 0; n < one.columns / 2; ++n) {
                int i = l / 4 + n % 4 / 2 * 8, j = n / 4 * 8 + l % 4 * 2 + n % 2;
                double total = one.add ? c[n] : 0;
                for (int k = 0; k < 16; ++k) total += double(a[i][k]) * b[j][k];
                c[n] = float(total);
            }
        }
        for (int l = 0; l < 32; ++l) lanes[l].products.erase(lanes[l].products.begin());
    }
    for (int l = 0; l < 32; ++l) {
        lanes[l].fenced = false;
        for (auto sums = lanes[l].in_flight.begin(); sums != lanes[l].in_flight.end();) {
            bool more = false;
            for (auto& one : lanes[l].products) more |= one.c == sums->first;
            if (!more) std::copy(sums->second.begin(), sums->second.end(), sums->first);
            sums = more ? std::next(sums) : lanes[l].in_flight.erase(sums);
        }
    }
}

// ------------------------------------------------------------------ calling a kernel

template <typename T> const char* name_of() {
    typedef std::remove_cv_t<T> U;
    if (std::is_same_v<U, float>) return "float32";
    if (std::is_same_v<U, double>) return "float64";
    if (std::is_same_v<U, __nv_bfloat16>) return "bfloat16";
    if (std::is_same_v<U, __half>) return "float16";
    if (std::is_same_v<U, bool>) return "bool";
    if (std::is_integral_v<U> && sizeof(U) == 1) return std::is_signed_v<U> ? "int8" : "uint8";
    if (std::is_integral_v<U> && sizeof(U) == 4) return std::is_signed_v<U> ? "int32" : "uint32";
    if (std::is_integral_v<U> && sizeof(U) == 8) return std::is_signed_v<U> ? "int64" : "uint64";
    return "unknown";
}

// "float32* int32 ...": what the launcher's arguments are compared with
template <typename... A> const char* signature(void (*)(A...)) {
    static char text[1024];
    text[0] = 0;
    ((std::strcat(text, name_of<std::remove_pointer_t<A>>()), std::strcat(text, std::is_pointer_v<A> ? "* " : " ")), ...);
    return text;
}

template <typename... A, size_t... I> void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
}
template <typename... A> void call(void (*kernel)(A...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<A...>{});
}

}  // namespace on_cpu

#define SHARED(type, name, size)        \
    alignas(128) static type name[size]; \
    on_cpu::shared_array(name, sizeof name)
#define DYNAMIC_SHARED(name, alignment) unsigned char* name = on_cpu::dynamic

inline void __syncthreads(int line = __builtin_LINE()) { on_cpu::wait(on_cpu::IN_BLOCK, line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    on_cpu::full(mask, line);
    on_cpu::together<int, int>(on_cpu::nothing, 0, line);
}
template <typename T> T __shfl_sync(unsigned mask, T x, int source, int line = __builtin_LINE()) {
    return on_cpu::shuffled(mask, x, source % 32, line);
}
template <typename T> T __shfl_xor_sync(unsigned mask, T x, int lanes, int line = __builtin_LINE()) {
    return on_cpu::shuffled(mask, x, on_cpu::lane() ^ lanes, line);
}
template <typename T> T __shfl_down_sync(unsigned mask, T x, int by, int line = __builtin_LINE()) {
    int source = on_cpu::lane() + by;
    return on_cpu::shuffled(mask, x, source < 32 ? source : on_cpu::lane(), line);
}
template <typename T> T __shfl_up_sync(unsigned mask, T x, int by, int line = __builtin_LINE()) {
    int source = on_cpu::lane() - by;
    return on_cpu::shuffled(mask, x, source >= 0 ? source : on_cpu::lane(), line);
}
inline unsigned __ballot_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
    on_cpu::full(mask, line);
    return on_cpu::together<int, unsigned>(on_cpu::ballot, vote, line);
}

inline unsigned shared_address(const void* p) {
    std::ptrdiff_t offset = static_cast<const unsigned char*>(p) - on_cpu::dynamic;
    if (offset < 0 || size_t(offset) > on_cpu::dynamic_size) on_cpu::fail("not an address in dynamic shared memory", 0);
    return unsigned(offset);
}

template <typename T> unsigned pack_two(float low, float high);
template <> inline unsigned pack_two<__nv_bfloat16>(float low, float high) {
    return __float2bfloat16_rn(low).bits | unsigned(__float2bfloat16_rn(high).bits) << 16;
}
template <> inline unsigned pack_two<__half>(float low, float high) {
    return __float2half_rn(low).bits | unsigned(__float2half_rn(high).bits) << 16;
}

inline void ldmatrix_x4(unsigned (&r)[4], unsigned address, int line = __builtin_LINE()) {
    auto four = on_cpu::together<unsigned, on_cpu::Four>(on_cpu::ldmatrix<false>, address, line);
    std::memcpy(r, four.r, sizeof r);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], unsigned address, int line = __builtin_LINE()) {
    auto four = on_cpu::together<unsigned, on_cpu::Four>(on_cpu::ldmatrix<true>, address, line);
    std::memcpy(r, four.r, sizeof r);
}
template <typename T>
void mma_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, int line = __builtin_LINE()) {
    on_cpu::Product operand = {{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    auto sums = on_cpu::together<on_cpu::Product, on_cpu::Sums>(on_cpu::mma<T>, operand, line);
    std::memcpy(c, sums.c, sizeof c);
}

inline void cp_async_16(unsigned shared, const void* global, bool valid) {
    unsigned char* to = on_cpu::in_dynamic(shared, 16);
    if (valid && uintptr_t(global) % 16) on_cpu::fail("cp.async from an address that is not a multiple of 16", 0);
    std::memset(to, 0xff, 16);
    on_cpu::current->copies.push_back({to, global, valid, on_cpu::current->group});
}
inline void cp_async_commit() { ++on_cpu::current->group; }
template <int N> void cp_async_wait() { on_cpu::arrive(*on_cpu::current, on_cpu::current->group - 1 - N); }

inline void fence_proxy_async() {
    for (size_t chunk : on_cpu::current->unseen) on_cpu::unseen[chunk] = false;
    on_cpu::current->unseen.clear();
}
template <typename... Registers> void wgmma_fence(Registers&...) { on_cpu::current->fenced = true; }
inline void wgmma_commit() { ++on_cpu::current->product_group; }
template <int N, typename... Registers> void wgmma_wait(Registers&...) {
    on_cpu::together<int, int>(on_cpu::finish, on_cpu::current->product_group - 1 - N, 0);
}
template <typename T, int N> void wgmma_rows(float (&c)[N][4], unsigned a, unsigned b, bool add,
                                             int line = __builtin_LINE()) {
    auto number = [](uint16_t bits) { return on_cpu::number(bits, T{}); };
    on_cpu::together<on_cpu::Wgmma, int>(on_cpu::ask, {c[0], 8 * N, 0, line, add, false, {a}, b, number}, line);
}
template <typename T, int N> void wgmma_sums(float (&c)[N][4], const unsigned (&a)[4], unsigned b,
                                             int line = __builtin_LINE()) {
    auto number = [](uint16_t bits) { return on_cpu::number(bits, T{}); };
    on_cpu::Wgmma one = {c[0], 8 * N, 0, line, true, true, {a[0], a[1], a[2], a[3]}, b, number};
    on_cpu::together<on_cpu::Wgmma, int>(on_cpu::ask, one, line);
}
