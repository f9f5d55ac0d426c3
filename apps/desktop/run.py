"""Progress of the running job, and the remaining time."""

import time
from collections.abc import Callable

from apps.worker.messages import Converting, Downloading, Event, Loaded, Loading, Picture, Progress
from mlx_snapgen.errors import plural
from mlx_snapgen.settings import DrawSettings


class Run:
    """Progress of one job, from its events.

    Args:
        job: its number.
        settings: None when it only loads a model.
        clock: seconds.
    """

    def __init__(
        self,
        job: int,
        settings: DrawSettings | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.job, self.draws, self._clock = job, settings is not None, clock
        self.num_images = 1 if settings is None else settings.num_images
        self.status = ""
        self.notices: list[str] = []
        self.share = 0.0
        """Of the work, 0 to 1."""
        self.between_steps = False
        """Whether the job can be cancelled; it cannot while the model loads."""
        self.downloading = False
        self._started = clock()
        self._seconds: list[float] = []

    @property
    def can_cancel(self) -> bool:
        """Whether the button cancels: while drawing or downloading."""
        return self.draws or self.downloading

    @property
    def summary(self) -> str:
        """Status text at the end."""
        count = len(self._seconds)
        if not count:
            return ""
        each = sum(self._seconds) / count
        return f"{each:.1f} s" if count == 1 else f"{plural(count, 'picture')}, {each:.1f} s each"

    def take(self, event: Event) -> None:
        """Update `status` and `share`."""
        self.downloading = isinstance(event, Downloading)
        if isinstance(event, Downloading):
            self.share = event.done / event.total if event.total else 0.0
            done, total = event.done / 1e6, event.total / 1e6
            left = self._left(self.share)
            verb = "Converting" if isinstance(event, Converting) else "Downloading"
            self.status = f"{verb} {event.name}: {done:.0f} of {total:.0f} MB{left}"
        elif isinstance(event, Loading):
            self.share, self._started = 0.0, self._clock()
            self.status = "Loading the model…"
        elif isinstance(event, Loaded):
            self.share, self._started, self.between_steps = 0.0, self._clock(), True
            self.status = "Encoding the prompt…" if self.draws else "Ready"
        elif isinstance(event, Progress):
            done = event.image * event.num_steps + event.index + 1
            self.share = done / (self.num_images * event.num_steps)
            which = "Step"
            if self.num_images > 1:
                which = f"Picture {event.image + 1} of {self.num_images}, step"
            left = self._left(self.share)
            self.status = f"{which} {event.index + 1} of {event.num_steps}{left}"
        elif isinstance(event, Picture):
            self._seconds.append(event.seconds)

    def _left(self, share: float) -> str:
        if not 0 < share < 1:
            return ""
        seconds = (self._clock() - self._started) * (1 - share) / share
        if seconds < 1:
            return ""
        minutes, rest = divmod(round(seconds), 60)
        time_left = f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
        return f" · {time_left} left"
