"""Memory over time as an SVG: one panel a process, the fitted line over what was measured, the warm-up in grey."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

from tests.soak_slope import Slope

WIDTH, PANEL, LEFT, RIGHT, TOP, BOTTOM = 720, 92, 60, 170, 18, 14
HEAD = 30


def picture(
    title: str, minutes: Sequence[float], series: dict[str, Sequence[float]], slopes: dict[str, Slope], warm_up: float
) -> str:
    """`series` = process → MB at each of `minutes`; the line is drawn from `warm_up` on."""
    height = HEAD + PANEL * len(series)
    panels = [
        _panel(number, name, minutes, series[name], slopes[name], warm_up) for number, name in enumerate(sorted(series))
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="11">',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            f'<text x="8" y="18" font-size="13">{escape(title)}</text>',
            *panels,
            "</svg>\n",
        ]
    )


def _panel(number: int, name: str, minutes: Sequence[float], mb: Sequence[float], fit: Slope, warm_up: float) -> str:
    top, bottom = HEAD + PANEL * number + TOP, HEAD + PANEL * (number + 1) - BOTTOM
    right, last = WIDTH - RIGHT, max(minutes)
    most = max(mb) * 1.05

    def at(minute: float, value: float) -> str:
        return f"{LEFT + minute / last * (right - LEFT):.1f},{bottom - value / most * (bottom - top):.1f}"

    middle = (warm_up + last) / 2
    line = [(m, fit.mean_mb + fit.mb_per_minute * (m - middle)) for m in (warm_up, last)]
    points = " ".join(at(m, value) for m, value in zip(minutes, mb, strict=True))
    colour = "#b00020" if fit.grows else "#1b6e3c"
    edge = float(at(warm_up, 0).split(",")[0])
    return "\n".join(
        [
            f'<rect x="{LEFT}" y="{top}" width="{edge - LEFT:.1f}" height="{bottom - top}" fill="#eeeeee"/>',
            f'<path d="M{LEFT},{top}V{bottom}H{right}" fill="none" stroke="#999999"/>',
            f'<polyline points="{points}" fill="none" stroke="#3b5b92" stroke-width="1"/>',
            f'<polyline points="{" ".join(at(*point) for point in line)}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
            f'<text x="{LEFT}" y="{top - 4}">{escape(name)}</text>',
            f'<text x="{LEFT - 4}" y="{top + 8}" text-anchor="end" fill="#555555">{most:.0f} MB</text>',
            f'<text x="{LEFT - 4}" y="{bottom}" text-anchor="end" fill="#555555">0</text>',
            f'<text x="{right + 8}" y="{top + 20}">{fit.mean_mb:.0f} MB</text>',
            f'<text x="{right + 8}" y="{top + 36}" fill="{colour}">{fit.mb_per_minute:+.3f} MB/min</text>',
            f'<text x="{right + 8}" y="{top + 52}" fill="#555555">[{fit.low:+.3f}, {fit.high:+.3f}]</text>',
            f'<text x="{right}" y="{bottom + 11}" text-anchor="end" fill="#555555">{last:.0f} min</text>',
        ]
    )
