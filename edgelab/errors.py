"""The exceptions of the package: one clear sentence, also inside a notebook."""


class EdgeLabError(Exception):
    """Something the user can mend. The message is one sentence: what is wrong, and what would be right."""

    def _render_traceback_(self) -> list[str]:
        # IPython calls this instead of printing a page of traceback.
        return [f"{type(self).__name__}: {self}"]


class MissingExtraError(EdgeLabError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; `pip install 'edgelab[{extra}]'` installs it.")
