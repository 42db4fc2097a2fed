import threading

import pytest
import torch

from pfstorer_rt.runtime.host_threads import one_host_thread


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_one_thread_is_used_inside_and_the_old_number_afterwards():
    for wanted, inside in ((True, 1), (False, 3)):
        with one_host_thread(wanted):
            assert torch.get_num_threads() == inside
        assert torch.get_num_threads() == 3


def test_threads_that_overlap_get_their_own_number_back():
    both_inside, first_left = threading.Barrier(2, timeout=20), threading.Event()
    seen = {}

    def restore(name, leaves_first):
        with one_host_thread(True):
            both_inside.wait()
            if not leaves_first:
                first_left.wait(20)
            seen[name, "inside"] = torch.get_num_threads()
        first_left.set()
        seen[name, "afterwards"] = torch.get_num_threads()

    threads = [threading.Thread(target=restore, args=args) for args in (("a", True), ("b", False))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {(n, w): 1 if w == "inside" else 3 for n in "ab" for w in ("inside", "afterwards")}
    assert torch.get_num_threads() == 3


def test_a_thread_that_starts_meanwhile_keeps_the_default():
    seen = []
    with one_host_thread(True):
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert seen == [3]
