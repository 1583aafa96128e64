"""What libraries say when memory or the GPU fails them, in their own words, and the error class it ends in."""

from __future__ import annotations

import pytest

from resources.errors import Failure, MediaError, ModelUnavailable, OutOfMemory, is_out_of_memory

NO_MEMORY = {
    "torch, cuda": "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.79 GiB of which"
    " 19.62 MiB is free.",
    "torch, cuda driver": "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "torch, cublas": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "torch, cudnn": "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "torch, cpu": "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    " to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)",
    "onnxruntime": "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node."
    " Name:'Conv_0' Status Message: " + "/onnxruntime_src/" * 40 + "bfc_arena.cc:376 void*"
    " onnxruntime::BFCArena::AllocateRawInternal(size_t, bool) Failed to allocate memory for requested buffer of size"
    " 4294967296",
    "onnxruntime, cpu": "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc",
    "ctranslate2": "CUDA failed with error out of memory",
    "ctranslate2, cublas": "cuBLAS failed with status CUBLAS_STATUS_ALLOC_FAILED",
    "ctranslate2, cpu": "failed to allocated memory",
    "opencv": "OpenCV(4.11.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 12441600000 bytes in"
    " function 'OutOfMemoryError'",
}
NO_DEVICE = {
    "torch, no driver": "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed"
    " a driver from http://www.nvidia.com/Download/index.aspx",
    "torch, old driver": "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU"
    " driver by downloading and installing a new version",
    "torch, init": "CUDA driver initialization failed, you might not have a CUDA gpu.",
    "torch, hidden": "No CUDA GPUs are available",
    "torch, cpu build": "Torch not compiled with CUDA enabled",
    "torch, card": "CUDA error: no kernel image is available for execution on the device",
    "ctranslate2": "CUDA failed with error CUDA driver version is insufficient for CUDA runtime version",
    "ctranslate2, libraries": "Library libcublas.so.12 is not found or cannot be loaded",
}


@pytest.mark.parametrize("text", NO_MEMORY.values(), ids=NO_MEMORY)
def test_exhausted_memory_is_told_from_the_librarys_words(text: str) -> None:
    """Given what a library says when memory is exhausted, then it is known as that, whatever the exception's type."""
    error = RuntimeError(text)
    assert is_out_of_memory(error)
    assert (Failure.of(error).error_class, Failure.of(error).retryable) == (OutOfMemory.code, False)


def test_torch_itself_out_of_memory_is_known() -> None:
    """Given a tensor larger than any memory, then torch's own error is known."""
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15, dtype=torch.float64)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(OutOfMemory("The remote worker ran out of memory."))


@pytest.mark.parametrize("text", NO_DEVICE.values(), ids=NO_DEVICE)
def test_a_gpu_that_cannot_be_used_is_no_fault_of_the_item(text: str) -> None:
    """Given a missing driver or one that does not suit, then the model is unavailable, with what to do."""
    error: Exception = AssertionError(text) if "compiled" in text else RuntimeError(text)
    failure = Failure.of(error)
    assert not is_out_of_memory(error)
    assert (failure.error_class, failure.retryable) == (ModelUnavailable.code, True)
    assert "nvidia-smi" in failure.message


def test_other_errors_are_not_taken_for_exhausted_memory() -> None:
    """Given errors that only speak of memory or of a device, then they keep their own class."""
    for error in (RuntimeError("illegal memory access"), ValueError("unknown device"), MediaError("out of memory")):
        assert not is_out_of_memory(error)
        assert Failure.of(error).error_class == "internal"
