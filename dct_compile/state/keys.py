"""The keys of saved states: ``name`` for a parameter's state, ``name@1`` for its second one, and so on.

A name that holds an "@" itself always gets a number: ``a@1@0`` is the first state of ``a@1``. So no two states have the same key.
"""

from collections.abc import Collection, Mapping

from dct_compile.state.entry import Entry


def key_of(name: str, ordinal: int) -> str:
    """Returns the key of the state number ``ordinal`` of the parameter ``name``."""
    return f"{name}@{ordinal}" if ordinal or "@" in name else name


def by_parameter(saved: Mapping[str, Entry], names: Collection[str]) -> dict[str, list[Entry]]:
    """Returns the states of each of the parameters ``names``, in order.

    A key without a number may be a name with an "@" in it: older versions wrote such keys.

    Raises:
        ValueError: ``saved`` is no mapping, a key belongs to no parameter, or a state before it is missing.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"a state is a dict by parameter name, not {type(saved).__name__}")
    found: dict[str, dict[int, Entry]] = {name: {} for name in names}
    unknown = []
    for key, entry in saved.items():
        name, ordinal = _parsed(str(key), names)
        if name in found and ordinal not in found[name]:
            found[name][ordinal] = entry
        else:
            unknown.append(str(key))
    if unknown:
        raise ValueError(f"the state names parameters that the model does not have: {', '.join(unknown)}; it has {', '.join(names)}")
    for name, entries in found.items():
        missing = [number for number in range(len(entries)) if number not in entries]
        if missing:
            others = ", ".join(key_of(name, number) for number in sorted(entries))
            raise ValueError(f"the state lacks {key_of(name, missing[0])}: it has {others}, which must be numbered from 0 on")
    return {name: [entries[number] for number in sorted(entries)] for name, entries in found.items()}


def _parsed(key: str, names: Collection[str]) -> tuple[str, int]:
    name, _, number = key.rpartition("@")
    return (name, int(number)) if name in names and number.isdecimal() else (key, 0)
