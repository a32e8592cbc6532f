"""A `fit` that was interrupted and is called again ends as one that was not, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("keras")

import keras
import tensorflow as tf

import ray_ckpt
from ray_ckpt.errors import MismatchError, UsageError
from ray_ckpt.frontends.keras import load_variables
from ray_ckpt.frontends.keras.skip import Skip
from tests.frontends.keras_fits import (
    BATCHES,
    EPOCHS,
    Interrupt,
    Listener,
    data,
    fit,
    make_model,
    outcome,
    retention_leaves,
    run_dir,
    steps,
)
from tests.system.waiting import eventually

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]


def backup(path: Path, save_freq: Any = "epoch", **settings: Any) -> Any:
    return ray_ckpt.BackupAndRestore(run_dir(path), save_freq, **{"delete_checkpoint": False, **settings})


@pytest.fixture(scope="module")
def uninterrupted() -> Any:
    return outcome(fit())


@pytest.mark.parametrize(
    ("save_freq", "interrupt", "goes_on_at"),
    [
        ("epoch", (1, 2), 4),
        # In the last batch of an epoch: its validation is still to come.
        (1, (1, 3), 8),
    ],
)
def test_a_resumed_fit_is_as_if_never_interrupted(
    tmp_path: Path, save_freq: Any, interrupt: tuple[int, int], goes_on_at: int
) -> None:
    expected = outcome(fit(validation_data=data()))
    heard = Listener()
    fit([backup(tmp_path, save_freq), heard], interrupt=interrupt, validation_data=data())
    assert heard.batches[-1] == interrupt
    # Another seed: what is not restored is another value.
    heard = Listener()
    resumed = fit([backup(tmp_path, save_freq), heard], seed=2, validation_data=data())
    assert heard.iterations[0] == goes_on_at
    assert outcome(resumed) == expected
    # All batches of the epoch are heard of, also those that are only taken from the data.
    assert heard.batches == [(epoch, batch) for epoch in (1, 2) for batch in range(BATCHES)]


def test_interrupted_again_and_again(tmp_path: Path, uninterrupted: Any) -> None:
    for seed, interrupt in enumerate([(0, 1), (0, 3), (1, 1), (2, 2)], 2):
        fit([backup(tmp_path, 1)], seed=seed if seed > 2 else 1, interrupt=interrupt)
    assert outcome(fit([backup(tmp_path, 1)], seed=9)) == uninterrupted


def test_shuffled_arrays(tmp_path: Path) -> None:
    expected = outcome(fit(shuffle=True))
    fit([backup(tmp_path, 1)], shuffle=True, interrupt=(1, 1))
    assert outcome(fit([backup(tmp_path, 1)], shuffle=True)) == expected


def _dataset(repeat: bool = False) -> Any:
    x, y = data()
    # A filter hides the number of batches, as any stream of unknown length does.
    found = tf.data.Dataset.from_tensor_slices((x, y)).filter(lambda a, b: True).batch(8)
    return found.repeat() if repeat else found


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_a_dataset_of_unknown_length(tmp_path: Path) -> None:
    expected = outcome(fit(dataset=_dataset))
    fit([backup(tmp_path, 3)], dataset=_dataset, interrupt=(1, 2))
    assert outcome(fit([backup(tmp_path, 3)], seed=2, dataset=_dataset)) == expected


@pytest.mark.parametrize("save_freq", [1, "epoch"])
def test_endless_data(tmp_path: Path, save_freq: Any) -> None:
    settings = {"dataset": lambda: _dataset(repeat=True), "steps_per_epoch": 3}
    expected = outcome(fit(**settings))
    fit([backup(tmp_path, save_freq, stream=True)], interrupt=(1, 1), **settings)
    assert outcome(fit([backup(tmp_path, save_freq, stream=True)], seed=2, **settings)) == expected


def test_several_batches_an_execution(tmp_path: Path) -> None:
    def model() -> Any:
        return make_model(steps_per_execution=2)

    expected = outcome(fit(model=_seeded(model)))
    fit([backup(tmp_path, 2)], model=_seeded(model), interrupt=(1, 3))
    assert outcome(fit([backup(tmp_path, 2)], seed=2, model=model())) == expected


def _seeded(make: Any) -> Any:
    keras.utils.set_random_seed(1)
    return make()


def test_random_states_are_restored(tmp_path: Path) -> None:
    drawn: list[tuple[float, float, float]] = []

    class Draw(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            drawn.append((random.random(), np.random.rand(), float(keras.random.uniform(()))))

    fit([Draw()])
    expected = list(drawn)
    drawn.clear()
    fit([backup(tmp_path), Draw()], interrupt=(1, 2))
    del drawn[1:]
    fit([backup(tmp_path), Draw()], seed=5)
    assert drawn == expected


def test_a_training_that_has_ended_is_given_up(tmp_path: Path) -> None:
    first = fit([backup(tmp_path, delete_checkpoint=True)])
    retention_leaves(tmp_path, [EPOCHS * BATCHES + 1])
    assert list(ray_ckpt.load(tmp_path)) == ["keras/training"]
    assert outcome(fit([backup(tmp_path, delete_checkpoint=True)])) == outcome(first)
    retention_leaves(tmp_path, [2 * (EPOCHS * BATCHES + 1)])
    with pytest.raises(ray_ckpt.errors.NoCheckpointError, match="has ended"):
        load_variables(first, str(tmp_path))


@pytest.mark.parametrize("save_freq", ["epoch", 1000])
def test_a_fit_after_one_that_has_ended_trains(tmp_path: Path, save_freq: Any) -> None:
    model = fit([backup(tmp_path, save_freq, delete_checkpoint=True)], epochs=1)
    fit([backup(tmp_path, save_freq, delete_checkpoint=True)], epochs=1, model=model)
    assert int(model.optimizer.iterations) == 2 * BATCHES


def test_a_training_that_is_kept_goes_on_with_more_epochs(tmp_path: Path, uninterrupted: Any) -> None:
    fit([backup(tmp_path)], epochs=2)
    resumed = fit([backup(tmp_path)], seed=2)
    assert outcome(resumed) == uninterrupted
    # Nothing is left to train; the model and its history are restored all the same.
    assert outcome(fit([backup(tmp_path)], seed=3)) == uninterrupted


def test_a_later_fit_of_the_model_begins_at_the_first_epoch(tmp_path: Path) -> None:
    fit([backup(tmp_path)], interrupt=(1, 1))
    model = fit([backup(tmp_path)])
    listener = Listener()
    fit([listener], model=model, epochs=1)
    assert listener.batches == [(0, batch) for batch in range(BATCHES)]


def test_a_fit_that_fails_while_it_skips_leaves_nothing_behind(tmp_path: Path) -> None:
    fit([backup(tmp_path, 1)], interrupt=(0, 2))
    model = make_model()
    fit([backup(tmp_path, 1)], model=model, interrupt=(0, 0))
    assert isinstance(model.train_function, Skip)
    before = int(model.optimizer.iterations)
    fit(model=model, epochs=1)
    assert int(model.optimizer.iterations) == before + BATCHES


def test_one_callback_for_several_fits(tmp_path: Path, uninterrupted: Any) -> None:
    callback = backup(tmp_path, 1)
    fit([callback], interrupt=(1, 1))
    assert outcome(fit([callback], seed=2)) == uninterrupted


def test_a_ready_list_of_callbacks_for_several_fits(tmp_path: Path) -> None:
    model = make_model()
    saves = [backup(tmp_path, 1), ray_ckpt.ModelCheckpoint(run_dir(tmp_path / "models"), save_freq=1)]
    interrupt = Interrupt(0, 1)
    callbacks = keras.callbacks.CallbackList([*saves, interrupt], add_history=True, model=model, epochs=1)
    x, y = data()
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, batch_size=8, verbose=0, callbacks=callbacks)
    callbacks.callbacks.remove(interrupt)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=callbacks)
    assert int(model.optimizer.iterations) == BATCHES


def test_another_initial_epoch(tmp_path: Path) -> None:
    fit([backup(tmp_path, 1)], interrupt=(0, 1))
    with pytest.raises(UsageError, match=r"saved in epoch 0 after 2 batches, but fit\(\) begins with epoch 2"):
        fit([backup(tmp_path, 1)], initial_epoch=2)


def test_a_stop_request_ends_the_training_to_be_resumed(tmp_path: Path, uninterrupted: Any) -> None:
    callback = backup(tmp_path, delete_checkpoint=True)

    class Ask(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1:
                callback._ckpt.request_stop("the test asks")

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            # Agreements take a moment; batches here take none.
            callback._ckpt._link.courier.nudge()

    listener = Listener()
    fit([callback, Ask(), listener], epochs=400)
    assert len(listener.batches) < 400 * BATCHES
    at = steps(tmp_path)[-1]
    assert at == len(listener.batches)
    resumed = fit([backup(tmp_path)], seed=2, epochs=at // BATCHES + 2)
    assert outcome(resumed) == outcome(fit(epochs=at // BATCHES + 2))


@pytest.fixture(scope="module")
def saved(short_tmp: Path, ray_cluster: Any) -> tuple[Path, Any]:
    """A directory, and the model that was saved to it."""
    path = short_tmp / "keras-backup"
    return path, fit([backup(path)], epochs=1)


def test_tensorflow_reads_it(saved: tuple[Path, Any]) -> None:
    path, model = saved
    # The `checkpoint` file follows the commit.
    eventually(lambda: tf.train.latest_checkpoint(str(path)), "TensorFlow to find it")
    reader = tf.train.load_checkpoint(str(path))
    dense = model.layers[0]
    np.testing.assert_array_equal(reader.get_tensor(f"model/{dense.kernel.path}"), dense.kernel.numpy())
    assert reader.get_tensor(f"optimizer/{model.optimizer._iterations.path}") == BATCHES


def test_another_model(saved: tuple[Path, Any]) -> None:
    with pytest.raises(MismatchError, match=r"float32\[3,5\]"):
        fit([backup(saved[0])], model=make_model(units=5))


def test_a_directory_of_something_else(saved: tuple[Path, Any]) -> None:
    path = run_dir(saved[0])
    with pytest.raises(UsageError, match="not saved by ModelCheckpoint"):
        fit([ray_ckpt.ModelCheckpoint(path)])
    with pytest.raises(UsageError, match="two callbacks"):
        fit([backup(saved[0]), ray_ckpt.ModelCheckpoint(path)])


def test_a_model_without_variables(tmp_path: Path) -> None:
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(UsageError, match="no variables yet"):
        fit([backup(tmp_path)], model=model)


@pytest.mark.parametrize("save_freq", ["batch", 0, -1, 1.5, True, None])
def test_a_wrong_save_freq(tmp_path: Path, save_freq: Any) -> None:
    for callback in (ray_ckpt.BackupAndRestore, ray_ckpt.ModelCheckpoint):
        with pytest.raises(ValueError, match="Unrecognized save_freq"):
            callback(tmp_path, save_freq=save_freq)


def test_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="decides save_steps itself"):
        ray_ckpt.BackupAndRestore(tmp_path, save_steps=5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_to_kep'"):
        ray_ckpt.ModelCheckpoint(tmp_path, max_to_kep=3)
    with pytest.raises(UsageError, match="is empty"):
        ray_ckpt.BackupAndRestore("")


def test_another_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(UsageError, match="tensorflow and jax, found 'torch'"):
        backup(tmp_path)
