// The ops a program is made of. Each makes one call of the kernels in ops/ for the whole batch.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/ranks.h"
#include "ops/by_head.h"
#include "ops/gemm.h"
#include "ops/moe.h"
#include "ops/rope.h"
#include "ops/rowops.h"
#include "program/program.h"

namespace ml {

/// Memory of a weight that somebody else owns: kept alive with the op.
struct Weight {
  std::shared_ptr<const void> owner;
  const void* data = nullptr;
  int64_t size = 0;
};

/// out = table[ids] * scale.
class EmbedOp : public Op {
 public:
  EmbedOp(int out, Weight table, DType type, int64_t rows, int64_t columns, float scale)
      : out_(out), table_(std::move(table)), type_(type), rows_(rows), columns_(columns), scale_(scale) {}
  const char* name() const override { return "embed"; }
  void run(Step& step) const override;

 private:
  int out_;
  Weight table_;
  DType type_;
  int64_t rows_, columns_;
  float scale_;
};

/// out = the hidden states that came with the batch.
class GivenOp : public Op {
 public:
  GivenOp(int out, int64_t columns) : out_(out), columns_(columns) {}
  const char* name() const override { return "given"; }
  void run(Step& step) const override;

 private:
  int out_;
  int64_t columns_;
};

/// The same as EmbedOp from a packed matrix (f32 or bf16, not gated), so that a model whose head is its embedding holds it once.
class PackedEmbedOp : public Op {
 public:
  PackedEmbedOp(int out, PackedWeight table, float scale) : out_(out), table_(std::move(table)), scale_(scale) {}
  const char* name() const override { return "embed"; }
  void run(Step& step) const override;

 private:
  int out_;
  PackedWeight table_;
  float scale_;
};

/// out = norm(x), or out += norm(x) when `added`.
class NormOp : public Op {
 public:
  NormOp(int x, int out, Weight weight, int64_t dim, NormForm form, float eps, bool added)
      : x_(x), out_(out), weight_(std::move(weight)), dim_(dim), form_(form), eps_(eps), added_(added) {}
  const char* name() const override { return "norm"; }
  void run(Step& step) const override;

 private:
  int x_, out_;
  Weight weight_;  // [dim]
  int64_t dim_;
  NormForm form_;
  float eps_;
  bool added_;
};

/// out = epilogue(x W^T + bias) + residual; residual < 0: none. With `ranks` x W^T is summed over all of them.
class LinearOp : public Op {
 public:
  LinearOp(int x, int out, PackedWeight weight, Weight bias, int residual, Activation act,
           std::shared_ptr<Ranks> ranks = nullptr)
      : x_(x),
        out_(out),
        weight_(std::move(weight)),
        bias_(std::move(bias)),
        residual_(residual),
        act_(act),
        ranks_(std::move(ranks)) {}
  const char* name() const override { return "linear"; }
  void run(Step& step) const override;

 private:
  int x_, out_;
  PackedWeight weight_;
  Weight bias_;
  int residual_;
  Activation act_;
  std::shared_ptr<Ranks> ranks_;
};

/// out = moe(x) + residual; residual < 0: none.
class MoeOp : public Op {
 public:
  MoeOp(int x, int out, Moe moe, int residual) : x_(x), out_(out), moe_(std::move(moe)), residual_(residual) {}
  const char* name() const override { return "experts"; }
  void run(Step& step) const override;

 private:
  int x_, out_;
  Moe moe_;
  int residual_;
};

/// Rotates q and k of qkv [T, (H + 2K) D], stores k and v in the pool, and attends: out [T, H D].
class AttendOp : public Op {
 public:
  struct Layer {
    int32_t index;
    Weight rotation;      // [positions, D] float32
    Weight q_norm, k_norm;  // [D], or without data
    Weight sinks;           // [H] float32, or without data
    NormForm norm_form;
    float eps;
    float scale;
    int32_t window;  // 0: none
    float softcap;   // 0: none
    int plan;        // number of the attention plan
  };
  AttendOp(int qkv, int out, Layer layer) : qkv_(qkv), out_(out), layer_(std::move(layer)) {}
  const char* name() const override { return "attend"; }
  void run(Step& step) const override;

 private:
  void rotate_and_store(Step& step, const KvView& kv) const;
  int qkv_, out_;
  Layer layer_;
};

/// Each head's numbers times its weight; see gemm_by_head.
class ByHeadOp : public Op {
 public:
  ByHeadOp(int x, int out, std::vector<PackedWeight> weights, int64_t tail)
      : x_(x), out_(out), weights_(std::move(weights)), tail_(tail) {}
  const char* name() const override { return "by_head"; }
  void run(Step& step) const override;

 private:
  int x_, out_;
  std::vector<PackedWeight> weights_;
  int64_t tail_;
};

/// Normalises and rotates latents [T, D] and stores them in the pool, rotates q [T, H D], and attends: out [T, H Dv],
/// where D is the shape's head_dim and Dv its value_dim. Normalised are the first Dv numbers of a latent, rotated those
/// behind them, in latents and in q.
class LatentAttendOp : public Op {
 public:
  struct Layer {
    int32_t index;
    Weight rotation;   // [positions, D - Dv] float32
    bool interleaved;  // neighbours are a pair
    Weight norm;       // [Dv]
    NormForm norm_form;
    float eps;
    float scale;
    int plan;  // number of the attention plan
  };
  LatentAttendOp(int q, int latent, int out, Layer layer) : q_(q), latent_(latent), out_(out), layer_(std::move(layer)) {}
  const char* name() const override { return "attend"; }
  void run(Step& step) const override;

 private:
  void rotate_and_store(Step& step, const KvView& kv) const;
  int q_, latent_, out_;
  Layer layer_;
};

/// out = the kept rows of x.
class SelectOp : public Op {
 public:
  SelectOp(int x, int out, int64_t columns) : x_(x), out_(out), columns_(columns) {}
  const char* name() const override { return "select"; }
  void run(Step& step) const override;

 private:
  int x_, out_;
  int64_t columns_;
};

/// Logits in float32: W x, bounded by softcap * tanh(x / softcap) when softcap is not 0.
class LinearHead : public Program::Head {
 public:
  LinearHead(PackedWeight weight, DType type, float softcap)
      : weight_(std::move(weight)), type_(type), softcap_(softcap) {}
  int64_t vocabulary() const override;
  void run(const void* hidden, int64_t count, float* logits) const override;

 private:
  PackedWeight weight_;
  DType type_;
  float softcap_;
};

}  // namespace ml
