// Memory for weights and scratch: aligned, and on 2 MB pages where the system gives them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace ml {

constexpr int64_t kHugePage = int64_t{2} << 20;

/// Owned, zeroed memory aligned to 64 bytes, from 1 MB on to 2 MB with transparent huge pages asked for. Reading
/// weights over 4 KB pages costs a third of the memory bandwidth.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes);  ///< Throws std::bad_alloc.
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  int64_t mapped_ = 0;  // length of the mapping; 0: from the heap
};

/// Hands out pieces of large buffers, so that many small weights share huge pages. Pieces live as long as the arena,
/// which each of them keeps alive. Not thread-safe.
class Arena {
 public:
  explicit Arena(int64_t chunk_bytes = int64_t{64} << 20) : chunk_bytes_(chunk_bytes) {}

  std::shared_ptr<void> take(int64_t bytes);  ///< Aligned to 64 bytes, zeroed.
  int64_t taken_bytes() const { return taken_; }

 private:
  int64_t chunk_bytes_;
  std::shared_ptr<Buffer> chunk_;
  int64_t used_ = 0;
  int64_t taken_ = 0;
};

}  // namespace ml
