"""Errors, grouped by what the caller would do next.

RayCkptError
|-- UsageError          fix the call (also a ValueError)
|   |-- StateError      fix the state that is saved: the text names the leaf
|   `-- MismatchError   fix the target of the restore: the text lists the differing leaves
|-- MissingExtraError   install an extra of this package (also an ImportError)
|-- StorageError        fix the storage or its permissions, then try again
|   |-- ObjectMissingError   the object is not there
|   `-- UnsafeStoreError     this kind of store cannot promise exclusive creation
|-- CheckpointError     pick another checkpoint
|   |-- NoCheckpointError    there is none, or not the one asked for
|   `-- DamagedError         bytes are missing or fail their checksum
|-- SaveError           one save failed; training and older checkpoints are unharmed
|-- FencedError         somebody newer owns the run; stop this process
|-- PreemptedError      let it through: all is committed, and the job starts again elsewhere
`-- UnavailableError    a deadline passed; the text names who is late
"""

from __future__ import annotations


class RayCkptError(Exception):
    """Base of everything this package raises on purpose."""


class UsageError(RayCkptError, ValueError):
    """The call itself is wrong; repeating it unchanged cannot work."""


class StateError(UsageError):
    """The state handed to a save cannot be saved as it is; names the leaf and the remedy."""


class MismatchError(UsageError):
    """The restore target and the checkpoint differ; lists missing, unexpected and changed leaves."""


class MissingExtraError(RayCkptError, ImportError):
    """An optional dependency is not installed; names the extra to install."""


class StorageError(RayCkptError):
    """A storage operation failed for good (after retries); names the URL and the operation."""


class ObjectMissingError(StorageError):
    """The object does not exist (any more)."""


class UnsafeStoreError(StorageError):
    """Exclusive creation is unproven on this store; name single-coordinator mode to use it."""


class CheckpointError(RayCkptError):
    """This checkpoint cannot be used; another one may."""


class NoCheckpointError(CheckpointError):
    """No committed checkpoint, or none of the step asked for."""


class DamagedError(CheckpointError):
    """Bytes of a checkpoint are missing, truncated or fail their checksum; names file and tensor."""


class SaveError(RayCkptError):
    """One save was abandoned; everything committed before it stands."""


class FencedError(RayCkptError):
    """A newer start of the job owns the directory, or Ray has given up this process's node: it saves no more."""


class PreemptedError(RayCkptError):
    """A host of the job goes away: all workers have saved and stopped at one step, to be started again elsewhere."""


class UnavailableError(RayCkptError):
    """A bounded wait ended without an answer; names who is late."""
