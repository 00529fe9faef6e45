// Attention, see attention.h: which arithmetic serves which types, and the merge of partial results.
#include "ops/attention_few.h"
#include "ops/attention_item.h"

namespace ml::ML_ISA {

namespace {

#if defined(ML_ISA_AVX512)
/// bf16 queries multiply bf16 pairs, also when keys and values are stored narrower: those are exact in bf16.
bool pairs(const AttendCall& call) {
  return call.dtype == DType::bf16 && call.kv.type != DType::f32 && call.kv.type != DType::f16;
}
#endif

template <class A, class T>
Reader<A> reader_of() {
  return {pack_keys<A, T>, pack_values<A, T>};
}

Reader<FmaArith> fma_reader(DType type) {
  switch (type) {
    case DType::bf16:
      return reader_of<FmaArith, bf16>();
    case DType::f16:
      return reader_of<FmaArith, fp16>();
    case DType::fp8_e4m3:
      return reader_of<FmaArith, fp8_e4m3>();
    case DType::fp8_e5m2:
      return reader_of<FmaArith, fp8_e5m2>();
    case DType::i8:
      return reader_of<FmaArith, int8_t>();
    default:
      return reader_of<FmaArith, float>();
  }
}

#if defined(ML_ISA_AVX512)
Reader<DotArith> dot_reader(DType type) {
  switch (type) {
    case DType::fp8_e4m3:
      return reader_of<DotArith, fp8_e4m3>();
    case DType::fp8_e5m2:
      return reader_of<DotArith, fp8_e5m2>();
    case DType::i8:
      return reader_of<DotArith, int8_t>();
    default:
      return reader_of<DotArith, bf16>();
  }
}
#endif

int64_t scratch_bytes(const AttendCall& call, int heads) {
#if defined(ML_ISA_AVX512)
  if (pairs(call)) {
    const int64_t rows = call.most_queries < kMostDirectRows ? call.most_queries : kMostDirectRows;
    const int64_t few = FewMemory(call, heads, rows, nullptr).bytes, many = ItemMemory<DotArith>(call, nullptr).bytes;
    return few > many ? few : many;
  }
#endif
  return ItemMemory<FmaArith>(call, nullptr).bytes;
}

void run(const AttendCall& call, const AttendItem& item, int head, int head_end, void* scratch) {
#if defined(ML_ISA_AVX512)
  if (pairs(call)) {
    if (few_rows(call, item)) return FewRun(call, item, head, head_end, scratch).run();
    const Reader<DotArith> reader = dot_reader(call.kv.type);
    for (; head < head_end; ++head) ItemRun<DotArith>(call, item, head, reader, scratch).run();
    return;
  }
#endif
  const Reader<FmaArith> reader = fma_reader(call.kv.type);
  for (; head < head_end; ++head) ItemRun<FmaArith>(call, item, head, reader, scratch).run();
}

/// The same operations in the same order as in a task that holds all blocks.
void merge(const AttendCall& call, const AttendMerge& row, int head, void* scratch) {
  const int group = call.q_heads / call.kv.heads, dim = call.kv.value_dim;
  float* values = static_cast<float*>(scratch);
  for (int q_head = head * group; q_head < (head + 1) * group; ++q_head) {
    RowState state = kNothing;
    for (int at = 0; at < dim; ++at) values[at] = 0.0f;
    for (int block = 0; block < row.blocks; ++block) {
      const float* part = call.partials + row.partials + (int64_t{block} * call.q_heads + q_head) * (dim + 2);
      const RowState found = {part[dim], part[dim + 1]};
      RowMerge merge;
      merge_states(&found, 1, &state, &merge);
      const f32v keep = f32v::set(merge.keep), add = f32v::set(merge.add);
      int at = 0;
      for (; at + kLanes <= dim; at += kLanes) {
        fma(f32v::load(values + at), keep, f32v::load(part + at) * add).store(values + at);
      }
      if (at < dim) fma(f32v::load(values + at), keep, f32v::load(part + at, dim - at) * add).store(values + at);
    }
    write_row_as(call, row.token, q_head, state, values);
  }
}

}  // namespace

const AttentionTable attention_table = {scratch_bytes, run, merge};

}  // namespace ml::ML_ISA
