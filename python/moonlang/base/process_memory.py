"""Memory of other processes of this host: written in place, in one copy, without their help (process_vm_writev).

As fast as a shared mapping, and private memory stays private memory: it keeps its huge pages, and a process that is
killed leaves no file behind. What a mapping would give for free is checked here: before every write the other process
proves, by a tag in its memory, that it is still the one that was meant (process ids are used again).
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moonlang.base.errors import PeerError

TAG_BYTES: Final = 32

_IOV_MAX = 1024  # entries of one call; from limits.h
_PR_SET_PTRACER = 0x59616D61  # from prctl.h
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def host_key() -> str:
    """Equal for processes that may be able to reach each other's memory: same boot, same process ids. "": nobody."""
    if _calls() is None or not _BOOT_ID.exists():
        return ""
    return f"{_BOOT_ID.read_text().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"


class Doorplate:
    """Names this process for others of the same host: `handle` says where its tag is. Must live as long as they write.

    tag: TAG_BYTES drawn anew at every start of a process, so that a successor under the same process id is another.
    """

    def __init__(self, tag: bytes) -> None:
        if len(tag) != TAG_BYTES:
            raise ValueError(f"a tag has {TAG_BYTES} bytes, not {len(tag)}")
        self._memory = ctypes.create_string_buffer(tag, TAG_BYTES)
        self._pid = os.getpid()
        self.address = ctypes.addressof(self._memory)
        self.handle = f"{self._pid}:{self.address:x}"
        _let_peers_in()


class ProcessMemory:
    """The memory of the process behind `handle`, as long as it carries `tag`."""

    def __init__(self, handle: str, tag: bytes) -> None:
        """PeerError when there is no such process, it is another one, or it may not be reached from here."""
        calls = _calls()
        if calls is None:
            raise PeerError("This system cannot write into the memory of other processes.")
        self._read, self._write = calls
        try:
            pid, address = handle.split(":")
            self._pid, self._tag_address = int(pid), int(address, 16)
        except ValueError as error:
            raise PeerError(f"{handle!r} is no handle of a process.") from error
        self._tag = tag
        self.check()

    def check(self) -> None:
        """PeerError unless the process is there and is the one that was meant."""
        found = ctypes.create_string_buffer(TAG_BYTES)
        local = _Iovec(ctypes.addressof(found), TAG_BYTES)
        remote = _Iovec(self._tag_address, TAG_BYTES)
        done = self._read(self._pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        if done != TAG_BYTES:
            raise self._error(ctypes.get_errno())
        if found.raw != self._tag:
            raise PeerError(f"Process {self._pid} is another one than before.")

    def write(self, source: NDArray[np.uint64], target: NDArray[np.uint64], sizes: NDArray[np.uint64]) -> None:
        """Copy the sizes[i] bytes at source[i] of this process to target[i] of the other, in order. All arrays: [n].

        PeerError when not all of it could be written; a part of it may have been.
        """
        self.check()
        for first in range(0, len(sizes), _IOV_MAX):
            part = slice(first, first + _IOV_MAX)
            local = np.ascontiguousarray(np.stack((source[part], sizes[part]), axis=1))
            remote = np.ascontiguousarray(np.stack((target[part], sizes[part]), axis=1))
            done = self._write(self._pid, local.ctypes.data, len(local), remote.ctypes.data, len(remote), 0)
            if done != int(sizes[part].sum()):
                raise self._error(ctypes.get_errno() if done < 0 else errno.EFAULT)

    def _error(self, number: int) -> PeerError:
        if number == errno.ESRCH:
            return PeerError(f"Process {self._pid} is gone.")
        if number == errno.EPERM:
            hint = "Run both under the same user, and in a container with the capability SYS_PTRACE."
            return PeerError(f"The memory of process {self._pid} may not be reached from here.", hint=hint)
        return PeerError(f"The memory of process {self._pid} cannot be reached: {os.strerror(number)}.")


def _calls() -> tuple[ctypes._NamedFuncPointer, ctypes._NamedFuncPointer] | None:
    library = ctypes.CDLL(None, use_errno=True)
    try:
        found = library.process_vm_readv, library.process_vm_writev
    except AttributeError:  # not Linux
        return None
    for call in found:
        number, pointer = ctypes.c_ulong, ctypes.c_void_p
        call.argtypes = (ctypes.c_int, pointer, number, pointer, number, number)
        call.restype = ctypes.c_ssize_t
    return found


def _let_peers_in() -> None:
    """Under Yama's default a process may reach into its own children only, unless the other one agrees."""
    if _YAMA.exists() and _YAMA.read_text().strip() == "1":
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
