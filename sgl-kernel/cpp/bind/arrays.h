// Arrays from Python (anything with DLPack) as checked C++ views.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>

#include "base/types.h"

namespace ml::bind {

namespace nb = nanobind;

using Array = nb::ndarray<nb::device::cpu>;
using ReadArray = nb::ndarray<nb::ro, nb::device::cpu>;

[[noreturn]] inline void refuse(const std::string& what) { throw nb::value_error(what.c_str()); }

/// The element type of an array, or a ValueError naming the array.
template <class A>
DType dtype_of(const A& array, const char* name) {
  // DLPack's codes (dlpack.h): 0 int, 2 float, 4 bfloat, 10 float8_e4m3fn, 12 float8_e5m2.
  const auto type = array.dtype();
  const int code = int(type.code), bits = int(type.bits);
  if (code == 2 && bits == 32) return DType::f32;
  if (code == 2 && bits == 16) return DType::f16;
  if (code == 4 && bits == 16) return DType::bf16;
  if (code == 10 && bits == 8) return DType::fp8_e4m3;
  if (code == 12 && bits == 8) return DType::fp8_e5m2;
  if (code == 0 && bits == 8) return DType::i8;
  if (code == 0 && bits == 32) return DType::i32;
  if (code == 0 && bits == 64) return DType::i64;
  refuse(std::string(name) + ": unsupported element type");
}

/// Rows of contiguous elements; `ld` elements from one row to the next.
struct Matrix {
  void* data;
  DType type;
  int64_t rows, columns, ld;

  char* row(int64_t i) const { return static_cast<char*>(data) + i * ld * bytes_of(type); }
};

/// A 2-D array whose rows are contiguous (any distance between rows), or a ValueError.
template <class A>
Matrix matrix(const A& array, const char* name) {
  if (array.ndim() != 2) refuse(std::string(name) + ": expected 2 dimensions, got " + std::to_string(array.ndim()));
  const int64_t rows = int64_t(array.shape(0)), columns = int64_t(array.shape(1));
  if (columns > 1 && array.stride(1) != 1) refuse(std::string(name) + ": the elements of a row must be contiguous");
  const int64_t ld = rows > 1 ? int64_t(array.stride(0)) : columns;
  return {const_cast<void*>(static_cast<const void*>(array.data())), dtype_of(array, name), rows, columns, ld};
}

/// A contiguous 1-D array of `size` elements of `type`, or a ValueError.
template <class A>
void* vector(const A& array, const char* name, DType type, int64_t size) {
  if (array.ndim() != 1 || int64_t(array.shape(0)) != size) {
    refuse(std::string(name) + ": expected 1 dimension of " + std::to_string(size));
  }
  if (size > 1 && array.stride(0) != 1) refuse(std::string(name) + ": must be contiguous");
  if (dtype_of(array, name) != type) refuse(std::string(name) + ": wrong element type");
  return const_cast<void*>(static_cast<const void*>(array.data()));
}

}  // namespace ml::bind
