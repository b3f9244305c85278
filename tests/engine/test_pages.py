"""Pages against a model of what they hold: every sequence finds its own tokens, and only them."""

import random

import pytest

from bitjax.engine.pages import PageStore, common, pages_for
from bitjax.ops.rows import PAGE


def fill(store, tokens):
    """A sequence that takes what is there, and adds the rest; as the engine does."""
    pages, partial, length = store.match(tokens, len(tokens) - 1)
    shared = PAGE * len(pages)
    if partial is not None:
        store.hold(partial)
        copied = partial.tokens[:length]
        pages.append(store.take())
        store.extend(pages, shared, copied)
        store.release([partial])
        shared += length
    while len(pages) < pages_for(len(tokens)):
        pages.append(store.take())
    store.extend(pages, shared, tokens[shared:])
    return pages, shared


def held(pages):
    return [token for page in pages for token in page.tokens]


def test_beginnings_are_found_to_the_token():
    store, text = PageStore(20), list(range(1000, 1200))
    pages, shared = fill(store, text)
    assert shared == 0
    store.release(pages)
    for length in (2, 63, 64, 65, 130, 200):
        for tail in ([], [7, 8]):
            tokens = text[:length] + tail
            again, shared = fill(store, tokens)
            # The last token has always to be run, for it gives the logits.
            assert shared == min(length, len(tokens) - 1)
            assert held(again) == tokens
            store.release(again)
    other, shared = fill(store, [5, *text])
    assert shared == 0
    assert store.used == len(other)


def test_pages_in_use_are_shared_and_never_written():
    store, text = PageStore(10), list(range(130))
    first, _ = fill(store, text)
    second, shared = fill(store, [*text, 500])
    assert shared == 130
    assert [a is b for a, b in zip(first, second, strict=True)] == [True, True, False]
    assert first[0].users == 2
    store.release(first)
    assert held(second) == [*text, 500]
    assert store.used == 3


def test_the_longest_unused_is_given_up_first():
    store = PageStore(4)
    old, _ = fill(store, [1] * 100)
    new, _ = fill(store, [2] * 100)
    store.release(old)
    store.release(new)
    taken = [store.take(), store.take()]
    assert store.match([2] * 100, 99)[0] == [new[0]]
    assert store.match([1] * 100, 99) == ([], None, 0)
    store.release([new[0], *taken])


def test_without_sharing_nothing_is_kept():
    store = PageStore(4, sharing=False)
    pages, _ = fill(store, [1] * 100)
    store.release(pages)
    assert store.match([1] * 100, 99) == ([], None, 0)
    assert store.available == 4


@pytest.mark.parametrize("seed", range(3))
def test_random_lives(seed):
    """Texts that branch from each other come and go; nothing is lost, mixed up or leaked."""
    rng, store, live = random.Random(seed), PageStore(24), []
    texts = [[rng.randrange(3) for _ in range(150)] for _ in range(3)]
    reused = 0
    for _ in range(400):
        if live and (rng.random() < 0.4 or store.available < 4):
            store.release(live.pop(rng.randrange(len(live)))[0])
        if store.available >= 4:
            tokens = rng.choice(texts)[: rng.randrange(2, 150)]
            tokens = tokens + [rng.randrange(3) for _ in range(rng.randrange(20))]
            pages, shared = fill(store, tokens)
            reused += shared
            live.append((pages, tokens))
        assert all(held(pages) == tokens for pages, tokens in live)
        counts = {}
        for pages, _ in live:
            for page in pages:
                counts[page] = counts.get(page, 0) + 1
        assert all(page.users == count for page, count in counts.items())
        assert store.used == len(counts)
    assert reused > 1000
    for pages, _ in live:
        store.release(pages)
    assert store.available == 24


def test_common():
    assert [common([1, 2, 3], b) for b in ([], [1], [1, 2, 4, 5], [1, 2, 3, 4], [0])] == [
        0, 1, 2, 3, 0,
    ]  # fmt: skip
