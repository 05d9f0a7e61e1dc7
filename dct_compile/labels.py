"""Short names of sites, for code, profiles and charts."""


def site_label(name: str, kind: str) -> str:
    """Returns a short name: the first parameter and the number of the others, or module and line.

    Examples are ``top.weight +3``, ``top.0: model.py:12`` and ``model.py:12 backward``. ``name`` and ``kind`` are those of
    :class:`dct_compile.report.SiteReport`.
    """
    place = name.partition(" in ")[0]
    if kind in ("gradient", "buffers"):
        first, *others = place.split(", ")
        return f"{first} +{len(others)}" if others else first
    return f"{place} backward" if kind.endswith("_gradient") else place
