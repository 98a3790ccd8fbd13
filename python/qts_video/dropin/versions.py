"""Which transformers versions the drop-in works with."""

# (first, first after the last) as (major, minor).
SUPPORTED = (((4, 57), (4, 58)), ((5, 6), (5, 18)), ((5, 19), (5, 24)))
_WHY = "5.0 to 5.5 give some videos wrong positions, 5.18 mixes up the videos of a sample in beam search"


def check_version(version: str) -> None:
    """Raise RuntimeError unless ``version`` of transformers is one that the drop-in knows."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if not any(first <= (major, minor) < end for first, end in SUPPORTED):
        known = ", ".join(f"{a[0]}.{a[1]} to {b[0]}.{b[1] - 1}" for a, b in SUPPORTED)
        raise RuntimeError(f"transformers {version} is not supported; known versions: {known} ({_WHY})")
