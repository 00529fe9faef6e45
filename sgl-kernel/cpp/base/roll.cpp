#include "base/roll.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstring>
#include <stdexcept>

#include "base/ranks.h"

namespace ml {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kLookMs = 50;  // between two looks whether the rank that is waited for still lives

int64_t now_us() {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what + ": " + std::strerror(errno)); }

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

struct flock one_byte(int rank, short type) {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return lock;
}

}  // namespace

/// What a rank tells the others: the rounds it has begun. Ranks asleep on it are counted, so that nobody is woken in
/// vain.
struct alignas(kLine) Roll::Notice {
  std::atomic<uint32_t> round;
  std::atomic<uint32_t> sleepers;
  std::atomic<uint32_t> joined;
};

Roll::Roll(const std::string& path, int rank, int64_t payload_bytes, int64_t patience_ms, int64_t spin_us)
    : rank_(rank), patience_ms_(patience_ms), spin_us_(spin_us), bytes_(kHead + payload_bytes) {
  static_assert(sizeof(Notice) == kLine && std::atomic<uint32_t>::is_always_lock_free && kMostRanks * kLine <= kHead);
  file_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (file_ < 0) fail(path);
  // Every rank sets the same length; a file that is new holds zeros, which is how a notice begins.
  void* const memory = ftruncate(file_, bytes_) != 0
                           ? MAP_FAILED
                           : mmap(nullptr, size_t(bytes_), PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
  struct flock lock = one_byte(rank, F_WRLCK);
  if (memory == MAP_FAILED || fcntl(file_, F_OFD_SETLK, &lock) != 0) {
    const int reason = errno;
    if (memory != MAP_FAILED) munmap(memory, size_t(bytes_));
    ::close(file_);
    errno = reason;
    fail(path);
  }
  memory_ = static_cast<char*>(memory);
  notice(rank).joined.store(1);
}

Roll::~Roll() {
  munmap(memory_, size_t(bytes_));
  ::close(file_);  // and with it the lock: the others see this rank gone
}

Roll::Notice& Roll::notice(int rank) const { return reinterpret_cast<Notice*>(memory_)[rank]; }

void Roll::announce(uint32_t round) {
  Notice& own = notice(rank_);
  own.round.store(round);
  if (own.sleepers.load() > 0) syscall(SYS_futex, &own.round, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void Roll::await(int rank, uint32_t round) const {
  Notice& theirs = notice(rank);
  const auto there = [&](uint32_t seen) { return int32_t(seen - round) >= 0; };
  if (there(theirs.round.load(std::memory_order_acquire))) return;
  const int64_t begin_us = now_us();
  while (now_us() - begin_us < spin_us_) {
    for (int i = 0; i < 64; ++i) {
      if (there(theirs.round.load(std::memory_order_acquire))) return;
      relax();
    }
  }
  const struct timespec nap {0, kLookMs * 1000000};
  theirs.sleepers.fetch_add(1);
  for (;;) {
    const uint32_t seen = theirs.round.load();
    if (there(seen)) break;
    syscall(SYS_futex, &theirs.round, FUTEX_WAIT, seen, &nap, nullptr, 0);
    if (there(theirs.round.load())) break;
    const bool late = now_us() - begin_us > patience_ms_ * 1000;
    if (late || (theirs.joined.load() != 0 && !lives(rank))) {
      theirs.sleepers.fetch_sub(1);
      const std::string name = "Rank " + std::to_string(rank);
      throw RankLost(rank, late ? name + " has not answered for " + std::to_string(patience_ms_) + " ms"
                                : name + " has ended");
    }
  }
  theirs.sleepers.fetch_sub(1);
}

bool Roll::lives(int rank) const {
  struct flock lock = one_byte(rank, F_WRLCK);
  return fcntl(file_, F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

}  // namespace ml
