// A libcuda.so.1 for machines without a GPU: the driver's functions that bigsmall calls, over memory of the host. Kernels
// run as C++ by emu.h. It keeps to what the driver's manual allows, not to what drivers mostly do:
//
//   - Copies and launches are queued. When they run is chosen by FAKECUDA_ORDER:
//       late    (the default) when somebody waits for them, and then only what he must have waited for
//       early   at once
//       random  some of them whenever any function is called
//       thread  as a thread gets to them, with pauses
//   - Memory is poison until written. Behind and in front of every piece are guards: a page that faults, and up to it
//     bytes that are looked at when the piece is freed. Device memory faults when the host touches it. No address is used
//     twice.
//   - What a queued copy names must still be allocated, and page-locked, when it runs. Pageable memory is read at the call.
//   - Handles belong to their context. Functions fail without a current context, and in a child of fork().
//
// What a caller does wrong goes to standard error and is counted: fakecuda_faults().
//
//   FAKECUDA_DEVICES  number of devices (1); with 0 cuInit says so
//   FAKECUDA_CC       compute capability, such as 86 (90)
//   FAKECUDA_DRIVER   CUDA version, such as 11040 (12040); newer PTX is refused
//   FAKECUDA_MEMORY   bytes of a device (1 GiB)
//   FAKECUDA_SEED     of all that is random (1)
//   FAKECUDA_FAIL     name:n[:error]: the n-th call of that function, from 1, fails with that error (2, out of memory).
//                     The name "kernel" means the n-th launch, while it runs (700, an illegal address); from then on
//                     everything fails. Several with commas; more by fakecuda_fail().
//   FAKECUDA_FLIP     hexadecimal bytes: in the first copy to the device that has them, the lowest bit of the last of them is
//                     turned on its way. More by fakecuda_flip().
#include "emu.h"

#include <dlfcn.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>

namespace device {
#include "../../codecs/gpu/kernel.cu"
}

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fake {

enum Result {
    kSuccess = 0,
    kInvalidValue = 1,
    kOutOfMemory = 2,
    kNotInitialized = 3,
    kNoDevice = 100,
    kInvalidDevice = 101,
    kInvalidContext = 201,
    kNoBinary = 209,
    kInvalidPtx = 218,
    kUnsupportedPtx = 222,
    kInvalidHandle = 400,
    kNotFound = 500,
    kNotReady = 600,
    kIllegalAddress = 700,
    kLaunchOutOfResources = 701,
    kAlreadyRegistered = 712,
    kNotRegistered = 713,
};

struct ErrorText {
    int code;
    const char *name, *text;
};
const ErrorText kErrors[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

constexpr size_t kPage = 4096, kAlign = 256;
constexpr unsigned char kFresh = 0xdb, kCanary = 0xc7;

long number(const char *variable, long otherwise) {
    const char *text = getenv(variable);
    return text && *text ? strtol(text, nullptr, 10) : otherwise;
}

struct Context;
struct Stream;

struct Op {
    uint64_t at;  // place in the order of the calls
    Context *context;
    std::function<int()> run;
    std::vector<std::shared_ptr<Op>> after;  // older ones
    bool done = false;
};
using OpPtr = std::shared_ptr<Op>;

struct Context {
    int device = 0;
    bool alive = true;
    Stream *legacy = nullptr;  // the default stream
};
struct Stream {
    Context *context;
    bool blocking;  // waits for the default stream, and that for it
    bool made;      // by cuStreamCreate
    bool alive = true;
    OpPtr last = {};
    std::vector<OpPtr> waits = {};  // what the next one comes after, beside the last
};
struct Event {
    Context *context;
    bool alive = true;
    OpPtr op = {};
    int asked = 0;
};
struct Kernel {
    std::vector<size_t> sizes;  // of its arguments
    std::function<void(const std::vector<std::vector<char>> &)> call;
};
struct Function {
    Context *context;
    bool alive = true;
    std::string name;
    const Kernel *kernel;
    unsigned most_threads;
};
struct Module {
    Context *context;
    bool alive = true;
    std::string ptx;
    std::map<std::string, Function *> functions = {};
};
struct Memory {
    size_t bytes;
    char *pages;
    size_t n_pages;  // bytes of them, without the guards
    Context *context;
};

// Everything below is guarded by this one.
std::recursive_mutex lock;

pid_t process = 0;  // that called cuInit
int sticky = 0;     // an error of the device that everything reports from then on
uint64_t rng = 0;
uint64_t calls_so_far = 0;
std::map<std::string, unsigned long> calls;
std::map<uint64_t, OpPtr> queue;  // by Op::at
std::map<uint64_t, Memory> device_memory, host_memory;
std::map<uint64_t, size_t> registered;
std::set<Context *> contexts;
std::set<Stream *> streams;
std::set<Event *> events;
std::set<Module *> modules;
size_t device_bytes = 0;
unsigned long launched = 0, pageable = 0;
std::vector<std::string> faults;
Context *primary[16];
thread_local std::vector<Context *> current;
// Streams "per thread": one for each thread of the host.
thread_local std::map<Context *, Stream *> of_thread;

uint32_t draw() {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return uint32_t(rng >> 32);
}

__attribute__((format(printf, 1, 2))) void fault(const char *format, ...) {
    char text[400];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    fprintf(stderr, "fakecuda: %s\n", text);
    faults.push_back(text);
}

// ---- kernels ----

template <class... A, size_t... I>
void call(void (*f)(A...), const std::vector<std::vector<char>> &arguments, std::index_sequence<I...>) {
    std::tuple<A...> values;
    (memcpy((void *)&std::get<I>(values), arguments[I].data(), sizeof(A)), ...);
    std::apply(f, values);
}
template <class... A>
Kernel kernel(void (*f)(A...)) {
    return {{sizeof(A)...}, [f](const std::vector<std::vector<char>> &arguments) {
                call(f, arguments, std::index_sequence_for<A...>());
            }};
}

const std::map<std::string, Kernel> &kernels() {
    static const std::map<std::string, Kernel> all = {
        {"bs_decode8", kernel(device::bs_decode8)}, {"bs_decode16", kernel(device::bs_decode16)}, {"bs_decode32", kernel(device::bs_decode32)},
        {"bs_restart", kernel(device::bs_restart)}, {"bs_verify", kernel(device::bs_verify)},     {"bs_gather", kernel(device::bs_gather)},
    };
    return all;
}

// ---- the queue ----

// While one is there, device memory can be reached.
struct OnDevice {
    static inline int depth = 0;
    OnDevice() {
        if (depth++ == 0) protect(PROT_READ | PROT_WRITE);
    }
    ~OnDevice() {
        if (--depth == 0) protect(PROT_NONE);
    }
    static void protect(int how) {
        for (auto &[address, m] : device_memory) mprotect(m.pages, m.n_pages, how);
    }
};

// Runs what stands in the queue, in order, as far as `op` comes after it.
void demand(const OpPtr &op) {
    if (!op || op->done) return;
    std::map<uint64_t, OpPtr> needed;
    std::vector<OpPtr> open = {op};
    while (!open.empty()) {
        const OpPtr one = open.back();
        open.pop_back();
        if (one->done || !needed.emplace(one->at, one).second) continue;
        open.insert(open.end(), one->after.begin(), one->after.end());
    }
    for (auto &[at, one] : needed) {
        if (!sticky) {
            const OnDevice here;
            sticky = one->run();
        }
        one->done = true;
        one->run = nullptr;
        one->after.clear();
        queue.erase(at);
    }
}

void demand_any() {
    if (queue.empty()) return;
    auto i = queue.begin();
    std::advance(i, draw() % std::min<size_t>(queue.size(), 64));
    demand(OpPtr(i->second));
}

enum Order { kLate, kEarly, kRandom, kThread } order = kLate;

void enqueue(Stream *s, std::function<int()> run) {
    auto op = std::make_shared<Op>();
    op->at = calls_so_far++;
    op->context = s->context;
    op->run = std::move(run);
    op->after = std::move(s->waits);
    s->waits.clear();
    if (s->last) op->after.push_back(s->last);
    Stream *legacy = s->context->legacy;
    if (s == legacy) {
        for (Stream *other : streams) {
            if (other->context == s->context && other->blocking && other->last) op->after.push_back(other->last);
        }
    } else if (s->blocking && legacy->last) {
        op->after.push_back(legacy->last);
    }
    op->after.erase(std::remove_if(op->after.begin(), op->after.end(), [](const OpPtr &o) { return o->done; }),
                    op->after.end());
    s->last = op;
    queue[op->at] = op;
    if (order == kEarly) demand(op);
}

bool ending = false;

void work() {
    for (;;) {
        unsigned pause;
        {
            const std::lock_guard<std::recursive_mutex> guard(lock);
            if (ending) return;
            demand_any();
            pause = draw() % 300;
        }
        usleep(pause);
    }
}

// ---- calls ----

struct Failure {
    unsigned long n;
    int error;
};
std::multimap<std::string, Failure> failures;
std::vector<unsigned char> flip;
bool flipped = false;

void add_failures(const std::string &list, bool from_now) {
    for (size_t at = 0; at < list.size();) {
        const size_t end = std::min(list.find(',', at), list.size());
        char name[64];
        Failure f = {0, -1};
        if (sscanf(list.substr(at, end - at).c_str(), "%63[^:]:%lu:%d", name, &f.n, &f.error) < 2) {
            fault("%s is not name:n[:error]", list.c_str());
            return;
        }
        const bool runs = strcmp(name, "kernel") == 0;
        if (f.error < 0) f.error = runs ? kIllegalAddress : kOutOfMemory;
        if (from_now) f.n += runs ? launched : calls[name];
        failures.emplace(name, f);
        at = end + 1;
    }
}

void read_environment() {
    rng = uint64_t(number("FAKECUDA_SEED", 1)) * 0x9e3779b97f4a7c15 | 1;
    emu::seed = uint64_t(number("FAKECUDA_SEED", 1));
    const char *text = getenv("FAKECUDA_ORDER");
    const std::string how = text ? text : "";
    order = how == "early" ? kEarly : how == "random" ? kRandom : how == "thread" ? kThread : kLate;
    if (order == kLate && !how.empty() && how != "late") fault("FAKECUDA_ORDER=%s is no order", how.c_str());
    const char *fail = getenv("FAKECUDA_FAIL");
    if (fail) add_failures(fail, false);
    const char *bytes = getenv("FAKECUDA_FLIP");
    unsigned byte;
    for (; bytes && sscanf(bytes, "%2x", &byte) == 1; bytes += 2) flip.push_back((unsigned char)byte);
}

int injected(const std::string &name, unsigned long n) {
    const auto [from, to] = failures.equal_range(name);
    for (auto i = from; i != to; i++) {
        if (i->second.n == n) return i->second.error;
    }
    return 0;
}

enum Needs { kNothing, kInit, kContext, kCurrent };  // kCurrent: a context that works

// What every function begins with. Holds the lock from here on.
struct Call {
    std::lock_guard<std::recursive_mutex> guard{lock};
    int error = 0;
    Context *context = nullptr;

    Call(const char *name, Needs needs) {
        const unsigned long n = ++calls[name];
        error = injected(name, n);
        if (error || needs == kNothing) return;
        if (process != getpid()) {
            error = kNotInitialized;
            return;
        }
        if (order == kRandom) {
            for (unsigned k = draw() % 4; k > 0; k--) demand_any();
        }
        if (needs >= kContext) {
            context = current.empty() ? nullptr : current.back();
            if (!context || !context->alive) error = kInvalidContext;
            else if (needs == kCurrent) error = sticky;
        }
    }
};

#define BEGIN(needs)                 \
    const Call call(__func__, needs); \
    if (call.error) return call.error

// What a call finds under a handle. Objects are not deleted, so that handles out of date are known for what they are.
template <class T>
int check(const Call &call, const std::set<T *> &all, T *handle, const char *what) {
    if (!all.count(handle)) {
        fault("%p is no %s", (void *)handle, what);
        return kInvalidHandle;
    }
    if (!handle->alive) {
        fault("a %s is used after its end", what);
        return kInvalidHandle;
    }
    if (handle->context != call.context) {
        fault("a %s of another context is used", what);
        return kInvalidHandle;
    }
    return 0;
}

int stream(const Call &call, Stream *&s) {
    if ((uintptr_t)s <= 1) {  // NULL, CU_STREAM_LEGACY
        s = call.context->legacy;
        return 0;
    }
    if ((uintptr_t)s == 2) {  // CU_STREAM_PER_THREAD
        Stream *&own = of_thread[call.context];
        if (!own) own = new Stream{call.context, true, false}, streams.insert(own);
        s = own;
        return 0;
    }
    return check(call, streams, s, "stream");
}

Context *new_context(int device) {
    auto *c = new Context;
    c->device = device;
    c->legacy = new Stream{c, false, false};
    contexts.insert(c);
    return c;
}

// ---- memory ----

char *pages(size_t bytes, int protection) {
    char *p = (char *)mmap(nullptr, bytes + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    mprotect(p + kPage, bytes, protection);
    return p + kPage;
}

// As near to the end of its pages as the alignment allows.
uint64_t allocate(std::map<uint64_t, Memory> &all, size_t bytes, Context *context) {
    const size_t room = (bytes + kAlign - 1) / kAlign * kAlign, n_pages = (room + kPage - 1) / kPage * kPage;
    char *p = pages(n_pages, PROT_READ | PROT_WRITE);
    if (!p) return 0;
    char *start = p + n_pages - room;
    memset(p, kCanary, n_pages);
    memset(start, kFresh, bytes);
    if (&all == &device_memory && OnDevice::depth == 0) mprotect(p, n_pages, PROT_NONE);
    all[(uint64_t)start] = {bytes, p, n_pages, context};
    return (uint64_t)start;
}

int release(std::map<uint64_t, Memory> &all, uint64_t address, const char *what) {
    const auto i = all.find(address);
    if (i == all.end()) {
        fault("%s memory is freed that is not allocated: %#llx", what, (unsigned long long)address);
        return kInvalidValue;
    }
    const Memory m = i->second;
    mprotect(m.pages, m.n_pages, PROT_READ | PROT_WRITE);
    const char *start = (const char *)address;
    for (const char *p = m.pages; p < m.pages + m.n_pages; p++) {
        if (p == start) p += m.bytes;
        if (p < m.pages + m.n_pages && (unsigned char)*p != kCanary) {
            fault("somebody wrote %td bytes from the start of %s memory of %zu bytes", p - start, what, m.bytes);
            break;
        }
    }
    madvise(m.pages, m.n_pages, MADV_DONTNEED);
    mprotect(m.pages, m.n_pages, PROT_NONE);  // and stays so: no address is used twice
    all.erase(i);
    return 0;
}

template <class T>
size_t size_of(const T &v) {
    if constexpr (std::is_same_v<T, Memory>) return v.bytes;
    else return v;
}
template <class T>
auto holding(const std::map<uint64_t, T> &all, uint64_t address, size_t bytes) {
    auto i = all.upper_bound(address);
    if (i == all.begin()) return all.end();
    --i;
    return address - i->first <= size_of(i->second) && bytes <= size_of(i->second) - (address - i->first) ? i : all.end();
}

bool on_device(uint64_t address, size_t bytes) { return holding(device_memory, address, bytes) != device_memory.end(); }
bool page_locked(uint64_t address, size_t bytes) {
    return holding(host_memory, address, bytes) != host_memory.end() ||
           holding(registered, address, bytes) != registered.end();
}

int still(bool is, const char *what, uint64_t address, size_t bytes) {
    if (is) return 0;
    fault("a copy runs when its %s is no longer there: %zu bytes from %#llx", what, bytes, (unsigned long long)address);
    return kIllegalAddress;
}

void damage(char *bytes, size_t n) {
    if (flip.empty()) return;
    char *found = (char *)memmem(bytes, n, flip.data(), flip.size());
    if (!found) return;
    found[flip.size() - 1] ^= 1;
    flip.clear();
    flipped = true;
}

int to_device(Stream *s, uint64_t dst, const void *src, size_t n) {
    if (n == 0) return 0;
    if (!src || !on_device(dst, n)) return kInvalidValue;
    if (page_locked((uint64_t)src, n)) {
        enqueue(s, [=] {
            if (int e = still(on_device(dst, n), "device memory", dst, n)) return e;
            if (int e = still(page_locked((uint64_t)src, n), "page-locked memory", (uint64_t)src, n)) return e;
            memcpy((void *)dst, src, n);
            damage((char *)dst, n);
            return 0;
        });
        return 0;
    }
    pageable++;
    auto copy = std::make_shared<std::vector<char>>((const char *)src, (const char *)src + n);
    enqueue(s, [=] {
        if (int e = still(on_device(dst, n), "device memory", dst, n)) return e;
        memcpy((void *)dst, copy->data(), n);
        damage((char *)dst, n);
        return 0;
    });
    return 0;
}

int to_host(Stream *s, void *dst, uint64_t src, size_t n) {
    if (n == 0) return 0;
    if (!dst || !on_device(src, n)) return kInvalidValue;
    const bool locked = page_locked((uint64_t)dst, n);
    enqueue(s, [=] {
        if (int e = still(on_device(src, n), "device memory", src, n)) return e;
        if (locked) {
            if (int e = still(page_locked((uint64_t)dst, n), "page-locked memory", (uint64_t)dst, n)) return e;
        }
        memcpy(dst, (const void *)src, n);
        return 0;
    });
    if (!locked) {
        pageable++;
        demand(s->last);
    }
    return sticky;
}

// ---- PTX ----

// The newest PTX, times ten, that a driver takes.
int newest_ptx(int driver) {
    static const int table[][2] = {{13020, 92}, {13010, 91}, {13000, 90}, {12090, 88}, {12080, 87}, {12070, 86},
                                   {12050, 85}, {12040, 84}, {12030, 83}, {12020, 82}, {12010, 81}, {12000, 80},
                                   {11080, 78}, {11070, 77}, {11060, 76}, {11050, 75}, {11040, 74}, {11030, 73},
                                   {11020, 72}, {11010, 71}, {11000, 70}, {10020, 65}, {10010, 64}, {10000, 63},
                                   {9020, 62},  {9010, 61},  {9000, 60}};
    for (const auto &row : table) {
        if (driver >= row[0]) return row[1];
    }
    return 50;
}

// Sizes of the arguments of an entry, or false where there is none of that name.
bool entry(const std::string &ptx, const std::string &name, std::vector<size_t> &sizes, unsigned &most_threads) {
    size_t at = ptx.find(".entry " + name + "(");
    if (at == std::string::npos) return false;
    const size_t end = ptx.find(')', at), body = ptx.find('{', end);
    for (at = ptx.find(".param ", at); at < end; at = ptx.find(".param ", at + 1)) {
        size_t bits = 0;
        char kind;
        if (sscanf(ptx.c_str() + at, ".param .%c%zu", &kind, &bits) != 2) {
            fault("%s has an argument of a kind unknown here", name.c_str());
        }
        sizes.push_back(bits / 8);
    }
    most_threads = 1024;
    for (const char *limit : {".maxntid ", ".reqntid "}) {
        const size_t found = ptx.find(limit, end);
        if (found < body) most_threads = (unsigned)strtoul(ptx.c_str() + found + strlen(limit), nullptr, 10);
    }
    return true;
}

int load(const Call &call, Module **module, const void *image, char *log, size_t log_bytes) {
    if (!module || !image) return kInvalidValue;
    const std::string ptx = (const char *)image;
    const auto refuse = [&](int error, const std::string &text) {
        if (log && log_bytes) snprintf(log, log_bytes, "%s", text.c_str());
        return error;
    };
    const size_t version = ptx.find(".version "), target = ptx.find(".target sm_");
    int major = 0, minor = 0;
    if (version == std::string::npos || target == std::string::npos ||
        sscanf(ptx.c_str() + version, ".version %d.%d", &major, &minor) != 2) {
        return refuse(kInvalidPtx, "ptxas fatal: no .version and .target");
    }
    const int newest = newest_ptx((int)number("FAKECUDA_DRIVER", 12040));
    if (major * 10 + minor > newest) {
        return refuse(kUnsupportedPtx, "ptxas fatal: Unsupported .version " + std::to_string(major) + "." +
                                           std::to_string(minor) + "; current version is '" +
                                           std::to_string(newest / 10) + "." + std::to_string(newest % 10) + "'");
    }
    if (strtol(ptx.c_str() + target + strlen(".target sm_"), nullptr, 10) > number("FAKECUDA_CC", 90)) {
        return refuse(kNoBinary, "the .target is newer than the device");
    }
    auto *m = new Module{call.context, true, ptx};
    modules.insert(m);
    *module = m;
    return 0;
}

std::vector<std::pair<size_t, const char *>> live() {
    const auto alive = [](const auto &all) {
        return (size_t)std::count_if(all.begin(), all.end(), [](const auto *one) { return one->alive; });
    };
    const auto made = [](const Stream *s) { return s->made && s->alive; };
    return {{alive(modules), "modules"},
            {(size_t)std::count_if(streams.begin(), streams.end(), made), "streams"},
            {alive(events), "events"},
            {device_memory.size(), "pieces of device memory"},
            {host_memory.size(), "pieces of page-locked memory"},
            {registered.size(), "registrations of memory"},
            {queue.size(), "operations not waited for"}};
}

}  // namespace fake

using namespace fake;
typedef uint64_t CUdeviceptr;

// ---- for tests ------------------------------------------------------------------------------------------------------

// Makes a context of that device and makes it current, as a caller of bigsmall does. Returns a CUresult.
EXPORT int fakecuda_context(int device);

// Number of calls of a function so far.
EXPORT unsigned long fakecuda_calls(const char *name) {
    const std::lock_guard<std::recursive_mutex> guard(lock);
    const auto i = calls.find(name);
    return i == calls.end() ? 0 : i->second;
}

// Number of copies whose memory of the host was not page-locked, and which therefore were not asynchronous.
EXPORT unsigned long fakecuda_pageable() {
    const std::lock_guard<std::recursive_mutex> guard(lock);
    return pageable;
}

// More of FAKECUDA_FAIL, calls counted from now on; "" takes all back.
EXPORT void fakecuda_fail(const char *list) {
    const std::lock_guard<std::recursive_mutex> guard(lock);
    if (*list) add_failures(list, true);
    else failures.clear();
}

// In the first copy to the device that has these bytes, the lowest bit of the last of them is turned.
EXPORT void fakecuda_flip(const void *bytes, size_t n) {
    const std::lock_guard<std::recursive_mutex> guard(lock);
    flip.assign((const unsigned char *)bytes, (const unsigned char *)bytes + n);
    flipped = false;
}

// Whether that has happened.
EXPORT int fakecuda_flipped() {
    const std::lock_guard<std::recursive_mutex> guard(lock);
    return flipped;
}

// What exists: "" if nothing does, else such as "1 modules, 2 streams". Contexts do not count. Valid until the next call.
EXPORT const char *fakecuda_report() {
    const std::lock_guard<std::recursive_mutex> guard(lock);
    static std::string text;
    text.clear();
    for (const auto &[count, what] : live()) {
        if (count) text += (text.empty() ? "" : ", ") + std::to_string(count) + " " + what;
    }
    return text.c_str();
}

// How many those are.
EXPORT unsigned long fakecuda_live() {
    const std::lock_guard<std::recursive_mutex> guard(lock);
    unsigned long n = 0;
    for (const auto &[count, what] : live()) n += count;
    return n;
}

// What was done wrong so far, a line each. Valid until the next call.
EXPORT const char *fakecuda_faults() {
    const std::lock_guard<std::recursive_mutex> guard(lock);
    static std::string text;
    text.clear();
    for (const auto &one : faults) text += one + "\n";
    return text.c_str();
}

// ---- the driver -----------------------------------------------------------------------------------------------------

EXPORT int cuInit(unsigned) {
    BEGIN(kNothing);
    if (number("FAKECUDA_DEVICES", 1) == 0) return kNoDevice;
    if (process == 0) {
        process = getpid();
        read_environment();
        if (order == kThread) {
            std::thread(work).detach();
            atexit([] {  // before all that it uses is destroyed
                const std::lock_guard<std::recursive_mutex> guard(lock);
                ending = true;
            });
        }
    }
    return process == getpid() ? kSuccess : kNotInitialized;
}

EXPORT int cuDriverGetVersion(int *version) {
    BEGIN(kNothing);
    if (!version) return kInvalidValue;
    *version = (int)number("FAKECUDA_DRIVER", 12040);
    return 0;
}

EXPORT int cuGetErrorName(int error, const char **text) {
    for (const auto &e : kErrors) {
        if (e.code == error) {
            *text = e.name;
            return 0;
        }
    }
    *text = nullptr;
    return kInvalidValue;
}

EXPORT int cuGetErrorString(int error, const char **text) {
    for (const auto &e : kErrors) {
        if (e.code == error) {
            *text = e.text;
            return 0;
        }
    }
    *text = nullptr;
    return kInvalidValue;
}

EXPORT int cuDeviceGetCount(int *count) {
    BEGIN(kInit);
    if (!count) return kInvalidValue;
    *count = (int)number("FAKECUDA_DEVICES", 1);
    return 0;
}

EXPORT int cuDeviceGet(int *device, int ordinal) {
    BEGIN(kInit);
    if (!device) return kInvalidValue;
    if (ordinal < 0 || ordinal >= number("FAKECUDA_DEVICES", 1)) return kInvalidDevice;
    *device = ordinal;
    return 0;
}

EXPORT int cuDeviceGetName(char *name, int room, int device) {
    BEGIN(kInit);
    if (device < 0 || device >= number("FAKECUDA_DEVICES", 1)) return kInvalidDevice;
    snprintf(name, (size_t)room, "fake device %d", device);
    return 0;
}

EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
    BEGIN(kInit);
    if (!value) return kInvalidValue;
    if (device < 0 || device >= number("FAKECUDA_DEVICES", 1)) return kInvalidDevice;
    switch (attribute) {
    case 1: *value = 1024; return 0;                                    // threads of a CTA
    case 5: *value = 2147483647; return 0;                              // CTAs of a grid
    case 10: *value = 32; return 0;                                     // lanes of a warp
    case 16: *value = 2; return 0;                                      // multiprocessors
    case 40: *value = 2; return 0;                                      // engines that copy
    case 41: *value = 1; return 0;                                      // unified addresses
    case 75: *value = (int)number("FAKECUDA_CC", 90) / 10; return 0;    // compute capability
    case 76: *value = (int)number("FAKECUDA_CC", 90) % 10; return 0;
    default: fault("the attribute %d of a device is unknown here", attribute); return kInvalidValue;
    }
}

EXPORT int cuCtxCreate_v2(Context **context, unsigned, int device) {
    BEGIN(kInit);
    if (!context) return kInvalidValue;
    if (device < 0 || device >= number("FAKECUDA_DEVICES", 1)) return kInvalidDevice;
    *context = new_context(device);
    current.push_back(*context);
    return 0;
}

EXPORT int cuCtxDestroy_v2(Context *context) {
    BEGIN(kInit);
    if (!contexts.count(context) || !context->alive) return kInvalidContext;
    for (auto i = queue.begin(); i != queue.end(); i = queue.begin()) demand(OpPtr(i->second));
    context->alive = false;
    if (!current.empty() && current.back() == context) current.pop_back();
    // What is in a context ends with it.
    for (Module *m : modules) m->alive = m->alive && m->context != context;
    for (Stream *s : streams) s->alive = s->alive && s->context != context;
    for (Event *e : events) e->alive = e->alive && e->context != context;
    return 0;
}

EXPORT int cuDevicePrimaryCtxRetain(Context **context, int device) {
    BEGIN(kInit);
    if (device < 0 || device >= std::min(16l, number("FAKECUDA_DEVICES", 1))) return kInvalidDevice;
    if (!primary[device]) primary[device] = new_context(device);
    *context = primary[device];
    return 0;
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
    BEGIN(kInit);
    return device < 0 || device >= 16 || !primary[device] ? kInvalidContext : kSuccess;
}

EXPORT int cuCtxGetCurrent(Context **context) {
    BEGIN(kInit);
    if (!context) return kInvalidValue;
    *context = current.empty() ? nullptr : current.back();
    return 0;
}

EXPORT int cuCtxSetCurrent(Context *context) {
    BEGIN(kInit);
    if (context && (!contexts.count(context) || !context->alive)) return kInvalidContext;
    if (!current.empty()) current.pop_back();
    if (context) current.push_back(context);
    return 0;
}

EXPORT int cuCtxPushCurrent_v2(Context *context) {
    BEGIN(kInit);
    if (!contexts.count(context) || !context->alive) return kInvalidContext;
    current.push_back(context);
    return 0;
}

EXPORT int cuCtxPopCurrent_v2(Context **context) {
    BEGIN(kInit);
    if (current.empty()) return kInvalidContext;
    if (context) *context = current.back();
    current.pop_back();
    return 0;
}

EXPORT int cuCtxGetDevice(int *device) {
    BEGIN(kContext);
    if (!device) return kInvalidValue;
    *device = call.context->device;
    return 0;
}

EXPORT int cuCtxSynchronize() {
    BEGIN(kCurrent);
    for (auto i = queue.begin(); i != queue.end(); i = queue.begin()) demand(OpPtr(i->second));
    return sticky;
}

EXPORT int cuModuleLoadData(Module **module, const void *image) {
    BEGIN(kCurrent);
    return load(call, module, image, nullptr, 0);
}

EXPORT int cuModuleLoadDataEx(Module **module, const void *image, unsigned n, const int *options, void **values) {
    BEGIN(kCurrent);
    char *log = nullptr;
    size_t log_bytes = 0;
    for (unsigned i = 0; i < n; i++) {
        if (options[i] == 5) log = (char *)values[i];                // CU_JIT_ERROR_LOG_BUFFER
        if (options[i] == 6) log_bytes = (size_t)(uintptr_t)values[i];  // and its size
    }
    return load(call, module, image, log, log_bytes);
}

EXPORT int cuModuleUnload(Module *module) {
    BEGIN(kCurrent);
    if (int e = check(call, modules, module, "module")) return e;
    module->alive = false;
    for (auto &[name, f] : module->functions) f->alive = false;
    return 0;
}

EXPORT int cuModuleGetFunction(Function **function, Module *module, const char *name) {
    BEGIN(kCurrent);
    if (int e = check(call, modules, module, "module")) return e;
    if (!function || !name) return kInvalidValue;
    std::vector<size_t> sizes;
    unsigned most_threads;
    if (!entry(module->ptx, name, sizes, most_threads)) return kNotFound;
    const auto k = kernels().find(name);
    if (k == kernels().end()) {
        fault("the PTX has a kernel %s, the fake driver lacks it", name);
        return kNotFound;
    }
    if (k->second.sizes != sizes) fault("%s has other arguments in the PTX than in kernel.cu", name);
    Function *&f = module->functions[name];
    if (!f) f = new Function{module->context, true, name, &k->second, most_threads};
    *function = f;
    return 0;
}

EXPORT int cuFuncSetAttribute(Function *function, int, int) {
    BEGIN(kCurrent);
    return function && function->alive ? kSuccess : kInvalidHandle;
}

EXPORT int cuFuncSetCacheConfig(Function *function, int) {
    BEGIN(kCurrent);
    return function && function->alive ? kSuccess : kInvalidHandle;
}

EXPORT int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    BEGIN(kCurrent);
    *total = (size_t)number("FAKECUDA_MEMORY", 1l << 30);
    *free_bytes = *total - device_bytes;
    return 0;
}

EXPORT int cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    BEGIN(kCurrent);
    if (!address || bytes == 0) return kInvalidValue;
    if (bytes > (size_t)number("FAKECUDA_MEMORY", 1l << 30) - device_bytes) return kOutOfMemory;
    const uint64_t p = allocate(device_memory, bytes, call.context);
    if (!p) return kOutOfMemory;
    device_bytes += bytes;
    *address = p;
    return 0;
}

EXPORT int cuMemFree_v2(CUdeviceptr address) {
    BEGIN(kCurrent);
    if (address == 0) return 0;
    const auto i = device_memory.find(address);
    const size_t bytes = i == device_memory.end() ? 0 : i->second.bytes;
    const int e = release(device_memory, address, "device");
    device_bytes -= bytes;
    return e;
}

EXPORT int cuMemHostAlloc(void **address, size_t bytes, unsigned) {
    BEGIN(kCurrent);
    if (!address || bytes == 0) return kInvalidValue;
    const uint64_t p = allocate(host_memory, bytes, call.context);
    if (!p) return kOutOfMemory;
    *address = (void *)p;
    return 0;
}

EXPORT int cuMemFreeHost(void *address) {
    BEGIN(kCurrent);
    return release(host_memory, (uint64_t)address, "page-locked");
}

EXPORT int cuMemHostRegister_v2(void *address, size_t bytes, unsigned) {
    BEGIN(kCurrent);
    if (!address || bytes == 0) return kInvalidValue;
    const uint64_t from = (uint64_t)address;
    for (const auto &[start, n] : registered) {
        if (from < start + n && start < from + bytes) return kAlreadyRegistered;
    }
    for (const auto &[start, m] : host_memory) {
        if (from < start + m.bytes && start < from + bytes) return kAlreadyRegistered;
    }
    registered[from] = bytes;
    return 0;
}

EXPORT int cuMemHostUnregister(void *address) {
    BEGIN(kCurrent);
    return registered.erase((uint64_t)address) ? kSuccess : kNotRegistered;
}

EXPORT int cuPointerGetAttribute(void *value, int attribute, CUdeviceptr address) {
    BEGIN(kInit);
    const auto d = holding(device_memory, address, 1);
    const auto h = holding(host_memory, address, 1);
    const auto r = holding(registered, address, 1);
    const bool device = d != device_memory.end(), host = h != host_memory.end();
    if (!value || (!device && !host && r == registered.end())) return kInvalidValue;
    switch (attribute) {
    case 1: *(Context **)value = device ? d->second.context : host ? h->second.context : nullptr; return 0;
    case 2: *(unsigned *)value = device ? 2 : 1; return 0;  // CU_MEMORYTYPE_DEVICE, _HOST
    case 3: *(CUdeviceptr *)value = address; return 0;
    case 4:
        if (device) return kInvalidValue;
        *(void **)value = (void *)address;
        return 0;
    case 8: *(unsigned *)value = 0; return 0;  // managed
    case 9: *(int *)value = device ? d->second.context->device : 0; return 0;
    case 11: *(CUdeviceptr *)value = device ? d->first : host ? h->first : r->first; return 0;
    case 12: *(size_t *)value = device ? d->second.bytes : host ? h->second.bytes : r->second; return 0;
    default: fault("the attribute %d of a pointer is unknown here", attribute); return kInvalidValue;
    }
}

EXPORT int cuMemcpyHtoDAsync_v2(CUdeviceptr dst, const void *src, size_t n, Stream *s) {
    BEGIN(kCurrent);
    if (int e = stream(call, s)) return e;
    return to_device(s, dst, src, n);
}

EXPORT int cuMemcpyDtoHAsync_v2(void *dst, CUdeviceptr src, size_t n, Stream *s) {
    BEGIN(kCurrent);
    if (int e = stream(call, s)) return e;
    return to_host(s, dst, src, n);
}

EXPORT int cuMemcpyDtoDAsync_v2(CUdeviceptr dst, CUdeviceptr src, size_t n, Stream *s) {
    BEGIN(kCurrent);
    if (int e = stream(call, s)) return e;
    if (n == 0) return 0;
    if (!on_device(dst, n) || !on_device(src, n)) return kInvalidValue;
    enqueue(s, [=] {
        if (int e = still(on_device(dst, n), "device memory", dst, n)) return e;
        if (int e = still(on_device(src, n), "device memory", src, n)) return e;
        memcpy((void *)dst, (const void *)src, n);
        return 0;
    });
    return 0;
}

// The synchronous ones are of the default stream.
EXPORT int cuMemcpyHtoD_v2(CUdeviceptr dst, const void *src, size_t n) {
    BEGIN(kCurrent);
    if (int e = to_device(call.context->legacy, dst, src, n)) return e;
    demand(call.context->legacy->last);
    return sticky;
}

EXPORT int cuMemcpyDtoH_v2(void *dst, CUdeviceptr src, size_t n) {
    BEGIN(kCurrent);
    if (int e = to_host(call.context->legacy, dst, src, n)) return e;
    demand(call.context->legacy->last);
    return sticky;
}

template <class T>
static int fill(Stream *s, CUdeviceptr dst, T value, size_t n) {
    if (n == 0) return 0;
    if (dst % sizeof(T) || !on_device(dst, n * sizeof(T))) return kInvalidValue;
    enqueue(s, [=] {
        if (int e = still(on_device(dst, n * sizeof(T)), "device memory", dst, n * sizeof(T))) return e;
        std::fill_n((T *)dst, n, value);
        return 0;
    });
    return 0;
}

EXPORT int cuMemsetD32Async(CUdeviceptr dst, unsigned value, size_t n, Stream *s) {
    BEGIN(kCurrent);
    if (int e = stream(call, s)) return e;
    return fill(s, dst, value, n);
}

EXPORT int cuMemsetD8Async(CUdeviceptr dst, unsigned char value, size_t n, Stream *s) {
    BEGIN(kCurrent);
    if (int e = stream(call, s)) return e;
    return fill(s, dst, value, n);
}

EXPORT int cuStreamCreate(Stream **s, unsigned flags) {
    BEGIN(kCurrent);
    if (!s || flags > 1) return kInvalidValue;
    *s = new Stream{call.context, flags == 0, true};  // CU_STREAM_NON_BLOCKING is 1
    streams.insert(*s);
    return 0;
}

EXPORT int cuStreamDestroy_v2(Stream *s) {
    BEGIN(kCurrent);
    if (int e = check(call, streams, s, "stream")) return e;
    s->alive = false;
    return 0;
}

EXPORT int cuStreamGetCtx(Stream *s, Context **context) {
    BEGIN(kCurrent);
    if (int e = stream(call, s)) return e;
    *context = s->context;
    return 0;
}

EXPORT int cuStreamIsCapturing(Stream *s, int *status) {
    BEGIN(kCurrent);
    if (int e = stream(call, s)) return e;
    *status = 0;
    return 0;
}

// Comes after all that is in a stream, as it is now.
static void meet_default_stream(Stream *s) {
    if (s->context->legacy == s || s->blocking) enqueue(s, [] { return 0; });
}

EXPORT int cuStreamSynchronize(Stream *s) {
    BEGIN(kCurrent);
    if (int e = stream(call, s)) return e;
    meet_default_stream(s);
    for (const OpPtr &op : s->waits) demand(op);
    demand(s->last);
    return sticky;
}

EXPORT int cuStreamQuery(Stream *s) {
    BEGIN(kCurrent);
    if (int e = stream(call, s)) return e;
    if (s->last && !s->last->done && draw() % 4 == 0) demand(s->last);
    return s->last && !s->last->done ? (int)kNotReady : sticky;
}

EXPORT int cuStreamWaitEvent(Stream *s, Event *event, unsigned) {
    BEGIN(kCurrent);
    if (int e = stream(call, s)) return e;
    if (int e = check(call, events, event, "event")) return e;
    if (event->op && !event->op->done) s->waits.push_back(event->op);
    return 0;
}

EXPORT int cuEventCreate(Event **event, unsigned) {
    BEGIN(kCurrent);
    if (!event) return kInvalidValue;
    *event = new Event{call.context};
    events.insert(*event);
    return 0;
}

EXPORT int cuEventRecord(Event *event, Stream *s) {
    BEGIN(kCurrent);
    if (int e = stream(call, s)) return e;
    if (int e = check(call, events, event, "event")) return e;
    enqueue(s, [] { return 0; });
    event->op = s->last;
    return 0;
}

EXPORT int cuEventQuery(Event *event) {
    BEGIN(kCurrent);
    if (int e = check(call, events, event, "event")) return e;
    if (!event->op || event->op->done) return sticky;
    if (++event->asked % 4 == 0) demand(event->op);
    return event->op->done ? sticky : (int)kNotReady;
}

EXPORT int cuEventSynchronize(Event *event) {
    BEGIN(kCurrent);
    if (int e = check(call, events, event, "event")) return e;
    demand(event->op);
    return sticky;
}

EXPORT int cuEventDestroy_v2(Event *event) {
    BEGIN(kCurrent);
    if (int e = check(call, events, event, "event")) return e;
    event->alive = false;
    return 0;
}

EXPORT int cuLaunchKernel(Function *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared_bytes, Stream *s, void **arguments, void **extra) {
    BEGIN(kCurrent);
    if (int e = stream(call, s)) return e;
    if (!function) return kInvalidHandle;
    if (!function->alive || function->context != call.context) {
        fault("a function is launched whose module is %s", function->alive ? "of another context" : "unloaded");
        return kInvalidHandle;
    }
    const emu::Dim grid = {gx, gy, gz}, block = {bx, by, bz};
    if (grid.count() == 0 || block.count() == 0 || gx > 2147483647 || gy > 65535 || gz > 65535 || extra || shared_bytes ||
        (!arguments && !function->kernel->sizes.empty())) {
        return kInvalidValue;
    }
    if (block.count() > function->most_threads) return kLaunchOutOfResources;
    std::vector<std::vector<char>> values;
    for (size_t i = 0; i < function->kernel->sizes.size(); i++) {
        const char *from = (const char *)arguments[i];
        values.emplace_back(from, from + function->kernel->sizes[i]);
    }
    const unsigned long n = ++launched;
    const std::string name = function->name;
    const Kernel *kernel = function->kernel;
    enqueue(s, [=] {
        if (const int e = injected("kernel", n)) return e;
        emu::launch(name.c_str(), grid, block, [&] { kernel->call(values); });
        return 0;
    });
    return 0;
}

EXPORT int fakecuda_context(int device) {
    if (int e = cuInit(0)) return e;
    Context *context;
    return cuCtxCreate_v2(&context, 0, device);
}
