"""What libraries say when memory or the GPU fails them, in their own words, and the error class it ends in."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from media_assets.stages.shots import Shots
from resources.compute import devices
from resources.errors import Failure, MediaError, ModelUnavailable, OutOfMemory, is_out_of_memory
from resources.models.registry import ModelRegistry
from resources.models.transnet import WEIGHTS
from resources.settings import Settings

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
    "torch, two drivers": "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling"
    " NumCudaDevices() that might have already set an error? Error 803: system has unsupported display driver / cuda"
    " driver combination",
    "torch, data centre card": "CUDA error: forward compatibility was attempted on non supported HW",
    "torch, toolchain": "CUDA error: the provided PTX was compiled with an unsupported toolchain.",
    "torch, taken": "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
    "onnxruntime": "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version ; GPU=0",
    "nvml": "NVML_ERROR_LIB_RM_VERSION_MISMATCH: Driver/library version mismatch",
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


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(NO_MEMORY["torch, cuda"]), "there is too little memory. Give the worker more memory"),
        (OutOfMemory("The remote worker ran out of memory."), "there is too little memory"),
        (RuntimeError(NO_DEVICE["torch, old driver"]), "The NVIDIA driver on your system is too old"),
        (AssertionError(NO_DEVICE["torch, cpu build"]), "nvidia-smi"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device. Check its weights"),
        (KeyError("state_dict"), "KeyError: 'state_dict'"),
        (ModelUnavailable("No weights.", "Install them."), "No weights. Install them."),
    ],
    ids=["memory", "remote memory", "driver", "cpu build", "disk", "library", "adapter"],
)
def test_whatever_goes_wrong_while_a_model_loads_is_no_fault_of_the_item(
    tmp_path: Path, error: Exception, said: str
) -> None:
    """Given a load that raises, then the model is unavailable, retryable, and the next one to ask loads it anew."""
    models = ModelRegistry(Settings(home=tmp_path))
    spec = models.spec("shots")

    def load() -> str:
        raise error

    with pytest.raises(ModelUnavailable) as caught:
        models.loaded(spec, load)
    failure = Failure.of(caught.value)
    assert (failure.error_class, failure.retryable) == ("model_unavailable", True)
    assert said in failure.message
    assert models.loaded(spec, lambda: "loaded") == "loaded"
    assert models.loads == {spec.identity: 1}


def test_weights_that_no_library_can_read_are_named(tmp_path: Path) -> None:
    """Given a file with the pinned digest which holds no network, then the model is named, with what to check."""
    weights = b"not a network"
    (tmp_path / WEIGHTS).write_bytes(weights)
    digest = hashlib.sha256(weights).hexdigest()
    (tmp_path / "models.toml").write_text(
        f"""
        [[offline.shots]]
        name = "transnetv2"
        adapter = "transnet"
        source = "file:{tmp_path}"
        sha256 = {{ "{WEIGHTS}" = "{digest}" }}
        licence = "MIT"
        """
    )
    stage = Shots(settings := Settings(home=tmp_path), ModelRegistry(settings))
    with pytest.raises(ModelUnavailable, match=r"transnetv2 .shots. cannot be loaded: \w+Error: .* Check its weights"):
        stage.load()


@pytest.mark.parametrize(
    ("wanted", "there", "device"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_a_model_goes_to_the_gpu_where_there_is_one(
    wanted: str, there: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given what an entry says and a machine, then the model goes where it may."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    assert devices.for_torch(wanted) == device


@pytest.mark.parametrize(
    ("wanted", "said"), [("cuda", "wants a GPU, and torch finds none"), ("tpu", "no device 'tpu'")]
)
def test_a_device_that_is_not_there_is_refused(wanted: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given an entry that insists on a GPU, on a machine without one, then the model is not loaded slowly instead."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ModelUnavailable, match=said):
        devices.for_torch(wanted)


def test_no_model_of_the_gpu_profile_insists_on_one(tmp_path: Path) -> None:
    """Given profile `gpu`, then all its models may be asked on a machine without a GPU."""
    models = ModelRegistry(Settings(home=tmp_path, profile="gpu"))
    specs = [spec for task in models.tasks() for spec in models.candidates(task)]
    assert {spec.parameters.get("device", "auto") for spec in specs} == {"auto"}


def test_other_errors_are_not_taken_for_exhausted_memory() -> None:
    """Given errors that only speak of memory or of a device, then they keep their own class."""
    for error in (RuntimeError("illegal memory access"), ValueError("unknown device"), MediaError("out of memory")):
        assert not is_out_of_memory(error)
        assert Failure.of(error).error_class == "internal"
