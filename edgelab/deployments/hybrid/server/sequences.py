"""Sequences of one session, one for each conversation, so that whoever has their turn again reads only what is new.

An engine that holds one sequence keeps what was read last; a conversation that comes back is read again there.
"""

from __future__ import annotations

from edgelab.deployments.hybrid.server.limits import Limits
from edgelab.runtimes.session import Sequence, Session


class Sequences:
    """Those that are kept. Where they are too many or too large, the one that was used least recently goes first.

    The one in the session goes last of all, however large it is. All of this runs on the thread of the session.
    """

    def __init__(self, session: Session, limits: Limits) -> None:
        self._session, self._limits = session, limits
        self._waiting: dict[int, Sequence] = {}  # by owner, the least recently used first
        self._owner: int | None = None  # of the sequence in the session; None where nobody comes back to it

    def __len__(self) -> int:
        return len(self._waiting) + (self._owner is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of those that wait. What two of them share is counted twice."""
        return sum(one.kept.nbytes for one in self._waiting.values())

    def of(self, owner: int, ids: list[int]) -> Session:
        """The session with an owner's sequence in it.

        Where none is kept it is a new one, which takes over what any other has read of `ids` from their beginning on.
        """
        if not self._session.can.sequences or owner == self._owner:
            return self._session
        found = self._waiting.pop(owner, None)
        self.free()
        self._session.exchange(found or self._alike(ids))
        self._owner = owner
        self._make_room()
        return self._session

    def free(self) -> Session:
        """The session for an answer that nobody goes on from: the next one may overwrite it."""
        if self._owner is not None:
            self._waiting[self._owner] = self._session.exchange()
            self._owner = None
            self._make_room()
        return self._session

    def forget(self, owner: int) -> None:
        """Let go of an owner's sequence, if there is one."""
        self._waiting.pop(owner, None)
        if owner == self._owner:
            self._owner = None
            self._session.exchange()

    def close(self) -> None:
        """Let go of all that wait; the one in the session ends with the session."""
        self._waiting.clear()
        self._owner = None

    def _alike(self, ids: list[int]) -> Sequence | None:
        """Another sequence that begins as the one does which has the most of `ids`; None where none has their first."""
        best = max(self._waiting.values(), key=lambda one: common(one.ids, ids), default=None)
        return best.fork() if best is not None and common(best.ids, ids) else None

    def _make_room(self) -> None:
        most = self._limits
        while self._waiting and (len(self) > most.sequences or self.nbytes > most.sequence_bytes):
            del self._waiting[next(iter(self._waiting))]


def common(one: list[int], other: list[int]) -> int:
    """With how many of the same tokens two texts begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))
