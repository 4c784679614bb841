"""Files and errors, shared by all stages.

A row is a dict, a line of a JSONL file. What the user gave and cannot be used is an InputError: one
line on stderr and exit code 2, without a traceback.
"""

import json
import os
import sys
from pathlib import Path


class InputError(Exception):
    """Something that the user gave cannot be used. The message is one line: the thing, its value, the next step."""


def command_line(main):
    """Run main(): exit code 2 and one line for an InputError, 130 for Ctrl-C, a traceback for our own mistakes."""
    try:
        main()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def each_row(path, keys=()):
    """The rows of a JSONL file, one at a time: dicts that have all of `keys` and, if they have one, a unique id."""
    seen, rows = {}, 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode())
                except UnicodeDecodeError as e:
                    raise InputError(f"{path}, line {number}: not UTF-8 text ({e.reason} at byte {e.start})")
                except ValueError as e:
                    torn = "" if line.endswith(b"\n") else "; the file ends in the middle of it"
                    raise InputError(f"{path}, line {number}: not valid JSON ({e}){torn}")
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {number}: not a JSON object but {line.decode().strip()[:40]!r}")
                for key in keys:
                    if key not in row or (key == "id" and row["id"] is None):
                        raise InputError(f"{path}, line {number}: no {key!r} in it, only {', '.join(row)}")
                name, rows = row.get("id"), rows + 1
                if name is not None and (first := seen.setdefault(str(name), number)) != number:
                    raise InputError(f"{path}, line {number}: id {name!r} already stands on line {first}")
                yield row
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})")
    if not rows:
        raise InputError(f"{path}: no rows in it")


def read_jsonl(path, keys=()):
    """All rows of a JSONL file, as `each_row` gives them."""
    return list(each_row(path, keys))


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({e})")


def meta_path(out):
    """The record beside an output: x.candidates.jsonl -> x.candidates.meta.json, folder -> folder.meta.json."""
    return Path(str(out).removesuffix(".jsonl") + ".meta.json")


def write_json(path, data):
    """Write `data` to `path` so that a reader sees the old file or the new one, never half of it."""
    partial = Path(f"{path}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror}); choose another --out")
