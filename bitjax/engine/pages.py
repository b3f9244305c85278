"""Which pages of the cache are whose, and which tokens they hold.

A page has 64 slots. A sequence has a list of pages; those of a beginning that others have too are
shared, counted, and never written to again. What nobody uses any more is kept until its memory is
needed, the longest unused first.

What a page holds is named by a hash of the chain of tokens up to it, so that it is found again:

    key(page) = H(key(page before), its 64 tokens)

Of a page that agrees only at its beginning, or is not full yet, the beginning can be had as a copy.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from bitjax.ops.rows import PAGE

ROOT = b""  # the key before the first page


class Page:
    """64 slots of the cache.

    Attributes:
        number: of the page.
        users: sequences that read it.
        parent: key of the page before, once it is known what this one will hold.
        tokens: whose keys and values are in its first slots.
        key: its own, once it is full.
    """

    __slots__ = ("key", "number", "parent", "tokens", "users")

    def __init__(self, number: int) -> None:
        self.number = number
        self.users = 0
        self.parent: bytes = ROOT
        self.tokens: list[int] = []
        self.key: bytes | None = None


class PageStore:
    """All pages.

    Args:
        count: of pages.
        sharing: whether what is no longer used is kept, and found again.
    """

    def __init__(self, count: int, sharing: bool = True) -> None:
        self.count = count
        self.sharing = sharing
        self._free = [Page(number) for number in reversed(range(count))]
        self._idle: OrderedDict[int, Page] = OrderedDict()  # unused, the longest first
        self._full: dict[bytes, Page] = {}
        self._after: dict[tuple[bytes, int], list[Page]] = {}  # by parent and first token

    @property
    def available(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that some sequence reads."""
        return self.count - self.available

    def take(self) -> Page:
        """An empty page for one user. There must be one available."""
        if self._free:
            page = self._free.pop()
        else:
            _, page = self._idle.popitem(last=False)
            self._forget(page)
        page.users = 1
        return page

    def release(self, pages: Sequence[Page]) -> None:
        """One user less for each page of a sequence; ends of sequences are given up first."""
        for page in reversed(pages):
            page.users -= 1
            if page.users:
                continue
            if self.sharing and page.tokens:
                self._idle[page.number] = page
            else:
                self._forget(page)
                self._free.append(page)

    def match(self, tokens: Sequence[int], most: int) -> tuple[list[Page], Page | None, int]:
        """What of a beginning is there already.

        Args:
            tokens: of a sequence.
            most: of them that may be taken from elsewhere.

        Returns:
            Whole pages, which have one user more now; a page whose first slots agree with what
            follows, not held, or None; and how many of its slots do.
        """
        found: list[Page] = []
        if not self.sharing:
            return found, None, 0
        parent, at = ROOT, 0
        while at + PAGE <= most:
            page = self._full.get(chain(parent, tokens[at : at + PAGE]))
            if page is None:
                break
            self.hold(page)
            found.append(page)
            assert page.key is not None
            parent, at = page.key, at + PAGE
        best, length = None, 0
        if at < most:
            rest = tokens[at : min(most, at + PAGE)]
            for page in self._after.get((parent, tokens[at]), ()):
                agreed = common(page.tokens, rest)
                if agreed > length:
                    best, length = page, agreed
        return found, best, length

    def extend(self, pages: Sequence[Page], first: int, tokens: Sequence[int]) -> None:
        """Note that tokens from position `first` on are in the pages of a sequence now."""
        for position, token in enumerate(tokens, first):
            page = pages[position // PAGE]
            assert len(page.tokens) == position % PAGE
            page.tokens.append(token)
            if not self.sharing:
                continue
            if position % PAGE == 0:
                before = pages[position // PAGE - 1].key if position else ROOT
                assert before is not None
                page.parent = before
                self._after.setdefault((before, token), []).append(page)
            if len(page.tokens) == PAGE:
                page.key = chain(page.parent, page.tokens)
                self._full.setdefault(page.key, page)

    def hold(self, page: Page) -> None:
        """One user more."""
        page.users += 1
        self._idle.pop(page.number, None)

    def _forget(self, page: Page) -> None:
        if self.sharing and page.tokens:
            siblings = self._after[page.parent, page.tokens[0]]
            siblings.remove(page)
            if not siblings:
                del self._after[page.parent, page.tokens[0]]
            if page.key is not None and self._full.get(page.key) is page:
                del self._full[page.key]
        page.tokens, page.key, page.parent = [], None, ROOT


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full page."""
    return hashlib.blake2b(parent + np.array(tokens, np.int64).tobytes(), digest_size=16).digest()


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    length = min(len(a), len(b))
    if list(a[:length]) == list(b[:length]):
        return length
    return next(i for i in range(length) if a[i] != b[i])


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE)
