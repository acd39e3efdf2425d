// Random calls of the CPU kernels without Python: `make sanitize` builds this with AddressSanitizer and UBSan.
//
//     harness [--count N] [--seed FIRST] [--family NAME] [--once 1]
//
// Every case is a seed. Its tensors lie between guard pages, its results are filled with NaN before and compared with a
// definition in double after, on every instruction set that this machine runs and on 1, 2 and 3 threads, which must
// agree bit for bit; with --once 1 (shorter cases) on one set and one number of threads, in turn. A failure prints the
// command that repeats it alone.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "draw.h"
#include "families.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>

// Fresh memory of a workspace is NaN, so that a read of what was never written shows in the results.
extern "C" const char* __asan_default_options() { return "max_malloc_fill_size=1073741824:malloc_fill_byte=255"; }
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1"; }
#endif

namespace {

char repeat[128], running[1024];

void print_running() { std::fprintf(stderr, "\nharness: while running %s\n  repeat with: %s\n", running, repeat); }

void watch_crashes() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_set_death_callback(print_running);
#else
    const auto on_signal = [](int signal) {
        print_running();
        std::signal(signal, SIG_DFL);
        std::raise(signal);
    };
    for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) std::signal(signal, on_signal);
#endif
}

[[noreturn]] void usage(const char* program) {
    std::fprintf(stderr, "usage: %s [--count N] [--seed FIRST] [--once 1] [--family", program);
    for (const harness::Family& family : harness::kFamilies) std::fprintf(stderr, " %s", family.name);
    std::fprintf(stderr, "]\n");
    std::exit(2);
}

}  // namespace

int main(int argc, char** argv) {
    uint64_t count = 1000, seed = 0;
    const char* only = nullptr;
    bool once = false;
    for (int n = 1; n < argc; n += 2) {
        if (n + 1 == argc) usage(argv[0]);
        if (!std::strcmp(argv[n], "--count"))
            count = std::strtoull(argv[n + 1], nullptr, 10);
        else if (!std::strcmp(argv[n], "--seed"))
            seed = std::strtoull(argv[n + 1], nullptr, 10);
        else if (!std::strcmp(argv[n], "--family"))
            only = argv[n + 1];
        else if (!std::strcmp(argv[n], "--once"))
            once = std::strtoull(argv[n + 1], nullptr, 10) != 0;
        else
            usage(argv[0]);
    }
    watch_crashes();
    harness::short_cases = once;
    harness::Context context;
    context.now = [](const std::string& what) { std::snprintf(running, sizeof running, "%s", what.c_str()); };
    std::string names;
    for (const char* name : {INSTRUCTION_SETS}) {
        const efficient_attn::Kernels* kernels = efficient_attn::find_kernels(name);
        if (!kernels) continue;
        context.kernels.push_back(kernels);
        names += std::string(" ") + name;
    }
    const std::vector<const efficient_attn::Kernels*> every = context.kernels;
    bool ran = false;
    for (const harness::Family& family : harness::kFamilies) {
        if (only && std::strcmp(only, family.name)) continue;
        ran = true;
        context.calls = context.elements = 0, context.worst = 0;
        for (uint64_t n = seed; n < seed + count; ++n) {
            std::snprintf(repeat, sizeof repeat, "%s --family %s --seed %llu --count 1%s", argv[0], family.name,
                          static_cast<unsigned long long>(n), once ? " --once 1" : "");
            if (once) {
                context.kernels = {every[n % every.size()]};
                context.only = &harness::kRuns[n / every.size() % 3];
            }
            const std::string wrong = family.check(n, context);
            if ((n + 1 - seed) % 1000 == 0 && n + 1 - seed < count)
                std::fprintf(stderr, "%s: %llu of %llu\n", family.name, static_cast<unsigned long long>(n + 1 - seed),
                             static_cast<unsigned long long>(count));
            if (wrong.empty()) continue;
            std::fprintf(stderr, "harness: %s\n  repeat with: %s\n", wrong.c_str(), repeat);
            return 1;
        }
        std::printf("%s: %llu random cases, %lld calls on%s, %lld results compared, largest error %.2f of its bound\n",
                    family.name, static_cast<unsigned long long>(count), static_cast<long long>(context.calls),
                    names.c_str(), static_cast<long long>(context.elements), context.worst);
        std::fflush(stdout);
    }
    if (!ran) usage(argv[0]);
    return 0;
}
