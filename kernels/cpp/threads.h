// Threads of our own for the loops of the kernels.
//
// Plan: a loop of `count` items is cut into one interval a thread, in order, and thread t owns the
// t-th. A thread takes its interval from the front, a few items at a time, and then, from the back,
// what the others have not begun. So no thread waits for one that the system has not woken or has
// taken off its core: under load the caller does all the work itself. It waits only for items that
// another one has in hand; where that takes long, the next loops have no helpers. Who does an item
// decides no bit of its result.
//
// Between loops a helper looks for the next one for a tenth of a millisecond (a token has hundreds
// of loops a few microseconds apart), then it sleeps. OpenMP's threads either look for good, which
// takes the core from others, or sleep at once, which costs more than a loop.
#pragma once

#include <cstdint>
#include <type_traits>

constexpr int MOST_THREADS = 64;
using Items = void (*)(void* context, int64_t begin, int64_t end);

// Calls items(context, begin, end) for parts of 0..count, each item once, on up to `threads` threads,
// this one among them; returns when all are done. Another call that is under way leaves all items
// to this thread. Memory that an item writes is the caller's to read afterwards.
void run_parallel(int threads, int64_t count, Items items, void* context);

// f(begin, end) for parts of 0..count.
template <typename F>
static inline void parallel(int threads, int64_t count, F&& f) {
  if (threads <= 1 || count <= 1) {
    f((int64_t)0, count);
    return;
  }
  using Body = std::remove_reference_t<F>;
  run_parallel(
      threads, count,
      [](void* context, int64_t begin, int64_t end) { (*(Body*)context)(begin, end); }, (void*)&f);
}
