"""A judge behind a server with OpenAI's interface. Retries and their pauses are openai's, the rate is aiolimiter's."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from typing import Any

from dpo_ray.config import Endpoint, Judge
from dpo_ray.errors import ConfigError, EndpointError
from dpo_ray.origin import short
from dpo_ray.pairs import Message


def require_endpoint(endpoint: Endpoint) -> None:
    """Raises ConfigError where the key or a library is missing."""
    _key(endpoint)
    try:
        import aiolimiter  # noqa: F401
        import openai  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"A judge behind an endpoint needs {error.name}: install dpo-ray[judge].") from None


class EndpointChat:
    """Asks a server, some requests at once.

    Raises ConfigError where the key is missing.
    """

    def __init__(self, judge: Judge, endpoint: Endpoint):
        require_endpoint(endpoint)
        self._judge = judge
        self._endpoint = endpoint

    def replies(self, dialogues: Sequence[list[Message]], schema: dict[str, Any] | None) -> list[str]:
        """Raises ConfigError where the server knows neither the key nor the model or refuses a request as wrong, and
        EndpointError where it fails or does not answer as often as it may be tried.
        """
        return asyncio.run(self._all(dialogues, schema))

    async def _all(self, dialogues: Sequence[list[Message]], schema: dict[str, Any] | None) -> list[str]:
        import openai
        from aiolimiter import AsyncLimiter

        endpoint = self._endpoint
        at_once = asyncio.Semaphore(endpoint.concurrent_requests)
        # A server's burst may be a second's share only: a minute's requests are spread over it.
        rate = AsyncLimiter(1, 60 / endpoint.requests_per_minute) if endpoint.requests_per_minute else _no_limit()
        async with openai.AsyncOpenAI(
            base_url=endpoint.base_url,
            api_key=_key(endpoint),
            timeout=endpoint.timeout_seconds,
            max_retries=endpoint.max_retries,
        ) as client:

            async def ask(dialogue: list[Message]) -> str:
                async with at_once, rate:
                    return await self._one(client, dialogue, schema)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(ask(dialogue)) for dialogue in dialogues]
            except ExceptionGroup as error:
                raise self._told(error.exceptions[0]) from error
        return [task.result() for task in tasks]

    async def _one(self, client: Any, dialogue: list[Message], schema: dict[str, Any] | None) -> str:
        held = {}
        if schema is not None:
            form = {"name": self._judge.compare, "schema": schema, "strict": True}
            held = {"response_format": {"type": "json_schema", "json_schema": form}}
        done = await client.chat.completions.create(
            model=self._endpoint.model,
            messages=dialogue,
            temperature=self._judge.temperature,
            max_tokens=self._judge.max_tokens,
            **held,
        )
        try:
            return (done.choices[0].message.content or "") if done.choices else ""
        except (AttributeError, TypeError) as error:
            raise ConfigError(
                f"The judge {self._endpoint.model} at {self._endpoint.base_url} answers with what is no chat "
                f"completion ({short(str(done))}). Check endpoint.base_url, which mostly ends in /v1."
            ) from error

    def _told(self, error: Exception) -> Exception:
        import openai

        endpoint = self._endpoint
        where = f"The judge {endpoint.model} at {endpoint.base_url}"
        said = short(str(error)).rstrip(".")
        match error:
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                named = f"the key in {endpoint.api_key_env}" if endpoint.api_key_env else "a request without a key"
                return ConfigError(
                    f"{where} refuses {named} ({said}): set endpoint.api_key_env to what holds the right one."
                )
            case openai.NotFoundError():
                return ConfigError(f"{where} is not known there ({said}): check endpoint.base_url and endpoint.model.")
            case openai.BadRequestError() | openai.UnprocessableEntityError():
                return ConfigError(
                    f"{where} refuses a question as wrong ({said}). Where it does not offer structured output, set "
                    "structured=false; where the question is too long, shorten generate.sampling.max_tokens."
                )
            case openai.APIError():
                return EndpointError(
                    f"{where} failed {endpoint.max_retries + 1} times ({type(error).__name__}: {said}). Look at the "
                    "server and run the same command again: what is finished is kept. With a server that is only slow, "
                    "raise endpoint.timeout_seconds or lower endpoint.concurrent_requests."
                )
        return error


def _key(endpoint: Endpoint) -> str:
    if endpoint.api_key_env is None:
        return "none"  # the client wants one, whether the server does or not
    key = os.environ.get(endpoint.api_key_env)
    if not key:
        raise ConfigError(
            f"endpoint.api_key_env is {endpoint.api_key_env}, and there is no such environment variable here: set it, "
            "on every node of the cluster (a job takes it in its runtime_env)."
        )
    return key


def _no_limit() -> contextlib.AbstractAsyncContextManager[None]:
    return contextlib.nullcontext()
