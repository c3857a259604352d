"""The JSON of vLLM's token-in/token-out routes, as its clients and `oldlogits serve` read and write it, and nothing more of it.

POST /inference/v1/generate
    {"request_id", "token_ids", "sampling_params": {"max_tokens", "temperature", ..., "logprobs": 0}}
 -> {"choices": [{"token_ids", "logprobs": {"content": [{"token_id", "logprob"}]}, "finish_reason",
                  "weight_versions": [{"version": label, "start", "end"}],
                  "routed_experts": base64 of .npy [token but the last, layer, choice]}], "prompt_logprobs"}
"""

from __future__ import annotations

import io
import reprlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Final, Literal, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from oldlogits.core.engine import FinishReason, Generation, Sampling, Span
from oldlogits.core.errors import ConfigError, MissingLogprobError
from oldlogits.core.server import GenerateRequest, Json, ServerFailedError
from oldlogits.core.trajectory import Routing
from oldlogits.core.weights import PolicyVersion

STARTING_LABEL: Final = "default"
"""The label of the weights that a server read from its model folder."""
ABORT_PREFIX: Final = "generate-tokens-"
"""What a server puts before the id of a request: it is aborted under that name."""
BACKEND: Final = "oldlogits"
"""The name of the weight transfer that reads the trainer's copy in shared memory."""
SAMPLED: Final = "vllm:generation_tokens_total"
"""The counter among a server's metrics (Prometheus' text format) of all tokens that it has sampled."""

_ROUTED: Final = ("choices", 0, "routed_experts")
_NEUTRAL: Final[Mapping[str, Json]] = {
    "n": 1,
    "min_p": 0.0,
    "min_tokens": 0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Parameters of vLLM that `Sampling` lacks, with the value that does nothing; null and an empty list do nothing, either."""
_WITHOUT_EFFECT: Final = frozenset({"skip_special_tokens", "spaces_between_special_tokens", "output_kind"})
"""Parameters that say nothing about which token is sampled."""


class Message(BaseModel):
    """A part of a body: types are strict, and unknown keys are left alone."""

    model_config = ConfigDict(strict=True, frozen=True, ser_json_inf_nan="constants")


M = TypeVar("M", bound=Message)


class SamplingParams(Message):
    """How to sample; what the embedded engine does not have is refused unless it does nothing."""

    model_config = ConfigDict(extra="allow")

    max_tokens: int | None = None
    temperature: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    stop_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = True  # it stops where it is told to, and nowhere else
    logprobs: int | None = 0  # of the sampled token only
    detokenize: bool = False

    @model_validator(mode="after")
    def _asks_for_nothing_else(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name not in _WITHOUT_EFFECT and value is not None and value != [] and value != _NEUTRAL.get(name, ()):
                raise ValueError(f"{name[:40]} = {reprlib.repr(value)} is none of {', '.join(type(self).model_fields)}")
        return self


class GenerateBody(Message):
    """A request to sample."""

    request_id: Annotated[str, Field(max_length=1024)] = ""
    token_ids: list[int]
    sampling_params: SamplingParams = SamplingParams()
    stream: Literal[False] | None = False

    @classmethod
    def of(cls, request: GenerateRequest) -> Self:
        """The body of a request."""
        s = request.sampling
        params = SamplingParams(
            max_tokens=s.max_tokens,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            stop_token_ids=list(s.stop_token_ids),
            prompt_logprobs=0 if s.prompt_logprobs else None,
        )
        return cls(request_id=request.request_id, token_ids=list(request.token_ids), sampling_params=params)

    def request(self, *, default_id: str, default_max_tokens: int) -> GenerateRequest:
        """The request of a body; one that has no id, or does not say how many tokens it wants, gets the defaults."""
        p = self.sampling_params
        sampling = Sampling(
            max_tokens=default_max_tokens if p.max_tokens is None else p.max_tokens,
            temperature=p.temperature,
            top_p=p.top_p,
            top_k=max(0, p.top_k),
            stop_token_ids=tuple(p.stop_token_ids or ()),
            prompt_logprobs=p.prompt_logprobs is not None,
        )
        return GenerateRequest(request_id=self.request_id or default_id, token_ids=tuple(self.token_ids), sampling=sampling)


class TokenLogprob(Message):
    """A sampled token."""

    token_id: int
    logprob: float
    rank: int | None = None
    top_logprobs: list[object] = []


class WeightSpan(Message):
    """Output tokens ``[start, end)`` were sampled with the weights of one label."""

    version: str
    start: int
    end: int


class Choice(Message):
    """What was sampled."""

    index: int = 0
    token_ids: list[int] | None = None
    logprobs: dict[str, list[TokenLogprob] | None] | None = None
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    weight_versions: list[WeightSpan] | None = None
    routed_experts: str | None = None

    def logprobs_of(self, token_ids: tuple[int, ...]) -> tuple[float, ...]:
        """The log-probs of the sampled tokens, each checked to be of its token."""
        entries = (self.logprobs or {}).get("content") or []
        if tuple(entry.token_id for entry in entries) != token_ids:
            raise MissingLogprobError(
                "a server returned tokens without log-probs",
                got=f"{len(token_ids)} tokens, log-probs of {len(entries)}",
                allowed="one log-prob per sampled token",
                fix="use vLLM 0.32 or later, with --logprobs-mode processed_logprobs",
            )
        return tuple(entry.logprob for entry in entries)

    def spans(self, version_of: Callable[[str], PolicyVersion]) -> tuple[Span, ...]:
        """Which weights sampled which tokens."""
        if self.weight_versions is None and self.token_ids:
            raise MissingLogprobError(
                "a server does not say which weights sampled its tokens",
                got="no weight_versions",
                allowed="weight_versions of all tokens",
                fix="use vLLM 0.32 or later",
            )
        return tuple(Span(version=version_of(s.version), start=s.start, end=s.end) for s in self.weight_versions or [])

    def routing(self, num_tokens: int) -> Routing | None:
        """The experts of all tokens but the last, of `num_tokens` with the prompt; None: the server does not say."""
        if self.routed_experts is None:
            return None
        try:
            found = np.load(io.BytesIO(b64decode(self.routed_experts, validate=True)), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise refusal(_ROUTED, self.routed_experts[:40], "base64 of an array in NumPy's format") from error
        allowed = f"expert ids from 0 to 65535 [{num_tokens - 1} tokens, layers, choices]"
        if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu" or found.ndim != 3 or len(found) != num_tokens - 1:
            raise refusal(_ROUTED, f"{found.dtype} {found.shape}", allowed)
        if not found.size or found.min() < 0 or found.max() >= 2**16:
            raise refusal(_ROUTED, "experts out of range, or none", allowed)
        return Routing.of(found if found.dtype == np.uint8 else found.astype(np.uint16))


class PromptLogprob(Message):
    """A token of the prompt."""

    logprob: float
    rank: int | None = None


class AnswerBody(Message):
    """The answer to a request."""

    request_id: str = ""
    model: str = ""
    output_mode: str = "tokens"
    choices: list[Choice] = Field(min_length=1, max_length=1)
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    usage: dict[str, object] | None = None

    @classmethod
    def of(cls, answer: Generation, request: GenerateRequest, *, model: str, labels: Mapping[PolicyVersion, str]) -> Self:
        """The body of the answer to `request`, with the labels of versions."""
        ids, prompt = list(answer.output_ids), request.token_ids
        content = [TokenLogprob(token_id=token, logprob=logp) for token, logp in zip(ids, answer.logprobs, strict=True)]
        routing = answer.spans[-1].routing if answer.spans else None
        choice = Choice(
            routed_experts=None if routing is None else _as_npy(routing),
            token_ids=ids,
            logprobs={"content": content},
            finish_reason=answer.finish_reason,
            stop_reason=ids[-1] if answer.finish_reason == "stop" else None,
            weight_versions=[WeightSpan(version=labels[span.version], start=span.start, end=span.end) for span in answer.spans],
        )
        of_prompt: list[dict[str, PromptLogprob] | None] | None = None
        if request.sampling.prompt_logprobs:
            pairs = zip(prompt[1:], answer.prompt_logprobs, strict=True)
            of_prompt = [None, *({str(token): PromptLogprob(logprob=logp)} for token, logp in pairs)]
        total = {"prompt_tokens": len(prompt), "completion_tokens": len(ids), "total_tokens": len(prompt) + len(ids)}
        name = ABORT_PREFIX + request.request_id
        return cls(request_id=name, model=model, choices=[choice], prompt_logprobs=of_prompt, usage=dict(total))

    def answer(self, request: GenerateRequest, version_of: Callable[[str], PolicyVersion]) -> Generation:
        """The answer to `request`, with the versions of labels."""
        [choice] = self.choices
        token_ids = tuple(choice.token_ids or ())
        spans = choice.spans(version_of)
        if spans:  # what older weights chose, a server does not say
            spans = (*spans[:-1], replace(spans[-1], routing=choice.routing(len(request.token_ids) + len(token_ids))))
        return Generation(
            output_ids=token_ids,
            logprobs=choice.logprobs_of(token_ids),
            spans=spans,
            finish_reason=choice.finish_reason,
            prompt_logprobs=self._of_prompt(request.token_ids) if request.sampling.prompt_logprobs else (),
        )

    def _of_prompt(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Those of tokens 1, 2, ...: each entry maps token ids to log-probs, that of the prompt among them."""
        entries = (self.prompt_logprobs or [])[1:]
        found = [(entry or {}).get(str(token)) for token, entry in zip(token_ids[1:], entries, strict=False)]
        if len(entries) != len(token_ids) - 1 or None in found:
            raise refusal(("prompt_logprobs",), f"{len(entries)} tokens", f"all {len(token_ids) - 1} tokens but the first")
        return tuple(token.logprob for token in found if token is not None)


class ModelConfig(Message):
    """What a server says of its model."""

    model: str = ""
    dtype: str
    max_model_len: int
    logprobs_mode: str | None = None


class ServerConfig(Message):
    """The parts of vLLM's configuration that a client reads; `additional_config` is where ours stand."""

    model_settings: ModelConfig = Field(alias="model_config")  # pydantic has its own use of the name
    scheduler_config: dict[str, object]
    weight_transfer_config: dict[str, object] | None = None
    additional_config: object = None

    def own(self, key: str) -> object:
        """What this package added to the configuration."""
        return self.additional_config.get(key) if isinstance(self.additional_config, dict) else None


class ServerInfoBody(Message):
    """What /server_info answers."""

    vllm_config: ServerConfig


class StateBody(Message):
    """What /version, /is_paused or /weight_info answers."""

    version: str | None = None
    is_paused: bool = False
    weight_version: str | None = None


class NonceFile(Message):
    """A file of the trainer's machine, and what it says: it shows that the server is on that machine."""

    path: str
    nonce: str


def _as_npy(routing: Routing) -> str:
    file = io.BytesIO()
    np.save(file, routing.choices, allow_pickle=False)
    return b64encode(file.getvalue()).decode()


def read(kind: type[M], content: bytes) -> M:
    """Read a body; one that is no JSON comes from a broken server, another mistake is a `ConfigError`."""
    try:
        return kind.model_validate_json(content or b"{}")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise ServerFailedError(f"an answer that is no JSON: {content[:100]!r}") from error
        raise refusal(first["loc"], first["input"], first["msg"]) from error


def refusal(place: Sequence[int | str], got: object, message: str) -> ConfigError:
    """The error of a value that is not what pydantic wants at its place in a body."""
    where = ".".join(map(str, place)) or "the body"
    return ConfigError(
        "a message over HTTP is not what its route takes",
        got=f"{where} = {reprlib.repr(got)}"[:200],
        allowed=f"{where}: {message}",
        fix="use the routes of vLLM 0.32 or later, or those of `oldlogits serve`",
    )
