#include "base/mapped.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace ml {
namespace {

[[noreturn]] void fail(const std::string& path, int why) {
  throw std::runtime_error(path + ": " + std::strerror(why));
}

/// The mapping [start, ...) in /proc/self/smaps: kilobytes present, and those of them on 2 MB pages.
struct Present {
  int64_t all = 0;
  int64_t huge = 0;
};

Present present_kb(const void* start) {
  char first[32];
  std::snprintf(first, sizeof(first), "%lx-", reinterpret_cast<unsigned long>(start));
  std::ifstream smaps("/proc/self/smaps");
  Present found;
  bool here = false;
  for (std::string line; std::getline(smaps, line);) {
    std::istringstream words(line);
    std::string name;
    int64_t kb = 0;
    words >> name;
    if (name.back() != ':') {  // the first line of a mapping: its addresses
      if (here) break;
      here = name.rfind(first, 0) == 0;
    } else if (here && words >> kb) {
      if (name == "Rss:") found.all = kb;
      if (name == "FilePmdMapped:" || name == "ShmemPmdMapped:") found.huge += kb;
    }
  }
  return found;
}

}  // namespace

std::shared_ptr<MappedFile> MappedFile::open(const std::string& path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) fail(path, errno);
  struct stat status {};
  fstat(file, &status);
  void* const data = mmap(nullptr, size_t(status.st_size), PROT_READ, MAP_SHARED, file, 0);  // EINVAL if it is empty
  const int why = errno;
  close(file);
  if (data == MAP_FAILED) fail(path, why);
#ifdef MADV_HUGEPAGE
  madvise(data, size_t(status.st_size), MADV_HUGEPAGE);  // before the first touch: it makes the kernel read in 2 MB
#endif
  mlock(data, size_t(status.st_size));  // weights are read at every step; a refusal leaves them to the page cache
  return std::shared_ptr<MappedFile>(new MappedFile(static_cast<const char*>(data), status.st_size));
}

MappedFile::~MappedFile() { munmap(const_cast<char*>(data_), size_t(bytes_)); }

bool MappedFile::on_huge_pages() const {
  const Present present = present_kb(data_);
  return present.huge * 10 >= present.all * 9;
}

}  // namespace ml
