"""Claims and pins: exclusive, listed, and never a way out of the directory."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ray_ckpt.errors import DamagedError, UsageError
from ray_ckpt.log import delete_claim, list_claims, list_pins, pin, put_claim
from ray_ckpt.log.claims import CLAIMS, PIN_LIFETIME_S, PINS
from ray_ckpt.log.codec import encode_claim
from ray_ckpt.storage import Store
from ray_ckpt.testing.faulty_store import ALWAYS, Fault, FaultyStore
from ray_ckpt.types import Claim

LATER = 1e12


def claim(prefix: str, attempt: str = "e1-1") -> Claim:
    return Claim(attempt, epoch=1, generation=1, step=5, prefix=prefix, num_shards=3)


def test_the_first_claim_stands(store: Store) -> None:
    mine, theirs = claim("model.ckpt-5"), claim("model.ckpt-5", "e2-1")
    assert put_claim(store, mine) is None
    assert put_claim(store, theirs) == mine
    assert put_claim(store, mine) is None, "repeated after a lost answer"
    assert list_claims(store) == [mine]
    delete_claim(store, "model.ckpt-5")
    delete_claim(store, "model.ckpt-5")
    assert list_claims(store) == []
    assert put_claim(store, theirs) is None


def test_a_claim_under_an_attempt_has_a_flat_name(store: Store) -> None:
    put_claim(store, claim("e1-1/model.ckpt-5"))
    assert [info.path for info in store.list(CLAIMS)] == [f"{CLAIMS}/e1-1%2Fmodel.ckpt-5"]
    delete_claim(store, "e1-1/model.ckpt-5")
    assert store.list("") == []


def test_a_claim_that_vanishes_while_it_is_met(store: Store) -> None:
    put_claim(store, claim("p", "e0-1"))
    faulty = FaultyStore(store, [Fault("read", "call", first=2, hook=lambda: delete_claim(store, "p"))])
    assert put_claim(faulty, claim("p")) is None
    assert list_claims(store) == [claim("p")]


def test_a_claim_that_vanishes_while_it_is_listed(store: Store) -> None:
    put_claim(store, claim("a"))
    put_claim(store, claim("b"))
    faulty = FaultyStore(store, [Fault("list", "call"), Fault("read", "call", hook=lambda: delete_claim(store, "a"))])
    assert list_claims(faulty) == [claim("b")]


@pytest.mark.parametrize("prefix", ["../x", "/x", "gs://b/x", ""])
def test_prefixes_stay_inside(store: Store, prefix: str) -> None:
    with pytest.raises(UsageError):
        put_claim(store, claim(prefix))
    with pytest.raises(UsageError):
        delete_claim(store, prefix)
    with pytest.raises(UsageError), pin(store, prefix, "me"):
        pass
    with pytest.raises(UsageError):
        encode_claim(claim(prefix))
    store.put(f"{CLAIMS}/x", json.dumps({"format": 1, **dataclasses.asdict(claim(prefix))}).encode())
    assert list_claims(store) == []


def test_a_junk_claim_is_left_out_with_a_warning_and_still_protects(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(f"{CLAIMS}/x", b"junk")
    put_claim(store, claim("y"))
    assert list_claims(store) == [claim("y")]
    assert f"{CLAIMS}/x is no Claim" in caplog.text
    with pytest.raises(DamagedError, match=f"{CLAIMS}/x is no Claim"):
        put_claim(store, claim("x"))


def test_pins_last_as_long_as_the_block(store: Store) -> None:
    with pin(store, "e1-1/model.ckpt-5", "reader"), pin(store, "b", "reader"):
        with pin(store, "b", "another"):
            assert list_pins(store, 0.0) == {"e1-1/model.ckpt-5", "b"}
        assert list_pins(store, 0.0) == {"e1-1/model.ckpt-5", "b"}
    assert list_pins(store, 0.0) == set()
    assert store.list("") == []


def test_an_error_in_the_block_removes_the_pin(store: Store) -> None:
    def fail() -> None:
        with pin(store, "b", "reader"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list_pins(store, 0.0) == set()


def test_a_pin_that_cannot_be_removed_expires(store: Store) -> None:
    faulty = FaultyStore(store, [Fault("delete", "before", times=ALWAYS)])
    with pin(faulty, "b", "reader", lifetime_s=60.0):
        pass
    assert list_pins(store, 0.0) == {"b"}
    assert list_pins(store, LATER) == set()
    assert store.list(PINS) == []


def test_an_expired_pin_is_removed_and_others_stay(store: Store) -> None:
    with pin(store, "old", "reader", lifetime_s=-1.0), pin(store, "new", "reader", lifetime_s=1e13):
        assert list_pins(store, LATER) == {"new"}
        assert len(store.list(PINS)) == 1


def test_an_unreadable_pin_counts_for_its_normal_lifetime(store: Store) -> None:
    store.put(f"{PINS}/a%2Fb.x", b"junk")
    written = store.list(PINS)[0].modified
    assert list_pins(store, written) == {"a/b"}
    assert list_pins(store, written + PIN_LIFETIME_S) == set()
    assert store.list(PINS) == []


def test_a_pin_of_a_path_outside_is_left_out_with_a_warning(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.put(f"{PINS}/..%2Fsecret.x", b"junk")
    with pin(store, "b", "reader"):
        assert list_pins(store, 0.0) == {"b"}
    assert "names the checkpoint '../secret'" in caplog.text
