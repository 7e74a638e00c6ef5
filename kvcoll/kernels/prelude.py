"""The C++ that all kernels share: arithmetic that rounds once, and floats of 16 bits.

Rules of the file: what nvrtc and g++ both take; each function gives the bits that NumPy
gives, NaN apart, of which only that it is one is kept.
"""

from __future__ import annotations

import numpy as np

from ..arrays import DType

_FLOAT: DType = np.dtype(np.float32)
_C_TYPES = {
    "bool": "unsigned char",
    "int8": "signed char",
    "uint8": "unsigned char",
    "int16": "short",
    "uint16": "unsigned short",
    "int32": "int",
    "uint32": "unsigned int",
    "int64": "long long",
    "uint64": "unsigned long long",
    "float16": "kv_half",
    "bfloat16": "kv_brain",
    "float32": "float",
    "float64": "double",
    "complex64": "kv_complex64",
    "complex128": "kv_complex128",
}


def c_type(dtype: DType) -> str:
    """Name an element's type in C++.

    Raises
    ------
    KeyError
        Kernels do not know it: float8, long double.
    """
    return _C_TYPES[dtype.name]


def is_known(dtype: DType) -> bool:
    """Say whether kernels know a dtype."""
    return dtype.name in _C_TYPES


#: Lanes work on elements of a tile that lie beside one another, and each lane on a few.
LANES = 256
TILE = 1024

PRELUDE = """
typedef struct { unsigned short bits; } kv_half;
typedef struct { unsigned short bits; } kv_brain;
typedef struct { float re, im; } kv_complex64;
typedef struct { double re, im; } kv_complex128;
typedef unsigned int kv_u32;
typedef unsigned long long kv_u64;

KVCOLL_FUNCTION kv_u32 kv_bits(float x) {
  union { float number; kv_u32 bits; } both;
  both.number = x;
  return both.bits;
}
KVCOLL_FUNCTION float kv_float(kv_u32 bits) {
  union { float number; kv_u32 bits; } both;
  both.bits = bits;
  return both.number;
}
KVCOLL_FUNCTION kv_u64 kv_bits(double x) {
  union { double number; kv_u64 bits; } both;
  both.number = x;
  return both.bits;
}
KVCOLL_FUNCTION double kv_double(kv_u64 bits) {
  union { double number; kv_u64 bits; } both;
  both.bits = bits;
  return both.number;
}

// The segment of a table, of rows of so many words, to which a tile belongs.
KVCOLL_FUNCTION const long long *kv_row(
    const long long *table, long long n_rows, int n_words, long long tile) {
  long long low = 0, high = n_rows;
  while (high - low > 1) {
    const long long middle = (low + high) / 2;
    if (table[middle * n_words] <= tile) low = middle; else high = middle;
  }
  return table + low * n_words;
}

#ifdef __CUDACC__
KVCOLL_FUNCTION float kv_add(float a, float b) { return __fadd_rn(a, b); }
KVCOLL_FUNCTION double kv_add(double a, double b) { return __dadd_rn(a, b); }
KVCOLL_FUNCTION float kv_subtract(float a, float b) { return __fsub_rn(a, b); }
KVCOLL_FUNCTION double kv_subtract(double a, double b) { return __dsub_rn(a, b); }
KVCOLL_FUNCTION float kv_multiply(float a, float b) { return __fmul_rn(a, b); }
KVCOLL_FUNCTION double kv_multiply(double a, double b) { return __dmul_rn(a, b); }
KVCOLL_FUNCTION float kv_divide(float a, float b) { return __fdiv_rn(a, b); }
KVCOLL_FUNCTION double kv_divide(double a, double b) { return __ddiv_rn(a, b); }
KVCOLL_FUNCTION float kv_square_root(float a) { return __fsqrt_rn(a); }
KVCOLL_FUNCTION double kv_square_root(double a) { return __dsqrt_rn(a); }
#else
KVCOLL_FUNCTION float kv_add(float a, float b) { return a + b; }
KVCOLL_FUNCTION double kv_add(double a, double b) { return a + b; }
KVCOLL_FUNCTION float kv_subtract(float a, float b) { return a - b; }
KVCOLL_FUNCTION double kv_subtract(double a, double b) { return a - b; }
KVCOLL_FUNCTION float kv_multiply(float a, float b) { return a * b; }
KVCOLL_FUNCTION double kv_multiply(double a, double b) { return a * b; }
KVCOLL_FUNCTION float kv_divide(float a, float b) { return a / b; }
KVCOLL_FUNCTION double kv_divide(double a, double b) { return a / b; }
KVCOLL_FUNCTION float kv_square_root(float a) { return __builtin_sqrtf(a); }
KVCOLL_FUNCTION double kv_square_root(double a) { return __builtin_sqrt(a); }
#endif

KVCOLL_FUNCTION float kv_absolute(float a) { return kv_float(kv_bits(a) & 0x7fffffffu); }
KVCOLL_FUNCTION double kv_absolute(double a) {
  return kv_double(kv_bits(a) & 0x7fffffffffffffffull);
}
KVCOLL_FUNCTION float kv_negative(float a) { return -a; }
KVCOLL_FUNCTION double kv_negative(double a) { return -a; }
KVCOLL_FUNCTION float kv_copy_sign(float a, float b) {
  return kv_float((kv_bits(a) & 0x7fffffffu) | (kv_bits(b) & 0x80000000u));
}
KVCOLL_FUNCTION double kv_copy_sign(double a, double b) {
  return kv_double(
      (kv_bits(a) & 0x7fffffffffffffffull) | (kv_bits(b) & 0x8000000000000000ull));
}
#define KV_FOR_BOTH(T) \\
  KVCOLL_FUNCTION T kv_same(T a) { return a; } \\
  KVCOLL_FUNCTION T kv_square(T a) { return kv_multiply(a, a); } \\
  KVCOLL_FUNCTION T kv_sign(T a) { \\
    return a > (T)0 ? (T)1 : (a < (T)0 ? (T)-1 : (a == (T)0 ? (T)0 : a)); } \\
  KVCOLL_FUNCTION T kv_maximum(T a, T b) { return (a >= b || a != a) ? a : b; } \\
  KVCOLL_FUNCTION T kv_minimum(T a, T b) { return (a <= b || a != a) ? a : b; } \\
  KVCOLL_FUNCTION T kv_at_least(T a, T b) { return a != a ? a : (a > b ? a : b); } \\
  KVCOLL_FUNCTION T kv_at_most(T a, T b) { return a != a ? a : (a < b ? a : b); } \\
  KVCOLL_FUNCTION bool kv_greater(T a, T b) { return a > b; } \\
  KVCOLL_FUNCTION bool kv_greater_equal(T a, T b) { return a >= b; } \\
  KVCOLL_FUNCTION bool kv_less(T a, T b) { return a < b; } \\
  KVCOLL_FUNCTION bool kv_less_equal(T a, T b) { return a <= b; } \\
  KVCOLL_FUNCTION bool kv_equal(T a, T b) { return a == b; } \\
  KVCOLL_FUNCTION bool kv_not_equal(T a, T b) { return a != b; }
KV_FOR_BOTH(float)
KV_FOR_BOTH(double)

KVCOLL_FUNCTION float kv_widened(kv_half a) {
  const kv_u32 sign = (kv_u32)(a.bits & 0x8000u) << 16, rest = a.bits & 0x7fffu;
  if (rest >= 0x7c00u) return kv_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest >= 0x0400u) return kv_float(sign | ((rest << 13) + 0x38000000u));
  return kv_copy_sign((float)rest * 5.9604644775390625e-8f, kv_float(sign));  // in 2^-24
}
KVCOLL_FUNCTION float kv_widened(kv_brain a) { return kv_float((kv_u32)a.bits << 16); }

KVCOLL_FUNCTION kv_half kv_halved(kv_u32 sign, kv_u32 rest) {
  kv_half half;
  half.bits = (unsigned short)(sign | rest);
  return half;
}
KVCOLL_FUNCTION kv_half kv_to_half(float a) {
  const kv_u32 sign = (kv_bits(a) >> 16) & 0x8000u;
  kv_u32 x = kv_bits(a) & 0x7fffffffu;
  if (x > 0x7f800000u) return kv_halved(sign, 0x7e00u);
  if (x >= 0x47800000u) return kv_halved(sign, 0x7c00u);
  if (x <= 0x33000000u) return kv_halved(sign, 0u);  // up to half of the smallest number
  if (x < 0x38800000u) {
    const kv_u32 shift = 126u - (x >> 23), all = (x & 0x7fffffu) | 0x800000u;
    const kv_u32 kept = all >> shift, lost = all & ((1u << shift) - 1u), tie = 1u << (shift - 1u);
    return kv_halved(sign, kept + (lost > tie || (lost == tie && (kept & 1u))));
  }
  x += 0x0fffu + ((x >> 13) & 1u);
  return kv_halved(sign, (x - 0x38000000u) >> 13);
}
KVCOLL_FUNCTION kv_half kv_to_half(double a) {
  const kv_u64 all = kv_bits(a);
  const kv_u32 sign = (kv_u32)(all >> 48) & 0x8000u;
  kv_u64 x = all & 0x7fffffffffffffffull;
  if (x > 0x7ff0000000000000ull) return kv_halved(sign, 0x7e00u);
  if (x >= 0x40f0000000000000ull) return kv_halved(sign, 0x7c00u);
  if (x <= 0x3e60000000000000ull) return kv_halved(sign, 0u);
  if (x < 0x3f10000000000000ull) {
    const int shift = 1051 - (int)(x >> 52);
    const kv_u64 whole = (x & 0xfffffffffffffull) | 0x10000000000000ull;
    const kv_u64 kept = whole >> shift, lost = whole & ((1ull << shift) - 1ull);
    const kv_u64 tie = 1ull << (shift - 1);
    return kv_halved(sign, (kv_u32)kept + (lost > tie || (lost == tie && (kept & 1ull))));
  }
  x += 0x1ffffffffffull + ((x >> 42) & 1ull);
  return kv_halved(sign, (kv_u32)((x - 0x3f00000000000000ull) >> 42));
}
KVCOLL_FUNCTION kv_brain kv_to_brain(float a) {
  kv_brain brain;
  kv_u32 x = kv_bits(a);
  if (a != a) x = (x & 0x80000000u) | 0x7fc00000u; else x += 0x7fffu + ((x >> 16) & 1u);
  brain.bits = (unsigned short)(x >> 16);
  return brain;
}
"""


def cast(value: str, source: DType, target: DType) -> str:
    """Write a cast of what an expression of one dtype gives to another.

    A bool is taken as a number, and anything but 0 as true.
    """
    if source == target:
        return value
    if source.name in ("float16", "bfloat16"):
        return cast(f"kv_widened({value})", _FLOAT, target)
    if target.name == "float16":
        wide = value if source.name in ("float32", "float64") else f"(double){value}"
        return f"kv_to_half({wide})"
    if target.name == "bfloat16":
        return f"kv_to_brain((float){value})"
    if target.name == "bool":
        return f"({value} != 0)"
    if target.kind == "c":
        part = "float" if target.name == "complex64" else "double"
        if source.kind == "c":
            return f"({c_type(target)}{{({part})({value}).re, ({part})({value}).im}})"
        return f"({c_type(target)}{{({part}){value}, 0}})"
    return f"({c_type(target)}){value}"


def plus(a: str, b: str, dtype: DType) -> str:
    """Write the sum of what two expressions of one dtype give, in that dtype."""
    kind = c_type(dtype)
    if dtype.kind == "f":
        return f"kv_add({a}, {b})"
    if dtype.kind == "c":
        return f"{kind}{{kv_add({a}.re, {b}.re), kv_add({a}.im, {b}.im)}}"
    if dtype.kind == "b":
        return f"({kind})({a} | {b})"
    return f"({kind})((kv_u64){a} + (kv_u64){b})"  # without a sign, where it may wrap
