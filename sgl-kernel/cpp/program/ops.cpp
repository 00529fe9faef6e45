#include "program/ops.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "base/pool.h"
#include "ops/reduce.h"
#include "ops/softcap.h"

namespace ml {

namespace {

void check_ids(const Step& step, int64_t vocabulary) {
  for (int64_t id : step.ids) {
    if (id < 0 || id >= vocabulary) throw std::out_of_range("an input id is not in the vocabulary");
  }
}

/// Row `row` of a packed matrix, times scale. T: bf16 or float, what the weight and `out` hold. See ops/pack.h for the
/// layout.
template <class T>
void unpack_row(const PackedWeight& w, int64_t row, float scale, T* out) {
  constexpr int64_t kGroup = sizeof(T) == 2 ? 2 : 1;  // numbers of K that lie side by side
  const T* at = reinterpret_cast<const T*>(w.panel(row / kPanel)) + row % kPanel * kGroup;
  for (int64_t k = 0; k < w.k; k += kGroup, at += kPanel * kGroup) {
    for (int64_t i = 0; i < kGroup && k + i < w.k; ++i) from_f32(to_f32(at[i]) * scale, out + k + i);
  }
}

}  // namespace

void EmbedOp::run(Step& step) const {
  check_ids(step, rows_);
  embedding({type_, scale_, columns_, table_.data, columns_, step.ids.data(), step.at(out_), step.stride(columns_)},
            step.tokens());
}

void GivenOp::run(Step& step) const {
  if (step.given == nullptr) throw std::invalid_argument("the batch brings no hidden states");
  const int64_t row_bytes = columns_ * bytes_of(step.shape.dtype), stride = step.stride(columns_) * bytes_of(step.shape.dtype);
  for (int64_t t = 0; t < step.tokens(); ++t) {
    std::memcpy(static_cast<char*>(step.at(out_)) + t * stride, static_cast<const char*>(step.given) + t * row_bytes,
                size_t(row_bytes));
  }
}

void PackedEmbedOp::run(Step& step) const {
  check_ids(step, table_.n);
  constexpr int64_t kTaskElements = 16 * 1024;  // some 20 microseconds: every pair of numbers is on a line of its own
  const int64_t per_task = std::max<int64_t>(1, kTaskElements / table_.k), tokens = step.tokens();
  const int64_t stride = step.stride(table_.k);
  const auto rows = [&](int64_t task) {
    for (int64_t t = task * per_task; t < std::min(tokens, (task + 1) * per_task); ++t) {
      const int64_t id = step.ids[size_t(t)];
      if (table_.kind == WeightKind::bf16) {
        unpack_row(table_, id, scale_, static_cast<bf16*>(step.at(out_)) + t * stride);
      } else {
        unpack_row(table_, id, scale_, static_cast<float*>(step.at(out_)) + t * stride);
      }
    }
  };
  if (tokens <= per_task) return rows(0);
  parallel(ceil_div(tokens, per_task), rows);
}

void NormOp::run(Step& step) const {
  RmsNorm norm{};
  norm.type = step.shape.dtype;
  norm.form = form_;
  norm.sum = added_ ? NormSum::after : NormSum::none;
  norm.eps = eps_;
  norm.dim = dim_;
  norm.weight = weight_.data;
  norm.x = step.at(x_);
  norm.residual = norm.y = step.at(out_);
  norm.ldx = norm.ld_residual = norm.ldy = step.stride(dim_);
  rms_norm(norm, step.rows_of(out_));
}

void LinearOp::run(Step& step) const {
  const int64_t rows = step.rows_of(out_);
  if (rows == 0) return;
  const int64_t stride = step.stride(weight_.columns());
  Epilogue epilogue;
  epilogue.bias = static_cast<const float*>(bias_.data);
  epilogue.act = act_;
  if (residual_ >= 0) {
    epilogue.residual = step.at(residual_);
    epilogue.ld_residual = stride;
  }
  const DType type = step.shape.dtype;
  if (ranks_) {
    return reduced_gemm(*ranks_, weight_, step.at(x_), step.stride(weight_.k), step.at(out_), stride, type, rows,
                        epilogue);
  }
  gemm(weight_, step.at(x_), type, step.stride(weight_.k), step.at(out_), type, stride, rows, epilogue);
}

void MoeOp::run(Step& step) const {
  const int64_t rows = step.rows_of(out_), stride = step.stride(moe_.size());
  if (rows == 0 && !moe_.own_tokens()) return;
  const void* residual = residual_ < 0 ? nullptr : step.at(residual_);
  moe_.run(step.at(x_), stride, step.at(out_), stride, residual, stride, step.shape.dtype, rows);
}

void AttendOp::run(Step& step) const {
  const KvView kv = step.pool.layer(layer_.index, step.shape);
  if (step.last_position() >= layer_.rotation.size / step.shape.head_dim) {
    throw std::out_of_range("a position is beyond the rotation table");
  }
  rotate_and_store(step, kv);
  step.report.stored(layer_.index + 1);
  AttendCall call{};
  call.kv = kv;
  call.q = step.at(qkv_);
  call.out = step.at(out_);
  call.dtype = step.shape.dtype;
  call.q_heads = step.shape.heads;
  call.q_stride = step.stride(int64_t{step.shape.heads + 2 * step.shape.kv_heads} * step.shape.head_dim);
  call.out_stride = step.stride(int64_t{step.shape.heads} * step.shape.head_dim);
  call.window = layer_.window;
  call.scale = layer_.scale;
  call.softcap = layer_.softcap;
  call.sinks = static_cast<const float*>(layer_.sinks.data);
  ml::attend(call, step.plan(layer_.plan));
}

void AttendOp::rotate_and_store(Step& step, const KvView& kv) const {
  const ModelShape& shape = step.shape;
  const int64_t dim = shape.head_dim, item = bytes_of(shape.dtype);
  char* qkv = static_cast<char*>(step.at(qkv_));
  const DType norm_type = layer_.norm_form == NormForm::gemma ? DType::f32 : shape.dtype;
  const float* table = static_cast<const float*>(layer_.rotation.data);
  RopeCall call{};
  call.q = call.q_out = qkv;
  call.k = qkv + shape.heads * dim * item;
  call.v = qkv + (shape.heads + shape.kv_heads) * dim * item;
  call.dtype = shape.dtype;
  call.q_stride = step.stride((shape.heads + 2 * shape.kv_heads) * dim);
  call.k_stride = call.v_stride = call.q_out_stride = call.q_stride;
  call.q_heads = shape.heads;
  call.head_dim = shape.head_dim;
  call.eps = layer_.eps;
  call.q_norm = {layer_.q_norm.data, norm_type, shape.head_dim};
  call.k_norm = {layer_.k_norm.data, norm_type, shape.head_dim};
  call.rope = {table, table + dim / 2, DType::f32, dim, step.positions.data(), 0, shape.head_dim, false, false};
  call.kv = kv;
  call.store_page = step.store_page.data();
  call.store_offset = step.store_offset.data();
  call.tokens = step.tokens();
  rope_store(call);
}

void ByHeadOp::run(Step& step) const {
  const int64_t rows = step.rows_of(out_), heads = int64_t(weights_.size());
  if (rows == 0) return;
  const int64_t ldx = step.stride(heads * (weights_[0].k + tail_)), ldy = step.stride(heads * (weights_[0].n + tail_));
  gemm_by_head(weights_, {step.at(x_), step.at(out_), step.shape.dtype, ldx, ldy, tail_}, rows);
}

void LatentAttendOp::run(Step& step) const {
  const ModelShape& shape = step.shape;
  const KvView kv = step.pool.layer(layer_.index, shape);
  if (step.last_position() >= layer_.rotation.size / (shape.head_dim - shape.value_dim)) {
    throw std::out_of_range("a position is beyond the rotation table");
  }
  rotate_and_store(step, kv);
  step.report.stored(layer_.index + 1);
  AttendCall call{};
  call.kv = kv;
  call.q = step.at(q_);
  call.out = step.at(out_);
  call.dtype = shape.dtype;
  call.q_heads = shape.heads;
  call.q_stride = step.stride(int64_t{shape.heads} * shape.head_dim);
  call.out_stride = step.stride(int64_t{shape.heads} * shape.value_dim);
  call.scale = layer_.scale;
  ml::attend(call, step.plan(layer_.plan));
}

void LatentAttendOp::rotate_and_store(Step& step, const KvView& kv) const {
  const ModelShape& shape = step.shape;
  const int32_t rotated = shape.head_dim - shape.value_dim;
  const float* table = static_cast<const float*>(layer_.rotation.data);
  RopeCall call{};
  call.q = call.q_out = step.at(q_);
  call.k = step.at(latent_);
  call.dtype = shape.dtype;
  call.q_stride = call.q_out_stride = step.stride(int64_t{shape.heads} * shape.head_dim);
  call.k_stride = step.stride(shape.head_dim);
  call.q_heads = shape.heads;
  call.head_dim = shape.head_dim;
  call.eps = layer_.eps;
  call.k_norm = {layer_.norm.data, layer_.norm_form == NormForm::gemma ? DType::f32 : shape.dtype, shape.value_dim};
  call.rope = {table,   table + rotated / 2, DType::f32, rotated, step.positions.data(), shape.value_dim,
               rotated, false,               layer_.interleaved};
  call.kv = kv;
  call.store_page = step.store_page.data();
  call.store_offset = step.store_offset.data();
  call.tokens = step.tokens();
  rope_store(call);
}

void SelectOp::run(Step& step) const {
  const char* from = static_cast<const char*>(step.at(x_));
  char* to = static_cast<char*>(step.at(out_));
  const int64_t stride = step.stride(columns_) * bytes_of(step.shape.dtype);
  for (int64_t i = 0; i < step.kept_count(); ++i) {
    std::memcpy(to + i * stride, from + step.kept[size_t(i)] * stride, size_t(stride));
  }
}

int64_t LinearHead::vocabulary() const { return weight_.n; }

void LinearHead::run(const void* hidden, int64_t count, float* logits) const {
  gemm(weight_, hidden, type_, stride_of(weight_.k, type_), logits, DType::f32, weight_.n, count, {});
  if (softcap_ != 0) softcap(logits, count, weight_.n, softcap_);
}

}  // namespace ml
