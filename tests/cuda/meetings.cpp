// Tests of emu.h: each argument names a case; the wrong ones must abort, or give what they print.
#include "emu.h"

#include <string>

typedef unsigned u32;

static u32 out[4096];

// Sums by shuffles and ballots; every CTA and thread once.
extern "C" __global__ void right(u32 *p) {
    __shared__ u32 s[4];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 v = lane + 1;
    for (int by = 16; by > 0; by /= 2) v += __shfl_xor_sync(~0u, v, by);
    const u32 odd = __ballot_sync(~0u, lane & 1), up = __shfl_up_sync(~0u, lane, 3), down = __shfl_down_sync(~0u, lane, 3);
    u32 half = 0;
    if (lane < 16) half = __ballot_sync(0x0000ffff, lane != 3);
    else half = __ballot_sync(0xffff0000, lane != 20);
    __syncwarp();
    if (lane == 0) s[warp] = v;
    __syncthreads();
    u32 sum = 0;
    for (int i = 0; i < 4; i++) sum += s[i];
    const bool ok = odd == 0xaaaaaaaa && up == (lane < 3 ? lane : lane - 3) && down == (lane > 28 ? lane : lane + 3) &&
                    half == (lane < 16 ? 0x0000fff7u : 0xffef0000u) && __all_sync(~0u, 1) && !__any_sync(~0u, 0) &&
                    __shfl_sync(~0u, lane, 35) == 3 && __shfl_sync(~0u, lane, 1, 8) == (lane & ~7u) + 1 && sum == 4 * 528;
    atomicAdd(&p[blockIdx.x], u32(ok));
}

// Neighbours read what a lane wrote without having met.
extern "C" __global__ void no_syncwarp(u32 *p) {
    __shared__ u32 s[32];
    for (u32 i = 0; i < 64; i++) {
        s[threadIdx.x] = i;
        __syncwarp();
        p[threadIdx.x] += s[31 - threadIdx.x] != i;  // the next turn's writing may come before this
    }
}

extern "C" __global__ void no_syncthreads(u32 *p) {
    __shared__ u32 s[128];
    s[threadIdx.x] = 7;
    __syncwarp();
    p[threadIdx.x] = s[127 - threadIdx.x];
}

extern "C" __global__ void lane_missing(u32 *) {
    if (threadIdx.x != 5) __ballot_sync(~0u, 1);
}

extern "C" __global__ void not_in_mask(u32 *) { __ballot_sync(0xfffffffe, 1); }

extern "C" __global__ void masks_differ(u32 *) { __syncwarp(threadIdx.x < 16 ? ~0u : 0xffff0000u); }

extern "C" __global__ void barrier_missed(u32 *) {
    if (threadIdx.x / 32 != 2) __syncthreads();
}

extern "C" __global__ void barrier_against_warp(u32 *) {
    if (threadIdx.x & 1) __syncthreads();
    else __syncwarp();
}

extern "C" __global__ void past_the_end(u32 *p) {
    __syncwarp();
    p[threadIdx.x] = 1;
    __syncwarp();
}

static void run(const char *name, void (*kernel)(u32 *), unsigned grid, unsigned block, u32 *p = out) {
    emu::launch(name, {grid}, {block}, [=] { kernel(p); });
}

static bool all(u32 n, u32 value) {
    for (u32 i = 0; i < n; i++)
        if (out[i] != value) return false;
    return true;
}

int main(int argc, char **argv) {
    const std::string what = argc > 1 ? argv[1] : "";
    if (what == "right") {
        for (emu::seed = 1; emu::seed <= 20; emu::seed++) {
            memset(out, 0, sizeof out);
            run("right", right, 40, 128);
            if (!all(40, 128)) return 1;
        }
        return 0;
    }
    if (what == "races") {  // both must show
        u32 warp = 0, cta = 0;
        for (emu::seed = 1; emu::seed <= 20; emu::seed++) {
            memset(out, 0, sizeof out);
            run("no_syncwarp", no_syncwarp, 1, 32);
            warp += !all(32, 0);
            run("no_syncthreads", no_syncthreads, 1, 128);
            cta += !all(128, 7);
        }
        printf("of 20 runs, %u without __syncwarp and %u without __syncthreads went wrong\n", warp, cta);
        return warp > 10 && cta > 10 ? 0 : 1;
    }
    if (what == "lane_missing") run("lane_missing", lane_missing, 2, 128);
    if (what == "not_in_mask") run("not_in_mask", not_in_mask, 1, 32);
    if (what == "masks_differ") run("masks_differ", masks_differ, 1, 32);
    if (what == "barrier_missed") run("barrier_missed", barrier_missed, 1, 128);
    if (what == "barrier_against_warp") run("barrier_against_warp", barrier_against_warp, 1, 128);
    if (what == "past_the_end") {  // for AddressSanitizer
        u32 *short_by_one = new u32[31];
        run("past_the_end", past_the_end, 1, 32, short_by_one);
        delete[] short_by_one;
    }
    fprintf(stderr, "%s: nothing was noticed\n", what.c_str());
    return 3;
}
