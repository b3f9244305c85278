"""OpenAI's HTTP interface as data: bodies of requests in, bodies of answers out, no network."""

from bitjax.protocol.answers import Answers
from bitjax.protocol.calls import Call, chat_call, completion_call
from bitjax.protocol.fields import BadRequest
from bitjax.protocol.prompts import Encoder

__all__ = ["Answers", "BadRequest", "Call", "Encoder", "chat_call", "completion_call"]
