"""What a server allows: `bitjax serve`."""

from __future__ import annotations

from dataclasses import dataclass

from bitjax.config.fields import check_fields, require, require_positive


@dataclass(frozen=True)
class ServeConfig:
    """Limits that keep one client from harming the others."""

    host: str = "127.0.0.1"  # others' machines reach 0.0.0.0
    port: int = 8000  # 0: any that is free
    max_body: int = 4 << 20  # bytes of a request; a context of 128K tokens has some 500 kB
    max_tokens: int | None = None  # of an answer; None: what the context leaves
    queue: int = 256  # sequences that may wait for those that run; more are refused with 429
    connections: int = 1000  # at once; more are refused with 503
    idle_seconds: float = 30.0  # a connection may be without a request, or be sending one
    send_seconds: float = 30.0  # a client may take to read what it was sent
    drain_seconds: float = 60.0  # that requests may go on after SIGTERM

    def __post_init__(self) -> None:
        check_fields(self)
        require_positive(self, "max_body", "connections", "idle_seconds", "send_seconds")
        require(0 <= self.port < 2**16, f"serve.port={self.port} is not in 0..65535")
        require(self.queue >= 0, f"serve.queue={self.queue} is below 0")
        require(self.drain_seconds >= 0, f"serve.drain_seconds={self.drain_seconds} is below 0")
        if self.max_tokens is not None:
            require_positive(self, "max_tokens")
