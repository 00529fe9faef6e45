#include "base/arena.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "base/span.h"

namespace ml {
namespace {

constexpr int64_t kAlign = 64;
constexpr int64_t kMapFrom = int64_t{1} << 20;

/// `bytes` of fresh zero pages starting on a 2 MB boundary: map more, cut off the ends.
void* map_aligned(int64_t bytes) {
  void* raw = mmap(nullptr, size_t(bytes + kHugePage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  char* const start = static_cast<char*>(raw);
  char* const aligned =
      start + (round_up(reinterpret_cast<int64_t>(start), kHugePage) - reinterpret_cast<int64_t>(start));
  const int64_t before = aligned - start;
  const int64_t after = kHugePage - before;
  if (before > 0) munmap(start, size_t(before));
  if (after > 0) munmap(aligned + bytes, size_t(after));
#ifdef MADV_HUGEPAGE
  madvise(aligned, size_t(bytes), MADV_HUGEPAGE);  // a refusal leaves 4 KB pages: slower, still right
#endif
  return aligned;
}

}  // namespace

Buffer::Buffer(int64_t bytes) : bytes_(bytes) {
  if (bytes >= kMapFrom) {
    mapped_ = round_up(bytes, kHugePage);
    data_ = map_aligned(mapped_);
  } else if (bytes > 0) {
    data_ = std::aligned_alloc(size_t(kAlign), size_t(round_up(bytes, kAlign)));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(data_, 0, size_t(bytes));
  }
}

Buffer::~Buffer() {
  if (mapped_ > 0) {
    munmap(data_, size_t(mapped_));
  } else {
    std::free(data_);
  }
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      mapped_(std::exchange(other.mapped_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(mapped_, other.mapped_);
  return *this;
}

std::shared_ptr<void> Arena::take(int64_t bytes) {
  const int64_t size = round_up(bytes, kAlign);
  taken_ += size;
  if (size >= chunk_bytes_) {
    auto own = std::make_shared<Buffer>(size);
    return {own, own->data()};
  }
  if (chunk_ == nullptr || used_ + size > chunk_->bytes()) {
    chunk_ = std::make_shared<Buffer>(chunk_bytes_);
    used_ = 0;
  }
  void* const piece = static_cast<char*>(chunk_->data()) + used_;
  used_ += size;
  return {chunk_, piece};
}

}  // namespace ml
