"""Errors an item can end in: stable codes, whether a retry helps, and a remedy a person can act on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


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
    remedy = "The model server was replaced; retry. Raise serving.timeout_s if the model really needs longer."


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
    remedy = "The process died while this item was in flight; it is tried again and then quarantined."


class Internal(MediaError):
    code, retryable = "internal", True


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
        """Classify any exception; unknown ones become `internal`, memory exhaustion `out_of_memory`."""
        if isinstance(error, MediaError):
            return cls(error.code, _text(error), error.retryable)
        if is_out_of_memory(error):
            return cls(OutOfMemory.code, printable(f"Out of memory. {OutOfMemory.remedy}"), OutOfMemory.retryable)
        if isinstance(error, OSError):
            text = f"{type(error).__name__}: {_text(error)}. {StorageFailed.remedy}"
            return cls(StorageFailed.code, text, StorageFailed.retryable)
        return cls(Internal.code, f"{type(error).__name__}: {_text(error)}", Internal.retryable)


def _text(error: BaseException) -> str:
    try:
        return printable(str(error))
    except Exception:  # noqa: BLE001 - an exception that cannot even be printed
        return "(its message cannot be shown)"


def is_out_of_memory(error: BaseException) -> bool:
    """True for MemoryError and for torch's CUDA out-of-memory error, without importing torch."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def printable(text: str, limit: int = 500) -> str:
    """`text` made safe for a log line or a terminal: one line, no control or bidi characters, bounded."""
    kept = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    return kept if len(kept) <= limit else kept[: limit - 1] + "…"
