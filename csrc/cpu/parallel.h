// Threads: the only header that knows them. One OpenMP pool, shared with whoever loaded libgomp first.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __unix__
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace fastattn::cpu {

// A forked child inherits the memory of OpenMP's pool but none of its threads, and would wait for them
// for ever. Children therefore run on the one thread they have.
inline bool& is_forked() {
  static bool forked = false;
#ifdef __unix__
  static const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked() = true; });
  (void)registered;
#endif
  return forked;
}

inline int num_threads() {  // what torch.set_num_threads says, when torch was imported first
#ifdef _OPENMP
  if (!is_forked()) return omp_get_max_threads();
#endif
  return 1;
}

// Whether the loop that this thread works in has failed in another thread.
inline thread_local const std::atomic<bool>* loop_failed = nullptr;
struct Stopped {};

// f(i) for every i in [0, n), by whichever thread is free: i is begun only after every smaller one was.
// The first exception stops the loop and is thrown again here.
template <class F>
void parallel_for(int64_t n, F& f) {
  if (n < 2 || num_threads() < 2) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
#pragma omp parallel num_threads(n < num_threads() ? static_cast<int>(n) : num_threads())
  {
    loop_failed = &failed;
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
      next = n;
    }
    loop_failed = nullptr;
  }
  if (error) std::rethrow_exception(error);
}

// What a thread does while it waits for another that is at work: a pause, and now and then its time slice.  What it
// waits for will not come from a loop that has failed.
inline void relax(int spins) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
  if (spins % 1024 != 1023) return;
  if (loop_failed && *loop_failed) throw Stopped{};
  std::this_thread::yield();
}

// Tests fill scratch memory with NaN, so that a read of what was never written shows.
inline std::atomic<bool> poison{false};

// This thread's buffer, aligned to 64 bytes: it stays, grows, and is the same one at every call.  Slot 1 is another, for
// who calls a parallel loop and shares it with the tasks, which have slot 0.
template <int Slot = 0>
void* scratch(size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t bytes = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer own;
  if (own.bytes < bytes) {
    std::free(own.data);
    own.bytes = 0;
    own.data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!own.data) throw std::bad_alloc();
    own.bytes = bytes;
  }
  if (poison.load(std::memory_order_relaxed)) std::memset(own.data, 0xff, own.bytes);
  return own.data;
}

// A large output that is about to be written for the first time: in pages of 2 MB it takes 500 times fewer faults.
inline void expect_writes([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page,
                  end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fastattn::cpu
