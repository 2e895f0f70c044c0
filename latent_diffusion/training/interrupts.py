"""SIGINT and SIGTERM while training: the first asks the loop to save and stop, a second ends the program at once."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = 1.0  # seconds within which a repetition is the same wish: `timeout` and some shells send each signal twice


@contextlib.contextmanager
def catch() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in the list that it gives, instead of dying of them.

    Python runs a handler only between two of its own instructions, and a step or a compilation may last minutes. So a
    thread listens, too: it says at once that the signal has been heard, and at a second one ends the program with
    128 + its number. Does nothing outside of the main thread, where Python allows no handlers.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, lambda signum, frame: caught.append(signum)) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(reading,), daemon=True)
    listener.start()
    try:
        yield caught
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)
        listener.join()
        os.close(reading)


def _listen(reading: int) -> None:
    first = None
    while received := os.read(reading, 1):
        number = received[0]
        if number not in SIGNALS:
            continue
        name = signal.Signals(number).name
        if first is None:
            first = time.monotonic()
            os.write(2, f"\n{name}: saving after the current step; once more to stop at once\n".encode())
        elif time.monotonic() - first > SAME:
            os.write(2, f"\n{name}: stopped without saving\n".encode())
            os._exit(128 + number)
