# SPDX-License-Identifier: Apache-2.0
"""Showing something in the terminal during a run without disturbing the progress bar."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.text import Text

__all__ = ["MIN_ROWS", "Display", "Terminal", "View", "rich_progress"]

Display = Literal["auto", "panel", "print", "line", "off"]

MIN_ROWS = 20  # a panel that is higher than the terminal is cut while the bar is live


class View(Protocol):
    """Something that can be drawn as a panel or as one line, from any thread."""

    def panel(self, width: int, *, unicode: bool = True) -> RenderableType | None:
        """A panel of at most ``width`` columns, or None if that is too narrow."""

    def line(self, *, unicode: bool = True) -> str:
        """The same in one line."""


class Terminal:
    """Shows views below the running progress bar, above it, or as plain lines.

    ``panel`` extends the bar of Lightning's `RichProgressBar` (a terminal has room for one live display only), and
    falls back to ``print`` where there is none; ``print`` writes one panel per call; ``line`` writes one line per
    view; ``auto`` is ``panel`` in a terminal with at least 20 rows and ``line`` in files, pipes and dumb terminals.

    Args:
        display: The way to show.
    """

    def __init__(self, display: Display) -> None:
        self.display = display
        self._live = _LivePanel()

    def show(self, trainer: L.Trainer, views: Sequence[View]) -> None:
        """Show the views, in place of those of the last call. Only for the process of global rank zero.

        Args:
            trainer: The running Trainer.
            views: What to show.
        """
        if self.display == "off" or not views:
            return
        progress = rich_progress(trainer)
        console = progress.console if progress is not None else get_console()
        terminal = console.is_terminal and not console.is_dumb_terminal
        if self.display == "line" or (self.display != "print" and not terminal and not console.is_jupyter):
            _write(trainer, "\n".join(view.line(unicode=_speaks_unicode(console)) for view in views))
        elif self.display != "print" and progress is not None and console.height >= MIN_ROWS:
            self._live.views = tuple(views)
            self._live.attach(progress)
        else:
            panels = _renderable(views, console, only_first=False)
            if progress is not None:
                console.print(panels)
            else:
                with console.capture() as capture:
                    console.print(panels)
                _write(trainer, capture.get().rstrip("\n"))

    def keep(self, trainer: L.Trainer) -> None:
        """Attach to a bar that was created anew, as Lightning does per stage and with ``leave=True`` per epoch.

        Args:
            trainer: The running Trainer.
        """
        if self._live.views:
            progress = rich_progress(trainer)
            if progress is not None:
                self._live.attach(progress)

    def forget(self) -> None:
        """Show nothing any more."""
        self._live.views = ()


class _LivePanel:
    """The views as one renderable below a progress bar; drawn once and then served from a cache.

    The refresh thread of the bar may ask a hundred times per second; drawing takes milliseconds.
    """

    def __init__(self) -> None:
        self.views: tuple[View, ...] = ()
        self._progress: Any = None
        self._drawn_for: object = None
        self._segments: list[Segment] = []

    def attach(self, progress: Any) -> None:
        if progress is self._progress:
            return
        self._progress = progress
        bars: Callable[[], Iterator[RenderableType]] = progress.get_renderables

        def bars_and_panel() -> Iterator[RenderableType]:
            yield from bars()
            yield self

        # rich offers no hook for a row below the tasks; Progress documents get_renderables as the method to override
        progress.get_renderables = bars_and_panel

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        key = (self.views, console.width, console.height)
        if key != self._drawn_for:
            self._segments = []
            if self.views:
                drawn = (
                    _renderable(self.views, console, only_first=True)
                    if console.height >= MIN_ROWS
                    else _lines(self.views, console)
                )
                self._segments = list(console.render(drawn, options.update(height=None)))
            self._drawn_for = key
        yield from self._segments


def rich_progress(trainer: L.Trainer) -> Any:
    """The running progress of Lightning's rich bar, if there is one.

    Args:
        trainer: The running Trainer.
    """
    bar = trainer.progress_bar_callback
    progress = bar.progress if isinstance(bar, RichProgressBar) and bar.is_enabled else None
    return progress if progress is not None and progress.live.is_started else None


def _renderable(views: Sequence[View], console: Console, *, only_first: bool) -> RenderableType:
    """Panels; with ``only_first`` the others become lines, because room below a bar is scarce."""
    unicode = _speaks_unicode(console)
    parts: list[RenderableType] = []
    for index, view in enumerate(views):
        panel = view.panel(console.width, unicode=unicode) if index == 0 or not only_first else None
        parts.append(panel if panel is not None else _lines([view], console))
    return Group(*parts)


def _lines(views: Sequence[View], console: Console) -> RenderableType:
    unicode = _speaks_unicode(console)
    return Group(*(Text(view.line(unicode=unicode), no_wrap=True, overflow="ellipsis") for view in views))


def _speaks_unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf") and not console.legacy_windows


def _write(trainer: L.Trainer, text: str) -> None:
    bar = trainer.progress_bar_callback
    if bar is not None:
        bar.print(text)
    else:
        print(text)
