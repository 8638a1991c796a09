"""What a soak found, as a page beside its picture."""

from typing import Any


def page(found: dict[str, Any], name: str) -> str:
    """Markdown: what ran, the picture, each process's slope against its noise, and how to run it again."""
    rows = [
        f"| {process} | {found['rss'][process]['mean_mb']:.0f} | {fit['mean_mb']:.0f} | {fit['mb_per_minute']:+.3f} | [{fit['low']:+.3f}, {fit['high']:+.3f}] |"
        f" {fit['growth_mb']:+.1f} | {fit['noise_mb']:.1f} | {'**yes**' if fit['grows'] else 'no'} |"
        for process, fit in sorted(found["own"].items())
    ]
    resident = ", ".join(f"{process} {fit['mb_per_minute']:+.2f}" for process, fit in sorted(found["rss"].items()))
    told = found["machine"]
    return f"""# Memory

`make soak MINUTES={found["minutes"]:.0f}`: the local stack at {found["rate"]:,} events a second, a third of the \
{found["top_rate"]:,} that the same run measured on {told["cores"]} cores before; {found["minutes"]:.0f} minutes, a sample every \
five seconds. Warm-up of {found["warm_up_minutes"]:.0f} minutes cut off: heaps, arenas and caches fill up to their bounds first.
The broker's first heap of 256 MB is touched at its start: else it fills page by page for half an hour, and looks like growth.

![memory over time]({name}.svg)

| process | resident, MB | own, MB | MB a minute | 95 % interval | growth, MB | noise, MB | grows |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Own is anonymous memory. Resident adds the pages of mapped files, which are the page cache's: the broker maps its log's indices, and
they grow with the log. Resident, MB a minute: {resident}.

A process grows where the whole interval lies above zero and the growth over the time measured exceeds its noise: twice the spread
round the line, a hundredth of its size, or a megabyte. The interval is widened by the likeness of neighbouring samples. No windows of
minutes or hours and no late usage: what is kept for days grows by design until the oldest go. The Stripe stand-in, which keeps what it was told, is left out.

Apache Kafka {told["kafka"]} on {told["java"]}, Valkey {told["valkey"]}, ClickHouse {told["clickhouse"]},
Python {told["python"]}, commit `{told["commit"]}`, {found["at"]}. All samples: [{name}.json]({name}.json).
"""
