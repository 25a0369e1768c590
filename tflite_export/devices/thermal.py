"""Pick the processor's temperature out of a system's thermal zones."""

import re
from collections.abc import Iterable

# Names of zones on phones, boards and desktops; batteries, radios and skins are none of these.
_PROCESSOR = re.compile(r"cpu|soc|tsens|cluster|little|big|mid\b|gold|silver|prime|x86_pkg|coretemp|k10temp", re.I)


def processor_temperature(zones: Iterable[tuple[str, str]]) -> float | None:
    """Return the highest temperature of the processor in degrees Celsius, None where no zone tells.

    Args:
        zones: type and reading of each zone. Readings are in thousandths of a degree; a few kernels give degrees.
    """
    found = []
    for kind, reading in zones:
        if _PROCESSOR.search(kind) and re.fullmatch(r"-?\d+", reading.strip()):
            value = int(reading)
            degrees = value / 1000 if abs(value) >= 1000 else float(value)
            if 0 < degrees < 150:  # zones that are switched off read 0, -40 or -273
                found.append(degrees)
    return max(found, default=None)
