"""MoonLang's CPU kernels.

Arrays are anything that speaks DLPack (torch, numpy ...); outputs are written into arrays of the caller. Every function
checks shapes and types and raises ValueError. The instruction set is chosen at run time (`isa()`); the environment
variable MOONLANG_CPU_ISA=avx512|avx2|generic or `force_isa` chooses another one that the machine has.
"""

from sgl_kernel.attention import AttendPlan, KvPages, attend
from sgl_kernel.base import checksum, convert, detected_isa, force_isa, isa, set_threads, threads
from sgl_kernel.gemm import arena, gemm, pack
from sgl_kernel.pages import copy_pages, sum_pages
from sgl_kernel.quant import pack_quantized, why_not_packable
from sgl_kernel.rope import rope_store

__all__ = [
    "AttendPlan",
    "KvPages",
    "arena",
    "attend",
    "checksum",
    "convert",
    "copy_pages",
    "detected_isa",
    "force_isa",
    "gemm",
    "isa",
    "pack",
    "pack_quantized",
    "rope_store",
    "set_threads",
    "sum_pages",
    "threads",
    "why_not_packable",
]
