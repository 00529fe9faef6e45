"""Tokens to the ranks that hold their experts, and what those made of them back again."""

from sgl_kernel import _C

Mailboxes = _C.Mailboxes
SharedMailboxes = _C.SharedMailboxes
CarriedMailboxes = _C.CarriedMailboxes
Placement = _C.Placement
Exchange = _C.Exchange
