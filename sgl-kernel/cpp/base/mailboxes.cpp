#include "base/mailboxes.h"

#include <stdexcept>

#include "base/span.h"

namespace ml {

namespace {

constexpr int64_t kLine = 64;  // in front of each box: the size of its message

}  // namespace

Mailboxes::Mailboxes(int rank, int size, int64_t box_bytes)
    : rank_(rank), size_(size), box_bytes_(round_up(box_bytes, 4096)) {
  if (size < 1 || size > kMostRanks || rank < 0 || rank >= size || box_bytes < 1) {
    throw std::invalid_argument("rank, size or box_bytes is out of range");
  }
}

void Mailboxes::send(const std::vector<int64_t>& bytes) {
  if (int64_t(bytes.size()) != size_) throw std::invalid_argument("one message for each rank");
  for (int64_t count : bytes) {
    if (count < 0 || count > box_bytes_) throw std::invalid_argument("more than a box holds");
  }
  post(round_ + 1, bytes);
  ++round_;
}

Letter Mailboxes::receive(int from) {
  if (from < 0 || from >= size_ || from == rank_) throw std::invalid_argument("no such sender");
  const Letter letter = await(from, round_);
  if (letter.bytes < 0 || letter.bytes > box_bytes_) throw std::runtime_error("a message is larger than its box");
  return letter;
}

SharedMailboxes::SharedMailboxes(const std::string& path, char* memory, int64_t memory_bytes, int rank, int size,
                                 int64_t box_bytes, int64_t patience_ms, int64_t spin_us)
    : Mailboxes(rank, size, box_bytes), memory_(memory), roll_(path, rank, 0, patience_ms, spin_us) {
  if (memory == nullptr || memory_bytes < SharedMailboxes::memory_bytes(size, box_bytes)) {
    throw std::invalid_argument("too little memory for the boxes");
  }
}

int64_t SharedMailboxes::memory_bytes(int size, int64_t box_bytes) {
  return int64_t{size} * size * 2 * (kLine + round_up(box_bytes, 4096));
}

char* SharedMailboxes::at(int from, int to, uint32_t round) const {
  return memory_ + ((int64_t{from} * size_ + to) * 2 + round % 2) * (kLine + box_bytes_) + kLine;
}

void SharedMailboxes::post(uint32_t round, const std::vector<int64_t>& bytes) {
  for (int to = 0; to < size_; ++to) *reinterpret_cast<int64_t*>(at(rank_, to, round) - kLine) = bytes[size_t(to)];
  roll_.announce(round);
}

Letter SharedMailboxes::await(int from, uint32_t round) {
  roll_.await(from, round);
  const char* const data = at(from, rank_, round);
  return {data, *reinterpret_cast<const int64_t*>(data - kLine)};
}

}  // namespace ml
