"""Asking a coordinator that Ray restarts meanwhile."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayError

import ray_ckpt.coordinator
from ray_ckpt.errors import UnavailableError

find_module = sys.modules[f"{ray_ckpt.coordinator.__name__}.find"]


def answers(monkeypatch: pytest.MonkeyPatch, *found: Any) -> None:
    """What one call after the other finds: an exception, or the answer; the last one for ever."""
    left = list(found)

    def get(_: Any, timeout: float) -> Any:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    handle = SimpleNamespace(status=SimpleNamespace(remote=lambda: None))
    monkeypatch.setattr(find_module, "find", lambda url: handle)
    monkeypatch.setattr(find_module, "_AGAIN_S", 0.0)
    monkeypatch.setattr(find_module.ray, "get", get)


def test_a_coordinator_that_starts_again_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    away = ActorUnavailableError("restarting", None)
    answers(monkeypatch, away, away, "the answer")
    assert find_module._ask("/run", 60.0, "status") == "the answer"


def test_one_that_never_answers_is_reported_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, RayError("gone"))
    with pytest.raises(UnavailableError, match=r"the coordinator of .*/run does not answer: gone"):
        find_module._ask("/run", 0.05, "status")
