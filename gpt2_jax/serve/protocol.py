"""What clients may ask, as OpenAI's API defines it, and how they are refused.

https://platform.openai.com/docs/api-reference/completions, beyond it fields of vLLM
(`top_k`, `min_p`, `repetition_penalty`, `truncate_prompt_tokens`), and a look inside.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt

MOST_CHOICES = 16  # n and best_of
MOST_TOPS = 5  # OpenAI's limit
MOST_STOPS = 4  # OpenAI's limit
INSPECTED = 256  # tokens of a text whose attention is shown; it grows with the square

Id = Annotated[StrictInt, Field(ge=0)]
Number = StrictInt | StrictFloat
Ids = Annotated[list[Id], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class Body(BaseModel):
    """A JSON object whose unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """What a stream says beside its text."""

    include_usage: StrictBool = False


class CompletionRequest(Body):
    """`POST /v1/completions`."""

    model: str
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1)]
    ) = Field(description="A text, a list of texts, token ids, or a list of those")
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = Field(
        16, description="New tokens; 0 only with echo"
    )
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = 1.0
    n: Annotated[StrictInt, Field(ge=1, le=MOST_CHOICES)] | None = 1
    best_of: Annotated[StrictInt, Field(ge=1, le=MOST_CHOICES)] | None = Field(
        None, description="Write as many, give the n likeliest per token; not below n"
    )
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, lt=2**32)] | None = Field(
        None, description="The same seed draws the same text; none: another every time"
    )
    logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_TOPS)] | None = None
    echo: StrictBool | None = False
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: dict[TokenName, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    suffix: None = Field(None, description="Not supported: GPT-2 cannot fill in")
    user: str | None = Field(None, description="Taken, and not looked at")
    top_k: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = 1.0
    truncate_prompt_tokens: Annotated[StrictInt, Field(ge=1)] | None = Field(
        None, description="Keep only so many tokens of a prompt, the last ones"
    )


class TopLogprobs(BaseModel):
    """The log-probabilities of one choice, in nats; positions go with each other."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class Choice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: TopLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Usage(BaseModel):
    """Tokens, counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """The answer, or with `stream` one event of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """The one model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gpt2_jax"
    max_model_len: int = Field(description="Tokens of prompt and completion together")
    n_layer: int
    n_head: int


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class InspectRequest(Body):
    """`POST /v1/inspect`: a look inside."""

    model: str
    prompt: Text | Ids
    layer: Annotated[StrictInt, Field(ge=0)] | None = Field(
        None, description="Give the attention of this layer's heads; the first is 0"
    )
    top: Annotated[StrictInt, Field(ge=1, le=50)] = 10


class NextToken(BaseModel):
    """A token that could be next."""

    token: str
    id: int
    logprob: float


class Inspection(BaseModel):
    """What the model makes of a text."""

    tokens: list[str]
    token_ids: list[int]
    logprobs: list[float | None] = Field(description="In nats; none for the first")
    next: list[list[NextToken]] = Field(description="After each token, likeliest first")
    attention: list[list[list[float]]] | None = Field(
        description="head, query, key up to the query; rows sum to 1"
    )


class Problem(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's error shape."""

    error: Problem


class Refused(Exception):
    """An answer of 4xx or 5xx, in OpenAI's shape."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        kind = "rate_limit_error" if status == 429 else kind
        kind = "authentication_error" if status == 401 else kind
        problem = Problem(message=message, type=kind, param=param, code=code)
        self.body: dict[str, Any] = ErrorBody(error=problem).model_dump()
        self.status, self.headers = status, headers
