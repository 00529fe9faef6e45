#include "ops/exchange.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "base/pool.h"
#include "base/span.h"

namespace ml {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kCoded = 16;  // what a coded row may have more than a plain one, and where coded rows begin
constexpr int64_t kTaskBytes = 256 << 10;  // copied by one task, some 20 microseconds

/// copy(i) for all i of `count` rows of `bytes`.
template <class F>
void copy_rows(int64_t count, int64_t bytes, F&& copy) {
  const int64_t step = std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, bytes));
  const auto some = [&](int64_t task) {
    for (int64_t i = task * step; i < std::min(count, (task + 1) * step); ++i) copy(i);
  };
  if (count <= step) return some(0);
  parallel(ceil_div(count, step), some);
}

/// columns numbers as a float32 and as many int8: value = code * factor.
template <class T>
void encode(const T* from, int64_t columns, char* to) {
  float peak = 0;
  for (int64_t i = 0; i < columns; ++i) peak = std::max(peak, std::fabs(to_f32(from[i])));
  const float factor = peak / 127, inverse = peak > 0 ? 127 / peak : 0;
  std::memcpy(to, &factor, sizeof factor);
  int8_t* const codes = reinterpret_cast<int8_t*>(to + sizeof factor);
  for (int64_t i = 0; i < columns; ++i) codes[i] = int8_t(std::lrintf(to_f32(from[i]) * inverse));
}

template <class T>
void decode(const char* from, int64_t columns, T* to) {
  float factor;
  std::memcpy(&factor, from, sizeof factor);
  const int8_t* const codes = reinterpret_cast<const int8_t*>(from + sizeof factor);
  for (int64_t i = 0; i < columns; ++i) from_f32(float(codes[i]) * factor, to + i);
}

}  // namespace

void Placement::check(int ranks) const {
  if (int(held.size()) != ranks) throw std::invalid_argument("a placement for another number of ranks");
  for (const auto& places : copies) {
    if (places.empty()) throw std::invalid_argument("an expert is nowhere");
    for (const Copy& copy : places) {
      if (copy.rank < 0 || copy.rank >= ranks || copy.slot < 0 || copy.slot >= held[size_t(copy.rank)]) {
        throw std::invalid_argument("no such place for an expert");
      }
    }
  }
}

Exchange::Exchange(std::shared_ptr<Mailboxes> boxes, Payload payload) : boxes_(std::move(boxes)), payload_(payload) {
  out_.resize(size_t(size()));
  in_.resize(size_t(size()));
  in_rows_.resize(size_t(size()));
}

int64_t Exchange::rows_offset(int64_t pairs) {
  return round_up(int64_t(sizeof(Head)) + pairs * int64_t(sizeof(Pair)), kLine);
}

int64_t Exchange::most_tokens(int64_t row_bytes, int64_t per_token) const {
  // There a row and its pairs, back a row for each pair.
  const int64_t there = row_bytes + kCoded + per_token * int64_t(sizeof(Pair)), back = row_bytes * per_token;
  return (boxes_->box_bytes() - int64_t(sizeof(Head)) - kLine) / std::max(there, back);
}

void Exchange::dispatch(const TokenRows& x, const int32_t* chosen, int64_t per_token,
                        std::shared_ptr<const Placement> placement) {
  if (x.count > most_tokens(x.bytes(), per_token)) throw std::invalid_argument("more tokens than a box holds");
  x_ = x;
  row_bytes_ = x.bytes();
  placement_ = std::move(placement);
  if (turns_.size() < placement_->copies.size()) turns_.resize(placement_->copies.size(), uint32_t(rank()));
  for (Outgoing& out : out_) {
    out.tokens.clear();
    out.pairs.clear();
  }
  sent_.resize(size_t(x.count * per_token));
  for (int64_t i = 0; i < x.count * per_token; ++i) {
    const int32_t token = int32_t(i / per_token);
    const auto& copies = placement_->copies.at(size_t(chosen[i]));
    const Copy copy = copies.size() == 1 ? copies[0] : copies[turns_[size_t(chosen[i])]++ % copies.size()];
    Outgoing& out = out_[size_t(copy.rank)];
    if (out.tokens.empty() || out.tokens.back() != token) out.tokens.push_back(token);
    sent_[size_t(i)] = {copy.rank, int32_t(out.pairs.size())};
    out.pairs.push_back({int32_t(out.tokens.size()) - 1, copy.slot});
  }
  std::vector<int64_t> bytes(size_t(size()), 0);
  for (int to = 0; to < size(); ++to) {
    if (to == rank()) continue;
    pack(to);
    const Outgoing& out = out_[size_t(to)];
    bytes[size_t(to)] = rows_offset(int64_t(out.pairs.size())) + int64_t(out.tokens.size()) * wire_bytes();
  }
  boxes_->send(bytes);
  if (payload_ != Payload::plain) keep_own();
}

int64_t Exchange::wire_bytes() const {
  return payload_ == Payload::plain ? row_bytes_ : round_up(int64_t(sizeof(float)) + x_.columns, kCoded);
}

/// A row of this rank in the form in which it travels.
void Exchange::write(int64_t token, char* out) const {
  const char* const from = x_.row(token);
  if (payload_ == Payload::plain) {
    std::memcpy(out, from, size_t(row_bytes_));
  } else if (x_.type == DType::f32) {
    encode(reinterpret_cast<const float*>(from), x_.columns, out);
  } else if (x_.type == DType::bf16) {
    encode(reinterpret_cast<const bf16*>(from), x_.columns, out);
  } else {
    encode(reinterpret_cast<const fp16*>(from), x_.columns, out);
  }
}

void Exchange::read(int64_t i, char* out) const {
  const char* const from = rows_[size_t(i)];
  if (payload_ == Payload::plain) {
    std::memcpy(out, from, size_t(row_bytes_));
  } else if (x_.type == DType::f32) {
    decode(from, x_.columns, reinterpret_cast<float*>(out));
  } else if (x_.type == DType::bf16) {
    decode(from, x_.columns, reinterpret_cast<bf16*>(out));
  } else {
    decode(from, x_.columns, reinterpret_cast<fp16*>(out));
  }
}

void Exchange::pack(int to) const {
  const Outgoing& out = out_[size_t(to)];
  const Head head{int64_t(out.tokens.size()), int64_t(out.pairs.size())};
  char* const box = boxes_->outbox(to);
  std::memcpy(box, &head, sizeof head);
  if (head.pairs > 0) std::memcpy(box + sizeof head, out.pairs.data(), out.pairs.size() * sizeof(Pair));
  char* const rows = box + rows_offset(head.pairs);
  copy_rows(head.rows, row_bytes_, [&](int64_t i) { write(out.tokens[size_t(i)], rows + i * wire_bytes()); });
}

void Exchange::keep_own() {
  const Outgoing& own = out_[size_t(rank())];
  coded_.resize(own.tokens.size() * size_t(wire_bytes()));
  copy_rows(int64_t(own.tokens.size()), row_bytes_, [&](int64_t i) {
    write(own.tokens[size_t(i)], coded_.data() + i * wire_bytes());
  });
}

void Exchange::read_message(int from, const char*& rows, std::vector<Pair>& pairs) {
  const Letter letter = boxes_->receive(from);
  Head head{};
  if (letter.bytes >= int64_t(sizeof head)) std::memcpy(&head, letter.data, sizeof head);
  const bool counts = head.rows >= 0 && head.pairs >= 0 && head.rows <= letter.bytes && head.pairs <= letter.bytes;
  if (!counts || letter.bytes != rows_offset(head.pairs) + head.rows * wire_bytes()) {
    throw std::runtime_error("the message of rank " + std::to_string(from) + " makes no sense");
  }
  pairs.resize(size_t(head.pairs));
  if (head.pairs > 0) std::memcpy(pairs.data(), letter.data + sizeof head, pairs.size() * sizeof(Pair));
  for (const Pair& pair : pairs) {
    if (pair.row < 0 || pair.row >= head.rows || pair.slot < 0 || pair.slot >= placement_->held[size_t(rank())]) {
      throw std::runtime_error("the message of rank " + std::to_string(from) + " names what is not there");
    }
  }
  rows = letter.data + rows_offset(head.pairs);
}

const std::vector<int64_t>& Exchange::arrived() {
  std::vector<int64_t>& begin = begin_;
  begin.assign(size_t(placement_->held[size_t(rank())]) + 1, 0);
  for (int from = 0; from < size(); ++from) {
    if (from == rank()) {
      in_[size_t(from)] = out_[size_t(from)].pairs;
    } else {
      read_message(from, in_rows_[size_t(from)], in_[size_t(from)]);
    }
    for (const Pair& pair : in_[size_t(from)]) ++begin[size_t(pair.slot) + 1];
  }
  for (size_t slot = 1; slot < begin.size(); ++slot) begin[slot] += begin[slot - 1];
  rows_.resize(size_t(begin.back()));
  origin_.resize(size_t(begin.back()));
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  const std::vector<int32_t>& own_tokens = out_[size_t(rank())].tokens;
  for (int from = 0; from < size(); ++from) {
    const auto& pairs = in_[size_t(from)];
    for (size_t i = 0; i < pairs.size(); ++i) {
      const size_t at = size_t(next[size_t(pairs[i].slot)]++);
      origin_[at] = {from, int32_t(i)};
      const int32_t row = pairs[i].row;
      if (from != rank()) {
        rows_[at] = in_rows_[size_t(from)] + row * wire_bytes();
      } else if (payload_ == Payload::plain) {
        rows_[at] = x_.row(own_tokens[size_t(row)]);
      } else {
        rows_[at] = coded_.data() + row * wire_bytes();
      }
    }
  }
  return begin_;
}

void Exchange::give_back(const char* z) {
  own_.resize(in_[size_t(rank())].size());
  copy_rows(int64_t(origin_.size()), row_bytes_, [&](int64_t i) {
    const auto [to, pair] = origin_[size_t(i)];
    if (to == rank()) {
      own_[size_t(pair)] = z + i * row_bytes_;
    } else {
      std::memcpy(boxes_->outbox(to) + pair * row_bytes_, z + i * row_bytes_, size_t(row_bytes_));
    }
  });
  std::vector<int64_t> bytes(size_t(size()), 0);
  for (int to = 0; to < size(); ++to) {
    if (to != rank()) bytes[size_t(to)] = int64_t(in_[size_t(to)].size()) * row_bytes_;
  }
  boxes_->send(bytes);
}

const std::vector<const char*>& Exchange::returned() {
  std::vector<const char*> rows(size_t(size()), nullptr);
  for (int from = 0; from < size(); ++from) {
    if (from == rank()) continue;
    const Letter letter = boxes_->receive(from);
    if (letter.bytes != int64_t(out_[size_t(from)].pairs.size()) * row_bytes_) {
      throw std::runtime_error("rank " + std::to_string(from) + " returns another number of rows");
    }
    rows[size_t(from)] = letter.data;
  }
  returned_.resize(sent_.size());
  for (size_t i = 0; i < sent_.size(); ++i) {
    const auto [to, pair] = sent_[i];
    returned_[i] = to == rank() ? own_[size_t(pair)] : rows[size_t(to)] + pair * row_bytes_;
  }
  return returned_;
}

void* Exchange::memory(int64_t bytes, int slot) {
  Buffer& buffer = memory_[slot];
  if (bytes > buffer.bytes()) {
    buffer = Buffer();
    buffer = Buffer(round_up(bytes, kHugePage));
  }
  return buffer.data();
}

}  // namespace ml
