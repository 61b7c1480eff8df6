"""What can go wrong between edge and cloud, one class for each thing that a caller may do about it."""

from __future__ import annotations

from edgelab.errors import EdgeLabError


class CloudError(EdgeLabError):
    """The cloud did not do what it was asked. outage: whether another request would fare alike, for a breaker."""

    outage = True


class CloudDown(CloudError):
    """No connection, or one that ended before the answer."""


class CloudSlow(CloudError):
    """No whole answer within the deadline."""


class TooLate(CloudSlow):
    """Nothing was asked, for too little of the deadline was left: it says nothing about the cloud."""

    outage = False


class CloudGarbled(CloudError):
    """An answer that is none."""


class CloudRefused(CloudError):
    """The server says no. status: of HTTP; code: its own word for the reason, where it gives one."""

    outage = False

    def __init__(self, sentence: str, status: int, code: str = "") -> None:
        super().__init__(sentence)
        self.status, self.code = status, code


class CloudDenied(CloudRefused):
    """The token is not the server's, or allows too little; no other request with it would be answered."""

    outage = True


class CloudLacking(CloudRefused):
    """The server has nothing of the kind at this address, whatever the request."""

    outage = True


class CloudBroken(CloudRefused):
    """The server has failed at it."""

    outage = True


class CloudBusy(CloudRefused):
    """Too many others ask. retry_s: after how many seconds to ask again."""

    outage = True

    def __init__(self, sentence: str, status: int, code: str = "", retry_s: float = 1.0) -> None:
        super().__init__(sentence, status, code)
        self.retry_s = retry_s


class CircuitOpen(CloudError):
    """The cloud failed so often in a row that it is not asked now."""

    outage = False
