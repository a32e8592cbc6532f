"""What TensorFlow's hook leaves beside the checkpoints: graph.pbtxt, an event file, and each checkpoint's graph."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from google.protobuf import text_format

from ray_ckpt.bundle import graph_name
from ray_ckpt.errors import UsageError
from ray_ckpt.log import read_head, repair_state_file
from ray_ckpt.storage import Store, locate, open_store

_GRAPH = "graph.pbtxt"


def opened_by_tensorflow(folder: str) -> bool:
    """Whether TensorFlow has a file system for this path or URL."""
    scheme, separator, _ = folder.partition("://")
    return (scheme if separator else "") in tf.io.gfile.get_registered_schemes()


def check_folder(folder: str) -> None:
    """Raise `UsageError` for a path that is a file."""
    if locate(folder).scheme == "file" and tf.io.gfile.exists(folder) and not tf.io.gfile.isdir(folder):
        raise UsageError(f"checkpoint_dir {folder!r} is a file: give a directory, which need not exist yet")


class SideFiles:
    """The files of one hook; only rank 0's hook has them.

    Args:
        folder: the hook's ``checkpoint_dir``. Where TensorFlow cannot open it there are no event files.
        store: of the directory of the checkpoints, this folder or one below.
        save_path: the checkpoints' names in events, without a step.
        graphs: whether to write graphs.
        options: of `open_store`, for a folder that TensorFlow cannot open.
    """

    def __init__(self, folder: str, store: Store, save_path: str, *, graphs: bool, options: dict[str, Any]) -> None:
        check_folder(folder)
        self._folder = folder
        self._store = store
        self._save_path = save_path
        self._graphs = graphs
        self._options = options
        self._by_tensorflow = opened_by_tensorflow(folder)
        self._meta: tuple[tuple[Any, ...], bytes] | None = None
        self.events = tf.compat.v1.summary.FileWriterCache.get(folder) if self._by_tensorflow else None

    def write_graph(self, graph: Any) -> None:
        """graph.pbtxt, once a session."""
        if not self._graphs:
            return
        definition = graph.as_graph_def(add_shapes=True)
        if self._by_tensorflow:
            tf.io.write_graph(definition, self._folder, _GRAPH)
        else:
            open_store(self._folder, **self._options).put(_GRAPH, text_format.MessageToString(definition).encode())

    def log_graph(self, graph: Any, saver: Any) -> None:
        """The events of the graph and of its MetaGraphDef."""
        if self.events is not None:
            self.events.add_graph(graph)
            self.events.add_meta_graph(tf.compat.v1.MetaGraphDef.FromString(self._meta_bytes(graph, saver)))

    def write_meta(self, prefix: str, graph: Any, saver: Any, *, newest: bool) -> None:
        """``<prefix>.meta``, for `import_meta_graph`, unless the checkpoint is deleted. Raises `RayCkptError`.

        ``newest``: nothing can have followed this checkpoint, so it is there.
        """
        if not self._graphs:
            return
        self._store.put(graph_name(prefix), self._meta_bytes(graph, saver))
        # After the write: what is deleted from now on takes its graph along.
        head = None if newest else read_head(self._store)
        if head is not None and all(c.prefix != prefix for c in head.live):
            self._store.delete(graph_name(prefix))

    def _meta_bytes(self, graph: Any, saver: Any) -> bytes:
        """The MetaGraphDef. It is made again only when the graph has grown: that takes seconds for a large one."""
        sizes = {name: len(graph.get_collection_ref(name)) for name in graph.get_all_collection_keys()}
        form = (graph, saver, graph.version, sizes)
        if self._meta is None or self._meta[0] != form:
            with graph.as_default():
                self._meta = (form, saver.export_meta_graph().SerializeToString())
        return self._meta[1]

    def name_newest(self) -> None:
        """Have the `checkpoint` file name what is committed, if the coordinator has not yet. Raises `StorageError`."""
        repair_state_file(self._store)

    def log_checkpoint(self, step: Any) -> None:
        """The SessionLog event of a checkpoint."""
        if self.events is not None:
            kind = tf.compat.v1.SessionLog
            self.events.add_session_log(kind(status=kind.CHECKPOINT, checkpoint_path=self._save_path), step)
