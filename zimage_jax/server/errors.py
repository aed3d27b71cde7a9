"""Refusals, and their bodies as each API words them."""

from typing import Any

from fastapi.responses import JSONResponse

from ..errors import OutOfMemoryError, UsageError, ZImageError
from ..files import printable

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
_TYPES |= {404: "not_found_error", 429: "rate_limit_error"}


class RefusedError(Exception):
    """A request that is not carried out. `retry_after`: seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {} if retry_after is None else {"Retry-After": str(max(1, retry_after))}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def to_json(self) -> dict[str, Any]:
        """OpenAI's body, which the native API has too."""
        kind = _TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }

    def response(self, path: str) -> JSONResponse:
        body = self.to_json()
        if path.startswith("/sdapi/"):
            body = {
                "error": body["error"]["code"],
                "detail": str(self),
                "body": "",
                "errors": str(self),
            }
        return JSONResponse(body, self.status, self.headers)


def refusal_of(fault: Exception) -> RefusedError:
    """How a client is told of an error."""
    if isinstance(fault, RefusedError):
        return fault
    if isinstance(fault, OutOfMemoryError):
        return RefusedError(400, str(fault), "out_of_memory")
    if isinstance(fault, UsageError):
        return RefusedError(400, str(fault), "invalid_request")
    if isinstance(fault, ZImageError):
        return RefusedError(500, str(fault), "failed")
    return RefusedError(500, "an error of the server: its log has more", "failed")


def invalid(errors: list[dict[str, Any]]) -> RefusedError:
    """The first error that pydantic found. What the client sent is not repeated, but for keys."""
    first = errors[0]
    where = [printable(part, 60) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(where) or None
    if first["type"] == "extra_forbidden":
        return RefusedError(400, f"no such key: {param}", "unknown_parameter", param=param)
    if first["type"] == "missing":
        return RefusedError(
            400, f"{param or 'the body'} is missing", "missing_parameter", param=param
        )
    message = f"{param or 'the body'}: {printable(first['msg'], 200)}"
    return RefusedError(400, message, "invalid_request", param=param)
