"""Is the server alive? Its state as the HTTP layer knows it, and the probe that asks the engine for one token."""

from __future__ import annotations

import asyncio
import os
from typing import Literal

from moonlang.base.errors import ConfigError, RequestError
from moonlang.core.messages import Generate
from moonlang.core.sampling import SamplingParams
from moonlang.entrypoints.client import EngineClient

RID_PREFIX = "HEALTH_CHECK"
_TIMEOUT_VARIABLE = "SGLANG_HEALTH_CHECK_TIMEOUT"
_GENERATE_VARIABLE = "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"
_DEFAULT_TIMEOUT_S = 20.0


class Health:
    """The state of one server. timeout_s: how long a probe waits; generates: whether /health probes at all."""

    def __init__(self, client: EngineClient, *, timeout_s: float = _DEFAULT_TIMEOUT_S, generates: bool = True) -> None:
        self.state: Literal["Starting", "Up", "UnHealthy", "Exiting"] = "Starting"
        self.generates = generates
        self._client = client
        self._timeout_s = timeout_s

    @classmethod
    def from_environment(cls, client: EngineClient) -> Health:
        """With SGLang's environment variables. ConfigError when one of them makes no sense."""
        text = os.environ.get(_TIMEOUT_VARIABLE, str(_DEFAULT_TIMEOUT_S))
        try:
            timeout_s = float(text)
        except ValueError:
            raise ConfigError(f"{_TIMEOUT_VARIABLE} must be a number of seconds, got {text!r}.") from None
        generates = os.environ.get(_GENERATE_VARIABLE, "true").lower() not in ("0", "false", "no")
        return cls(client, timeout_s=timeout_s, generates=generates)

    @property
    def ready(self) -> bool:
        """True while requests are taken."""
        return self.state in ("Up", "UnHealthy") and not self._client.failure

    async def probe(self) -> bool:
        """Have the engine say something. Any output counts: a busy engine need not run a request for this."""
        if not self.ready:
            return False
        alive = await self._heard()
        self.state = "Up" if alive else "UnHealthy"
        return alive

    async def _heard(self) -> bool:
        return all(await asyncio.gather(*map(self._replica_heard, self._client.living)))

    async def _replica_heard(self, replica: int) -> bool:
        if self._client.is_busy(replica) and self._client.args.disaggregation_mode == "null":
            return await self._client.output(replica, self._timeout_s)  # a pair may wait for its other half in silence
        message = Generate(
            rid=f"{RID_PREFIX}_{self._client.fresh_rid()}",
            input_ids=[0],
            sampling=SamplingParams(max_new_tokens=1, temperature=0.0),
            dp_rank=replica,
        )
        try:
            with self._client.open([message], observed=False):
                return await self._client.output(replica, self._timeout_s)
        except RequestError:
            return False
