import os
import threading

from hypothesis import given
from hypothesis import strategies as st

from mm_train.block_cache import BlockCache


def held(cache):
    return sum(file.stat().st_size for file in cache.folder.glob("*/*"))


def test_what_was_put_is_got_by_another_process_too(tmp_path):
    BlockCache(tmp_path, 1000).put("abc", b"123")
    cache = BlockCache(tmp_path, 1000)
    assert cache.get("abc") == b"123"
    assert cache.get("other") is None
    cache.remove("abc")
    cache.remove("abc")
    assert cache.get("abc") is None


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 300)), max_size=60))
def test_it_never_holds_more_than_it_may(tmp_path_factory, puts):
    cache = BlockCache(tmp_path_factory.mktemp("cache"), 1000)
    for key, size in puts:
        cache.put(f"{key:02d}", bytes([key]) * size)
        assert held(cache) <= 1000 * (1 + 1 / 16)
    for key, _ in puts:
        data = cache.get(f"{key:02d}")
        assert data is None or set(data) <= {key}


def test_what_was_not_used_for_longest_goes(tmp_path):
    cache = BlockCache(tmp_path, 1000)
    for number in range(10):
        cache.put(f"{number:02d}", bytes(90))
        os.utime(cache._path(f"{number:02d}"), ns=(number, number))
    assert cache.get("00") is not None  # used now
    cache.put("10", bytes(150))
    assert [cache.get(f"{n:02d}") is not None for n in range(5)] == [True, False, False, True, True]


def test_two_that_share_a_folder(tmp_path):
    caches = [BlockCache(tmp_path, 5000) for _ in range(2)]

    def fill(cache, first):
        for number in range(first, first + 200):
            cache.put(f"{number:04d}", bytes(100))
            assert cache.get(f"{number:04d}") in (None, bytes(100))

    threads = [threading.Thread(target=fill, args=(cache, 100 * i)) for i, cache in enumerate(caches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held(caches[0]) <= 5000 * (1 + 2 / 16)


def test_a_folder_that_cannot_be_written_is_no_cache(tmp_path):
    (tmp_path / "file").write_text("")
    cache = BlockCache(tmp_path / "file" / "folder", 1000)
    cache.put("abc", b"123")
    assert cache.get("abc") is None
