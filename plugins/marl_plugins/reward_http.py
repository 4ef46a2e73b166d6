"""A reward service, asked by HTTP: batched, several requests at a time, with retries and a time-out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from marl_core import PluginError, Strategy, hookimpl, strict_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from marl_core import RewardFunction, Rollout

ANSWER_KEYS = {"marl": "rewards", "llama-factory": "scores"}
RETRY_STATUS_CODES = (429, 500, 502, 503, 504)
"""Status codes worth another try."""


class HttpReward(Strategy):
    """A reward service: texts by HTTP POST, scores back; in batches, with retries and a time-out."""

    url: str = Field(pattern=r"^https?://\S+$", description="Where to POST.")
    format: Literal["marl", "llama-factory"] = Field(
        default="marl",
        description="marl: prompts, completions, completion_ids and the data's columns, answered by rewards; "
        "llama-factory: messages (whole texts with their special tokens, as LLaMA-Factory sends them), answered by scores.",
    )
    batch: PositiveInt = Field(default=32, description="Responses per request.")
    workers: PositiveInt = Field(default=4, description="Requests at a time.")
    timeout_seconds: PositiveFloat = Field(default=30.0, description="Longest wait for an answer to one request.")
    retries: NonNegativeInt = Field(default=3, description="Further tries after a refused, lost or late request.")
    backoff_seconds: NonNegativeFloat = Field(
        default=0.5, description="Wait before the second retry; doubled for each further."
    )
    token_env: str | None = Field(default=None, description="Environment variable that holds a bearer token to send.")

    @hookimpl
    def marl_check(self) -> Iterable[str]:
        """The token must be there; whether the service answers is seen by the pre-flight check."""
        if self.token_env is not None and not os.environ.get(self.token_env):
            yield f"reward.token_env: the environment variable {self.token_env!r} is not set"

    @hookimpl
    def marl_describe(self) -> str:
        """For `marl check`."""
        return f"a service at {self.url}: {self.batch} responses per request, {self.timeout_seconds:g} s, {self.retries} retries"

    @hookimpl
    def marl_reward(self, tokenizer: PreTrainedTokenizerBase) -> RewardFunction:
        """A function that asks the service."""
        return Service(self, tokenizer)


class Service:
    """Callable: Rollout -> one score, or a list of scores for its tokens, for each response."""

    def __init__(self, options: HttpReward, tokenizer: PreTrainedTokenizerBase) -> None:
        """Open a pool of connections."""
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        self._options, self._tokenizer = options, tokenizer
        retry = Retry(
            total=options.retries,
            backoff_factor=options.backoff_seconds,
            status_forcelist=RETRY_STATUS_CODES,
            allowed_methods=None,  # POST too: a service that scores texts changes nothing
            raise_on_status=False,
        )
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=options.workers))
        self._session.headers["Content-Type"] = "application/json"
        if options.token_env is not None:
            self._session.headers["Authorization"] = f"Bearer {os.environ.get(options.token_env, '')}"

    def __call__(self, rollout: Rollout) -> list[Any]:
        """Scores of all responses, in their order."""
        body, size = self._body(rollout), self._options.batch
        slices = [slice(start, start + size) for start in range(0, len(rollout), size)]
        batches = [
            ({key: value[rows] for key, value in body.items()}, len(range(len(rollout))[rows])) for rows in slices
        ]
        with ThreadPoolExecutor(self._options.workers) as pool:
            return [score for scores in pool.map(lambda batch: self._ask(*batch), batches) for score in scores]

    def _body(self, rollout: Rollout) -> dict[str, list[Any]]:
        if self._options.format == "llama-factory":
            rows = zip(rollout.sequence_ids, rollout.sequence_mask, strict=True)
            texts = self._tokenizer.batch_decode([ids[keep].tolist() for ids, keep in rows], skip_special_tokens=False)
            return {"messages": list(texts)}
        from marl_plugins.reward_function import columns

        return columns(rollout)

    def _ask(self, body: Mapping[str, list[Any]], count: int) -> list[Any]:
        """One request; PluginError says what came back instead of scores."""
        from requests import RequestException

        extra = {"model": "model"} if self._options.format == "llama-factory" else {}
        payload = strict_json({**extra, **body}, default=str, ensure_ascii=True)  # halves of surrogate pairs too
        try:
            answer = self._session.post(self._options.url, data=payload, timeout=self._options.timeout_seconds)
        except RequestException as error:
            raise self._failed(
                f"{type(error).__name__}: {error}. Is the service up? reward.timeout_seconds and reward.retries say how patient marl is"
            ) from error
        if not answer.ok:
            raise self._failed(f"status {answer.status_code} {answer.reason}: {answer.text[:200]!r}")
        key = ANSWER_KEYS[self._options.format]
        try:
            scores = answer.json()[key]
        except (ValueError, KeyError, TypeError) as error:
            raise self._failed(f"the answer is no JSON object with {key!r}: {answer.text[:200]!r}") from error
        if not isinstance(scores, list) or len(scores) != count:
            what = f"{len(scores)} scores" if isinstance(scores, list) else f"a {type(scores).__name__}"
            raise self._failed(f"{key!r} holds {what} for {count} responses; the service must answer one for each")
        return scores

    def _failed(self, what: str) -> PluginError:
        return PluginError(
            f"reward.url: POST {self._options.url} failed after {self._options.retries} retries: {what}."
        )
