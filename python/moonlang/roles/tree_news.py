"""What the prefix tree gains and loses, for those whom --kv-events-config names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moonlang.config import kv_events
from moonlang.config.server_args import ServerArgs
from moonlang.mem_cache.journal import Journal
from moonlang.mem_cache.radix import RadixCache
from moonlang.scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from moonlang.observability.kv_events import KvEventPublisher


class TreeNews:
    """A journal of the tree, and who publishes it."""

    def __init__(self, journal: Journal, publisher: KvEventPublisher) -> None:
        self._journal = journal
        self._publisher = publisher

    def tell(self) -> None:
        """All since the last time, as one batch."""
        events = self._journal.take()
        if events:
            self._publisher.publish(events)

    def close(self) -> None:
        self._publisher.close()


def tree_news(args: ServerArgs, scheduler: Scheduler) -> TreeNews | None:
    """None when nobody wants to know. ConfigError: nobody can be told at that address."""
    config = kv_events.parse(args.kv_events_config)
    if config is None or not isinstance(scheduler.cache, RadixCache):
        return None
    from moonlang.observability.kv_events import KvEventPublisher  # and with it ZMQ, which a server may do without

    scheduler.cache.journal = journal = Journal(scheduler.config.page_size)
    return TreeNews(journal, KvEventPublisher(config))
