// Tokens to the ranks that hold their experts, and what those made of them back again.
//
// Each rank has tokens of its own. `dispatch` writes, for each rank, the rows that one of its experts is wanted for (each
// once) and which expert wants which row; `arrived` is what came in, sorted by expert. `give_back` returns a row per
// (token, expert) pair, unweighted and as it is, so that whoever adds them up does it in the order of the token's list:
// the sum does not depend on where experts are. Rows that stay on their rank are not copied.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/arena.h"
#include "base/mailboxes.h"
#include "base/types.h"

namespace ml {

/// Where a copy of an expert is: the rank, and its number among the experts held there.
struct Copy {
  int32_t rank;
  int32_t slot;
};

/// Where all experts of a layer are. Several copies share the tokens of an expert.
struct Placement {
  std::vector<std::vector<Copy>> copies;  // by expert
  std::vector<int32_t> held;              // by rank, the number of slots

  /// Throws std::invalid_argument when it is not for so many ranks, or names a rank or a slot that does not exist.
  void check(int ranks) const;
};

/// Rows of tokens.
struct TokenRows {
  const char* data;
  DType type;  // f32, bf16 or f16
  int64_t count, columns;
  int64_t stride;  // bytes from one to the next

  int64_t bytes() const { return columns * bytes_of(type); }
  const char* row(int64_t i) const { return data + i * stride; }
};

/// In what form rows travel to their experts: as they are, or as int8 with one float32 factor for each row. What comes
/// back is always as it is. The form is that of all rows, also of those that stay: results do not depend on the ranks.
enum class Payload { plain, int8 };

class Exchange {
 public:
  explicit Exchange(std::shared_ptr<Mailboxes> boxes, Payload payload = Payload::plain);

  int rank() const { return boxes_->rank(); }
  int size() const { return boxes_->size(); }

  /// The most tokens that a rank may dispatch at a time.
  int64_t most_tokens(int64_t row_bytes, int64_t per_token) const;

  /// Sends the rows x to where the experts chosen [x.count, per_token] are: the copies of an expert take turns. All ranks
  /// give the same placement, one that `check` has passed for them. x stays as it is until `give_back`. Throws RankLost.
  void dispatch(const TokenRows& x, const int32_t* chosen, int64_t per_token,
                std::shared_ptr<const Placement> placement);

  /// Waits for the rows of all ranks: [slots + 1], those of slot s are [begin[s], begin[s + 1]). Throws RankLost;
  /// std::runtime_error when a message makes no sense.
  const std::vector<int64_t>& arrived();

  /// Copies arrived row i, until `give_back`.
  void read(int64_t i, char* out) const;

  /// Sends z [arrived rows, row_bytes], dense, back: row i is what became of arrived row i. z stays as it is until the
  /// next dispatch. Throws RankLost.
  void give_back(const char* z);

  /// Waits for what became of this rank's tokens: [tokens * per_token] rows, valid until the next dispatch. Throws
  /// RankLost.
  const std::vector<const char*>& returned();

  /// Memory for whoever computes between these calls, valid until the next call for the same of two slots.
  void* memory(int64_t bytes, int slot);

 private:
  struct Pair {  // of a row in a message, and an expert that it is for
    int32_t row, slot;
  };
  struct Head {
    int64_t rows, pairs;
  };
  struct Outgoing {
    std::vector<int32_t> tokens;  // of its rows
    std::vector<Pair> pairs;
  };
  struct Origin {  // of a row that came in: pair number `pair` of rank `rank`
    int32_t rank, pair;
  };
  static int64_t rows_offset(int64_t pairs);
  int64_t wire_bytes() const;
  void write(int64_t token, char* out) const;
  void pack(int to) const;
  void keep_own();
  void read_message(int from, const char*& rows, std::vector<Pair>& pairs);

  std::shared_ptr<Mailboxes> boxes_;
  const Payload payload_;
  std::shared_ptr<const Placement> placement_;  // of what is under way
  std::vector<uint32_t> turns_;                 // by expert, of its copies
  TokenRows x_{};
  int64_t row_bytes_ = 0;
  std::vector<char> coded_;                  // own rows in the form in which they would travel
  std::vector<Outgoing> out_;                // by rank
  std::vector<Origin> sent_;                 // [tokens * per_token]: where each pair went
  std::vector<std::vector<Pair>> in_;        // by rank
  std::vector<const char*> in_rows_;         // by rank
  std::vector<Origin> origin_;               // of the arrived rows
  std::vector<const char*> own_;             // by pair of this rank: what became of it
  std::vector<int64_t> begin_;               // see arrived
  std::vector<const char*> rows_;            // that arrived
  std::vector<const char*> returned_;
  Buffer memory_[2];
};

}  // namespace ml
