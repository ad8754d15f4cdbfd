"""The library of this machine, and each instruction set it has kernels for."""

import ctypes

import pytest

from edgepeft.deploy.compile import host_library


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(host_library()))
    lib.edgepeft_kernels.restype = ctypes.c_char_p
    return lib


@pytest.fixture(params=["scalar", "avx2", "avx512vnni", "amx", "neon", "dotprod", "i8mm"])
def kernel(request, library):
    if library.edgepeft_force_kernel(request.param.encode()):
        pytest.skip(f"this CPU does not run {request.param}")
    yield request.param
    library.edgepeft_force_kernel(None)
