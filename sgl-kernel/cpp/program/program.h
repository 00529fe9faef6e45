// A model's forward as a list of kernel calls over numbered buffers.
//
// Python writes it once, when the model is loaded (python/moonlang/kernels/program.py); after that a step is one call:
// no interpreter, no dispatcher, no allocation. One thread at a time may use a program.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/ranks.h"
#include "program/step.h"

namespace ml {

/// One kernel call over the whole batch. Immutable; what it needs beyond the step it was given when made.
class Op {
 public:
  virtual ~Op() = default;
  virtual const char* name() const = 0;
  virtual void run(Step& step) const = 0;
};

class Program {
 public:
  explicit Program(const ModelShape& shape) : step_(shape) {}

  const ModelShape& shape() const { return step_.shape; }

  /// The number of a new buffer of `columns` numbers per token, or per kept token.
  int buffer(int64_t columns, bool kept);

  /// The number of the plan that attention layers with this window share (0: no window).
  int plan_for(int32_t window);

  void add(std::unique_ptr<Op> op) { ops_.push_back(std::move(op)); }

  /// The op that makes logits from hidden states: head(hidden states [n, M], n, logits [n, V]).
  class Head {
   public:
    virtual ~Head() = default;
    virtual int64_t vocabulary() const = 0;
    virtual void run(const void* hidden, int64_t count, float* logits) const = 0;
  };
  void set_head(int hidden_buffer, int64_t columns, std::unique_ptr<Head> head);

  /// Instead of a head: another program goes on from the hidden states of all tokens.
  void set_end(int hidden_buffer, int64_t columns);

  /// Writes them to `out`, [T, columns] dense.
  void hand_over(void* out) const;

  /// The head is this rank's share of one for a vocabulary of `vocabulary` tokens: see share_begin.
  void share_head(std::shared_ptr<Ranks> ranks, int64_t vocabulary);

  void set_pool(const KvPool& pool) { step_.pool = pool; }

  /// Where forwards report their progress (see Report); the memory outlives the program.
  void report_to(int64_t* word, int event) { step_.report = {word, event, 0, 0}; }

  /// The next forwards report every `every` layers, counted from `base`; 0: not at all.
  void report_every(int32_t every, int64_t base);

  /// One forward. The hidden states of the kept tokens stay until the next one.
  void run(const Batch& batch);

  /// Logits [end - begin, V] of the kept tokens [begin, end), valid until the next call.
  float* logits(int64_t begin, int64_t end);

  /// The most probable token of each of the kept tokens [begin, end), and which of them (counted from `begin`) have
  /// logits that are no finite numbers: theirs means nothing.
  struct Best {
    std::vector<int64_t> tokens, broken;
  };
  Best best(int64_t begin, int64_t end);

  int64_t kept_count() const { return step_.kept_count(); }
  int64_t vocabulary() const { return ranks_ ? whole_vocabulary_ : head_ ? head_->vocabulary() : 0; }

  /// Nanoseconds by name of op since the last call, when `measure` is on.
  std::map<std::string, int64_t> times();
  void measure(bool on) { measured_ = on; }
  bool measured() const { return measured_; }

 private:
  /// The head's logits [n, its vocabulary] in `out`.
  void run_head(int64_t begin, int64_t end, float* out);
  float* logits_memory(int64_t rows, int64_t columns);
  void gather_logits(int64_t begin, int64_t end, float* out);
  void gather_best(Best& best, std::vector<float>& peaks);

  template <class F>
  void timed(const char* name, F&& f);

  Step step_;
  std::vector<ValueBuffer> buffers_;
  std::vector<int32_t> windows_;
  std::vector<std::unique_ptr<Op>> ops_;
  std::unique_ptr<Head> head_;
  std::shared_ptr<Ranks> ranks_;  // among whom the head is shared, or none
  int64_t whole_vocabulary_ = 0;
  int hidden_buffer_ = -1;
  int64_t hidden_row_bytes_ = 0;
  int64_t end_row_bytes_ = 0;  // of what is handed over; 0: nothing is
  Buffer logits_;
  bool measured_ = false;
  std::map<std::string, int64_t> times_;
};

}  // namespace ml
