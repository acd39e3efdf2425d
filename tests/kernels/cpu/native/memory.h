// Memory between two pages that nobody may touch: an access one byte outside it ends the process.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace harness {

// Which end of the memory lies against its guard page.
enum class Flush { kStart, kEnd };

constexpr unsigned char kUnwritten = 0xFF;  // a NaN in every floating-point type

// `bytes` bytes, filled with kUnwritten like the rest of their pages.
class Guarded {
  public:
    Guarded(size_t bytes, Flush flush) {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        pages_ = (bytes + page - 1) / page * page;
        mapped_ = pages_ + 2 * page;
        void* base = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED) fail("mmap");
        base_ = static_cast<char*>(base);
        begin_ = base_ + page;
        if (pages_ > 0 && mprotect(begin_, pages_, PROT_READ | PROT_WRITE) != 0) fail("mprotect");
        std::memset(begin_, kUnwritten, pages_);
        data_ = flush == Flush::kStart ? begin_ : begin_ + pages_ - bytes;
        bytes_ = bytes;
    }
    Guarded(Guarded&& other) noexcept { *this = static_cast<Guarded&&>(other); }
    Guarded& operator=(Guarded&& other) noexcept {
        std::swap(base_, other.base_);
        std::swap(begin_, other.begin_);
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        std::swap(pages_, other.pages_);
        std::swap(mapped_, other.mapped_);
        return *this;
    }
    ~Guarded() {
        if (base_) munmap(base_, mapped_);
    }

    char* data() const { return data_; }
    size_t bytes() const { return bytes_; }
    // Whether the rest of the pages is as it was.
    bool slack_is_unwritten() const {
        for (const char* p = begin_; p < begin_ + pages_; ++p)
            if ((p < data_ || p >= data_ + bytes_) && static_cast<unsigned char>(*p) != kUnwritten) return false;
        return true;
    }

  private:
    [[noreturn]] static void fail(const char* what) {
        std::perror(what);
        std::exit(3);
    }
    char *base_ = nullptr, *begin_ = nullptr, *data_ = nullptr;
    size_t bytes_ = 0, pages_ = 0, mapped_ = 0;
};

}  // namespace harness
