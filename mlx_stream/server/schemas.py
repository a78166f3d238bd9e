"""The fields of OpenAI's API requests, and their limits; independent of the model.

Fields that cannot be honoured are refused by name. Fields that this server does not know are
ignored, and named in the answer's notices: clients also send fields meant for other servers.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mlx_stream.sampling import MOST_LOGPROBS, Sampling

MOST_MESSAGES = 65_536
MOST_STOPS, LONGEST_STOP = 16, 256
LONGEST_NAME = 256
MOST_NAMED = 16
MOST_BIASED = 1_024
MOST_TOKENS = 2**31 - 1
LOWEST_TOP_P = 1e-6
NO_MEDIA = "this model reads text only: images, audio and files are not read, and no URL is opened"
# Known fields that have no effect here: who asks, and where OpenAI would run or store it.
WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "parallel_tool_calls", "verbosity", "audio", "prediction"),
}


Item = TypeVar("Item")
# Checked only up to the first invalid item: each one that is reported takes 100 times as many bytes
# as it does in the body.
ListOf = Annotated[list[Item], Field(fail_fast=True)]


class Strict(BaseModel):
    """A base class for fields with strict types; unknown fields are kept separately."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @property
    def unknown(self) -> list[str]:
        """The names of unknown fields; only the first ones if there are many."""
        names = sorted((self.model_extra or {}).keys() - WITHOUT_EFFECT)
        return [name[:LONGEST_NAME] for name in names[:MOST_NAMED]]


class ContentPart(Strict):
    """A part of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def check_kind(self) -> "ContentPart":
        if self.type not in ("text", "refusal"):
            raise ValueError(NO_MEDIA)
        if (self.text if self.type == "text" else self.refusal) is None:
            raise ValueError(f"a part of type {self.type} needs the field {self.type}")
        return self


class ChatMessage(Strict):
    """A message of a history. Thinking that a client sends back is not read."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | ListOf[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[Any] | None = None
    reasoning_content: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text or part.refusal or "" for part in self.content)
        return self.content or ""

    @model_validator(mode="after")
    def check_content(self) -> "ChatMessage":
        if self.role != "assistant" and self.content is None:
            raise ValueError(f"a message with role {self.role} needs content")
        return self


class StreamOptions(Strict):
    include_usage: bool = False


class TemplateOptions(Strict):
    enable_thinking: bool | None = None


class SessionOption(Strict):
    """This server's own request fields."""

    session: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)] | None = None


class Generation(Strict):
    """The fields that both kinds of completions share."""

    model: Annotated[str, Field(max_length=LONGEST_NAME)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | ListOf[str] | None = None
    logit_bias: dict[str, Any] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("n")
    @classmethod
    def check_n(cls, n: int | None) -> int | None:
        if n not in (None, 1):
            raise ValueError("each request gets one answer: use 1, and send more requests")
        return n

    @field_validator("frequency_penalty", "presence_penalty")
    @classmethod
    def check_penalty(cls, penalty: float | None) -> float | None:
        if penalty:
            raise ValueError("this penalty is not supported: use 0, and repetition_penalty instead")
        return penalty

    @field_validator("stop")
    @classmethod
    def check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MOST_STOPS or any(not 0 < len(one) <= LONGEST_STOP for one in stops):
            raise ValueError(f"at most {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def check_bias(cls, bias: dict[str, Any] | None) -> dict[str, Any] | None:
        """Check the whole mapping here: pydantic would report every invalid value."""
        if bias and len(bias) > MOST_BIASED:
            raise ValueError(f"at most {MOST_BIASED:,} tokens")
        for id, value in (bias or {}).items():
            number = type(value) in (int, float) and -100 <= value <= 100
            if not (id.isascii() and id.isdigit() and len(id) < 10 and number):
                raise ValueError("it must map token ids to numbers from -100 to 100")
        return bias

    @model_validator(mode="after")
    def check_stream_options(self) -> "Generation":
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs `stream: true`")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def bias(self) -> dict[int, float] | None:
        return (
            {int(id): value for id, value in self.logit_bias.items()} if self.logit_bias else None
        )

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def sampling(self) -> Sampling:
        """The sampling settings; the defaults are this server's, not OpenAI's."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p if self.top_p is None else max(self.top_p, LOWEST_TOP_P),
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed if self.seed is None else self.seed % 2**64,
        }
        return Sampling(**{name: value for name, value in given.items() if value is not None})


class ChatRequest(Generation):
    """A chat completions request."""

    messages: Annotated[ListOf[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    reasoning_effort: Annotated[str, Field(max_length=LONGEST_NAME)] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    modalities: ListOf[str] | None = None
    mlx_stream: SessionOption | None = None

    @model_validator(mode="after")
    def check_what_is_offered(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs `logprobs: true`")
        if self.tools or self.functions or any(m.tool_calls for m in self.messages):
            raise ValueError("tools are not supported yet: leave out tools and tool calls")
        if self.response_format and self.response_format.get("type") != "text":
            raise ValueError("response_format: only text is supported")
        if self.modalities not in (None, ["text"]):
            raise ValueError(f"modalities: {NO_MEDIA}")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def think(self) -> bool | None:
        return self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None

    @property
    def all_unknown(self) -> list[str]:
        parts = (self.stream_options, self.chat_template_kwargs, self.mlx_stream)
        return [*self.unknown, *(name for part in parts if part for name in part.unknown)]


class TextRequest(Generation):
    """A completions request."""

    prompt: str | ListOf[str]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def check_what_text_offers(self) -> "TextRequest":
        if isinstance(self.prompt, list) and len(self.prompt) != 1:
            raise ValueError("prompt: each request completes only one text")
        if self.suffix or self.best_of not in (None, 1):
            raise ValueError("suffix and best_of are not supported: leave them out")
        return self

    @property
    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]
