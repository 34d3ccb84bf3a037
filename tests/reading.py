"""What loggers wrote, read back from their files: ``{key: {step: value}}``."""

import csv
import json
import struct
import time
from pathlib import Path

_BLOCK = 32 * 1024


def read_csv(logger):
    """Of a CSVLogger: numbers by key and step; a cell that is empty is left out."""
    logged = {}
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for key, cell in row.items():
                if cell and key != "step":
                    logged.setdefault(key, {})[int(row["step"])] = float(cell)
    return logged


def read_tensorboard(logger):
    """Of a TensorBoardLogger: numbers and histograms, each by key and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    scalars = {key: {e.step: e.value for e in events.Scalars(key)} for key in events.Tags()["scalars"]}
    pictures = {key: {e.step: e.histogram_value for e in events.Histograms(key)} for key in events.Tags()["histograms"]}
    return scalars, pictures


def read_wandb(directory):
    """Of the one offline run below a directory: its rows, as they were sent."""
    return [_row(record.history) for record in _sent(directory) if record.WhichOneof("record_type") == "history"]


def read_wandb_config(directory):
    """Of the one offline run below a directory: its configuration."""
    config = {}
    for record in _sent(directory):
        sent = record.run.config if record.WhichOneof("record_type") == "run" else record.config
        config |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in sent.update}
    return config


def _sent(directory):
    """All records of the one offline run below a directory."""
    (path,) = [path for path in Path(directory).glob("**/*.wandb") if not path.parent.is_symlink()]
    deadline = time.monotonic() + 30
    # Another process writes the file; on a busy machine it goes on for a moment after the run has been finished.
    # Older versions of wandb write others after the record of the exit.
    while "exit" not in [record.WhichOneof("record_type") for record in _records(path)]:
        assert time.monotonic() < deadline, f"{path} was not written to its end"
        time.sleep(0.1)
    return _records(path)


def _row(history):
    row = {}
    for item in history.item:
        place, *nested = [item.key] if item.key else list(item.nested_key)
        value = json.loads(item.value_json)
        if nested:
            row.setdefault(place, {})[".".join(nested)] = value
        else:
            row[place] = value
    return row


def _records(path):
    """LevelDB's log format after a header of 7 bytes: fragments that never cross the end of a block."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, pending = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while position + 7 <= len(data):
        rest_of_block = _BLOCK - position % _BLOCK
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if rest_of_block < 7 or kind == 0:  # padding
            position += rest_of_block
            continue
        if position + 7 + length > len(data):  # it is still being written
            return
        pending += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            record, pending = Record.FromString(pending), b""
            yield record
