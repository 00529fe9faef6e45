#include "program/program.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>

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

void Program::report_every(int32_t every, int64_t base) {
  if (every < 0 || (every > 0 && step_.report.word == nullptr)) throw std::invalid_argument("nowhere to report to");
  step_.report.every = every;
  step_.report.base = base;
}

void Program::run(const Batch& batch) {
  timed("plan", [&] { step_.begin(batch, buffers_, windows_); });
  for (const auto& op : ops_) timed(op->name(), [&] { op->run(step_); });
}

float* Program::logits(int64_t begin, int64_t end) {
  if (!head_ || begin < 0 || begin > end || end > kept_count()) throw std::out_of_range("no such kept tokens");
  const int64_t bytes = (end - begin) * head_->vocabulary() * int64_t(sizeof(float));
  if (bytes > logits_.bytes()) {
    logits_ = Buffer();
    logits_ = Buffer(round_up(bytes, kHugePage));
  }
  float* out = static_cast<float*>(logits_.data());
  const char* hidden = static_cast<const char*>(step_.at(hidden_buffer_)) + begin * hidden_row_bytes_;
  if (end > begin) timed("head", [&] { head_->run(hidden, end - begin, out); });
  return out;
}

Program::Best Program::best(int64_t begin, int64_t end) {
  const float* const values = logits(begin, end);
  Best found;
  found.tokens.resize(size_t(end - begin));
  std::vector<float> peaks(size_t(end - begin));
  timed("argmax", [&] { argmax(values, end - begin, vocabulary(), found.tokens.data(), peaks.data()); });
  for (size_t i = 0; i < peaks.size(); ++i) {
    if (!std::isfinite(peaks[i])) found.broken.push_back(int64_t(i));
  }
  return found;
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
