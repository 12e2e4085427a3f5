"""What went wrong with a request, in OpenAI's shape, and whether another berth may be asked instead.

Told by the names of classes: the gateways' table is tried and type-checked where neither Ray nor vLLM is installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FULL_RETRY_S = 1
"""A full berth frees a place with every answer that ends."""
DOWN_RETRY_S = 5
"""A replica that comes back takes longer: its engine has to start."""
CLIENT_GONE = 499
"""nginx's and Serve's status of a request whose client hung up; nobody reads it."""

# ray/exceptions.py, ray/serve/exceptions.py and vllm/v1/engine/exceptions.py of the tested pair.
_FULL = {"BackPressureError"}
_DOWN = {"RayActorError", "DeploymentUnavailableError", "ReplicaUnavailableError", "EngineDeadError", "NodeDiedError"}
_CANCELLED = {"TaskCancelledError", "RequestCancelledError"}
_LATE = {"TimeoutError", "GetTimeoutError"}
_WRONG = {"VLLMClientError", "ValidationError"}


class ApiError(Exception):
    """A refusal with an HTTP ``status``; ``retry_after_s`` becomes the header Retry-After.

    Positional, so that it survives the pickling between a replica and the gateway.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(status, message, code, param, retry_after_s)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """OpenAI's object (platform.openai.com/docs/guides/error-codes)."""
        kind = "rate_limit_error" if self.status == 429 else "server_error" if self.status >= 500 else None
        kind = kind or "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}

    def event(self) -> str:
        """For a stream that has begun: its status is sent, so the error is an event of its own, as vLLM's are."""
        return f"data: {json.dumps(self.body())}\n\n"


@dataclass(frozen=True)
class Failure:
    """``elsewhere``: the same request may be given to another berth, provided that nothing of the answer came."""

    error: ApiError
    elsewhere: bool = False


def full(model: str) -> ApiError:
    message = f"Every berth of the model `{model}` is full; try again shortly."
    return ApiError(429, message, code="overloaded", retry_after_s=FULL_RETRY_S)


def down(model: str) -> ApiError:
    message = f"The model `{model}` has no berth that runs now; try again shortly."
    return ApiError(503, message, code="unavailable", retry_after_s=DOWN_RETRY_S)


def unknown(model: str) -> ApiError:
    return ApiError(404, f"The model `{model}` does not exist.", code="model_not_found", param="model")


def invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What pydantic found wrong with a request (``ValidationError.errors()``), of which the first is told."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body of the request is not JSON: {first.get('ctx', {}).get('error', '')}.")
    # Between the keys pydantic says which class it tried.
    where = ".".join(str(part) for part in first["loc"] if re.fullmatch("[a-z0-9_]+", str(part)))
    return ApiError(400, f"{where or 'The body'}: {first['msg']}.", param=where or None)


def failure(error: BaseException, model: str) -> Failure:
    """What an exception from a berth means.

    ===========================================  ======  =========
    raised                                       status  elsewhere
    ===========================================  ======  =========
    BackPressureError: the berth's queue ended   429     yes
    RayActorError (died, unavailable), NodeDied  503     yes
    Deployment- or ReplicaUnavailableError       503     yes
    EngineDeadError: vLLM's process died         503     yes
    Request- or TaskCancelledError               499     no: the client hung up
    TimeoutError                                 504     no: it would take as long again
    ValidationError, VLLMClientError             400     no
    an error that carries a ``status_code``      its     no
    anything else                                500     no: it may be the request
    ===========================================  ======  =========
    """
    # A RayTaskError derives from the class of its cause and keeps the cause itself.
    cause = getattr(error, "cause", None)
    inner = cause if isinstance(cause, BaseException) else error
    if isinstance(inner, ApiError):
        return Failure(inner)
    names = {cls.__name__ for raised in (error, inner) for cls in type(raised).__mro__}
    if names & _FULL:
        return Failure(full(model), elsewhere=True)
    if names & _DOWN:
        return Failure(down(model), elsewhere=True)
    if names & _CANCELLED:
        return Failure(ApiError(CLIENT_GONE, "The request was cancelled."))
    if names & _LATE:
        return Failure(ApiError(504, f"The model `{model}` did not answer in time.", code="timeout"))
    if names & _WRONG:
        return Failure(ApiError(400, str(inner)))
    if isinstance(status := getattr(inner, "status_code", None), int):
        told = getattr(inner, "detail", None) or getattr(inner, "message", None) or str(inner)
        return Failure(ApiError(status, str(told)))
    # What it says is for the operator, who finds it in the replica's log; a client gets no insides.
    return Failure(ApiError(500, f"The model `{model}` failed to answer.", code="internal_error"))


def refusal(part: Any) -> ApiError | None:
    """The error that an engine gave instead of an answer: vLLM's ErrorResponse, or the first event of a stream."""
    first = part[0] if isinstance(part, list) and part else part
    if isinstance(first, str):
        found = _event_error(first)
    else:
        found = first.get("error") if isinstance(first, dict) else getattr(first, "error", None)
    if found is None:
        return None
    told: dict[str, Any] = found if isinstance(found, dict) else found.model_dump()
    status = told.get("code")
    status = status if isinstance(status, int) and 400 <= status < 600 else 400
    message, code = str(told.get("message") or "The engine refused the request."), None
    if status == 404 and told.get("param") == "model":
        code = "model_not_found"
    elif status == 400 and "maximum context length" in message:
        code = "context_length_exceeded"
    return ApiError(status, message, code=code, param=told.get("param"))


def _event_error(event: str) -> Any:
    """The error object of a server-sent event, None when it is none."""
    if not event.startswith('data: {"error"'):
        return None
    try:
        return json.loads(event.removeprefix("data: ")).get("error")
    except ValueError:
        return None
