"""A model's forward as a list of kernel calls that runs without Python."""

from sgl_kernel import _C

PackedWeight = _C.PackedWeight
Program = _C.Program
