// The threads that run kernels.
//
// parallel(tasks, f) calls f(0) ... f(tasks - 1), each once, on the pool's threads and the caller's, handed out one by
// one from an atomic counter. So a thread that the system takes off its core delays the step by the one task it holds,
// never by a static share. Choose tasks of 20-100 us; what a task computes must not depend on who runs it.
//
// Workers spin for a few microseconds after a job and then sleep in the kernel: an idle pool uses no CPU.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace ml {

/// Threads that take part, the caller included. The start value is MOONLANG_CPU_THREADS or the CPUs this process may
/// use.
int threads();

/// 1 <= n <= 256. With `pin` each worker is bound to one of the CPUs the process may use, all but the first: a woken
/// worker then never queues behind the caller that woke it. The caller stays free, as do the threads it starts. Not to
/// be called while a job runs.
void set_threads(int n, bool pin = false);

/// Runs the tasks and returns when all are done; the first exception of a task is thrown again here. Called from inside
/// a task it throws std::logic_error. If another thread is using the pool, the caller runs its tasks alone.
void run_tasks(int64_t tasks, void (*task)(void* context, int64_t index), void* context);

template <class F>
void parallel(int64_t tasks, F&& f) {
  run_tasks(
      tasks, [](void* context, int64_t index) { (*static_cast<std::remove_reference_t<F>*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

/// This thread's scratch memory, aligned to 64 bytes, valid until its next call of `scratch` with the same slot. Slots
/// keep two users inside one task apart; 0 <= slot < 4. Grows and is never given back before the thread ends.
void* scratch(int64_t bytes, int slot = 0);

}  // namespace ml
