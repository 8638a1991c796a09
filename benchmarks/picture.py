"""Bars on a logarithmic scale, as SVG that reads on light and dark."""

import math
from collections.abc import Sequence

LEFT, RIGHT, ROW, WIDTH = 330, 90, 28, 860
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#555}.t{font-weight:600}.o{fill:#2563eb}.p{fill:#9ca3af}"
    "line{stroke:#9ca3af;stroke-opacity:.35}@media(prefers-color-scheme:dark){text{fill:#ccc}}"
)


def bars(title: str, rows: Sequence[tuple[str, float, bool]]) -> str:
    """One bar a row: (name, value, whether it is ours)."""
    low = 10 ** math.floor(math.log10(min(value for _, value, _ in rows)))
    high = 10 ** math.ceil(math.log10(max(value for _, value, _ in rows)))
    decades = round(math.log10(high / low))
    height = 60 + ROW * len(rows)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log10(value / low) / decades

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">',
        f"<style>{STYLE}</style>",
        f'<text class="t" x="8" y="20">{title}</text>',
    ]
    for decade in range(decades + 1):
        value = low * 10**decade
        out.append(f'<line x1="{x(value):.0f}" x2="{x(value):.0f}" y1="32" y2="{height - 22}"/>')
        out.append(f'<text x="{x(value):.0f}" y="{height - 6}" text-anchor="middle">{value:,}</text>')
    for number, (name, value, ours) in enumerate(rows):
        y = 36 + ROW * number
        kind = "o" if ours else "p"
        out.append(f'<text x="{LEFT - 10}" y="{y + 15}" text-anchor="end">{name}</text>')
        out.append(f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{x(value) - LEFT:.0f}" height="20" rx="2"/>')
        out.append(f'<text x="{x(value) + 6:.0f}" y="{y + 15}">{value:,.0f}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"
