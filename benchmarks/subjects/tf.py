"""TensorFlow's own checkpoints: ``tf.train.Checkpoint``, its asynchronous mode, and compat.v1's CheckpointSaverHook.

All three write TensorBundle files through a temporary name and ``rename``, never ``fsync``; reading verifies each
tensor's crc32c. The docs name no setting for speed but ``enable_async``.
"""

from __future__ import annotations

import glob
import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from benchmarks.cases import Case
from benchmarks.subjects.base import Subject


class _Tensorflow(Subject):
    gives_up: ClassVar[str] = "no fsync"
    cases: ClassVar[tuple[str, ...]] = ("big", "small", "quick")

    def __init__(self, case: Case, rank: int, directory: str) -> None:
        super().__init__(case, rank, directory)
        self._last: int | None = None

    def _load(self, **environment: str) -> None:
        """Import TensorFlow, which reads its environment only then."""
        os.environ.update({"TF_CPP_MIN_LOG_LEVEL": "2", **environment})
        self.tf = importlib.import_module("tensorflow")
        self.tf.get_logger().setLevel("ERROR")

    def _load_to_restore(self, step: int) -> None:
        """Let each restore read into memory that was not touched before.

        oneDNN's allocator keeps what it ever had, so that only the first restore of a process meets such memory;
        without oneDNN the C library's gives large buffers back and takes new ones.
        """
        self._load(TF_ENABLE_ONEDNN_OPTS="0")
        self._last = step

    def _prefix(self, step: int) -> str:
        return os.path.join(self.directory, f"model.ckpt-{step}")

    def files(self, step: int) -> str:
        return self._prefix(step) + ".*"

    def _require_complete(self) -> None:
        """The index is renamed into place last: with it the checkpoint is complete."""
        if self._last is None:
            raise RuntimeError(f"{self.name}: wait() without a save().")
        index = self._prefix(self._last) + ".index"
        if not os.path.exists(index):
            raise RuntimeError(f"{self.name}: step {self._last} was saved, but {index} does not exist.")


class TfSync(_Tensorflow):
    """``tf.train.Checkpoint.write`` of eager variables.

    ``write`` and not ``save``, since the harness numbers the steps: it leaves out only the small ``checkpoint`` file.
    """

    name: ClassVar[str] = "tf.train.Checkpoint"

    def start(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._load()
        # DeepCopy: else a variable may share NumPy's memory, and its first update would be a copy.
        self._track({name: self.tf.raw_ops.DeepCopy(x=array) for name, array in arrays.items()})
        # assign_add wants equal shapes; these stand for gradients, one for all tensors of a shape.
        self._ones = {shape: self.tf.ones(shape) for shape in {tuple(v.shape) for v in self._variables.values()}}

    def _track(self, values: Mapping[str, Any]) -> None:
        self._variables = {name: self.tf.Variable(value, name=name) for name, value in values.items()}
        self._checkpoint = self.tf.train.Checkpoint(**self._variables)

    def update(self, names: Sequence[str]) -> None:
        for name in names:
            variable = self._variables[name]
            variable.assign_add(self._ones[tuple(variable.shape)], read_value=False)

    def save(self, step: int) -> None:
        self._last = step
        self._checkpoint.write(self._prefix(step))

    def wait(self) -> None:
        self._require_complete()

    def open_restore(self, step: int) -> None:
        """A fresh model, its variables filled with zeros.

        RestoreV2 reads into buffers of its own, which become the variables'.
        """
        self._load_to_restore(step)
        self._track(
            {name: self.tf.zeros(self.case.part(name, shape, self.rank)[1]) for name, shape in self.case.shapes}
        )

    def restore(self) -> Mapping[str, Any]:
        assert self._last is not None
        self._checkpoint.read(self._prefix(self._last)).assert_existing_objects_matched()
        return self._variables

    def close(self) -> None:
        del self._checkpoint, self._variables


class TfAsync(TfSync):
    """The same with ``enable_async``: save aliases the variables, the next update of each pays for a copy."""

    name: ClassVar[str] = "tf.train.Checkpoint async"

    def start(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().start(arrays)
        self._options = self.tf.train.CheckpointOptions(enable_async=True)
        # The first save makes the second set of variables, the second traces the function that copies into it (more
        # than a minute for 20,000 variables). A job pays that once, so it is not in the numbers of a save.
        scratch = os.path.join(self.directory, "warm-up")
        for _ in range(2):
            self._checkpoint.write(scratch, options=self._options)
        self._checkpoint.sync()
        for path in glob.glob(scratch + ".*"):
            os.unlink(path)

    def save(self, step: int) -> None:
        self._last = step
        self._checkpoint.write(self._prefix(step), options=self._options)

    def wait(self) -> None:
        self._checkpoint.sync()
        # sync() keeps a failure for the next save; the missing file shows it now.
        self._require_complete()


class TfHook(_Tensorflow):
    """compat.v1: CheckpointSaverHook in a MonitoredSession, ``Saver.restore`` in a session. No graph is saved.

    The hook is due on every run through the MonitoredSession (``save_steps=1``): ``save`` is a run that only sets the
    global step, ``update`` goes past the hooks to the session within.
    """

    name: ClassVar[str] = "compat.v1 CheckpointSaverHook"

    def _build(self) -> None:
        """The graph of a model with a global step. Its initial values are placeholders."""
        v1 = self.tf.compat.v1
        self._inputs, self._variables = {}, {}
        for name, shape in self.case.shapes:
            part = self.case.part(name, shape, self.rank)[1]
            self._inputs[name] = v1.placeholder(self.tf.float32, part)
            # DeepCopy: else a variable may share NumPy's memory, and its first update would be a copy.
            value = self.tf.raw_ops.DeepCopy(x=self._inputs[name])
            self._variables[name] = v1.Variable(value, name=name, use_resource=True)
        self._step = v1.train.get_or_create_global_step()
        self._saver = v1.train.Saver(max_to_keep=None)

    def _build_updates(self) -> None:
        v1 = self.tf.compat.v1
        ones = {}
        for variable in self._variables.values():
            shape = tuple(variable.shape)
            if shape not in ones:
                # In variables: as constants of the graph they would be copied on every run.
                holder = v1.Variable(self.tf.ones(shape), use_resource=True, collections=[v1.GraphKeys.LOCAL_VARIABLES])
                ones[shape] = holder.read_value()
        self._updates = {
            name: variable.assign_add(ones[tuple(variable.shape)], read_value=False)
            for name, variable in self._variables.items()
        }
        self._new_step = v1.placeholder(self.tf.int64, ())
        self._set_step = self._step.assign(self._new_step, read_value=False)
        self._callables: dict[tuple[str, ...], Any] = {}

    def start(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._load()
        v1 = self.tf.compat.v1
        self._graph = self.tf.Graph()
        with self._graph.as_default():
            self._build()
            self._build_updates()
            feed = {self._inputs[name]: array for name, array in arrays.items()}
            # The checks that all variables are ready, minutes for 20,000 of them, are left out.
            ready = self.tf.constant([], self.tf.string)
            scaffold = v1.train.Scaffold(
                init_op=v1.global_variables_initializer(),
                init_feed_dict=feed,
                ready_op=ready,
                ready_for_local_init_op=ready,
                saver=self._saver,
            )
            hook = v1.train.CheckpointSaverHook(self.directory, save_steps=1, scaffold=scaffold, save_graph_def=False)
            creator = v1.train.ChiefSessionCreator(scaffold)
            self._monitored = v1.train.MonitoredSession(creator, hooks=[hook])
        self._session = self._monitored._tf_sess()  # MonitoredSession.raw_session() of TF 1.x exists no more
        for path in glob.glob(self.files(0)):
            os.unlink(path)  # the hook saves when it is made, too

    def update(self, names: Sequence[str]) -> None:
        key = tuple(names)
        if key not in self._callables:
            self._callables[key] = self._session.make_callable([self._updates[name] for name in key])
        self._callables[key]()

    def save(self, step: int) -> None:
        self._last = step
        with self._graph.as_default():
            self._monitored.run(self._set_step, {self._new_step: step})

    def wait(self) -> None:
        self._require_complete()

    def open_restore(self, step: int) -> None:
        """The graph and a session. No variable is initialised, so none has memory yet."""
        self._load_to_restore(step)
        self._graph = self.tf.Graph()
        with self._graph.as_default():
            self._build()
            self._session = self._monitored = self.tf.compat.v1.Session()

    def restore(self) -> Mapping[str, Any]:
        assert self._last is not None
        with self._graph.as_default():
            self._saver.restore(self._session, self._prefix(self._last))
        return {name: _Value(self._session, variable) for name, variable in self._variables.items()}

    def close(self) -> None:
        with self._graph.as_default():
            self._monitored.close()


class _Value:
    """A variable's value, fetched only when it is looked at: the restore ends with the variables filled."""

    def __init__(self, session: Any, variable: Any) -> None:
        self._session = session
        self._variable = variable

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._session.run(self._variable), dtype)
