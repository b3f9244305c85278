"""Conversations: chat templates, what of a history fits, and the terminal chat."""

from bitjax.chat.conversation import ChatFormat, Conversation, Message
from bitjax.chat.template import Renderer, render

__all__ = ["ChatFormat", "Conversation", "Message", "Renderer", "render"]
