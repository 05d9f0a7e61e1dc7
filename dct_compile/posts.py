"""The sites that a rank is about to exchange, as the ranks of a group compare them. Knows no process group and no store."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Signature:
    """One site, as it is compared between ranks.

    ``key``: what is equal on all ranks and for every batch size: collective, kind, dtype, trailing shape, sizes of parameters.
    ``decision``: scheme, capacity, dtype of values. ``label``: the site's name for a message; it is not compared.
    """

    key: str
    decision: str
    label: str = field(compare=False)

    def titled(self, position: int) -> str:
        """Returns the site's name with its place in the check."""
        return f"site {position}, {self.label!r} ({self.key})"


@dataclass(frozen=True)
class Post:
    """The sites of one check. ``fresh`` is the ordinal of a fresh check, from 1; 0 otherwise."""

    fresh: int
    options: Mapping[str, object]
    signatures: tuple[Signature, ...]

    def pack(self) -> str:
        """Returns the post as text, equal for equal posts."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def unpack(cls, text: str) -> "Post":
        """Reads what :meth:`pack` returned."""
        values = json.loads(text)
        return cls(values["fresh"], values["options"], tuple(Signature(**item) for item in values["signatures"]))


class Log:
    """The posts of one rank, as far as they were read.

    ``known`` are all sites. ``cut`` are those of posts that are not fresh: a rank may post them in other portions than its peers.
    """

    def __init__(self, rank: int, rank_name: str) -> None:
        self.rank, self.rank_name = rank, rank_name
        self.posts: list[Post] = []
        self.known: set[Signature] = set()
        self.cut: set[Signature] = set()

    def add(self, post: Post) -> None:
        """Appends the rank's next post."""
        self.posts.append(post)
        self.known.update(post.signatures)
        if not post.fresh:
            self.cut.update(post.signatures)

    def fresh(self, ordinal: int) -> Post | None:
        """Returns the post of the rank's fresh check of that ordinal, if it was read."""
        return next((post for post in self.posts if post.fresh == ordinal), None)

    def has_met(self, post: Post) -> bool:
        """Returns whether this rank has come to where another rank posts ``post``."""
        return self.fresh(post.fresh) is not None if post.fresh else not self.known.isdisjoint(post.signatures)


def difference(mine: Log, theirs: Log) -> str:
    """Returns the first difference between the last post of ``mine`` and ``theirs``, or an empty string.

    Fresh posts of one ordinal must be equal. Of other posts, the sites of one rank must contain those of the other: their graphs may be
    cut differently, so that one is ahead.
    """
    post = mine.posts[-1]
    if post.fresh:
        other = theirs.fresh(post.fresh)
        return "" if other is None else _first_unequal(mine, post, theirs, other)
    if not theirs.posts:
        return ""
    other = theirs.posts[-1]
    if set(post.signatures) == set(other.signatures):
        return _first_unequal(mine, post, theirs, other)
    here, there = mine.cut - theirs.known, theirs.cut - mine.known
    if not here or not there:
        return ""
    position, site = next((i, item) for made in mine.posts for i, item in enumerate(made.signatures) if item in here)
    candidates = [item for made in theirs.posts for item in made.signatures if item in there]
    counterpart = next((item for item in candidates if item.key == site.key), candidates[0])
    return _describe(position, (mine, post, site), (theirs, other, counterpart))


def _first_unequal(mine: Log, post: Post, theirs: Log, other: Post) -> str:
    here, there = post.signatures, other.signatures
    for position in range(max(len(here), len(there))):
        a, b = (items[position] if position < len(items) else None for items in (here, there))
        if a != b:
            return _describe(position, (mine, post, a), (theirs, other, b))
    return ""


_Side = tuple[Log, Post, Signature | None]


def _describe(position: int, here: _Side, there: _Side) -> str:
    me, them = here[0].rank_name, there[0].rank_name
    a, b = here[2], there[2]
    if a is not None and b is not None and a.key == b.key:
        site = f"{a.titled(position)}, is {a.decision!r} on rank {me} and {b.decision!r} on rank {them}"
    else:
        site = f"site {position} is {_full(a)} on rank {me} and {_full(b)} on rank {them}"
    ours, others = here[1].options, there[1].options
    names = [name for name in {**ours, **others} if ours.get(name) != others.get(name)]
    options = [f"option {name!r} is {ours.get(name)!r} on rank {me} and {others.get(name)!r} on rank {them}" for name in names]
    return "; ".join([site, *options])


def _full(site: Signature | None) -> str:
    return "missing" if site is None else f"{site.label!r} ({site.key}: {site.decision!r})"
