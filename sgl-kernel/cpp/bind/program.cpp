// sgl_kernel.Program: built op by op when a model is loaded, then run with one call per step.
#include "program/program.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "bind/arrays.h"
#include "bind/module.h"
#include "base/cpu.h"
#include "bind/kv_view.h"
#include "program/ops.h"

namespace nb = nanobind;
using namespace nb::literals;
using ml::bind::ReadArray;
using ml::bind::refuse;

namespace {

using Ints = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

ml::DType dtype_named(const std::string& name) {
  if (name == "float32") return ml::DType::f32;
  if (name == "bfloat16") return ml::DType::bf16;
  if (name == "float16") return ml::DType::f16;
  refuse("no program runs in " + name);
}

ml::NormForm form_named(const std::string& name) {
  if (name == "llama") return ml::NormForm::llama;
  if (name == "gemma") return ml::NormForm::gemma;
  refuse("no such form of a norm: " + name);
}

/// The array's memory, kept alive by the weight.
ml::Weight share(const ReadArray& array) {
  ml::Weight weight;
  weight.data = array.data();
  weight.size = int64_t(array.size());
  weight.owner = std::make_shared<ReadArray>(array);
  return weight;
}

ml::Weight share_vector(const std::optional<ReadArray>& array, const char* name, ml::DType type, int64_t size) {
  if (!array) return {};
  ml::bind::vector(*array, name, type, size);
  return share(*array);
}

/// What a program knows of its values while it is written: the columns of each buffer's present value.
class Writer {
 public:
  Writer(const std::string& dtype, int heads, int kv_heads, int head_dim, int value_dim)
      : program_({dtype_named(dtype), heads, kv_heads, head_dim, value_dim}) {
    if (kv_heads < 1 || heads < 1 || heads % kv_heads != 0 || head_dim < 1) refuse("heads, kv_heads or head_dim is wrong");
    if (value_dim != 0 && (kv_heads != 1 || value_dim < 0 || value_dim >= head_dim)) {
      refuse("a latent is one KV head, and its value a part of it");
    }
  }

  int buffer(int64_t columns, bool kept) {
    values_.push_back({columns, 0, kept});
    return program_.buffer(columns, kept);
  }

  void embed(int out, const ReadArray& table, float scale) {
    const ml::bind::Matrix matrix = ml::bind::matrix(table, "table");
    if (matrix.type != dtype() || matrix.ld != matrix.columns) refuse("table: must be contiguous and of the program's dtype");
    define(out, matrix.columns);
    if (values_[size_t(out)].kept) refuse("embed: every token has an id, not only the kept ones");
    program_.add(std::make_unique<ml::EmbedOp>(out, share(table), dtype(), matrix.rows, matrix.columns, scale));
  }

  void embed_packed(int out, const ml::PackedWeight& table, float scale) {
    const bool same = dtype() == ml::DType::f32 ? table.kind == ml::WeightKind::f32
                                                : dtype() == ml::DType::bf16 && table.kind == ml::WeightKind::bf16;
    if (!same || table.gated) refuse("table: must be packed in the program's dtype, and not gated");
    define(out, table.k);
    if (values_[size_t(out)].kept) refuse("embed: every token has an id, not only the kept ones");
    program_.add(std::make_unique<ml::PackedEmbedOp>(out, table, scale));
  }

  void given(int out, int64_t columns) {
    define(out, columns);
    if (values_[size_t(out)].kept) refuse("given: every token has hidden states, not only the kept ones");
    program_.add(std::make_unique<ml::GivenOp>(out, columns));
  }

  void norm(int x, int out, const ReadArray& weight, float eps, const std::string& form, bool added) {
    const int64_t dim = columns(x);
    const ml::NormForm chosen = form_named(form);
    const ml::DType type = chosen == ml::NormForm::gemma ? ml::DType::f32 : dtype();
    ml::Weight shared = share_vector(weight, "weight", type, dim);
    if (added && columns(out) != dim) refuse("norm: the residual has another width");
    same_kind(x, out);
    define(out, dim);
    program_.add(std::make_unique<ml::NormOp>(x, out, std::move(shared), dim, chosen, eps, added));
  }

  void linear(int x, int out, const ml::PackedWeight& weight, const std::optional<ReadArray>& bias, int residual,
              const std::string& act, std::shared_ptr<ml::Ranks> ranks) {
    if (columns(x) != weight.k) refuse("linear: x has " + std::to_string(columns(x)) + " columns, not " +
                                          std::to_string(weight.k));
    const ml::Activation chosen = act_named(act);
    if (weight.gated != (chosen != ml::Activation::none)) refuse("linear: an activation needs a gated weight");
    const int64_t width = weight.columns();
    if (residual >= 0 && columns(residual) != width) refuse("linear: the residual has another width");
    if (ranks && weight.gated) refuse("linear: an activation comes after the sum over the ranks");
    same_kind(x, out);
    define(out, width);
    program_.add(std::make_unique<ml::LinearOp>(x, out, weight, share_vector(bias, "bias", ml::DType::f32, weight.n),
                                                residual, chosen, std::move(ranks)));
  }

  void experts(int x, int out, const ml::Moe& moe, int residual) {
    const int64_t width = columns(x);
    if (width != moe.size()) refuse("experts: x has another width");
    if (residual >= 0 && columns(residual) != width) refuse("experts: the residual has another width");
    if (x == out) refuse("experts: out must not be x");
    same_kind(x, out);
    define(out, width);
    program_.add(std::make_unique<ml::MoeOp>(x, out, moe, residual));
  }

  void attend(int qkv, int out, int layer, const ReadArray& rotation, const std::optional<ReadArray>& q_norm,
              const std::optional<ReadArray>& k_norm, float eps, const std::string& norm_form, float scale, int window,
              float softcap, const std::optional<ReadArray>& sinks) {
    const ml::ModelShape& shape = program_.shape();
    if (shape.value_dim != 0) refuse("attend: the program's pages hold latents");
    if (columns(qkv) != int64_t{shape.heads + 2 * shape.kv_heads} * shape.head_dim) refuse("attend: qkv has another width");
    if (values_[size_t(qkv)].kept) refuse("attend: it needs every token");
    const ml::bind::Matrix table = ml::bind::matrix(rotation, "rotation");
    if (table.type != ml::DType::f32 || table.columns != shape.head_dim || table.ld != table.columns) {
      refuse("rotation: must be [positions, head_dim] float32");
    }
    ml::AttendOp::Layer made;
    made.index = layer;
    made.rotation = share(rotation);
    made.norm_form = form_named(norm_form);
    const ml::DType type = made.norm_form == ml::NormForm::gemma ? ml::DType::f32 : dtype();
    made.q_norm = share_vector(q_norm, "q_norm", type, shape.head_dim);
    made.k_norm = share_vector(k_norm, "k_norm", type, shape.head_dim);
    made.sinks = share_vector(sinks, "sinks", ml::DType::f32, shape.heads);
    made.eps = eps;
    made.scale = scale;
    made.window = window;
    made.softcap = softcap;
    made.plan = program_.plan_for(window);
    same_kind(qkv, out);
    define(out, int64_t{shape.heads} * shape.head_dim);
    program_.add(std::make_unique<ml::AttendOp>(qkv, out, std::move(made)));
  }

  void by_head(int x, int out, std::vector<ml::PackedWeight> weights, int64_t tail) {
    if (weights.empty()) refuse("by_head: one weight per head");
    const int64_t heads = int64_t(weights.size()), n = weights[0].n, k = weights[0].k;
    for (const ml::PackedWeight& weight : weights) {
      if (weight.gated || weight.n != n || weight.k != k || weight.kind != weights[0].kind) {
        refuse("by_head: all heads have weights of one shape and kind");
      }
    }
    if (x == out) refuse("by_head: out must not be x");
    if (columns(x) != heads * (k + tail)) refuse("by_head: x has another width");
    same_kind(x, out);
    define(out, heads * (n + tail));
    program_.add(std::make_unique<ml::ByHeadOp>(x, out, std::move(weights), tail));
  }

  void attend_latent(int q, int latent, int out, int layer, const ReadArray& rotation, bool interleaved,
                     const ReadArray& norm, float eps, const std::string& norm_form, float scale) {
    const ml::ModelShape& shape = program_.shape();
    if (shape.value_dim == 0) refuse("attend_latent: the program has no latents");
    if (columns(q) != int64_t{shape.heads} * shape.head_dim) refuse("attend_latent: q has another width");
    if (columns(latent) != shape.head_dim) refuse("attend_latent: the latent has another width");
    if (values_[size_t(q)].kept) refuse("attend_latent: it needs every token");
    const ml::bind::Matrix table = ml::bind::matrix(rotation, "rotation");
    if (table.type != ml::DType::f32 || table.columns != shape.head_dim - shape.value_dim || table.ld != table.columns) {
      refuse("rotation: must be [positions, head_dim - value_dim] float32");
    }
    ml::LatentAttendOp::Layer made;
    made.index = layer;
    made.rotation = share(rotation);
    made.interleaved = interleaved;
    made.norm_form = form_named(norm_form);
    made.norm = share_vector(norm, "norm", made.norm_form == ml::NormForm::gemma ? ml::DType::f32 : dtype(),
                             shape.value_dim);
    made.eps = eps;
    made.scale = scale;
    made.plan = program_.plan_for(0);
    same_kind(q, latent);
    same_kind(q, out);
    define(out, int64_t{shape.heads} * shape.value_dim);
    program_.add(std::make_unique<ml::LatentAttendOp>(q, latent, out, std::move(made)));
  }

  void select(int x, int out) {
    if (values_[size_t(x)].kept || !values_[size_t(out)].kept) refuse("select: from all tokens to the kept ones");
    const int64_t width = columns(x);
    define(out, width);
    program_.add(std::make_unique<ml::SelectOp>(x, out, width));
  }

  void head(int hidden, const ml::PackedWeight& weight, float softcap) {
    if (columns(hidden) != weight.k) refuse("head: the hidden states have another width");
    if (!values_[size_t(hidden)].kept) refuse("head: the hidden states are not those of the kept tokens");
    program_.set_head(hidden, weight.k, std::make_unique<ml::LinearHead>(weight, dtype(), softcap));
  }

  void end(int hidden) {
    if (values_[size_t(hidden)].kept) refuse("end: the hidden states are not those of all tokens");
    program_.set_end(hidden, columns(hidden));
  }

  void share_head(std::shared_ptr<ml::Ranks> ranks, int64_t vocabulary) {
    const int64_t first = ml::share_begin(vocabulary, ranks->rank(), ranks->size());
    if (program_.vocabulary() != ml::share_begin(vocabulary, ranks->rank() + 1, ranks->size()) - first) {
      refuse("head: not this rank's share of the vocabulary");
    }
    program_.share_head(std::move(ranks), vocabulary);
  }

  void set_pool(uint64_t address, int64_t pages, int layers, int page_tokens, const std::string& type) {
    ml::KvPool pool;
    pool.base = reinterpret_cast<char*>(address);
    pool.pages = pages;
    pool.layers = layers;
    pool.page_tokens = page_tokens;
    pool.type = ml::bind::pool_dtype_named(type);
    program_.set_pool(pool);
  }

  void report_to(uint64_t address, int event) { program_.report_to(reinterpret_cast<int64_t*>(address), event); }

  void run(const Ints& ids, const Ints& slots, const Ints& starts, const Ints& lengths, const Table& pages,
           const Ints& kept, uint64_t given) {
    const auto span = [](const Ints& array) { return ml::Span<const int64_t>{array.data(), int64_t(array.size())}; };
    const ml::Batch batch{span(ids),    span(slots),
                          span(starts), span(lengths),
                          span(kept),   pages.data(),
                          int64_t(pages.shape(0)), int64_t(pages.shape(1)),
                          reinterpret_cast<const void*>(given)};
    const nb::gil_scoped_release free;
    program_.run(batch);
  }

  float* logits(int64_t begin, int64_t end) {
    const nb::gil_scoped_release free;
    return program_.logits(begin, end);
  }

  std::pair<std::vector<int64_t>, std::vector<int64_t>> best(int64_t begin, int64_t end) {
    const nb::gil_scoped_release free;
    ml::Program::Best found = program_.best(begin, end);
    return {std::move(found.tokens), std::move(found.broken)};
  }

  ml::Program& program() { return program_; }

 private:
  struct Value {
    int64_t capacity;
    int64_t columns;
    bool kept;
  };

  ml::DType dtype() const { return program_.shape().dtype; }

  int64_t columns(int buffer) const {
    if (buffer < 0 || size_t(buffer) >= values_.size()) refuse("no such buffer: " + std::to_string(buffer));
    return values_[size_t(buffer)].columns;
  }

  void define(int buffer, int64_t columns) {
    if (buffer < 0 || size_t(buffer) >= values_.size()) refuse("no such buffer: " + std::to_string(buffer));
    if (columns > values_[size_t(buffer)].capacity) refuse("the buffer is too small");
    values_[size_t(buffer)].columns = columns;
  }

  void same_kind(int x, int out) const {
    columns(out);
    if (values_[size_t(x)].kept != values_[size_t(out)].kept) refuse("one buffer holds all tokens, the other the kept ones");
  }

  static ml::Activation act_named(const std::string& name) {
    if (name.empty()) return ml::Activation::none;
    if (name == "silu") return ml::Activation::silu;
    if (name == "gelu_tanh") return ml::Activation::gelu_tanh;
    if (name == "gelu_erf") return ml::Activation::gelu_erf;
    if (name == "relu") return ml::Activation::relu;
    refuse("no such activation: " + name);
  }

  ml::Program program_;
  std::vector<Value> values_;
};

}  // namespace

ML_BIND(program) {
  nb::class_<Writer>(m, "Program")
      .def(nb::init<const std::string&, int, int, int, int>(), nb::kw_only(), "dtype"_a, "heads"_a, "kv_heads"_a,
           "head_dim"_a, "value_dim"_a = 0)
      .def("buffer", &Writer::buffer, "columns"_a, "kept"_a)
      .def("embed", &Writer::embed, "out"_a, "table"_a, "scale"_a)
      .def("embed_packed", &Writer::embed_packed, "out"_a, "table"_a, "scale"_a)
      .def("given", &Writer::given, "out"_a, "columns"_a)
      .def("norm", &Writer::norm, "x"_a, "out"_a, "weight"_a, "eps"_a, "form"_a, "added"_a)
      .def("linear", &Writer::linear, "x"_a, "out"_a, "weight"_a, "bias"_a.none(), "residual"_a, "act"_a,
           "ranks"_a = nb::none())
      .def("experts", &Writer::experts, "x"_a, "out"_a, "moe"_a, "residual"_a)
      .def("attend", &Writer::attend, "qkv"_a, "out"_a, nb::kw_only(), "layer"_a, "rotation"_a, "q_norm"_a.none(),
           "k_norm"_a.none(), "eps"_a, "norm_form"_a, "scale"_a, "window"_a, "softcap"_a,
           "sinks"_a = nb::none())
      .def("by_head", &Writer::by_head, "x"_a, "out"_a, "weights"_a, "tail"_a)
      .def("attend_latent", &Writer::attend_latent, "q"_a, "latent"_a, "out"_a, nb::kw_only(), "layer"_a, "rotation"_a,
           "interleaved"_a, "norm"_a, "eps"_a, "norm_form"_a, "scale"_a)
      .def("select", &Writer::select, "x"_a, "out"_a)
      .def("head", &Writer::head, "hidden"_a, "weight"_a, "softcap"_a)
      .def("end", &Writer::end, "hidden"_a)
      .def(
          "hand_over", [](Writer& w, uint64_t to) { w.program().hand_over(reinterpret_cast<void*>(to)); }, "to"_a,
          nb::call_guard<nb::gil_scoped_release>())
      .def("share_head", &Writer::share_head, "ranks"_a, "vocabulary"_a)
      .def("set_pool", &Writer::set_pool, "address"_a, "pages"_a, "layers"_a, "page_tokens"_a, "dtype"_a)
      .def("report_to", &Writer::report_to, "address"_a, "event"_a)
      .def("report_every", [](Writer& w, int every, int64_t base) { w.program().report_every(every, base); }, "every"_a,
           "base"_a)
      .def("run", &Writer::run, "ids"_a, "slots"_a, "starts"_a, "lengths"_a, "pages"_a, "kept"_a,
           "given"_a = 0)
      .def(
          "logits",
          [](nb::handle_t<Writer> self, int64_t begin, int64_t end) {
            Writer& writer = nb::cast<Writer&>(self);
            float* data = writer.logits(begin, end);
            const size_t shape[2] = {size_t(end - begin), size_t(writer.program().vocabulary())};
            return nb::ndarray<nb::numpy, float, nb::ndim<2>>(data, 2, shape, self);
          },
          "begin"_a, "end"_a)
      .def("best", &Writer::best, "begin"_a, "end"_a)
      .def_prop_ro_static("isa", [](nb::handle) { return std::string(ml::isa_name(ml::isa())); })
      .def_prop_rw(
          "measured", [](Writer& writer) { return writer.program().measured(); },
          [](Writer& writer, bool on) { writer.program().measure(on); })
      .def("times", [](Writer& writer) { return writer.program().times(); });
}
