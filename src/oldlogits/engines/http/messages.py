"""What travels between `HttpEngine` and a server: the JSON of vLLM's token-in/token-out route, and nothing more of it.

POST /inference/v1/generate
    {"request_id", "token_ids", "sampling_params": {"max_tokens", "temperature", ..., "logprobs": 0}}
 -> {"choices": [{"token_ids", "logprobs": {"content": [{"token_id", "logprob"}]}, "finish_reason",
                  "weight_versions": [{"version": label, "start", "end"}]}], "prompt_logprobs"}

A server knows versions by *labels*, any text; the client chooses them, and "default" is what a server starts with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

from oldlogits.core.engine import FinishReason, Sampling
from oldlogits.core.errors import ConfigError, MissingLogprobError

Json: TypeAlias = "Mapping[str, Json] | Sequence[Json] | str | int | float | bool | None"
"""A JSON value."""

_T = TypeVar("_T", bound="str | int | float | bool | Sequence[object] | Mapping[str, object]")

STARTING_LABEL: Final = "default"
"""The label of the weights that a server read from its model folder."""

UNFINISHED_LABEL: Final = "unfinished"
"""The label of weights whose update was broken off."""

ABORT_PREFIX: Final = "generate-tokens-"
"""What a server puts before the id of a request: it is aborted under that name."""

LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
"""Hosts that need no token and no proxy."""

BACKEND: Final = "oldlogits"
"""The name of the weight transfer that reads the trainer's copy in shared memory."""

SAMPLED: Final = "vllm:generation_tokens_total"
"""The counter among a server's metrics (Prometheus' text format) of all tokens that it has sampled."""

_NEUTRAL: Final[Mapping[str, Json]] = {
    "n": 1,
    "min_p": 0.0,
    "min_tokens": 0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": None,
    "stop": None,
    "logit_bias": None,
    "bad_words": None,
    "structured_outputs": None,
}
"""Parameters of vLLM that `Sampling` lacks, with the value that does nothing."""

_KNOWN: Final = frozenset(
    {"max_tokens", "temperature", "top_p", "top_k", "stop_token_ids", "prompt_logprobs"}
    | {"logprobs", "ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "output_kind"}
)
"""Parameters that are read, or that say nothing about which token is sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSpan:
    """Output tokens ``[start, end)`` were sampled with the weights of one label."""

    label: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request to sample a completion."""

    request_id: str
    token_ids: tuple[int, ...]
    sampling: Sampling

    def to_json(self) -> Json:
        """The body of the request."""
        s = self.sampling
        return {
            "request_id": self.request_id,
            "token_ids": self.token_ids,
            "sampling_params": {
                "max_tokens": s.max_tokens,
                "temperature": s.temperature,
                "top_p": s.top_p,
                "top_k": s.top_k,
                "stop_token_ids": s.stop_token_ids,
                "ignore_eos": True,  # it stops where it is told to, and nowhere else
                "logprobs": 0,  # of the sampled token only
                "prompt_logprobs": 0 if s.prompt_logprobs else None,
                "detokenize": False,
            },
        }

    @classmethod
    def from_json(cls, body: Json, *, default_id: str, default_max_tokens: int) -> Request:
        """The request of a body.

        Args:
            body: The parsed JSON.
            default_id: Of a request that has none.
            default_max_tokens: Of a request that sets none.

        Raises:
            ConfigError: It is not what the route takes, or asks for what the embedded engine does not have.
        """
        fields = typed(body, dict, "the body")
        params = typed(fields.get("sampling_params", {}), dict, "sampling_params")
        for name, value in params.items():
            if name in _KNOWN or value == _NEUTRAL.get(name, ()) or value is None or value == []:
                continue
            raise _refused(f"sampling_params.{name} = {value!r}", ", ".join(sorted(_KNOWN)))
        if fields.get("stream"):
            raise _refused("stream = true", "stream = false")
        max_tokens = params.get("max_tokens")
        return cls(
            request_id=typed(fields.get("request_id", default_id), str, "request_id"),
            token_ids=_integers(fields.get("token_ids"), "token_ids"),
            sampling=Sampling(
                max_tokens=default_max_tokens if max_tokens is None else typed(max_tokens, int, "max_tokens"),
                temperature=_number(params.get("temperature", 1.0), "temperature"),
                top_p=_number(params.get("top_p", 1.0), "top_p"),
                top_k=max(0, typed(params.get("top_k", 0), int, "top_k")),
                stop_token_ids=_integers(params.get("stop_token_ids") or [], "stop_token_ids"),
                prompt_logprobs=params.get("prompt_logprobs") is not None,
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a server has sampled for a request; the arguments are those of `Generation`, but for labels."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[LabelledSpan, ...]
    finish_reason: FinishReason
    prompt_logprobs: tuple[float, ...] = ()

    def to_json(self, request: Request, *, model: str) -> Json:
        """The body of the answer to `request`."""
        num_prompt, num_output = len(request.token_ids), len(self.token_ids)
        content: list[Json] = [
            {"token_id": token, "logprob": logprob, "rank": None, "top_logprobs": []}
            for token, logprob in zip(self.token_ids, self.logprobs, strict=True)
        ]
        prompt: Json = None
        if request.sampling.prompt_logprobs:
            pairs = zip(request.token_ids[1:], self.prompt_logprobs, strict=True)
            prompt = [None, *({str(token): {"logprob": logprob, "rank": None}} for token, logprob in pairs)]
        choice: Json = {
            "index": 0,
            "token_ids": self.token_ids,
            "logprobs": {"content": content},
            "finish_reason": self.finish_reason,
            "stop_reason": self.token_ids[-1] if self.finish_reason == "stop" else None,
            "weight_versions": [{"version": span.label, "start": span.start, "end": span.end} for span in self.spans],
        }
        return {
            "request_id": ABORT_PREFIX + request.request_id,
            "model": model,
            "output_mode": "tokens",
            "choices": [choice],
            "prompt_logprobs": prompt,
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_output,
                "total_tokens": num_prompt + num_output,
            },
        }

    @classmethod
    def from_json(cls, body: Json, request: Request) -> Answer:
        """The answer to `request`.

        Raises:
            ConfigError: It is not what the route answers.
            MissingLogprobError: It has tokens without log-probs or without a version.
        """
        fields = typed(body, dict, "the body")
        [choice] = (typed(choice, dict, "choices[0]") for choice in typed(fields.get("choices"), list, "choices"))
        token_ids = _integers(choice.get("token_ids") or [], "token_ids")
        return cls(
            token_ids=token_ids,
            logprobs=_logprobs(choice.get("logprobs"), token_ids),
            spans=_spans(choice.get("weight_versions"), len(token_ids)),
            finish_reason=_finish_reason(choice.get("finish_reason")),
            prompt_logprobs=_prompt_logprobs(fields.get("prompt_logprobs"), request),
        )


def typed(value: object, kind: type[_T], name: str) -> _T:
    """`value`, if it is of a kind.

    Raises:
        ConfigError: It is not.
    """
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise _refused(f"{name} = {value!r}"[:200], f"{name}: {kind.__name__}")
    return value


def _refused(got: str, allowed: str) -> ConfigError:
    return ConfigError(
        "a message over HTTP is not what its route takes",
        got=got,
        allowed=allowed,
        fix="use the routes of vLLM 0.32 or later, or those of `oldlogits serve`",
    )


def _number(value: object, name: str) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else typed(value, float, name)


def _integers(value: object, name: str) -> tuple[int, ...]:
    return tuple(typed(item, int, name) for item in typed(value, list, name))


def _finish_reason(value: object) -> FinishReason:
    reasons: tuple[FinishReason, ...] = ("stop", "length", "abort")
    for reason in reasons:
        if value == reason:
            return reason
    raise _refused(f"finish_reason = {value!r}", ", ".join(reasons))


def _logprobs(value: object, token_ids: tuple[int, ...]) -> tuple[float, ...]:
    """The log-probs of the sampled tokens, each checked to be of its token."""
    content = value.get("content") if isinstance(value, dict) else None
    entries = [typed(entry, dict, "logprobs.content") for entry in content or []]
    if tuple(entry.get("token_id") for entry in entries) != token_ids:
        raise MissingLogprobError(
            "a server returned tokens without log-probs",
            got=f"{len(token_ids)} tokens, log-probs of {len(entries)}",
            allowed="one log-prob per sampled token",
            fix="use vLLM 0.32 or later, with --logprobs-mode processed_logprobs",
        )
    return tuple(_number(entry.get("logprob"), "logprob") for entry in entries)


def _spans(value: object, num_tokens: int) -> tuple[LabelledSpan, ...]:
    if value is None and num_tokens:
        raise MissingLogprobError(
            "a server does not say which weights sampled its tokens",
            got="no weight_versions",
            allowed="weight_versions of all tokens",
            fix="use vLLM 0.32 or later",
        )
    entries = [typed(entry, dict, "weight_versions") for entry in typed(value or [], list, "weight_versions")]
    return tuple(
        LabelledSpan(
            label=typed(entry.get("version"), str, "version"),
            start=typed(entry.get("start"), int, "start"),
            end=typed(entry.get("end"), int, "end"),
        )
        for entry in entries
    )


def _prompt_logprobs(value: object, request: Request) -> tuple[float, ...]:
    """Of prompt tokens 1, 2, ...: each entry maps token ids to log-probs, that of the prompt among them."""
    if not request.sampling.prompt_logprobs:
        return ()
    entries = typed(value, list, "prompt_logprobs")
    found = []
    for token, entry in zip(request.token_ids[1:], entries[1:], strict=True):
        of_token = typed(typed(entry, dict, "prompt_logprobs").get(str(token)), dict, "prompt_logprobs")
        found.append(_number(of_token.get("logprob"), "logprob"))
    return tuple(found)
