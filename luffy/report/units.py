"""Numbers for people, and by people: bytes, rates, durations, counts.

Sizes and rates are decimal (1 kB = 1000 bytes), because links are sold that way: a byte count printed here
can be divided by a link's rate in one's head. Three significant digits are enough to compare two runs, and
few enough that noise does not look like knowledge.
"""

import math
import re

from luffy.errors import UserError

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgtKMGT]?)(i?)B")
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
DASH = "–"  # what stands in a table where nothing was measured


def _is_missing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def _three_digits(value: float) -> str:
    """Three significant digits, never an exponent: 0.0123, 1.23, 12.3, 123, 1234."""
    if value == 0:
        return "0"
    value = float(f"{value:.3g}")  # round first: 99.96 is 100, not 100.0
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals > 2 else text


def _scaled(value: float) -> tuple[float, str]:
    """The value and the prefix that keep the printed number under 1000."""
    magnitude = abs(value)
    index = 0
    # 999.5 prints as 1000 with three digits, so it already belongs to the next prefix.
    while magnitude >= 999.5 and index < len(_PREFIXES) - 1:
        magnitude /= 1000
        index += 1
    return math.copysign(magnitude, value), _PREFIXES[index]


def format_count(value: float | None) -> str:
    """`950`, `1.23k`, `45.6M`: a number of tokens, rows or parameters."""
    if value is None or _is_missing(value):
        return DASH
    if float(value).is_integer() and abs(value) < 1000:
        return str(int(value))
    scaled, prefix = _scaled(float(value))
    return _three_digits(scaled) + prefix


def format_bytes(num_bytes: float | None) -> str:
    """`512 B`, `1.23 MB`, `45.6 GB`: decimal units."""
    if num_bytes is None or _is_missing(num_bytes):
        return DASH
    scaled, prefix = _scaled(float(num_bytes))
    digits = str(round(scaled)) if prefix == "" and abs(scaled) >= 1 else _three_digits(scaled)
    return f"{digits} {prefix}B"


def format_loss(nats: float | None) -> str:
    """`3.9331`: a loss, in nats per token, as every table, figure and line has it."""
    return DASH if nats is None or _is_missing(nats) else f"{nats:.4f}"


def format_rate(per_second: float | None, unit: str = "B") -> str:
    """`12.3 MB/s` for bytes (the default unit), `45.6k tokens/s` for any other unit."""
    if per_second is None or _is_missing(per_second):
        return DASH
    if unit == "B":
        return format_bytes(per_second) + "/s"
    return f"{format_count(per_second)} {unit}/s"


def format_seconds(seconds: float | None) -> str:
    """`850 µs`, `12.3 ms`, `4.20 s`, `3 min 20 s`, `2 h 05 min`, `3 d 04 h`."""
    if seconds is None or _is_missing(seconds):
        return DASH
    if seconds < 0:
        return "-" + format_seconds(-seconds)
    if seconds == 0:
        return "0 s"
    if seconds < 0.9995e-3:
        return f"{_three_digits(seconds * 1e6)} µs"
    if seconds < 0.9995:
        return f"{_three_digits(seconds * 1e3)} ms"
    if seconds < 59.95:
        return f"{_three_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours:02d} h"


def format_share(part: float, whole: float) -> str:
    """`38 %`, `0.4 %`, `< 0.1 %`, `0 %`: a part of a whole."""
    percent = 100 * part / whole if whole else 0.0
    if percent == 0:
        return "0 %"
    if percent >= 0.95:
        return f"{percent:.0f} %"
    return f"{percent:.1f} %" if percent >= 0.05 else "< 0.1 %"


def parse_num_bytes(text: str, option: str) -> int:
    """``8GB``, ``500MB``, ``2GiB`` -> bytes. Raises UserError naming the option."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise UserError(f"{option} {text}: not a size; write a number and a unit, such as 8GB or 500MB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _POWER[match[2].lower()])
