// Decoding of payloads in the memory of a CUDA device. codecs/SPEC.md has the format, the plain Go of codecs and codecs/rans is the
// truth that this must equal, gpu.go the layout of what the host hands over.
//
// One warp decodes one stream: lane l has the coder's lane l, and symbol i of a stream is lane i mod 32's. Four warps, a
// group of blocks, share one table, expanded to an entry a slot in shared memory. A stream is a block, or a segment of
// one where there are restart points: the states of the lanes in the middle of a block.
//
// The host has validated the program. Of the bytes of a stream nothing is trusted: where the words run out the last one
// is read again, and what does not end as an encoder ends it is reported.
//
// No #include, so that NVRTC, nvcc and, with an emulation of the few intrinsics, a C++ compiler all take this text.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

static_assert(sizeof(u32) == 4 && sizeof(u64) == 8, "sizes");

constexpr u32 kLanes = 32, kWarps = 4, kThreads = kLanes * kWarps;
constexpr u32 kCTAs = 8;  // that shared memory has room for on a multiprocessor of today
constexpr u32 kBlockLog = 16;              // log2 of the words of a block
constexpr u32 kSlots = 4096, kScale = 12;  // frequencies sum to kSlots
constexpr u32 kLower = 1u << 16;           // states are at least this
constexpr u32 kMaxSymbols = 256;
constexpr u32 kFields = 3;
constexpr u32 kAll = 0xffffffffu;  // every lane
constexpr u32 kStateBytes = 128;
constexpr u32 kHalf = 4 * kLanes;  // words that four turns take at most
constexpr u32 kRing = 2 * kHalf;   // words of a stream in shared memory, a warp

enum PlaneKind { kRaw, kConstant, kCoded, kOfHost };

struct Tensor {
    u64 payload, out, program, restarts;
};
struct Unit {
    u32 tensor, quad;
};
struct Field {
    u8 shift, sym, rest, rotate;
    u32 zero[3];
};
struct Program {
    u64 n_words;
    u32 n_blocks;
    u8 n_fields, word_bytes, shift, half;
    u32 planes, blocks, segments_log, n_bytes;
    Field field[kFields];
};
struct Block {
    u64 offset, hash;
    u32 length, verify;
};
struct Plane {
    u32 data, words, rest, listed;
    u32 table;
    u16 patches, symbol;
    u8 kind, zero[3];
    u32 zero2;
};
struct Restart {
    u32 state[kLanes];
    u32 words;
};

template <class T>
__device__ __forceinline__ const T *at(u64 address) {
    return (const T *)address;
}

__device__ __forceinline__ u32 lane() { return threadIdx.x % kLanes; }
__device__ __forceinline__ u32 warp() { return threadIdx.x / kLanes; }

// What a CTA has in shared memory.
struct Shared {
    u32 slot[kSlots];        // frequency, symbol number and rank in 12, 8 and 12 bits
    u32 value[kMaxSymbols];  // symbols, where they stand in a field
    u32 ring[kWarps][(kRing + kHalf) / 2];
};
__shared__ Shared shared;

// Expands a table; all threads of the CTA. up is where a symbol's lowest bit stands in a field.
__device__ void expand(const u32 *table, u32 up) {
    const u32 n = table[0], log = 31 - __clz(n);
    const u32 *own = table + 2, *other = own + n;
    __syncthreads();  // whoever reads the table before
#pragma unroll 1
    for (u32 i = threadIdx.x; i < kSlots; i += kThreads) {
        const u32 k = i & (n - 1), r = i >> log, o = other[k];
        const bool mine = r < o >> 24;
        const u32 symbol = mine ? k : o >> 16 & 255, rank = mine ? r : (o + r) & (kSlots - 1);
        shared.slot[i] = own[symbol] << 20 | symbol << kScale | rank;
    }
#pragma unroll 1
    for (u32 i = threadIdx.x; i < n; i += kThreads) {
        shared.value[i] = own[i] >> 16 << up;
    }
    __syncthreads();
}

// The binary32 of the same number as a binary16; NaNs keep their bits.
__device__ __forceinline__ u32 widen(u32 h) {
    const u32 sign = (h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023;
    if (e == 31) return sign | 0x7f800000 | m << 13;
    if (e > 0) return sign | (e + 112) << 23 | m << 13;
    if (m == 0) return sign;
    const u32 k = __clz(m) - 22;  // zeros before the leading one, of ten bits
    return sign | (112 - k) << 23 | (m << (k + 1) & 1023) << 13;
}

// Where the rest goes in a field. A rotated field has a float's sign in bit 0 of the rest, which belongs on top.
struct Rest {
    u32 bits, rotate, top, sign, keep;

    __device__ explicit Rest(const Field *f) {
        const u32 mask = (1u << f->rest) - 1;
        bits = f->rest;
        rotate = f->rotate;
        top = f->sym + f->rest - 1;
        sign = 1u << top;  // without rotation no bit of the rest
        keep = f->rotate ? mask >> 1 | sign : mask;
    }
    // The rest that begins at bit `right` of low; what it lacks there is in high.
    __device__ __forceinline__ u32 place(u32 low, u32 high, u32 right) const {
        const u32 a = __funnelshift_r(low, low, (right - top) % 32), b = __funnelshift_rc(low, high, right + rotate);
        return ((a & sign) | (b & ~sign)) & keep;
    }
    // That of word i; from are the packed bits.
    __device__ u32 of(const u32 *from, u32 i) const {
        if (bits == 0) return 0;
        const u32 bit = i * bits, k = bit / 32, low = __ldg(from + k);  // i * bits < 2^20
        return place(low, bit % 32 + bits > 32 ? __ldg(from + k + 1) : 0, bit % 32);
    }
};

// Whole bytes of words, stored as they are.
struct Bytes {
    const u8 *from;  // may be null
    u32 up;
    __device__ __forceinline__ u32 of(u32 i) const { return from ? (u32)__ldg(from + i) << up : 0; }
};

// A stream's place: words first to last-1 of a block that has n.
struct Span {
    u32 first, last, n;
};

enum Job { kDecode, kRestart, kGather };

// Where words go.
template <class Word, Job job>
struct Sink {
    Word *out;        // of word 0 of the block
    u32 from, count;  // kGather: only these words, counted from word 0 of the block
    bool half;        // words become those of the binary32 format
    bool join;        // other fields are there already

    __device__ __forceinline__ bool wanted(u32 i) const {
        return job == kDecode || (job == kGather && i - from < count);
    }
    __device__ __forceinline__ void put(u32 i, u32 v) const {
        if (!wanted(i)) return;
        if (sizeof(Word) == 4) {
            if (half) v = widen(v);
            if (join) v |= out[i];
        }
        out[i] = (Word)v;
    }
    // Replaces the bits of a mask.
    __device__ __forceinline__ void patch(u32 i, u32 v, u32 mask) const {
        if (!wanted(i)) return;
        if (sizeof(Word) == 4) {
            if (half) v = widen(v);
            else v |= out[i] & ~mask;
        }
        out[i] = (Word)v;
    }
};

// A stream on its way: the states are in registers, the words come by a ring in shared memory, half of which is filled at
// a time; what is filled next is under way meanwhile. The first half is there twice, the other time behind the second, so
// that four turns read on without turning round.
struct Coder {
    const u32 *words;  // in pairs
    u32 end;           // the last pair
    u32 ring;          // which is that warp's, in words
    u32 x, at, taken, filled, ahead[2], below;

    __device__ __forceinline__ void load() {
        ahead[0] = __ldg(words + min(filled / 2 + lane(), end));
        ahead[1] = __ldg(words + min(filled / 2 + kLanes + lane(), end));
    }
    __device__ __forceinline__ void store() {
        u32 *r = shared.ring[0] + (ring + filled % kRing) / 2 + lane();
        r[0] = ahead[0];
        r[kLanes] = ahead[1];
        if (filled % kRing == 0) {
            r[kRing / 2] = ahead[0];
            r[kRing / 2 + kLanes] = ahead[1];
        }
        filled += kHalf;
    }

    __device__ Coder(const u8 *data, u32 n_words, u32 state, u32 first) {
        words = (const u32 *)(data + kStateBytes);
        end = (n_words + 1) / 2 - 1;
        // With no words this reads the last state: whoever wanted a word is found out at the end.
        if (n_words == 0) words -= 1, end = 0;
        // By shuffles, so that these are kept and not computed anew at every turn.
        ring = __shfl_sync(kAll, warp() * (kRing + kHalf), 0);
        below = __shfl_sync(kAll, (1u << lane()) - 1, lane());
        x = state;
        taken = first;
        at = ring + taken % kRing;
        filled = first & ~(kHalf - 1);
        __syncwarp();
        for (u32 k = 0; k < 2; k++) {
            load();
            store();
        }
        load();
        __syncwarp();
    }

    // Sees to it that four turns find their words; called after four at most. What is overwritten has been taken.
    __device__ __forceinline__ void refill() {
        taken = used();
        at = ring + taken % kRing;
        if (filled - taken >= kHalf) return;  // the same in all lanes
        __syncwarp();
        store();
        load();
        __syncwarp();
    }

    // How many words have been taken.
    __device__ __forceinline__ u32 used() const { return taken + (at - (ring + taken % kRing)); }

    // Decodes one symbol a lane, of the lanes that are active, and gives its value.
    __device__ __forceinline__ u32 turn(bool active) {
        const u32 e = shared.slot[x % kSlots];
        const u32 y = (e >> 20) * (x >> kScale) + e % kSlots;
        const u32 all = __ballot_sync(kAll, active && y < kLower);
        const u32 word = ((const u16 *)shared.ring)[at + __popc(all & below)];
        at += __popc(all);
        if (active) x = y < kLower ? y << 16 | word : y;
        return shared.value[e >> kScale & 255];
    }

    __device__ void save(Restart &r) const {
        r.state[lane()] = x;
        if (lane() == 0) r.words = used();
    }
};

// The carried numbers of a block's lanes and its restart points.
struct Restarts {
    u16 *carry;
    Restart *points;
};

// Decodes the stream of a coded plane with its rest, and the planes of whole bytes that go with it. Gives what the lanes
// carry, or -1 where something is not in order.
template <class Word, Job job>
__device__ i32 coded(const u8 *block, const Plane *p, const Field *f, u32 shift, const Span &span, const Restarts &restarts,
                     u32 per, const Bytes &bytes0, const Bytes &bytes1, const Sink<Word, job> &sink) {
    const u8 *data = block + p->data;
    const u32 segment = job == kRestart ? 0 : span.first / per;
    u32 state, first = 0;
    bool ok = true;
    if (segment == 0) {
        const u16 *halves = (const u16 *)data;
        state = halves[lane()] | (u32)halves[kLanes + lane()] << 16;
        ok = state >= kLower;
    } else {
        state = restarts.points[segment - 1].state[lane()];
        first = restarts.points[segment - 1].words;
    }
    Coder c(data, p->words, state, first);
    const u32 *from = (const u32 *)(block + p->rest);
    const u32 turns = (span.last - span.first) / kLanes;
    u32 i = span.first + lane();
    if (job == kRestart) {
#pragma unroll 1
        for (u32 t = 0; t < turns; t++, i += kLanes) {
            if (i % per < kLanes && i >= per) c.save(restarts.points[i / per - 1]);
            c.turn(true);
            c.refill();
        }
        if (i - lane() < span.last && i % per < kLanes && i >= per) c.save(restarts.points[i / per - 1]);
    } else {
        const Rest rest(f);
        const u32 up = f->shift + shift;
        // 32 words take rest.bits pairs of bytes twice: a lane's bits are at the same place of every turn's. Four bytes
        // behind the rest may be read; there is something there, if only what the host leaves room for.
        const u32 right = lane() * rest.bits % 32;
        const u32 *r = rest.bits ? from + (u64)(span.first / kLanes) * rest.bits + lane() * rest.bits / 32 : (const u32 *)block;
        Word *out = sink.out + i;
        const auto step = [&](u32 k, u32 low, u32 high) {
            u32 v = (c.turn(true) | rest.place(low, high, right)) << up;
            if (sizeof(Word) == 4) v |= bytes0.of(i + k * kLanes) | bytes1.of(i + k * kLanes);
            if (sizeof(Word) == 4 || job != kDecode) {
                sink.put(i + k * kLanes, v);
            } else {
                out[k * kLanes] = (Word)v;
            }
        };
        u32 t = turns, low[4], high[4];
        if (t >= 4) {
#pragma unroll
            for (u32 k = 0; k < 4; k++) low[k] = __ldg(r + k * rest.bits), high[k] = __ldg(r + k * rest.bits + 1);
        }
#pragma unroll 1
        for (; t >= 4; t -= 4) {
            const u32 *next = t >= 8 ? r + 4 * rest.bits : r;  // the rest of the next four turns is under way meanwhile
#pragma unroll
            for (u32 k = 0; k < 4; k++) {
                const u32 l = low[k], h = high[k];
                low[k] = __ldg(next + k * rest.bits), high[k] = __ldg(next + k * rest.bits + 1);
                step(k, l, h);
            }
            c.refill();
            r += 4 * rest.bits;
            i += 4 * kLanes;
            out += 4 * kLanes;
        }
#pragma unroll 1
        for (; t > 0; t--) {
            step(0, __ldg(r), __ldg(r + 1));
            r += rest.bits;
            i += kLanes;
            out += kLanes;
        }
    }
    c.refill();
    if (i - lane() < span.last) {
        const bool active = i < span.last;
        const u32 v = c.turn(active);
        if (active && job != kRestart) {
            const Rest rest(f);
            sink.put(i, (v | rest.of(from, i)) << (f->shift + shift) | bytes0.of(i) | bytes1.of(i));
        }
    }
    __syncwarp();
    u32 carry;
    if (span.last == span.n) {
        carry = c.x & 0xffff;
        ok = ok && c.x >> 16 == 1 && c.used() == p->words && (lane() < 2 * p->patches || carry == 0);
        if (job == kRestart) restarts.carry[lane()] = (u16)carry;
    } else {
        carry = restarts.carry[lane()];
        ok = ok && c.x == restarts.points[segment].state[lane()] && c.used() == restarts.points[segment].words;
    }
    return __all_sync(kAll, ok) ? (i32)carry : -1;
}

// Decodes one plane of one stream, all of it. Returns whether it is in order.
template <class Word, Job job>
__device__ bool plane(const u8 *block, const Plane *p, const Field *f, u32 shift, const Span &span, const Restarts &restarts,
                      u32 per, const Bytes &bytes0, const Bytes &bytes1, const Sink<Word, job> &sink) {
    i32 carry = 0;
    bool ok = true;
    const u32 up = f->shift + shift, above = f->rest - f->rotate;  // where the field stands, and in it the symbol
    if (p->kind == kCoded) {
        carry = coded<Word, job>(block, p, f, shift, span, restarts, per, bytes0, bytes1, sink);
        if (carry < 0) return false;
    } else {
        const Rest rest(f);
        const u32 *from = (const u32 *)(block + p->rest);
#pragma unroll 1
        for (u32 i = span.first + lane(); i < span.last; i += kLanes) {
            const u32 symbol = p->kind == kRaw ? block[p->data + i] : p->symbol;
            if (symbol >> f->sym) ok = false;
            sink.put(i, (symbol << above | rest.of(from, i)) << up | bytes0.of(i) | bytes1.of(i));
        }
    }
    // Patches: positions, then symbols, ascending. What the lanes carry are the first of these numbers.
    __syncwarp();
    const Rest rest(f);
    const u32 *from = (const u32 *)(block + p->rest);
    const u16 *listed = (const u16 *)(block + p->listed);
    const u32 n = p->patches, carried = p->kind == kCoded ? min(2 * n, kLanes) : 0;
    const u32 mask = ((1u << (f->sym + f->rest)) - 1) << up;
    u32 least = 0;  // position that the next patch may have
#pragma unroll 1
    for (u32 k0 = 0; k0 < n; k0 += kLanes) {
        const u32 k = k0 + lane();
        u32 number[2];
        for (u32 j = 0; j < 2; j++) {
            const u32 i = k + j * n, here = __shfl_sync(kAll, (u32)carry, i % kLanes);
            number[j] = k >= n ? 0 : i < carried ? here : listed[i - carried];
        }
        const u32 after = __shfl_sync(kAll, number[0] + 1, (lane() + kLanes - 1) % kLanes);
        const u32 from_here = lane() == 0 ? least : after;
        least = __shfl_sync(kAll, number[0] + 1, kLanes - 1);
        if (k >= n) continue;
        if (number[0] < from_here || number[0] >= span.n || number[1] >> f->sym) {
            ok = false;
        } else if (number[0] - span.first < span.last - span.first) {
            const u32 i = number[0];
            sink.patch(i, (number[1] << above | rest.of(from, i)) << up | bytes0.of(i) | bytes1.of(i), mask);
        }
    }
    __syncwarp();
    return __all_sync(kAll, ok);
}

// What a warp does of a payload: stream q of it.
struct Part {
    const Program *program;
    const Block *blocks;
    const Plane *planes;
    u32 per, segments;  // words of a segment, segments of a block
    u32 block;          // of stream q
    Span span;
    bool some;  // there is such a stream

    __device__ Part(u64 address, u32 segments_log, u32 q) {
        program = at<Program>(address);
        blocks = at<Block>(address + program->blocks);
        planes = at<Plane>(address + program->planes);
        segments = 1u << segments_log;
        per = 1u << (kBlockLog - segments_log);
        block = q >> segments_log;
        const u64 before = (u64)block << kBlockLog;
        some = block < program->n_blocks;
        span.n = some ? (u32)min(program->n_words - before, (u64)1 << kBlockLog) : 0;
        span.first = (q & (segments - 1)) * per;
        span.last = min(span.first + per, span.n);
        some = some && span.first < span.last;
    }
};

// Decodes the streams of a CTA, one a warp, whose blocks are of the group of `leader`, a block that exists. Only warps that
// are active have one.
template <class Word, Job job>
__device__ bool streams(const Tensor *t, const Part &part, u32 leader, bool active, Sink<Word, job> sink) {
    const Program *g = part.program;
    const u32 n_fields = g->n_fields;
    const Plane *planes = part.planes + (u64)part.block * n_fields;
    bool ok = true;
    active = active && planes->kind != kOfHost;
#pragma unroll 1
    for (u32 i = 0; i < n_fields; i++) {
        const Field *f = g->field + i;
        // The planes of field i in a group share a table, if there is one.
        const u32 table = part.planes[(u64)leader * n_fields + i].table;
        if (table) {
            expand(at<u32>((u64)g + table), f->rest - f->rotate);
        }
        if (!active || !ok) continue;
        const u8 *block = at<u8>(t->payload + part.blocks[part.block].offset);
        const u64 notes = t->restarts + (u64)part.block * (2 * kLanes + (part.segments - 1) * sizeof(Restart));
        const Restarts restarts = {(u16 *)notes, (Restart *)(notes + 2 * kLanes)};
        Bytes bytes[2] = {};
        if (sizeof(Word) == 4) {
            bool joined = false;
#pragma unroll 1
            for (u32 k = 1; k < n_fields; k++) {
                const bool whole = planes[k].kind == kRaw && g->field[k].sym == 8 && g->field[k].rest == 0;
                if (whole && i == 0) bytes[k - 1] = {block + planes[k].data, (u32)g->field[k].shift + g->shift};
                if (whole && i == k) joined = true;
            }
            if (joined) continue;
            sink.join = i > 0;
        }
        ok = plane<Word, job>(block, planes + i, f, g->shift, part.span, restarts, part.per, bytes[0], bytes[1], sink);
    }
    return ok;
}

__device__ __forceinline__ void report(bool ok, u32 *status, u32 number) {
    if (!ok && lane() == 0) atomicMin(status, number);
}

__device__ __forceinline__ Unit unit(u64 units, u32 first) {
    if (units) return at<Unit>(units)[blockIdx.x];
    return {0, first + blockIdx.x};
}

template <class Word, Job job>
__device__ void decode(const Tensor *t, u32 segments_log, u32 quad, u64 out, u32 *status, u32 number) {
    const u32 q = kWarps * quad + warp();
    const Part part(t->program, segments_log, q);
    Sink<Word, job> sink = {};
    sink.out = (Word *)(out + ((u64)part.block << kBlockLog) * sizeof(Word));
    sink.half = part.program->half;
    const bool ok = streams<Word, job>(t, part, kWarps * quad >> segments_log, part.some, sink);
    report(ok, status, number);
}

template <class Word>
__device__ __forceinline__ void decode_units(u64 tensors, u64 units, u32 first, u64 out, u32 *status) {
    const Unit u = unit(units, first);
    const Tensor *t = at<Tensor>(tensors) + u.tensor;
    const u32 number = kWarps * (units ? blockIdx.x : u.quad) + warp();
    decode<Word, kDecode>(t, at<Program>(t->program)->segments_log, u.quad, out ? out : t->out, status, number);
}

// Decode into place, tensors of words of 1, 2 and 4 bytes: kernels of their own, since the fewer registers one takes, the
// more streams are under way. out replaces that of the record, if it is not 0.
extern "C" __global__ void __launch_bounds__(kThreads, kCTAs)
    bs_decode8(u64 tensors, u64 units, u32 first, u64 out, u32 *status) {
    decode_units<u8>(tensors, units, first, out, status);
}
extern "C" __global__ void __launch_bounds__(kThreads, kCTAs)
    bs_decode16(u64 tensors, u64 units, u32 first, u64 out, u32 *status) {
    decode_units<u16>(tensors, units, first, out, status);
}
extern "C" __global__ void __launch_bounds__(kThreads, kCTAs)
    bs_decode32(u64 tensors, u64 units, u32 first, u64 out, u32 *status) {
    decode_units<u32>(tensors, units, first, out, status);
}

// Decodes whole blocks, writes nothing of them, and notes where their segments begin.
extern "C" __global__ void __launch_bounds__(kThreads, kCTAs) bs_restart(u64 tensors, u64 units, u32 first, u32 *status) {
    const Unit u = unit(units, first);
    const Tensor *t = at<Tensor>(tensors) + u.tensor;
    Part part(t->program, 0, kWarps * u.quad + warp());
    part.segments = 1u << part.program->segments_log;
    part.per = 1u << (kBlockLog - part.program->segments_log);
    const bool ok = streams<u16, kRestart>(t, part, kWarps * u.quad, part.some, {});
    report(ok, status, kWarps * (units ? blockIdx.x : u.quad) + warp());
}

template <class Word>
__device__ void gather(const Tensor *t, const Program *g, u64 start, u32 row_words, u64 out, u32 *status) {
    const u32 log = g->segments_log, per = 1u << (kBlockLog - log);
    const u32 q0 = (u32)(start / per), q1 = (u32)((start + row_words - 1) / per), q = q0 + warp();
    const Part part(t->program, log, q);
    Sink<Word, kGather> sink = {};
    const u64 before = (u64)part.block << kBlockLog;
    sink.out = (Word *)(out + ((u64)blockIdx.x * row_words + before - start) * sizeof(Word));
    sink.half = g->half;
    sink.from = (u32)(start - before);
    sink.count = row_words;
    bool ok = true;
    // A row may end in the next group, which may have another table.
#pragma unroll 1
    for (u32 group = q0 >> log >> 2; group <= q1 >> log >> 2; group++) {
        const bool mine = part.some && q <= q1 && part.block >> 2 == group;
        ok = streams<Word, kGather>(t, part, group << 2, mine, sink) && ok;
    }
    report(ok, status, blockIdx.x);
}

// Decodes rows, one a CTA: row ids[i] of row_words words to place i. A row lies within four segments.
extern "C" __global__ void __launch_bounds__(kThreads, kCTAs / 2)
    bs_gather(u64 tensor, const i64 *ids, u32 n_ids, u32 row_words, u64 out, u32 *status) {
    const Tensor *t = at<Tensor>(tensor);
    const Program *g = at<Program>(t->program);
    const i64 id = blockIdx.x < n_ids ? ids[blockIdx.x] : -1;
    if (id < 0 || (u64)id >= g->n_words / row_words) {
        report(false, status, blockIdx.x);
        return;
    }
    const u64 start = (u64)id * row_words;
    if (g->word_bytes == 2) {
        gather<u16>(t, g, start, row_words, out, status);
    } else {
        gather<u32>(t, g, start, row_words, out, status);
    }
}

// ---- checksums: XXH3-64 of more than 240 bytes, without a seed --------------------------------------------------------
//
// Eight accumulators take a stripe of 64 bytes at a time; within 16 stripes their order does not matter. Lane l has
// accumulator l mod 8 and, of four stripes, the one number l / 8.

__device__ const u64 kSecret[24] = {
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072, 0x78e5c0cc4ee679cb, 0x2172ffcc7dd05a82,
    0x8e2443f7744608b8, 0x4c263a81e69035e0, 0xcb00c391bb52283c, 0xa32e531b8b65d088, 0x4ef90da297486471, 0xd8acdea946ef1938,
    0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a, 0x647378d9c97e9fc8, 0xc3ebd33483acc5ea, 0xeb6313faffa081c5,
    0x49daf0b751dd0d17, 0x9e68d429265516d3, 0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af,
};

constexpr u64 kPrime32_1 = 0x9E3779B1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D;
constexpr u64 kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F, kPrime64_3 = 0x165667B19E3779F9,
              kPrime64_4 = 0x85EBCA77C2B2AE63, kPrime64_5 = 0x27D4EB2F165667C5;

// Eight bytes of the secret from any byte on.
__device__ __forceinline__ u64 secret(u32 byte) {
    const u32 k = byte / 8, r = byte % 8 * 8;
    return r ? kSecret[k] >> r | kSecret[k + 1] << (64 - r) : kSecret[k];
}

__device__ __forceinline__ u64 shuffle_xor(u64 v, u32 mask) {
    const u32 low = __shfl_xor_sync(kAll, (u32)v, mask), high = __shfl_xor_sync(kAll, (u32)(v >> 32), mask);
    return (u64)high << 32 | low;
}

// What a stripe's eight bytes add: the product to their own accumulator, themselves to the neighbour's.
__device__ __forceinline__ void stripe(u64 data, u64 key, u64 &product, u64 &plain) {
    key ^= data;
    product += (u64)(u32)key * (u32)(key >> 32);
    plain += data;
}

__device__ u64 xxh3(const u64 *src, u32 length) {
    const u32 i = lane() % 8, row = lane() / 8;
    u64 acc = i == 0   ? kPrime32_3
              : i == 1 ? kPrime64_1
              : i == 2 ? kPrime64_2
              : i == 3 ? kPrime64_3
              : i == 4 ? kPrime64_4
              : i == 5 ? kPrime32_2
              : i == 6 ? kPrime64_5
                       : kPrime32_1;
    u64 key[4];
    for (u32 k = 0; k < 4; k++) key[k] = kSecret[4 * k + row + i];
    const u64 scramble = kSecret[16 + i];
    const u32 n = (length - 1) / 1024, last = (length - 1 - n * 1024) / 64;  // stretches of 16 stripes; stripes left
#pragma unroll 2
    for (u32 b = 0; b < n; b++) {
        u64 product = 0, plain = 0;
#pragma unroll
        for (u32 k = 0; k < 4; k++) stripe(__ldg(src + b * 128 + k * 32 + lane()), key[k], product, plain);
        product += shuffle_xor(plain, 1);
        product += shuffle_xor(product, 8);
        product += shuffle_xor(product, 16);
        acc += product;
        acc ^= acc >> 47;
        acc = (acc ^ scramble) * kPrime32_1;
    }
    u64 product = 0, plain = 0;
    for (u32 k = 0; k < 4; k++) {
        if (4 * k + row < last) stripe(__ldg(src + n * 128 + k * 32 + lane()), key[k], product, plain);
    }
    if (row == 0) stripe(__ldg(src + length / 8 - 8 + i), secret(121 + 8 * i), product, plain);  // the last 64 bytes
    product += shuffle_xor(plain, 1);
    product += shuffle_xor(product, 8);
    product += shuffle_xor(product, 16);
    acc += product;
    // Pairs are multiplied, folded and added.
    const u64 mine = acc ^ secret(11 + 8 * i), other = shuffle_xor(mine, 1);
    u64 sum = mine * other ^ __umul64hi(mine, other);
    sum += shuffle_xor(sum, 2);
    sum += shuffle_xor(sum, 4);
    sum += length * kPrime64_1;
    sum ^= sum >> 37;
    sum *= 0x165667919E3779F9;
    return sum ^ sum >> 32;
}

// Verifies the bytes of blocks. Lengths are multiples of 8.
extern "C" __global__ void __launch_bounds__(kThreads) bs_verify(u64 tensors, u64 units, u32 first, u32 *status) {
    const Unit u = unit(units, first);
    const Tensor *t = at<Tensor>(tensors) + u.tensor;
    const Part part(t->program, 0, kWarps * u.quad + warp());
    if (!part.some) return;
    const Block &b = part.blocks[part.block];
    if (!b.verify) return;
    const bool ok = xxh3((const u64 *)(t->payload + b.offset), b.length) == b.hash;
    report(ok, status, kWarps * (units ? blockIdx.x : u.quad) + warp());
}
