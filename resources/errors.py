"""Errors an item can end in: stable codes, whether a retry helps, and a remedy a person can act on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

# Libraries say both in plain RuntimeErrors, and remote ones arrive wrapped: only their text tells.
_NO_MEMORY = re.compile(
    r"out of memory|(failed|unable) to allocated? (memory|\d+ bytes)|can(no|')t allocate memory|insufficient memory"
    r"|_ALLOC_FAILED|bad[_ ]alloc",
    re.IGNORECASE,
)
_NO_DEVICE = re.compile(
    r"NVIDIA driver|CUDA driver|no CUDA-capable device|No CUDA GPUs|not compiled with CUDA|CUDA unknown error"
    r"|no kernel image is available|kernel image is invalid|invalid device ordinal|libcudart|libcublas|libcudnn"
    r"|display driver / cuda driver|forward compatibility was attempted|compiled with an unsupported toolchain"
    r"|busy or unavailable|Driver/library version mismatch|uncorrectable ECC|GPU is lost",
    re.IGNORECASE,
)


_WHOLE = 100_000  # characters: the telling words may come after a long trace
_DEVICE_REMEDY = "Check it with nvidia-smi; install a driver that suits the library, or choose a CPU profile."


class MediaError(Exception):
    """Base of every error that may end an item.

    `code` is the stable error class stored in the outcome record, `retryable` says whether the same
    input may succeed later, `http_status` is what an API answers, `remedy` tells a person what to do.
    The message names what was wrong with the item; it never carries foreign exception text verbatim
    from untrusted media into logs unescaped (see `printable`).
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500
    remedy: ClassVar[str] = "Report this with the run id."

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy_text = remedy or self.remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy_text}".strip()


class Undecodable(MediaError):
    code, http_status = "undecodable", 422
    remedy = "Check that the file plays; re-encode or re-upload it."


class Truncated(MediaError):
    code, http_status = "truncated", 422
    remedy = "The upload is incomplete; upload the whole file again."


class TooLarge(MediaError):
    code, http_status = "too_large", 413
    remedy = "Raise the limit in settings.toml [limits] if this file is meant to be processed."


class Unsupported(MediaError):
    code, http_status = "unsupported", 415
    remedy = "Convert it to a supported video, audio, image or text format."


class Empty(MediaError):
    code, http_status = "empty", 422
    remedy = "Upload the file again; there is nothing in it to process."


class Unreadable(MediaError):
    code, retryable, http_status = "unreadable", True, 403
    remedy = "Check that the file exists and that this process may read it, then retry."


class SourceChanged(MediaError):
    code, retryable, http_status = "source_changed", True, 409
    remedy = "The file changed while it was read; it is registered anew on the next run."


class DecodeTimeout(MediaError):
    code, retryable, http_status = "timeout", False, 504
    remedy = "Raise limits.decode_timeout_s if this file really needs longer."


class Hostile(MediaError):
    code, http_status = "hostile", 422
    remedy = "Keep the file apart and report it: it may exploit a defect of the decoder."


class DecoderCrashed(MediaError):
    code, retryable, http_status = "decoder_crashed", True, 502
    remedy = "The decoder process died on this file; it is tried again and then quarantined."


class OutOfMemory(MediaError):
    code, retryable, http_status = "out_of_memory", False, 507
    remedy = "Lower the batch size or give the worker more memory, then retry this item."


class ModelUnavailable(MediaError):
    code, retryable, http_status = "model_unavailable", True, 503
    remedy = "Install the weights the message names, or choose another profile in settings.toml."


class ModelFailed(MediaError):
    code, retryable, http_status = "model_failed", True, 502
    remedy = "Retry; if it persists, look at the run's log for the model's own error."


class ModelTimeout(MediaError):
    code, retryable, http_status = "model_timeout", True, 504
    remedy = "It is tried again, alone; raise engine.infer_timeout_s or serving.timeout_s if it really needs longer."


class ServingUnavailable(MediaError):
    code, retryable, http_status = "serving_unavailable", True, 503
    remedy = "Check ray.address and the cluster, or set serving.fallback or serving.backend to local."


class StorageFailed(MediaError):
    code, retryable, http_status = "storage_failed", True, 507
    remedy = "Check free space and permissions of the storage location, then retry."


class UpstreamFailed(MediaError):
    code, retryable, http_status = "upstream_failed", True, 424
    remedy = "Fix or retry the upstream asset; this one follows by itself."


class WorkerLost(MediaError):
    code, retryable, http_status = "worker_lost", True, 503
    remedy = "Look for the kernel's out-of-memory killer; then: media-assets dead-letters --class worker_lost --replay"


class DatabaseUnavailable(MediaError):
    code, retryable, http_status = "database_unavailable", True, 503
    remedy = "Check MEDIA_DATABASE_URL, or the log in <home>/postgres/log of the embedded server."


class Internal(MediaError):
    code, retryable = "internal", True


def remedy_of(error_class: str) -> str:
    """What a person can do about failures of a class; what there is to do about a defect where the class is unknown."""
    waiting: list[type[MediaError]] = [MediaError]
    while waiting:
        kind = waiting.pop()
        if kind.code == error_class:
            return kind.remedy
        waiting += kind.__subclasses__()
    return MediaError.remedy


def of_items() -> tuple[str, ...]:
    """Codes of the errors of this module that an item may end in."""
    kinds = [kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, MediaError)]
    return tuple(kind.code for kind in kinds if kind not in (MediaError, DatabaseUnavailable))


class NotApplicable(Exception):
    """Raised by a stage's prepare: the asset has no meaning for this item (a transcript of a photo).

    A success with zero rows, not an error; the message says why.
    """


@dataclass(frozen=True, slots=True)
class Failure:
    """How one unit or one item failed: a stable class, a sentence, and whether a retry may help."""

    error_class: str
    message: str
    retryable: bool

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Classify any exception; memory exhaustion becomes `out_of_memory`, a GPU that cannot be used (its driver is
        missing, too old or not the library's) `model_unavailable`, and what is unknown `internal`.
        """
        if isinstance(error, MediaError):
            return cls(error.code, _text(error), error.retryable)
        if is_out_of_memory(error):
            return cls(OutOfMemory.code, printable(f"Out of memory. {OutOfMemory.remedy}"), OutOfMemory.retryable)
        if _is_no_device(error):
            text = printable(f"The GPU cannot be used: {_text(error)}", 300)
            return cls(ModelUnavailable.code, f"{text} {_DEVICE_REMEDY}", ModelUnavailable.retryable)
        if isinstance(error, OSError):
            text = f"{type(error).__name__}: {_text(error)}. {StorageFailed.remedy}"
            return cls(StorageFailed.code, text, StorageFailed.retryable)
        return cls(Internal.code, f"{type(error).__name__}: {_text(error)}", Internal.retryable)


def not_loaded(what: str, error: BaseException) -> MediaError:
    """What `error`, which came up while `what` was loaded, says about every item alike: no item is to blame for it."""
    if is_out_of_memory(error):
        remedy = "Give the worker more memory, or choose smaller models in models.toml."
        return ModelUnavailable(f"{what} cannot be loaded: there is too little memory.", remedy)
    if isinstance(error, MediaError):
        return error
    said = _text(error, 300).rstrip(". ")
    if _is_no_device(error):
        return ModelUnavailable(f"{what} cannot be loaded, for the GPU cannot be used: {said}.", _DEVICE_REMEDY)
    return ModelUnavailable(
        f"{what} cannot be loaded: {type(error).__name__}: {said}.",
        "Check its weights, the free space where they are kept, and the version of its library.",
    )


def _is_no_device(error: BaseException) -> bool:
    return bool(_NO_DEVICE.search(_text(error, _WHOLE)))


def _text(error: BaseException, limit: int = 500) -> str:
    try:
        return printable(str(error), limit)
    except Exception:  # noqa: BLE001 - an exception that cannot even be printed
        return "(its message cannot be shown)"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the machine or of a GPU, was exhausted: told from the type, else from the library's words.

    Knows torch, ONNX Runtime, CTranslate2, OpenCV and their errors as a remote worker hands them on.
    """
    if isinstance(error, MemoryError | OutOfMemory) or type(error).__name__ == "OutOfMemoryError":
        return True
    return not isinstance(error, MediaError) and bool(_NO_MEMORY.search(_text(error, _WHOLE)))


def printable(text: str, limit: int = 500) -> str:
    """`text` made safe for a log line or a terminal: one line, no control or bidi characters, bounded."""
    kept = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    return kept if len(kept) <= limit else kept[: limit - 1] + "…"
