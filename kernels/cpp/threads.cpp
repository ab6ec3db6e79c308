// The pool of threads.h: one a process, its helpers started when they are first needed.
#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

// An interval of items begin..end-1 of the loop number `epoch`, in one word: a thread that is late
// by any number of loops cannot take an item of another one.
constexpr int INDEX_BITS = 20, EPOCH_BITS = 24;
constexpr uint64_t INDEX = (1u << INDEX_BITS) - 1, EPOCH = (1u << EPOCH_BITS) - 1;

inline uint64_t interval(uint64_t epoch, uint64_t begin, uint64_t end) {
  return (epoch & EPOCH) << (2 * INDEX_BITS) | begin << INDEX_BITS | end;
}

struct alignas(64) Slot {
  std::atomic<uint64_t> held{0};
};

constexpr auto LOOKS_FOR = std::chrono::microseconds(100);
constexpr int LOOKS = 64;  // between two readings of the clock
// The caller waits so long for items that others have in hand, and as long as it has worked in this
// loop itself (an item of a large matrix takes long, and no thread is to blame for it), before it
// says that their threads were taken off their cores. It then runs so many loops alone, at first and
// at most: twice as many each time, and half as many once so many in turn have not had to wait.
constexpr auto PATIENCE = std::chrono::microseconds(50);
constexpr int ALONE = 64, LONGEST_ALONE = 16384, TRUSTED = 1024;

inline void rest() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Pool {
  std::mutex turn;  // of who runs a loop
  Slot slots[MOST_THREADS];
  alignas(64) std::atomic<uint64_t> epoch{0};
  std::atomic<Items> items{nullptr};
  std::atomic<void*> context{nullptr};
  std::atomic<int> members{1};
  std::atomic<int64_t> step{1};
  alignas(64) std::atomic<int64_t> left{0};
  alignas(64) std::atomic<int> asleep{0};
  std::mutex bed;
  std::condition_variable alarm;
  int helpers = 0;
  int alone = 0, next_alone = ALONE, good = 0;  // loops; of who has the turn

  // Takes up to `step` items of slot `of`; from the front if it is the thread's own.
  bool take(int of, bool own, uint64_t now, int64_t most, int64_t* begin, int64_t* end) {
    std::atomic<uint64_t>& slot = slots[of].held;
    uint64_t held = slot.load(std::memory_order_acquire);
    for (;;) {
      const int64_t first = held >> INDEX_BITS & INDEX, last = held & INDEX;
      if (held >> (2 * INDEX_BITS) != (now & EPOCH) || first >= last) return false;
      const int64_t count = last - first < most ? last - first : most;
      *begin = own ? first : last - count;
      *end = *begin + count;
      const uint64_t rest = own ? interval(now, *end, last) : interval(now, first, *begin);
      if (slot.compare_exchange_weak(held, rest, std::memory_order_acq_rel)) return true;
    }
  }

  void work(int me, uint64_t now) {
    // Of this loop if an item of it can be taken below: they change only when all are done.
    const Items call = items.load(std::memory_order_relaxed);
    void* const with = context.load(std::memory_order_relaxed);
    const int all = members.load(std::memory_order_relaxed);
    const int64_t most = step.load(std::memory_order_relaxed);
    if (me >= all) return;
    for (int other = 0; other < all; other++) {
      int64_t begin, end;
      while (take((me + other) % all, other == 0, now, most, &begin, &end)) {
        call(with, begin, end);
        left.fetch_sub(end - begin, std::memory_order_acq_rel);
      }
    }
  }

  void help(int me) {
    uint64_t seen = 0;
    for (;;) {
      auto until = std::chrono::steady_clock::now() + LOOKS_FOR;
      uint64_t now;
      for (int look = 1; (now = epoch.load(std::memory_order_acquire)) == seen; look++) {
        rest();
        if (look % LOOKS || std::chrono::steady_clock::now() < until) continue;
        std::unique_lock<std::mutex> lock(bed);
        asleep.fetch_add(1);
        alarm.wait(lock, [&] { return epoch.load() != seen; });
        asleep.fetch_sub(1);
      }
      seen = now;
      work(me, now);
    }
  }

  // Helpers for so many threads; fewer where the system gives no more.
  int start(int threads) {
    while (helpers + 1 < threads) {
      try {
        std::thread([this, me = helpers + 1] { help(me); }).detach();
      } catch (const std::system_error&) {
        break;
      }
      helpers++;
    }
    return threads < helpers + 1 ? threads : helpers + 1;
  }

  void run(int threads, int64_t count, Items call, void* with) {
    if (alone > 0) {
      alone--;
      return call(with, 0, count);
    }
    threads = start(threads);
    const uint64_t now = epoch.load(std::memory_order_relaxed) + 1;
    items.store(call, std::memory_order_relaxed);
    context.store(with, std::memory_order_relaxed);
    members.store(threads, std::memory_order_relaxed);
    const int64_t part = count / threads / 8;
    step.store(part < 1 ? 1 : part, std::memory_order_relaxed);
    left.store(count, std::memory_order_relaxed);
    for (int t = 0; t < threads; t++)
      slots[t].held.store(interval(now, count * t / threads, count * (t + 1) / threads),
                          std::memory_order_release);
    epoch.store(now);
    if (asleep.load() > 0) {
      { std::lock_guard<std::mutex> lock(bed); }  // who lies down has seen the loop or hears of it
      alarm.notify_all();
    }
    using Clock = std::chrono::steady_clock;
    const Clock::time_point begun = Clock::now();
    work(0, now);
    const Clock::time_point worked = Clock::now();
    const Clock::duration patience = std::max<Clock::duration>(PATIENCE, worked - begun);
    bool late = false;
    for (int look = 1; left.load(std::memory_order_acquire) > 0; look++) {
      if (late)
        sched_yield();  // a helper was taken off its core with items in hand
      else
        rest();
      if (look % LOOKS == 0) late = late || Clock::now() - worked > patience;
    }
    if (late) {
      alone = next_alone, good = 0;
      next_alone = next_alone < LONGEST_ALONE ? 2 * next_alone : LONGEST_ALONE;
    } else if (++good >= TRUSTED) {
      next_alone = next_alone > ALONE ? next_alone / 2 : ALONE, good = 0;
    }
  }
};

std::atomic<Pool*> pool{nullptr};

Pool* the_pool() {
  Pool* found = pool.load(std::memory_order_acquire);
  if (found) return found;
  static std::once_flag once;
  // A child of fork() has none of the helpers: it starts its own. Nothing is freed: helpers that
  // sleep at the end of the process would read it.
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); }); });
  Pool* made = new Pool;
  if (pool.compare_exchange_strong(found, made)) return made;
  delete made;
  return found;
}

}  // namespace

void run_parallel(int threads, int64_t count, Items items, void* context) {
  if (count > (int64_t)INDEX) return items(context, 0, count);
  Pool* own = the_pool();
  std::unique_lock<std::mutex> turn(own->turn, std::try_to_lock);
  if (!turn.owns_lock()) return items(context, 0, count);
  const int most = threads < MOST_THREADS ? threads : MOST_THREADS;
  own->run((int64_t)most < count ? most : (int)count, count, items, context);
}
