"""CUDA IPC as a KV transfer will use it: the pool's handle goes over gRPC, another process opens it and copies blocks.

Run as a module with an address it is that other process. In a dry run a memfd stands in for the device's memory.
"""

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc

from ops.bench.gpu.device import Device

ROOT = Path(__file__).resolve().parents[3]
BLOCK_BYTES = 2**21
"""A block of 16 tokens of Llama-3.1-8B in bfloat16."""
POISON, REAL = 0xA5, 0x3C
METHOD = "/sluice.bench.Pool/Export"
DEVICE_TO_DEVICE, DEVICE_TO_HOST = 3, 2
LAZY_PEER_ACCESS = 1


class CudaError(Exception):
    """A call of the CUDA runtime failed; the message names it and the reason."""


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_byte * 64)]


class _Cuda:
    """The few runtime calls that torch does not offer."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(_find_runtime())
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise CudaError(f"{name}: {self._library.cudaGetErrorString(code).decode()}")


def _find_runtime() -> str:
    """The libcudart that torch has loaded into this process."""
    import torch

    torch.cuda.init()
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.rsplit(" ", 1)[-1]
        if "libcudart" in path:
            return path
    raise CudaError("torch loaded no libcudart")


class CudaMemory:
    """Memory by plain cudaMalloc, which IPC needs, or another process's by its handle."""

    def __init__(self, size: int, handle: bytes | None = None) -> None:
        self._cuda, self._pointer, self.size = _Cuda(), ctypes.c_void_p(), size
        self._owned = handle is None
        if handle is None:
            self._cuda.call("cudaMalloc", ctypes.byref(self._pointer), ctypes.c_size_t(size))
        else:
            opened = _Handle.from_buffer_copy(handle)
            self._cuda.call("cudaIpcOpenMemHandle", ctypes.byref(self._pointer), opened, LAZY_PEER_ACCESS)

    def export(self) -> bytes:
        handle = _Handle()
        self._cuda.call("cudaIpcGetMemHandle", ctypes.byref(handle), self._pointer)
        return bytes(handle)

    def fill(self, offset: int, size: int, value: int) -> None:
        self._cuda.call("cudaMemset", ctypes.c_void_p(self._address(offset)), value, ctypes.c_size_t(size))
        self._cuda.call("cudaDeviceSynchronize")

    def read(self, offset: int, size: int) -> bytes:
        host = ctypes.create_string_buffer(size)
        self._copy(ctypes.addressof(host), self._address(offset), size, DEVICE_TO_HOST)
        return host.raw

    def copy_from(self, other: "CudaMemory", size: int) -> None:
        self._copy(self._address(0), other._address(0), size, DEVICE_TO_DEVICE)

    def close(self) -> None:
        self._cuda.call("cudaFree" if self._owned else "cudaIpcCloseMemHandle", self._pointer)

    def _address(self, offset: int) -> int:
        return (self._pointer.value or 0) + offset

    def _copy(self, target: int, source: int, size: int, kind: int) -> None:
        self._cuda.call("cudaMemcpy", ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size), kind)
        self._cuda.call("cudaDeviceSynchronize")


class HostMemory:
    """The same over a memfd, opened through the owner's /proc entry."""

    def __init__(self, size: int, handle: bytes | None = None) -> None:
        self.size = size
        self._fd = os.memfd_create("pool") if handle is None else os.open(handle, os.O_RDWR)
        if handle is None:
            os.ftruncate(self._fd, size)
        self._map = mmap.mmap(self._fd, size)

    def export(self) -> bytes:
        return f"/proc/{os.getpid()}/fd/{self._fd}".encode()

    def fill(self, offset: int, size: int, value: int) -> None:
        self._map[offset : offset + size] = bytes([value]) * size

    def read(self, offset: int, size: int) -> bytes:
        return self._map[offset : offset + size]

    def copy_from(self, other: "HostMemory", size: int) -> None:
        self._map[:size] = other._map[:size]

    def close(self) -> None:
        self._map.close()
        os.close(self._fd)


def memory(dry: bool, size: int, handle: bytes | None = None) -> Any:
    return HostMemory(size, handle) if dry else CudaMemory(size, handle)


def measure(device: Device) -> dict[str, Any]:
    """Starts an owner and plays the reader: is what it reads right, how fast is it, and what if the owner dies?"""
    flags = ["--dry-run"] if device.dry else []
    size = device.size(2**32, 4 * BLOCK_BYTES)
    owner = subprocess.Popen(
        [sys.executable, "-m", "ops.bench.gpu.ipc", str(size), *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout is not None
        address = owner.stdout.readline().strip()
        if not address:
            raise CudaError("the owner of the pool did not start")
        with grpc.insecure_channel(address) as channel:
            export: Any = channel.unary_unary(METHOD)
            handle = export(b"", timeout=30)
        found = _read(device, size, handle)
        owner.send_signal(signal.SIGKILL)
        owner.wait(30)
        return {**found, **_after_the_owner(device, size, handle)}
    finally:
        owner.kill()
        owner.wait(30)


def _read(device: Device, size: int, handle: bytes) -> dict[str, Any]:
    pool, mine = memory(device.dry, size, handle), memory(device.dry, size)
    poisoned, real = pool.read(0, BLOCK_BYTES), pool.read(BLOCK_BYTES, BLOCK_BYTES)
    mine.copy_from(pool, size)
    begin = time.perf_counter()
    mine.copy_from(pool, size)
    seconds = time.perf_counter() - begin
    copied = mine.read(BLOCK_BYTES, BLOCK_BYTES)
    pool.close()
    mine.close()
    return {
        "poisoned_block_read": poisoned == bytes([POISON]) * BLOCK_BYTES,
        "real_block_read": real == bytes([REAL]) * BLOCK_BYTES,
        "copied_block_right": copied == real,
        "copy_gb_per_s": 2 * size / seconds / 1e9,
    }


def _after_the_owner(device: Device, size: int, handle: bytes) -> dict[str, Any]:
    """Opening the handle of a dead process must fail, by name; it must not hang or end this process."""
    try:
        memory(device.dry, size, handle).close()
    except (CudaError, OSError) as error:
        return {"dead_owner": f"{type(error).__name__}: {error}"[:200]}
    return {"dead_owner": "opened"}


def own(size: int, dry: bool) -> None:
    """The owner: poison everything, write one real block, hand the handle out until killed."""
    pool = memory(dry, size)
    pool.fill(0, size, POISON)
    pool.fill(BLOCK_BYTES, BLOCK_BYTES, REAL)
    handle = pool.export()
    export: Any = grpc.unary_unary_rpc_method_handler(lambda request, context: handle)
    service, method = METHOD.strip("/").split("/")
    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: export}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    own(int(sys.argv[1]), "--dry-run" in sys.argv)
