// Compiles CUDA C as C++17, so that codecs/gpu/kernel.cu runs on a CPU, under its sanitizers and debuggers.
//
// Include this first, then the kernels, and start one with emu::launch. A CTA's threads are fibers of one thread of the
// processor; they change over where lanes of a warp or threads of a CTA wait for each other, and nowhere else. Whom a
// meeting sets free goes on in an order drawn from emu::seed: ascending, descending or in between, at once or after the
// other warps. Code that leans on lanes in step, or on warps of like speed, so gives wrong results here, as it may on a device.
// Shared memory holds poison when a CTA starts. Where nobody can go on (lanes of a mask that never come, a barrier that
// some threads missed), the process aborts and says who waits where.
//
// Launches exclude each other. Not modelled: time, caches, the order in which memory is seen by others.
#ifndef BIGSMALL_EMU_H
#define BIGSMALL_EMU_H

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <functional>
#include <mutex>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Where the variables of shared memory stand; the linker names both ends of a section.
extern "C" {
extern char __start_emu_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_emu_shared[] __attribute__((weak, visibility("hidden")));
}

namespace emu {

struct Dim {
    unsigned x = 1, y = 1, z = 1;
    unsigned long long count() const { return 1ull * x * y * z; }
};

enum Op { kRuns, kBallot, kAny, kAll, kShuffle, kSyncWarp, kBarrier, kEnded };

inline const char *name(Op op) {
    static const char *const names[] = {"", "__ballot_sync", "__any_sync", "__all_sync", "a __shfl_sync", "__syncwarp",
                                        "__syncthreads", ""};
    return names[op];
}

constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = 64 << 10, kGuard = 4096;  // bytes
constexpr unsigned char kPoison = 0xa5;

struct Fiber {
    void *place[5];  // where it left off
    ucontext_t context;  // where it begins
    bool started;
    unsigned rank;  // in its CTA
    Dim thread;     // threadIdx
    const void *stack;
    size_t stack_bytes;
    void *fake_stack;  // AddressSanitizer's

    // The meeting it waits for, what it brings, and what it takes home.
    Op op;
    unsigned mask, source;
    int line;
    uint64_t value, result;
};

struct Launch {
    const char *kernel = "";
    Dim grid, block, cta;
    unsigned n = 0;  // threads of a CTA
    std::function<void()> body;
    std::vector<Fiber> fibers;
    Fiber host{};  // whoever called launch
    Fiber *current = nullptr, *previous = nullptr;
    unsigned waiting[kMostThreads / kWarp];  // lanes of each warp that wait for others of it
    unsigned at_barrier = 0, ended = 0;
    Fiber *ready[kMostThreads];  // a ring
    unsigned first_ready = 0, n_ready = 0;
    uint64_t random = 1, launches = 0;
};

inline Launch now;
inline std::mutex one_at_a_time;
inline uint64_t seed = 1;  // of the order in which fibers go on

inline uint32_t draw() {
    now.random ^= now.random << 13;
    now.random ^= now.random >> 7;
    now.random ^= now.random << 17;
    return uint32_t(now.random >> 32);
}

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "emu: %s, CTA %u,%u,%u, seed %llu: ", now.kernel, now.cta.x, now.cta.y, now.cta.z,
            (unsigned long long)seed);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    abort();
}

[[noreturn]] inline void stuck() {
    for (unsigned warp = 0; warp * kWarp < now.n; warp++) {
        unsigned told = 0;
        for (unsigned i = 0; i < kWarp && warp * kWarp + i < now.n; i++) {
            if (told >> i & 1) continue;
            const Fiber &f = now.fibers[warp * kWarp + i];
            unsigned same = 0;
            for (unsigned j = i; j < kWarp && warp * kWarp + j < now.n; j++) {
                const Fiber &g = now.fibers[warp * kWarp + j];
                if (g.op == f.op && g.line == f.line && g.mask == f.mask) same |= 1u << j;
            }
            told |= same;
            fprintf(stderr, "emu: warp %u, lanes %08x ", warp, same);
            if (f.op == kEnded) fprintf(stderr, "have ended\n");
            else if (f.op == kBarrier) fprintf(stderr, "wait in __syncthreads of line %d\n", f.line);
            else fprintf(stderr, "wait in %s of line %d for lanes %08x\n", name(f.op), f.line, f.mask);
        }
    }
    die("nobody can go on");
}

inline void arrived() {
#ifdef __SANITIZE_ADDRESS__
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(now.current->fake_stack, &bottom, &bytes);
    if (now.previous == &now.host) now.host.stack = bottom, now.host.stack_bytes = bytes;
#endif
}

// The built-in functions and not the library's: those of the library tell AddressSanitizer to forget a whole stack.
[[noreturn]] __attribute__((noinline, no_sanitize_address)) inline void go_on(Fiber *to) {
    if (to->started) __builtin_longjmp(to->place, 1);
    to->started = true;
    setcontext(&to->context);
    abort();
}

// Leaves the fiber that runs for another. Not to be inlined: what a kernel keeps in registers is saved around this call,
// and what it has in memory is there for the others.
__attribute__((noinline, no_sanitize_address)) inline void change_to(Fiber *to) {
    Fiber *from = now.current;
    if (to == from) return;
    now.previous = from;
    now.current = to;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(from->op == kEnded ? nullptr : &from->fake_stack, to->stack, to->stack_bytes);
#endif
    if (__builtin_setjmp(from->place) == 0) go_on(to);
    asm volatile("" ::: "memory");
    arrived();
}

inline Fiber *next() {
    if (now.n_ready == 0) {
        if (now.ended == now.n) return &now.host;
        stuck();
    }
    Fiber *f = now.ready[now.first_ready];
    now.first_ready = (now.first_ready + 1) % kMostThreads;
    now.n_ready--;
    return f;
}

// Sets fibers first .. first+31 free, those of the mask.
inline void set_free(unsigned first, unsigned mask) {
    const uint32_t r = draw();
    // An odd step visits every lane once; 1 and -1 are ascending and descending.
    const unsigned step = (r & 3) == 0 ? 1 : (r & 3) == 1 ? kWarp - 1 : (r >> 8 & 15) * 2 + 1;
    const unsigned start = (r & 3) == 0 ? 0 : (r & 3) == 1 ? kWarp - 1 : r >> 16 & (kWarp - 1);
    const bool in_front = r >> 24 & 1;
    for (unsigned k = 0, i = start; k < kWarp; k++, i = (i + step) % kWarp) {
        if (!(mask >> i & 1)) continue;
        Fiber *f = &now.fibers[first + i];
        f->op = kRuns;
        if (in_front) {
            now.first_ready = (now.first_ready + kMostThreads - 1) % kMostThreads;
            now.ready[now.first_ready] = f;
        } else {
            now.ready[(now.first_ready + now.n_ready) % kMostThreads] = f;
        }
        now.n_ready++;
    }
}

inline void set_all_free() {
    const unsigned warps = (now.n + kWarp - 1) / kWarp, start = draw() % warps;
    for (unsigned k = 0; k < warps; k++) {
        const unsigned first = (start + k) % warps * kWarp, left = now.n - first;
        set_free(first, left >= kWarp ? ~0u : (1u << left) - 1);
    }
}

// The lanes of the mask meet: each brings a value and gets a result.
inline uint64_t meet(Op op, unsigned mask, uint64_t value, unsigned source, int line) {
    Fiber &me = *now.current;
    const unsigned lane = me.rank % kWarp, first = me.rank - lane;
    unsigned &waiting = now.waiting[me.rank / kWarp];
    if (!(mask >> lane & 1)) {
        die("lane %u of warp %u calls %s of line %d for lanes %08x, itself not among them", lane, me.rank / kWarp,
            name(op), line, mask);
    }
    me.op = op, me.mask = mask, me.value = value, me.source = source, me.line = line;
    waiting |= 1u << lane;
    bool all = (waiting & mask) == mask;
    uint64_t ballot = 0;
    for (unsigned i = 0; i < kWarp && all; i++) {
        if (!(mask >> i & 1)) continue;
        const Fiber &f = now.fibers[first + i];
        all = f.op == op && f.mask == mask;
        ballot |= uint64_t(f.value != 0) << i;
    }
    if (all) {
        for (unsigned i = 0; i < kWarp; i++) {
            if (!(mask >> i & 1)) continue;
            Fiber &f = now.fibers[first + i];
            switch (op) {
            case kBallot: f.result = ballot; break;
            case kAny: f.result = ballot != 0; break;
            case kAll: f.result = ballot == mask; break;
            case kShuffle:
                // That of a lane which is not there is undefined.
                f.result = mask >> f.source & 1 ? now.fibers[first + f.source].value : 0xbadbadbadbadbad1;
                break;
            default: f.result = 0;
            }
        }
        waiting &= ~mask;
        set_free(first, mask);
    }
    change_to(next());
    return me.result;
}

inline void barrier(int line) {
    Fiber &me = *now.current;
    me.op = kBarrier, me.line = line, me.mask = 0;
    if (++now.at_barrier == now.n) {
        now.at_barrier = 0;
        set_all_free();
    }
    change_to(next());
}

inline void fiber() {
    arrived();
    now.body();
    now.current->op = kEnded;
    now.current->line = 0, now.current->mask = 0;
    now.ended++;
    change_to(next());
    abort();  // nobody comes back to a fiber that has ended
}

__attribute__((noinline)) inline void prepare(Fiber &f, char *stack) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stack;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber, 0);
}

// Runs body once for each thread of each CTA. The name is for messages.
inline void launch(const char *kernel, Dim grid, Dim block, std::function<void()> body) {
    const std::lock_guard<std::mutex> alone(one_at_a_time);
    static char *const stacks = [] {
        const size_t bytes = kMostThreads * (kStack + kGuard);
        void *p = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) die("no memory for stacks");
        for (unsigned i = 0; i < kMostThreads; i++) {
            mprotect((char *)p + i * (kStack + kGuard) + kGuard, kStack, PROT_READ | PROT_WRITE);
        }
        return (char *)p;
    }();
    now.kernel = kernel, now.grid = grid, now.block = block, now.body = std::move(body);
    now.cta = {0, 0, 0};
    now.random = (seed + now.launches++) * 0x9e3779b97f4a7c15 | 1;
    if (block.count() == 0 || block.count() > kMostThreads) die("%llu threads a CTA", block.count());
    now.n = unsigned(block.count());
    now.fibers.resize(kMostThreads);
    const uint64_t n_ctas = grid.count();
    const uint64_t start = draw() % (n_ctas ? n_ctas : 1);
    const bool backwards = draw() & 1;
    for (uint64_t k = 0; k < n_ctas; k++) {
        const uint64_t i = (start + (backwards ? n_ctas - k : k)) % n_ctas;
        now.cta = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
        if (__start_emu_shared) memset(__start_emu_shared, kPoison, size_t(__stop_emu_shared - __start_emu_shared));
        memset(now.waiting, 0, sizeof now.waiting);
        now.at_barrier = now.ended = now.first_ready = now.n_ready = 0;
        for (unsigned rank = 0; rank < now.n; rank++) {
            Fiber &f = now.fibers[rank];
            char *stack = stacks + rank * (kStack + kGuard) + kGuard;
#ifdef __SANITIZE_ADDRESS__
            ASAN_UNPOISON_MEMORY_REGION(stack, kStack);  // of the one that ended here before
#endif
            f.started = false;
            f.rank = rank;
            f.thread = {rank % block.x, rank / block.x % block.y, rank / block.x / block.y};
            f.stack = stack, f.stack_bytes = kStack, f.fake_stack = nullptr;
            prepare(f, stack);
        }
        set_all_free();
        now.host.op = kRuns;
        now.host.started = true;
        now.current = &now.host;
        change_to(next());
    }
    now.body = nullptr;
}

template <class T>
uint64_t bits(T v) {
    static_assert(sizeof(T) <= 8, "shuffles take up to 64 bits");
    uint64_t b = 0;
    memcpy(&b, &v, sizeof v);
    return b;
}
template <class T>
T shuffle(unsigned mask, T v, unsigned source, int line) {
    const uint64_t b = meet(kShuffle, mask, bits(v), source, line);
    memcpy(&v, &b, sizeof v);
    return v;
}
inline unsigned own_lane() { return now.current->rank % kWarp; }

}  // namespace emu

// ---- CUDA C ----

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static __attribute__((section("emu_shared")))
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (emu::now.current->thread)
#define blockIdx (emu::now.cta)
#define blockDim (emu::now.block)
#define gridDim (emu::now.grid)

struct __align__(8) uint2 { unsigned x, y; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
struct __align__(16) ulonglong2 { unsigned long long x, y; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }

inline unsigned __ballot_sync(unsigned mask, int is, int line = __builtin_LINE()) {
    return unsigned(emu::meet(emu::kBallot, mask, is != 0, 0, line));
}
inline int __any_sync(unsigned mask, int is, int line = __builtin_LINE()) {
    return int(emu::meet(emu::kAny, mask, is != 0, 0, line));
}
inline int __all_sync(unsigned mask, int is, int line = __builtin_LINE()) {
    return int(emu::meet(emu::kAll, mask, is != 0, 0, line));
}
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
    emu::meet(emu::kSyncWarp, mask, 0, 0, line);
}
inline void __syncthreads(int line = __builtin_LINE()) { emu::barrier(line); }

// A width below 32 makes groups of so many lanes. Where the other lane lies outside the group, a lane gets its own value.
template <class T>
T __shfl_sync(unsigned mask, T v, int from, int width = 32, int line = __builtin_LINE()) {
    return emu::shuffle(mask, v, (emu::own_lane() & ~(width - 1u)) | (unsigned(from) & (width - 1u)), line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, int line = __builtin_LINE()) {
    const unsigned lane = emu::own_lane();
    return emu::shuffle(mask, v, (lane & (width - 1u)) >= by ? lane - by : lane, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, int line = __builtin_LINE()) {
    const unsigned lane = emu::own_lane();
    return emu::shuffle(mask, v, (lane & (width - 1u)) + by < unsigned(width) ? lane + by : lane, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int with, int width = 32, int line = __builtin_LINE()) {
    const unsigned lane = emu::own_lane(), other = lane ^ unsigned(with);
    return emu::shuffle(mask, v, other / unsigned(width) <= lane / unsigned(width) ? other % 32 : lane, line);
}
// Lanes need not be in step, so a lane may only count on itself.
inline unsigned __activemask() { return 1u << emu::own_lane(); }

inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { emu::die("__trap() in thread %u", emu::now.current->rank); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline unsigned __brev(unsigned v) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (v >> i & 1) << (31 - i);
    return r;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    return unsigned(((uint64_t(high) << 32 | low) << (by & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return unsigned((uint64_t(high) << 32 | low) >> (by & 31));
}
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned by) {
    return by >= 32 ? low : __funnelshift_l(low, high, by);
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned by) {
    return by >= 32 ? high : __funnelshift_r(low, high, by);
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    if (selector & 0x8888) emu::die("__byte_perm with the selector %08x: only 3 bits of each are defined", selector);
    unsigned r = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned k = selector >> (4 * i) & 7;
        r |= (unsigned((uint64_t(high) << 32 | low) >> (8 * k)) & 255) << (8 * i);
    }
    return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

template <class T>
T __ldg(const T *p) {
    return *p;
}

#define EMU_MIN_MAX(T)                                      \
    inline T min(T a, T b) { return b < a ? b : a; }        \
    inline T max(T a, T b) { return a < b ? b : a; }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned)
EMU_MIN_MAX(long long)
EMU_MIN_MAX(unsigned long long)
#undef EMU_MIN_MAX

// Fibers do not interrupt each other, and launches exclude each other: nothing comes between.
#define EMU_ATOMIC(name, T, become)            \
    inline T name(T *p, T v) {                 \
        const T old = *p;                      \
        *p = become;                           \
        return old;                            \
    }
#define EMU_ATOMICS(T)                                   \
    EMU_ATOMIC(atomicAdd, T, old + v)                    \
    EMU_ATOMIC(atomicMin, T, v < old ? v : old)          \
    EMU_ATOMIC(atomicMax, T, old < v ? v : old)          \
    EMU_ATOMIC(atomicOr, T, old | v)                     \
    EMU_ATOMIC(atomicAnd, T, old &v)                     \
    EMU_ATOMIC(atomicExch, T, v)                         \
    inline T atomicCAS(T *p, T expected, T v) {          \
        const T old = *p;                                \
        if (old == expected) *p = v;                     \
        return old;                                      \
    }
EMU_ATOMICS(int)
EMU_ATOMICS(unsigned)
EMU_ATOMICS(unsigned long long)
#undef EMU_ATOMICS
#undef EMU_ATOMIC

#endif
