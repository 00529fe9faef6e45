#include "program/program.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "base/span.h"
#include "ops/sampling.h"

namespace ml {

int Program::buffer(int64_t columns, bool kept) {
  buffers_.push_back({columns * bytes_of(shape().dtype) + kStrideMore, kept});  // narrower values may be strided
  return int(buffers_.size()) - 1;
}

int Program::plan_for(int32_t window) {
  const auto found = std::find(windows_.begin(), windows_.end(), window);
  if (found != windows_.end()) return int(found - windows_.begin());
  windows_.push_back(window);
  return int(windows_.size()) - 1;
}

void Program::set_head(int hidden_buffer, int64_t columns, std::unique_ptr<Head> head) {
  hidden_buffer_ = hidden_buffer;
  hidden_row_bytes_ = stride_of(columns, shape().dtype) * bytes_of(shape().dtype);
  head_ = std::move(head);
}

void Program::set_end(int hidden_buffer, int64_t columns) {
  hidden_buffer_ = hidden_buffer;
  hidden_row_bytes_ = stride_of(columns, shape().dtype) * bytes_of(shape().dtype);
  end_row_bytes_ = columns * bytes_of(shape().dtype);
}

void Program::hand_over(void* out) const {
  if (end_row_bytes_ == 0) throw std::invalid_argument("the program ends with a head");
  const char* from = static_cast<const char*>(step_.at(hidden_buffer_));
  for (int64_t t = 0; t < step_.tokens(); ++t) {
    std::memcpy(static_cast<char*>(out) + t * end_row_bytes_, from + t * hidden_row_bytes_, size_t(end_row_bytes_));
  }
}

void Program::report_every(int32_t every, int64_t base) {
  if (every < 0 || (every > 0 && step_.report.word == nullptr)) throw std::invalid_argument("nowhere to report to");
  step_.report.every = every;
  step_.report.base = base;
}

void Program::run(const Batch& batch) {
  timed("plan", [&] { step_.begin(batch, buffers_, windows_); });
  for (const auto& op : ops_) timed(op->name(), [&] { op->run(step_); });
}

void Program::share_head(std::shared_ptr<Ranks> ranks, int64_t vocabulary) {
  ranks_ = std::move(ranks);
  whole_vocabulary_ = vocabulary;
}

void Program::run_head(int64_t begin, int64_t end, float* out) {
  if (end == begin) return;
  const char* hidden = static_cast<const char*>(step_.at(hidden_buffer_)) + begin * hidden_row_bytes_;
  timed("head", [&] { head_->run(hidden, end - begin, out); });
}

float* Program::logits_memory(int64_t rows, int64_t columns) {
  const int64_t bytes = rows * columns * int64_t(sizeof(float));
  if (bytes > logits_.bytes()) {
    logits_ = Buffer();
    logits_ = Buffer(round_up(bytes, kHugePage));
  }
  return static_cast<float*>(logits_.data());
}

float* Program::logits(int64_t begin, int64_t end) {
  if (!head_ || begin < 0 || begin > end || end > kept_count()) throw std::out_of_range("no such kept tokens");
  float* const out = logits_memory(end - begin, vocabulary());
  if (ranks_) {
    gather_logits(begin, end, out);
  } else {
    run_head(begin, end, out);
  }
  return out;
}

void Program::gather_logits(int64_t begin, int64_t end, float* out) {
  const int64_t widest = ceil_div(whole_vocabulary_, ranks_->size()) * int64_t(sizeof(float));
  const int64_t most = ranks_->part_bytes() / widest;
  if (most < 1) throw std::invalid_argument("too large a vocabulary for the ranks' memory");
  for (int64_t row = begin; row < end; row += most) {
    const int64_t count = std::min(most, end - row);
    run_head(row, row + count, static_cast<float*>(ranks_->mine()));
    timed("gather", [&] {
      ranks_->exchange(count * widest);
      for (int r = 0; r < ranks_->size(); ++r) {
        const int64_t first = share_begin(whole_vocabulary_, r, ranks_->size());
        const int64_t columns = share_begin(whole_vocabulary_, r + 1, ranks_->size()) - first;
        const float* const part = static_cast<const float*>(ranks_->part(r));
        for (int64_t i = 0; i < count; ++i) {
          std::copy_n(part + i * columns, columns, out + (row - begin + i) * whole_vocabulary_ + first);
        }
      }
    });
  }
}

Program::Best Program::best(int64_t begin, int64_t end) {
  if (!head_ || begin < 0 || begin > end || end > kept_count()) throw std::out_of_range("no such kept tokens");
  const int64_t width = head_->vocabulary();
  float* const values = logits_memory(end - begin, width);
  run_head(begin, end, values);
  Best found;
  found.tokens.resize(size_t(end - begin));
  std::vector<float> peaks(size_t(end - begin));
  timed("argmax", [&] { argmax(values, end - begin, width, found.tokens.data(), peaks.data()); });
  if (ranks_) timed("gather", [&] { gather_best(found, peaks); });
  for (size_t i = 0; i < peaks.size(); ++i) {
    if (!std::isfinite(peaks[i])) found.broken.push_back(int64_t(i));
  }
  return found;
}

void Program::gather_best(Best& best, std::vector<float>& peaks) {
  struct Candidate {
    float peak;
    int32_t token;
  };
  const size_t most = size_t(ranks_->part_bytes()) / sizeof(Candidate);
  const int64_t own = share_begin(whole_vocabulary_, ranks_->rank(), ranks_->size());
  for (size_t row = 0; row < peaks.size(); row += most) {
    const size_t count = std::min(most, peaks.size() - row);
    Candidate* const mine = static_cast<Candidate*>(ranks_->mine());
    for (size_t i = 0; i < count; ++i) mine[i] = {peaks[row + i], int32_t(own + best.tokens[row + i])};
    ranks_->exchange(int64_t(count * sizeof(Candidate)));
    for (size_t i = 0; i < count; ++i) {
      Candidate winner = static_cast<const Candidate*>(ranks_->part(0))[i];
      for (int r = 1; r < ranks_->size(); ++r) {  // of equal ones the first wins, as in argmax; a NaN spoils the row
        const Candidate other = static_cast<const Candidate*>(ranks_->part(r))[i];
        if (other.peak > winner.peak || std::isnan(other.peak)) winner = other;
        if (std::isnan(winner.peak)) break;
      }
      peaks[row + i] = winner.peak;
      best.tokens[row + i] = winner.token;
    }
  }
}

std::map<std::string, int64_t> Program::times() {
  std::map<std::string, int64_t> taken;
  taken.swap(times_);
  return taken;
}

template <class F>
void Program::timed(const char* name, F&& f) {
  if (!measured_) return f();
  const auto begin = std::chrono::steady_clock::now();
  f();
  const auto spent = std::chrono::steady_clock::now() - begin;
  times_[name] += std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count();
}

}  // namespace ml
