"""What the commands that look print from ClickHouse."""

import asyncio
import time
from typing import Any

from tollway.streams.looks import HOUR_S, check_account
from tollway.streams.settings import Settings
from tollway.streams.usage_queries import usage_report
from tollway.streams.wiring import audit_store


async def usage_of(settings: Settings, account: str, hours: int) -> list[dict[str, Any]]:
    """ClickHouse's accepted usage of an account in the last `hours`."""
    check_account(account)
    store = audit_store(settings)
    now_s = int(time.time())
    try:
        return await asyncio.to_thread(usage_report, store, account, now_s - hours * HOUR_S, now_s + 60)
    finally:
        store.close()
