"""A streamer that keeps what it is shown."""

from __future__ import annotations

from transformers.generation.streamers import BaseStreamer


class Collect(BaseStreamer):
    def __init__(self):
        self.values, self.raw, self.ended = [], [], False

    def put(self, value):
        self.raw.append(value)
        self.values.append(value.reshape(-1).tolist())

    def end(self):
        self.ended = True
