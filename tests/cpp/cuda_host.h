// Runs CUDA kernels on the CPU, for tests: a fiber per thread, one block at a time, blocks and threads in an order
// shuffled by a seed. A fiber serves a thread of each block in turn, and is switched without a system call. This has
// what the kernels use and no more, and stops with a message where a GPU would hang or give undefined results: see
// `Block::resolve`. It shows nothing of real concurrency, of approximate instructions, or speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Each block's own, NaN at its start.
#define CG_SHARED(type, name, count) \
  static const char name##_site = 0; \
  type* const name = static_cast<type*>(cuda_host::block->shared(&name##_site, sizeof(type) * (count)))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;

// Where a thread is. `site` names the call in the source.
enum class At { runs, barrier, shuffle, end };
struct Thread {
  void* state[5];  // of the compiler's setjmp, to go on from; `stack` is null until the thread has started
  std::unique_ptr<char[]> stack;
  At at = At::runs;
  const char* site = nullptr;
  uint32_t mask = 0;
  unsigned from = 0;  // the lane that a shuffle reads; its own if that is outside of the warp
  uint64_t value = 0, received = 0;
};

class Block {
 public:
  explicit Block(unsigned threads) : threads_(threads) {}

  void run(const std::function<void()>& kernel, std::mt19937& random) {
    kernel_ = &kernel;
    shared_.clear();
    std::vector<unsigned> order(threads_.size());
    for (unsigned i = 0; i < order.size(); ++i) {
      order[i] = i;
      threads_[i].at = At::runs;
    }
    for (;;) {
      std::shuffle(order.begin(), order.end(), random);
      for (unsigned i : order) {
        if (threads_[i].at == At::runs) resume(i);
      }
      if (all_at(At::end)) return;
      resolve();
    }
  }

  // Called by a thread: wait for the others.
  Thread& wait(At at, const char* site, uint32_t mask = 0, unsigned from = 0, uint64_t value = 0) {
    Thread& self = threads_[current_];
    if (at == At::shuffle && !(mask >> current_ % kWarp & 1)) {
      failure_ = std::string("a lane that is not in its own mask at ") + site;
    }
    self.at = at, self.site = site, self.mask = mask, self.from = from, self.value = value;
    leave(self);
    return self;
  }

  void* shared(const void* site, size_t bytes) {
    auto [entry, created] = shared_.try_emplace(site);
    if (created) entry->second.assign(bytes, '\xff');
    return entry->second.data();
  }

 private:
  // No thread can go on by itself: barriers and shuffles that are complete let theirs go on, all else is a mistake.
  void resolve() {
    if (all_at(At::barrier)) {
      for (Thread& thread : threads_) check_same_site(thread, threads_[0]), thread.at = At::runs;
      return;
    }
    bool any = false;
    for (unsigned i = 0; i < threads_.size(); ++i) {
      if (threads_[i].at == At::shuffle) shuffle(i), any = true;
    }
    if (any) return;
    for (const Thread& thread : threads_) {
      if (thread.at == At::barrier) fail(thread, "a barrier that not all threads of the block come to");
    }
    throw std::runtime_error("deadlock");
  }

  void shuffle(unsigned first) {
    const Thread& leader = threads_[first];
    const unsigned base = first / kWarp * kWarp;
    std::vector<Thread*> lanes;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(leader.mask >> lane & 1)) continue;
      if (base + lane >= threads_.size()) fail(leader, "a mask that names a lane outside of the block");
      Thread& other = threads_[base + lane];
      if (other.at == At::end) fail(leader, "a mask that names a lane that has ended");
      if (other.at != At::shuffle || other.mask != leader.mask) {
        fail(leader, "lanes of a warp at different collectives, or with different masks");
      }
      check_same_site(other, leader);
      if (other.from >= kWarp) other.received = other.value;
      else if (leader.mask >> other.from & 1) other.received = threads_[base + other.from].value;
      else fail(leader, "a shuffle from a lane that is not in the mask");
      lanes.push_back(&other);
    }
    for (Thread* lane : lanes) lane->at = At::runs;
  }

  static void check_same_site(const Thread& a, const Thread& b) {
    if (std::strcmp(a.site, b.site)) fail(a, std::string("lanes at different collectives, one of them ") + b.site);
  }
  [[noreturn]] static void fail(const Thread& thread, const std::string& what) {
    throw std::runtime_error(what + " at " + thread.site);
  }
  bool all_at(At at) const {
    return std::all_of(threads_.begin(), threads_.end(), [&](const Thread& t) { return t.at == at; });
  }

  void resume(unsigned i) {
    current_ = i;
    threadIdx.x = i;
    Thread& thread = threads_[i];
    const bool starts = thread.stack == nullptr;
    if (starts) thread.stack.reset(new char[kStackBytes]);
    void* const fake = switches(thread.stack.get(), kStackBytes);
    if (__builtin_setjmp(scheduler_) == 0) {
      if (starts) start(thread.stack.get());
      go_on(thread.state);
    }
    switched(fake);
    if (!failure_.empty()) throw std::runtime_error(failure_);
  }
  void leave(Thread& thread) {
    void* const fake = switches(scheduler_stack_, scheduler_bytes_);
    if (__builtin_setjmp(thread.state) == 0) go_on(scheduler_);
    switched(fake);
  }

  // The compiler's longjmp: the C library's takes a system call under the address sanitizer.
  [[noreturn, gnu::noinline, gnu::no_sanitize("address")]] static void go_on(void* (&state)[5]) {
    __builtin_longjmp(state, 1);
  }
  [[noreturn]] static void start(char* stack) {
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, &Block::entry, 0);
    setcontext(&context);
    std::abort();
  }
  static void entry();

  // The address sanitizer is told of each switch, before and after it.
  static void* switches([[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes) {
    void* fake = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake, stack, bytes);
#endif
    return fake;
  }
  static void switched([[maybe_unused]] void* fake) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  std::vector<Thread> threads_;
  std::map<const void*, std::vector<char>> shared_;
  const std::function<void()>* kernel_ = nullptr;
  void* scheduler_[5];
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_bytes_ = 0;
  unsigned current_ = 0;
  std::string failure_;
};

inline Block* block = nullptr;
inline std::mt19937 random_order;

inline void Block::entry() {
  Block& self = *block;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self.scheduler_stack_, &self.scheduler_bytes_);
#endif
  for (Thread& thread = self.threads_[self.current_];;) {
    (*self.kernel_)();
    thread.at = At::end;
    self.leave(thread);
  }
}

}  // namespace cuda_host

#define CG_STRING_(x) #x
#define CG_STRING(x) CG_STRING_(x)
#define __syncthreads() cuda_host::block->wait(cuda_host::At::barrier, __FILE__ ":" CG_STRING(__LINE__))
#define CG_SHUFFLE(mask, v, from) cuda_host::shuffle(__FILE__ ":" CG_STRING(__LINE__), mask, v, from)
#define __shfl_down_sync(mask, v, down) CG_SHUFFLE(mask, v, threadIdx.x % cuda_host::kWarp + (down))
#define __shfl_xor_sync(mask, v, bits) CG_SHUFFLE(mask, v, threadIdx.x % cuda_host::kWarp ^ (bits))

namespace cuda_host {

template <class V>
V shuffle(const char* site, uint32_t mask, V v, unsigned from) {
  uint64_t value = 0;
  std::memcpy(&value, &v, sizeof(V));
  value = block->wait(At::shuffle, site, mask, from, value).received;
  std::memcpy(&v, &value, sizeof(V));
  return v;
}

}  // namespace cuda_host

// One thread runs at a time.
inline void atomicAdd(unsigned long long* to, unsigned long long v) { *to += v; }
inline void atomicMax(unsigned long long* to, unsigned long long v) { *to = std::max(*to, v); }

// a * b + c rounded once, upwards and downwards: the product is exact in double, and the sum is taken with its error.
inline float __fmaf_ru(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, sum = product + c;
  if (!std::isfinite(sum)) return static_cast<float>(sum);
  const double c_part = sum - product, error = (product - (sum - c_part)) + (c - c_part);
  const float nearest = static_cast<float>(sum);
  const bool low = nearest < sum || (nearest == sum && error > 0);
  return low ? std::nextafterf(nearest, INFINITY) : nearest;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmaf_rd(float a, float b, float c) { return -__fmaf_ru(-a, b, -c); }

namespace cg::cuda {

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 threads, size_t, cudaStream_t, const Args&... args) {
  static std::map<unsigned, cuda_host::Block> made;  // by size: the stacks take longer than most kernels
  cuda_host::Block& block = made.try_emplace(threads.x, threads.x).first->second;
  cuda_host::block = &block;
  gridDim = grid, blockDim = threads;
  std::vector<dim3> blocks;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) blocks.emplace_back(x, y);
  }
  std::shuffle(blocks.begin(), blocks.end(), cuda_host::random_order);
  for (const dim3& at : blocks) {
    blockIdx = at;
    block.run([&] { kernel(static_cast<Params>(args)...); }, cuda_host::random_order);
  }
}

}  // namespace cg::cuda
