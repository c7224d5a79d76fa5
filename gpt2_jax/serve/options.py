"""What a server can be asked."""

from dataclasses import dataclass

from gpt2_jax.config import ConfigError, check


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a model is served."""

    host: str = "127.0.0.1"  # to listen on; 0.0.0.0, every network, takes a key
    port: int = 8000  # 0: any free one
    lanes: int = 8  # texts written at once, a power of two
    queue: int = 64  # texts that may wait; more are answered 429
    api_key: str | None = None  # clients send Authorization: Bearer KEY
    allowed_host: tuple[str, ...] = ()  # more names in the Host header; * is any
    cors_origin: tuple[str, ...] = ()  # pages elsewhere that may call: http://host:port
    drain_seconds: float = 30.0  # after SIGTERM, for what is under way

    def __post_init__(self):
        check(0 <= self.port < 2**16, "--port", self.port, "0 <= port < 65536")
        power = self.lanes > 0 and self.lanes & (self.lanes - 1) == 0
        check(power, "--lanes", self.lanes, "a power of two")
        check(self.queue >= 0, "--queue", self.queue, ">= 0")
        good = 0 <= self.drain_seconds < 1e6
        check(good, "--drain-seconds", self.drain_seconds, "0 <= seconds < 1e6")
        check(self.api_key != "", "--api-key", self.api_key, "a key, or none at all")
        closed = self.host.startswith("127.") or self.host in ("localhost", "::1")
        if not closed and self.api_key is None:
            raise ConfigError(
                f"--host {self.host} lets other machines in; allowed: with --api-key "
                "KEY, which clients send as Authorization: Bearer KEY"
            )
