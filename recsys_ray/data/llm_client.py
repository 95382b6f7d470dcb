"""One chat completion at a time from any OpenAI-compatible server (Ollama, vLLM, a hosted one), paced and retried.

The client of the `openai` package retries what may pass (timeouts, lost connections, 408, 409, 429 with
its Retry-After, 5xx) with growing pauses; what will not pass (a wrong key, an unknown model) ends the run
with the mend, and what one text alone provokes is that text's failure. The key comes from the environment.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from pydantic import Field, field_validator

from recsys_ray.config import Config

NO_KEY = "none"     # local servers ask for no key, but the client sends one
Messages = list[dict[str, str]]


class LlmError(ValueError):
    """A server that cannot be used as configured; the message names the address and the mend."""


class LlmUnavailable(ValueError):  # noqa: N818 - says what is wrong
    """No answer to one request after all retries: the server is down, stalls or is overloaded."""


class LlmRefused(ValueError):  # noqa: N818 - says what is wrong
    """The server rejects one request, e.g. because its text is too long; another text may pass."""


class LlmConfig(Config):
    """Which server and model, and how hard it is asked."""

    base_url: str = "http://localhost:11434/v1"         # Ollama; vLLM: http://localhost:8000/v1
    model: str = "llama3.1:8b"
    api_key_env: str = "OPENAI_API_KEY"                 # the environment variable that holds the key, if one is needed
    temperature: float = Field(default=0.0, ge=0, le=2)
    max_output_tokens: int = Field(default=300, ge=16)
    json_mode: bool = True                              # response_format json_object; off for servers without it
    timeout_s: float = Field(default=60.0, gt=0)        # without a byte from the server
    max_retries: int = Field(default=5, ge=0)           # of a request that may pass later
    attempts: int = Field(default=2, ge=1)              # questions until an answer can be used
    concurrency: int = Field(default=8, ge=1)           # requests under way, of one worker
    requests_per_minute: float | None = Field(default=None, gt=0)   # of one worker, retries counted; None: no limit

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")) or "@" in url:
            raise ValueError("must begin with http:// or https:// and hold no credentials")
        return url

    def asked(self) -> dict[str, Any]:
        """What decides an answer: not the address, nor how patiently it is waited for."""
        return {"model": self.model, "temperature": self.temperature, "max_output_tokens": self.max_output_tokens}


class Pace:
    """Lets threads pass at an even rate; `clock` and `sleep` are for tests."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = time.monotonic,
                 sleep: Callable[[float], object] = time.sleep) -> None:
        self._step = 0.0 if per_minute is None else 60.0 / per_minute
        self._clock, self._sleep = clock, sleep
        self._next = clock()
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Return when it is the caller's turn."""
        if not self._step:
            return
        with self._lock:
            turn = max(self._next, self._clock())
            self._next = turn + self._step
        self._sleep(max(0.0, turn - self._clock()))


class LlmClient:
    """A connection pool to the server; safe to use from several threads."""

    def __init__(self, config: LlmConfig) -> None:
        try:
            import openai
        except ImportError:
            raise LlmError("the openai package is not installed; install the extra: pip install 'recsys_ray[llm]'"
                           ) from None
        self.config, self._openai = config, openai
        pace = Pace(config.requests_per_minute)
        self._client = openai.OpenAI(
            base_url=config.base_url, api_key=os.environ.get(config.api_key_env) or NO_KEY, timeout=config.timeout_s,
            max_retries=config.max_retries,
            http_client=openai.DefaultHttpxClient(event_hooks={"request": [lambda _: pace.wait()]}))

    def ask(self, messages: Messages) -> str:
        """The text of the answer; empty when the server sends none.

        Errors: `LlmError` (end the run), `LlmUnavailable` (no answer), `LlmRefused` (not this text).
        """
        config, openai = self.config, self._openai
        extra: dict[str, Any] = {"response_format": {"type": "json_object"}} if config.json_mode else {}
        try:
            answer = self._client.chat.completions.create(
                model=config.model, messages=messages, temperature=config.temperature,  # type: ignore[arg-type]
                max_tokens=config.max_output_tokens, **extra)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise LlmError(f"{config.base_url} refuses to answer ({error.status_code}) as model {config.model!r}; "
                           f"check llm.model, llm.base_url and the key in {config.api_key_env}") from None
        except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
            raise LlmUnavailable(f"no answer after {config.max_retries} retries: {type(error).__name__}") from None
        except openai.APIStatusError as error:
            if error.status_code in (408, 409):
                raise LlmUnavailable(f"no answer after {config.max_retries} retries: {error.status_code}") from None
            raise LlmRefused(f"the server refused the request: {error.status_code}") from None
        except (openai.APIError, json.JSONDecodeError) as error:
            raise LlmRefused(f"the server sent no chat completion: {type(error).__name__}") from None
        return _text_of(answer)


def _text_of(answer: Any) -> str:
    """The first choice's text of whatever came back: a server may send JSON of any other shape."""
    choices = getattr(answer, "choices", None)
    if not isinstance(choices, list) or not choices:
        return ""
    content = getattr(getattr(choices[0], "message", None), "content", None)
    return content if isinstance(content, str) else ""
