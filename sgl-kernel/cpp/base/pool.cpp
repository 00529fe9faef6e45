#include "base/pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/arena.h"

namespace ml {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kSpins = 1000;  // about 20-40 us of pause instructions: longer than the gap between two ops of a step

thread_local bool t_inside = false;

void pause() {
#ifdef ML_X86
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t while_equal) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, while_equal, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word, int threads) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, threads, nullptr, nullptr, 0);
}

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    }
  }
  if (cpus.empty()) cpus.push_back(0);
  return cpus;
}

void bind_to(pthread_t thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread, sizeof(set), &set);  // a refusal only costs speed
}

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {}

  int threads() const { return threads_; }

  void resize(int threads, bool pin) {
    const std::lock_guard<std::mutex> lock(caller_);
    stop_workers();
    threads_ = threads;
    cpus_ = pin ? allowed_cpus() : std::vector<int>();
  }

  void run(int64_t tasks, void (*task)(void*, int64_t), void* context) {
    if (t_inside) throw std::logic_error("parallel() called from inside a task");
    if (tasks > int64_t{UINT32_MAX} - kMaxThreads) throw std::logic_error("too many tasks for one parallel()");
    if (tasks <= 0) return;
    std::unique_lock<std::mutex> lock(caller_, std::try_to_lock);
    if (tasks == 1 || threads_ == 1 || !lock.owns_lock()) {
      run_alone(tasks, task, context);
      return;
    }
    start_workers();
    publish(tasks, task, context);
    work(generation_.load(std::memory_order_relaxed));
    wait_done(uint32_t(tasks));
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  // A job is known by its generation. `next_` holds (generation << 32 | next task), so that a worker that comes late
  // can never take a task of the following job while believing it belongs to the one it read.
  std::atomic<uint64_t> next_{0};
  std::atomic<uint32_t> generation_{0};  // workers sleep on it
  std::atomic<uint32_t> done_{0};        // the caller sleeps on it
  std::atomic<uint32_t> tasks_{0};
  std::atomic<void (*)(void*, int64_t)> task_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<uint32_t> sleeping_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> stop_{false};
  std::mutex caller_;
  std::mutex failure_lock_;
  std::exception_ptr failure_;
  std::vector<std::thread> workers_;
  std::vector<int> cpus_;
  std::atomic<int> threads_;

  static void run_alone(int64_t tasks, void (*task)(void*, int64_t), void* context) {
    struct Inside {
      Inside() { t_inside = true; }
      ~Inside() { t_inside = false; }
    } inside;
    for (int64_t i = 0; i < tasks; ++i) task(context, i);
  }

  void start_workers() {
    while (int(workers_.size()) < threads_ - 1) {
      workers_.emplace_back([this, seen = generation_.load()] { serve(seen); });
      if (!cpus_.empty()) bind_to(workers_.back().native_handle(), cpus_[workers_.size() % cpus_.size()]);
    }
  }

  void stop_workers() {
    stop_.store(true);
    generation_.fetch_add(1);
    futex_wake(generation_, INT_MAX);
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stop_.store(false);
  }

  void publish(int64_t tasks, void (*task)(void*, int64_t), void* context) {
    const uint32_t generation = generation_.load(std::memory_order_relaxed) + 1;
    // No task of the last job is left. A late worker may still read the fields below, but whoever sees a new one also
    // sees this store, so its compare-exchange fails.
    next_.store(uint64_t{generation} << 32 | UINT32_MAX, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
    done_.store(0, std::memory_order_relaxed);
    tasks_.store(uint32_t(tasks), std::memory_order_relaxed);
    task_.store(task, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    next_.store(uint64_t{generation} << 32, std::memory_order_release);
    generation_.store(generation, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0)
      futex_wake(generation_, int(tasks - 1 < INT_MAX ? tasks - 1 : INT_MAX));
  }

  void work(uint32_t generation) {
    t_inside = true;
    uint64_t next = next_.load(std::memory_order_acquire);
    while (uint32_t(next >> 32) == generation) {
      const uint32_t tasks = tasks_.load(std::memory_order_acquire);
      const auto task = task_.load(std::memory_order_acquire);
      void* const context = context_.load(std::memory_order_acquire);
      const uint32_t index = uint32_t(next);
      if (index >= tasks) break;
      // Success proves that the generation still stands, hence that the three fields above belong to it.
      if (!next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      try {
        task(context, index);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(failure_lock_);
        if (!failure_) failure_ = std::current_exception();
      }
      if (done_.fetch_add(1, std::memory_order_seq_cst) + 1 == tasks &&
          caller_sleeps_.load(std::memory_order_seq_cst)) {
        futex_wake(done_, 1);
      }
      next = next_.load(std::memory_order_acquire);
    }
    t_inside = false;
  }

  void wait_done(uint32_t tasks) {
    for (int i = 0; i < kSpins; ++i) {
      if (done_.load(std::memory_order_acquire) == tasks) return;
      pause();
    }
    caller_sleeps_.store(true, std::memory_order_seq_cst);
    for (uint32_t done; (done = done_.load(std::memory_order_seq_cst)) != tasks;) futex_wait(done_, done);
    caller_sleeps_.store(false, std::memory_order_relaxed);
  }

  void serve(uint32_t seen) {
    while (true) {
      const uint32_t generation = next_generation(seen);
      if (stop_.load(std::memory_order_relaxed)) return;
      work(generation);
      seen = generation;
    }
  }

  uint32_t next_generation(uint32_t seen) {
    for (int i = 0; i < kSpins; ++i) {
      const uint32_t now = generation_.load(std::memory_order_acquire);
      if (now != seen) return now;
      pause();
    }
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    uint32_t now;
    while ((now = generation_.load(std::memory_order_seq_cst)) == seen) futex_wait(generation_, seen);
    sleeping_.fetch_sub(1, std::memory_order_relaxed);
    return now;
  }
};

int initial_threads() {
  const char* wanted = std::getenv("MOONLANG_CPU_THREADS");
  const int n = wanted != nullptr ? std::atoi(wanted) : int(allowed_cpus().size());
  return n < 1 ? 1 : (n > kMaxThreads ? kMaxThreads : n);
}

// The pool is never destroyed: at exit its sleeping workers vanish with the process, and a forked child, which has none
// of its parent's threads, simply forgets the parent's pool and makes its own.
std::atomic<Pool*> g_pool{nullptr};

void forget_pool_in_child() {
  t_inside = false;
  const Pool* parents = g_pool.load();
  if (parents != nullptr) g_pool.store(new Pool(parents->threads()));
}

Pool& pool() {
  if (Pool* existing = g_pool.load(std::memory_order_acquire)) return *existing;
  static std::once_flag once;
  std::call_once(once, [] {
    pthread_atfork(nullptr, nullptr, forget_pool_in_child);
    g_pool.store(new Pool(initial_threads()), std::memory_order_release);
  });
  return *g_pool.load(std::memory_order_acquire);
}

}  // namespace

int threads() { return pool().threads(); }

void set_threads(int n, bool pin) {
  if (n < 1 || n > kMaxThreads) throw std::invalid_argument("threads must be in [1, 256], got " + std::to_string(n));
  if (t_inside) throw std::logic_error("set_threads() called from inside a task");
  pool().resize(n, pin);
}

void run_tasks(int64_t tasks, void (*task)(void*, int64_t), void* context) { pool().run(tasks, task, context); }

void* scratch(int64_t bytes, int slot) {
  thread_local Buffer buffers[4];
  Buffer& buffer = buffers[slot];
  if (buffer.bytes() < bytes) buffer = Buffer(bytes + bytes / 4);
  return buffer.data();
}

}  // namespace ml
