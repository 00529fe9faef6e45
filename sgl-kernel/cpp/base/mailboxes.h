// Messages of different content from every rank to every other: what an all-to-all of tokens needs.
//
// In each round every rank sends one message to every other, of any size up to a box, also of none, and receives those of
// all others. There is no coordinator: a message is there when its sender says so. It may be read until its receiver
// sends in the next round; there are two boxes for each pair of ranks, so that a fast sender overtakes nobody.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/ranks.h"
#include "base/roll.h"

namespace ml {

struct Letter {
  const char* data = nullptr;
  int64_t bytes = 0;
};

class Mailboxes {
 public:
  /// box_bytes: the largest message; rounded up to whole pages. Throws std::invalid_argument.
  Mailboxes(int rank, int size, int64_t box_bytes);
  virtual ~Mailboxes() = default;
  Mailboxes(const Mailboxes&) = delete;
  Mailboxes& operator=(const Mailboxes&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  int64_t box_bytes() const { return box_bytes_; }

  /// Where the message of the next round to rank `to` is written; 64-byte aligned.
  char* outbox(int to) const { return box(to, round_ + 1); }

  /// Begins the next round: the first bytes[r] of outbox(r) are for rank r. Waits for nobody, and gives up the messages of
  /// the last round. Throws RankLost.
  void send(const std::vector<int64_t>& bytes);

  /// The message of another rank in this round. Throws RankLost.
  Letter receive(int from);

 protected:
  virtual char* box(int to, uint32_t round) const = 0;
  virtual void post(uint32_t round, const std::vector<int64_t>& bytes) = 0;
  virtual Letter await(int from, uint32_t round) = 0;

  const int rank_, size_;
  const int64_t box_bytes_;

 private:
  uint32_t round_ = 0;
};

/// Boxes of one host, in memory that all have mapped: [from][to][2] boxes, each with a line in front for its size.
class SharedMailboxes : public Mailboxes {
 public:
  /// memory: of `memory_bytes`, the same for all ranks; it outlives this. path, patience_ms, spin_us: see Roll.
  SharedMailboxes(const std::string& path, char* memory, int64_t memory_bytes, int rank, int size, int64_t box_bytes,
                  int64_t patience_ms, int64_t spin_us);

  /// What `size` ranks need.
  static int64_t memory_bytes(int size, int64_t box_bytes);

 private:
  char* box(int to, uint32_t round) const override { return at(rank_, to, round); }
  void post(uint32_t round, const std::vector<int64_t>& bytes) override;
  Letter await(int from, uint32_t round) override;
  char* at(int from, int to, uint32_t round) const;

  char* memory_;
  Roll roll_;
};

}  // namespace ml
