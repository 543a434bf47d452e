"""Error answers, all in the form of OpenAI's API."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serve.api.protocol import Error, ErrorResponse

_RETRY_AFTER = 10.0
_LOG = logging.getLogger("ray.serve")
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An error that is answered in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Take the HTTP status, and the fields of OpenAI's error object."""
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def too_many(message: str, code: str, seconds: float) -> ApiError:
    """A 429 with Retry-After."""
    return ApiError(429, message, code=code, headers={"Retry-After": str(max(1, round(seconds)))})


def unavailable(message: str, code: str, seconds: float) -> ApiError:
    """A 503 with Retry-After."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(max(1, round(seconds)))})


def as_http_error(error: Exception) -> HTTPException:
    """The error to answer with; it tells the client no detail of an unexpected failure."""
    if isinstance(error, HTTPException):
        return error
    if isinstance(error, OSError):
        return unavailable("the subject store cannot be read: come again later", "store_unavailable", _RETRY_AFTER)
    return ApiError(500, "the server failed to answer; its log says why")


def as_body(error: HTTPException) -> ErrorResponse:
    """The body of an error, in OpenAI's form."""
    return _body(error.status_code, error.detail, getattr(error, "param", None), getattr(error, "code", None))


def add_handlers(api: FastAPI) -> None:
    """Register the handlers that answer errors in this form."""
    api.add_exception_handler(HTTPException, _answer_http_error)
    api.add_exception_handler(OSError, _answer_unreadable_store)
    api.add_exception_handler(RequestValidationError, _answer_invalid_request)
    api.add_exception_handler(Exception, _answer_failure)


def _body(status: int, message: str, param: str | None = None, code: str | None = None) -> ErrorResponse:
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return ErrorResponse(error=Error(message=message, type=kind, param=param, code=code))


def _answer(status: int, body: ErrorResponse, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(body.model_dump(), status, headers)


async def _answer_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _answer(error.status_code, as_body(error), error.headers)


async def _answer_invalid_request(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _answer(400, _body(400, "the body is not valid JSON"))
    param = ".".join(str(part) for part in first["loc"][1:])
    if not param:
        return _answer(422, _body(422, "the body must be a JSON object, sent with Content-Type: application/json"))
    return _answer(422, _body(422, f"{param}: {first['msg']}", param, first["type"]))


async def _answer_unreadable_store(_: Request, error: Exception) -> JSONResponse:
    _LOG.error("the subject store cannot be read", exc_info=error)
    answer = as_http_error(error)
    return _answer(answer.status_code, as_body(answer), answer.headers)


async def _answer_failure(_: Request, error: Exception) -> JSONResponse:
    answer = as_http_error(error)
    return _answer(answer.status_code, as_body(answer))
