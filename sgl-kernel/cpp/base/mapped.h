// A file seen as memory.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace ml {

/// A whole file, mapped for reading on 2 MB pages where the file system keeps it in such (ext4, XFS and tmpfs of recent
/// kernels do), and locked into memory where the process may do that. It stays valid when the file is deleted or
/// replaced; who writes into the file in place, or cuts it, breaks the process.
class MappedFile {
 public:
  /// Throws std::runtime_error with the system's reason.
  static std::shared_ptr<MappedFile> open(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

  /// Of the pages touched so far, whether nearly all are on 2 MB pages.
  bool on_huge_pages() const;

 private:
  MappedFile(const char* data, int64_t bytes) : data_(data), bytes_(bytes) {}

  const char* data_;
  int64_t bytes_;
};

}  // namespace ml
