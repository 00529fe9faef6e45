"""The ranks that compute one model together, and how their parts get from each to all."""

from sgl_kernel import _C

Ranks = _C.Ranks
SharedRanks = _C.SharedRanks
CarriedRanks = _C.CarriedRanks
RankLostError = _C.RankLostError
