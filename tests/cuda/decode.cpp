// Decodes dumps of payloads by the kernels, good ones and damaged ones, in buffers of exactly the size that the host
// promises: built with AddressSanitizer and UndefinedBehaviorSanitizer.
//
//   decode ROUNDS DUMP...
//
// A dump: u64 bytes of the payload, of its program, of the decoded tensor; then those three. Each is decoded as it is and from
// restart points, by rows, and then ROUNDS times with damage that the kernels must survive, and the checksums find.
#include "emu.h"

#include <fstream>
#include <iterator>
#include <random>
#include <string>

namespace device {
#include "../../codecs/gpu/kernel.cu"
}
using namespace device;

typedef std::vector<char> Buffer;
constexpr size_t kSlack = 8;  // bytes that may be read behind a payload

static const char *where = "";

static void expect(bool is, const std::string &what) {
    if (is) return;
    fprintf(stderr, "%s: %s\n", where, what.c_str());
    exit(1);
}

// Device memory: aligned as the driver's, of exactly n bytes, and poison.
struct Exact {
    char *start, *p;
    size_t n;
    explicit Exact(size_t bytes) : n(bytes) {
        // malloc aligns to 16, which is all that kernels ask for, and guards every byte behind.
        start = p = (char *)malloc(n ? n : 1);
        memset(p, 0xdb, n);
    }
    explicit Exact(const Buffer &b) : Exact(b.size()) { memcpy(p, b.data(), n); }
    Exact(const Exact &) = delete;
    ~Exact() { free(start); }
    u64 address() const { return (u64)p; }
};

struct Case {
    Buffer payload, program, decoded;
    Program head;
    std::vector<Block> blocks;

    u32 quads(u32 log) const { return ((head.n_blocks << log) + kWarps - 1) / kWarps; }
};

template <class F, class... A>
static u32 start(const char *name, F *kernel, u32 ctas, const Exact &status, A... arguments) {
    *(u32 *)status.p = 0xffffffff;
    emu::launch(name, {ctas}, {kThreads}, [=] { kernel(arguments...); });
    return *(u32 *)status.p;
}

// A payload on the device.
struct Loaded {
    const Case &c;
    u32 log;
    Exact payload, program, out, restarts, record, status;

    Loaded(const Case &of, u32 segments_log, const Buffer &bytes)
        : c(of), log(segments_log), payload(bytes.size() + kSlack), program(of.program), out(of.decoded.size()),
          restarts(log ? of.head.n_blocks * (2 * kLanes + ((1u << log) - 1) * sizeof(Restart)) : 0),
          record(sizeof(Tensor)), status(4) {
        memcpy(payload.p, bytes.data(), bytes.size());
        ((Program *)program.p)->segments_log = log;
        *(Tensor *)record.p = {payload.address(), out.address(), program.address(), log ? restarts.address() : 0};
    }
    u32 verify() { return start("bs_verify", bs_verify, c.quads(0), status, record.address(), u64(0), 0u, (u32 *)status.p); }
    u32 restart() {
        return start("bs_restart", bs_restart, c.quads(0), status, record.address(), u64(0), 0u, (u32 *)status.p);
    }
    u32 decode(u32 first, u32 ctas, u64 units = 0, u64 to = 0) {
        const auto kernel = c.head.word_bytes == 1 ? bs_decode8 : c.head.word_bytes == 2 ? bs_decode16 : bs_decode32;
        return start("bs_decode", kernel, ctas, status, record.address(), units, first, to, (u32 *)status.p);
    }
    u32 decode() { return decode(0, c.quads(log)); }
    u32 gather(const std::vector<i64> &ids, u32 row_words, Exact &rows) {
        const Exact list(Buffer((const char *)ids.data(), (const char *)(ids.data() + ids.size())));
        return start("bs_gather", bs_gather, (u32)ids.size(), status, record.address(), (const i64 *)list.p,
                     (u32)ids.size(), row_words, rows.address(), (u32 *)status.p);
    }
    bool equal() const { return memcmp(out.p, c.decoded.data(), out.n) == 0; }
};

static std::string number(u64 n) { return std::to_string(n); }

static void good(const Case &c, std::mt19937_64 &random) {
    const u32 sound = 0xffffffff;
    {
        Loaded l(c, 0, c.payload);
        expect(l.verify() == sound, "verify finds damage in a good payload");
        expect(l.decode() == sound && l.equal(), "not decoded as it should be");
        // Units in any order, some of them twice, to another place.
        std::vector<Unit> list;
        for (u32 q = 0; q < c.quads(0); q++) list.push_back({0, q});
        list.push_back({0, c.quads(0) / 2});
        std::shuffle(list.begin(), list.end(), random);
        const Exact units(Buffer((const char *)list.data(), (const char *)(list.data() + list.size())));
        const Exact other(c.decoded.size());
        expect(l.decode(0, (u32)list.size(), units.address(), other.address()) == sound, "units are not in order");
        expect(memcmp(other.p, c.decoded.data(), other.n) == 0, "units are not decoded as they should be");
    }
    for (u32 log = 2; log <= 3 && c.head.n_fields == 1; log++) {
        Loaded l(c, log, c.payload);
        expect(l.restart() == sound, "no restart points of " + number(1u << log) + " segments");
        expect(l.decode() == sound && l.equal(), "not decoded from restart points as it should be");
        if (c.head.word_bytes == 1) continue;
        const u64 n = c.head.n_words;
        const u32 most = 2u << (kBlockLog - log);
        for (u32 row : {1u, 7u, 1000u, most}) {
            if (n < row) continue;
            std::vector<i64> ids = {0, i64(n / row - 1)};
            while (ids.size() < 4) ids.push_back(i64(random() % (n / row)));
            const size_t bytes = size_t(row) * c.head.word_bytes;
            Exact rows(ids.size() * bytes);
            expect(l.gather(ids, row, rows) == sound, "a row of " + number(row) + " words is not in order");
            for (size_t i = 0; i < ids.size(); i++) {
                expect(memcmp(rows.p + i * bytes, c.decoded.data() + size_t(ids[i]) * bytes, bytes) == 0,
                       "row " + number((u64)ids[i]) + " of " + number(row) + " words is wrong");
            }
        }
        for (i64 wrong : {i64(-1), i64(n / 64), i64(1) << 62, i64(u64(1) << 63)}) {
            if (n < 64) continue;
            Exact rows(3 * size_t(64) * c.head.word_bytes);
            expect(l.gather({0, wrong, wrong}, 64, rows) == 1, "row " + number((u64)wrong) + " is not refused");
        }
    }
}

static void damaged(const Case &c, std::mt19937_64 &random) {
    Buffer payload = c.payload;
    const u32 victim = u32(random() % c.head.n_blocks);
    const Block &b = c.blocks[victim];
    char *at = payload.data() + b.offset;
    switch (random() % 4) {
    case 0:  // a bit
        at[random() % b.length] ^= char(1 << random() % 8);
        break;
    case 1:  // everything
        for (u32 i = 0; i < b.length; i++) at[i] = (char)random();
        break;
    case 2:  // a stretch of ones: words that are all taken, patches that are anywhere
        memset(at + random() % b.length, 0xff, 1);
        memset(at + b.length / 2, 0xff, b.length - b.length / 2);
        break;
    default:  // and of zeros: states that are too small
        memset(at + 8, 0, b.length - 8);
        at[0] ^= 1;
    }
    const bool changed = payload != c.payload;
    const u32 log = c.head.n_fields == 1 ? u32(random() % 4) : 0;
    Loaded l(c, log == 1 ? 0 : log, payload);
    const u32 found = l.verify();
    if (b.verify) expect(found == (changed ? victim : 0xffffffff), "verify says " + number(found) + ", not " + number(victim));
    if (l.log) {
        l.restart();
        if (random() % 2) {
            for (size_t i = 0; i < l.restarts.n; i++) l.restarts.p[i] = (char)random();
        }
    }
    const u32 told = l.decode();
    expect(told == 0xffffffff || told / kWarps < c.quads(l.log), "an impossible status");
    if (l.log && c.head.word_bytes > 1 && c.head.n_words >= 500) {
        Exact rows(size_t(500) * c.head.word_bytes);
        l.gather({i64(random() % (c.head.n_words / 500))}, 500, rows);
    }
}

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    std::mt19937_64 random(1);
    for (int a = 2; a < argc; a++) {
        where = argv[a];
        std::ifstream file(argv[a], std::ios::binary);
        u64 sizes[3] = {};
        file.read((char *)sizes, sizeof sizes);
        Case c;
        c.payload.resize(sizes[0]), c.program.resize(sizes[1]), c.decoded.resize(sizes[2]);
        file.read(c.payload.data(), (std::streamsize)sizes[0]);
        file.read(c.program.data(), (std::streamsize)sizes[1]);
        file.read(c.decoded.data(), (std::streamsize)sizes[2]);
        expect(bool(file) && sizes[1] >= sizeof(Program), "not a dump");
        memcpy(&c.head, c.program.data(), sizeof c.head);
        c.blocks.resize(c.head.n_blocks);
        memcpy(c.blocks.data(), c.program.data() + c.head.blocks, sizeof(Block) * c.head.n_blocks);
        expect(c.head.n_words * c.head.word_bytes == sizes[2], "the program is of another tensor");
        emu::seed = u64(a);
        good(c, random);
        for (int i = 0; i < atoi(argv[1]); i++) damaged(c, random);
    }
    return 0;
}
