"""Every error that VRAMancer raises on purpose, in one tree.

::

    VRAMancerError                      500  server_error
    ├── ConfigError                     (start-up only)
    │   └── PortInUseError              (start-up only)
    ├── InvalidRequestError             400  invalid_request_error
    │   ├── UnsupportedParameterError   400  code=unsupported_parameter
    │   ├── ContextLengthError          400  code=context_length_exceeded
    │   ├── ChatTemplateError           400  code=chat_template_error
    │   ├── PayloadTooLargeError        413  code=payload_too_large
    │   ├── UnsupportedMediaTypeError   415  code=unsupported_media_type
    │   └── RequestTimeoutError         408  code=request_timeout
    ├── AuthenticationError             401  authentication_error
    ├── PermissionDeniedError           403  permission_error
    ├── NotFoundError                   404  not_found_error
    │   └── ModelNotFoundError          404  code=model_not_found
    ├── ConflictError                   409  conflict_error
    ├── RateLimitError                  429  code=rate_limit_exceeded (Retry-After)
    ├── QueueFullError                  429  rate_limit_error (Retry-After)
    ├── ModelError                      400  model_error
    │   ├── UnsupportedModelError       400  code=unsupported_model
    │   ├── CheckpointError             400  code=invalid_checkpoint
    │   └── InsufficientMemoryError     400  code=insufficient_memory
    ├── DeviceError                     400  code=device_error
    │   └── OutOfDeviceMemoryError      500  code=out_of_device_memory
    ├── StepFailedError                 500  code=step_failed
    │   ├── PageMoveError               500  code=step_failed
    │   ├── RecordError                 500  code=step_failed
    │   └── DeviceLostError             500  code=device_lost
    ├── UpstreamError                   502  upstream_error; code says what went wrong there
    │   └── UpstreamTimeoutError        504  code=upstream_timeout
    ├── NetworkError                    500  (between nodes; never an answer by itself)
    │   ├── ProtocolError               500  what arrived is not VTP, or not as announced
    │   ├── ClusterRefusedError         500  the other node does not want this one
    │   └── LinkLostError               500  the other node does not answer any more
    └── UnavailableError                503  service_unavailable (Retry-After)
        ├── EngineDeadError             503  code=engine_dead
        ├── EngineMovedError            503  code=engine_moved
        ├── CircuitOpenError            503  code=circuit_open
        ├── ModelNotLoadedError         503  code=model_not_loaded
        ├── UpstreamUnavailableError    503  code=upstream_unavailable
        └── ModelChangedError           503  code=model_changed

The HTTP status and the OpenAI-shaped ``type`` and ``code`` live on the class, so there is one map from error to answer.
"""

from __future__ import annotations

from typing import Any, ClassVar


class VRAMancerError(Exception):
    """Root of the tree. ``message`` is for people; ``param`` names the offending input, if there is one."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    retry_after_s: float | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.error_code = code if code is not None else self.code

    def to_openai(self) -> dict[str, Any]:
        """The body OpenAI clients expect: ``{"error": {"message", "type", "param", "code"}}``."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.error_code}}


class ConfigError(VRAMancerError):
    """A setting is unknown or out of range; the message names its source, its key and what is allowed."""


class PortInUseError(ConfigError):
    """Another program listens on the port."""


class InvalidRequestError(VRAMancerError):
    """The request cannot be served as written."""

    status = 400
    type = "invalid_request_error"


class UnsupportedParameterError(InvalidRequestError):
    """A known parameter that this version does not honour; it is refused rather than ignored."""

    code = "unsupported_parameter"


class ContextLengthError(InvalidRequestError):
    """Prompt plus requested tokens do not fit in the model's context.

    Clients that shorten a prompt and try again look for the code in the message, which is all that some of them see.
    """

    code = "context_length_exceeded"

    def to_openai(self) -> dict[str, Any]:
        body = super().to_openai()
        body["error"]["message"] += f" ({self.code})"
        return body


class ChatTemplateError(InvalidRequestError):
    """The model's chat template refused the messages, or the model has none."""

    code = "chat_template_error"


class PayloadTooLargeError(InvalidRequestError):
    """The body is larger than the server accepts."""

    status = 413
    code = "payload_too_large"


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body is not the content type that the route reads."""

    status = 415
    code = "unsupported_media_type"


class RequestTimeoutError(InvalidRequestError):
    """The client did not send its request in time."""

    status = 408
    code = "request_timeout"


class AuthenticationError(VRAMancerError):
    """No token, or a wrong one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDeniedError(VRAMancerError):
    """The caller is known but may not do this (read-only mode)."""

    status = 403
    type = "permission_error"
    code = "permission_denied"


class NotFoundError(VRAMancerError):
    """No such route or object."""

    status = 404
    type = "not_found_error"
    code = "not_found"


class ModelNotFoundError(NotFoundError):
    """The named model is not the one being served, or cannot be found to load."""

    type = "invalid_request_error"
    code = "model_not_found"


class ConflictError(VRAMancerError):
    """The request contradicts what is going on, such as a second model load."""

    status = 409
    type = "conflict_error"
    code = "conflict"


class RateLimitError(VRAMancerError):
    """More requests, or more wrong tokens, than a caller may send in a while; come back after ``retry_after_s``."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(VRAMancerError):
    """The waiting queue is at its limit; come back after ``retry_after_s``."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelError(VRAMancerError):
    """A model cannot be loaded."""

    status = 400
    type = "model_error"


class UnsupportedModelError(ModelError):
    """Architecture, weight format or quantization that is not supported."""

    code = "unsupported_model"


class CheckpointError(ModelError):
    """The checkpoint's files are missing, damaged or do not match its config."""

    code = "invalid_checkpoint"


class InsufficientMemoryError(ModelError):
    """The model does not fit; ``lacking_bytes`` says how many bytes each device lacks."""

    code = "insufficient_memory"

    def __init__(self, message: str, *, lacking_bytes: dict[str, int] | None = None) -> None:
        super().__init__(message)
        self.lacking_bytes = dict(lacking_bytes or {})

    def to_openai(self) -> dict[str, Any]:
        body = super().to_openai()
        body["error"]["lacking_bytes"] = self.lacking_bytes
        return body


class DeviceError(VRAMancerError):
    """A device specification is wrong, or the device is not there."""

    status = 400
    type = "device_error"
    code = "device_error"


class MissingNodeError(DeviceError):
    """A device of another machine was asked for, and that machine has not joined."""


class OutOfDeviceMemoryError(DeviceError):
    """An allocation would exceed a device's budget."""

    status = 500
    type = "server_error"
    code = "out_of_device_memory"


class StepFailedError(VRAMancerError):
    """The forward pass that this request was part of failed; other batches go on."""

    code = "step_failed"


class PageMoveError(StepFailedError):
    """KV pages could not be moved; every sequence whose pages may be among them has failed."""


class RecordError(StepFailedError):
    """A record of a step, or of its result, is not what it should be."""


class DeviceLostError(StepFailedError):
    """A device no longer answers. `device` is its logical name."""

    code = "device_lost"

    def __init__(self, message: str, *, device: str) -> None:
        super().__init__(message)
        self.device = device


class UpstreamError(VRAMancerError):
    """Another server, which answers for a model, cannot be reached, breaks off, or answers what nobody can read."""

    status = 502
    type = "upstream_error"
    code = "upstream_failed"


class UpstreamTimeoutError(UpstreamError):
    """Another server did not answer in time."""

    status = 504
    code = "upstream_timeout"


class NetworkError(VRAMancerError):
    """Something between two nodes went wrong."""


class ProtocolError(NetworkError):
    """Bytes that arrived are not what the protocol allows there."""


class ClusterRefusedError(NetworkError):
    """Two nodes do not go together; the message says in one line why."""


class LinkLostError(NetworkError):
    """The other end of a link has gone, or has been silent for too long. `node` is its id, as far as it is known."""

    def __init__(self, message: str, *, node: str = "") -> None:
        super().__init__(message)
        self.node = node


class UnavailableError(VRAMancerError):
    """Nothing can be served at the moment."""

    status = 503
    type = "service_unavailable"
    code = "unavailable"

    def __init__(self, message: str, *, retry_after_s: float | None = 5.0, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class EngineDeadError(UnavailableError):
    """The engine's thread has ended; the server has to be restarted or the model loaded again."""

    code = "engine_dead"


class EngineMovedError(UnavailableError):
    """Another engine has taken the requests of this one over."""

    code = "engine_moved"
    retry_after_s = 1.0


class CircuitOpenError(UnavailableError):
    """Steps failed again and again; requests are refused until the breaker closes."""

    code = "circuit_open"


class ModelNotLoadedError(UnavailableError):
    """No model is loaded."""

    code = "model_not_loaded"


class UpstreamUnavailableError(UnavailableError):
    """None of the servers that answer for a model is asked at the moment, since they failed again and again."""

    code = "upstream_unavailable"


class ModelChangedError(UnavailableError):
    """The model that a request was read for has been swapped in the meantime; trying again reaches the new one."""

    code = "model_changed"

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_s=1.0)
