"""Ranks of one host that compute one model together, and their shared memory."""

from sgl_kernel import _C

Ranks = _C.Ranks
RankLostError = _C.RankLostError
