"""Files and errors, shared by all stages: JSON, JSONL, and an output that can be stopped and goes on.

A row is a dict, a line of a JSONL file. What the user gave and cannot be used is an InputError: one
line on stderr and exit code 2, without a traceback.
"""

import contextlib
import fcntl
import json
import os
import platform
import re
import shlex
import signal
import sys
from pathlib import Path

FIRST = os.environ.get("RANK", "0") == "0"  # is this the first process that torchrun started, or the only one?
LOCKS = {}  # output -> its open lock file, while this process works on it
STOPPED = "\nstopped; the same command goes on from here"


class InputError(Exception):
    """Something that the user gave cannot be used. The message is one line: the thing, its value, the next step."""


def command_line(main):
    """Run main(); exit code 2 and one line for an InputError, 130 for Ctrl-C, 143 for SIGTERM, 141 for `| head`."""

    def terminate(number, frame):
        print("\nterminated; the same command goes on from here", file=sys.stderr)
        raise SystemExit(143)

    try:
        signal.signal(signal.SIGTERM, terminate)
        main()
        sys.stdout.flush()
    except InputError as e:
        print(f"error: {' '.join(str(e).split())[:2000]}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has seen enough, and what is left has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        sys.exit(130)
    finally:
        for out in list(LOCKS):
            unlock(out)


def stopped_early(kind, error, trace):
    """What Python prints for an error that nobody caught: a line where it is Ctrl-C while torch is being imported."""
    if kind is KeyboardInterrupt:
        return print(STOPPED, file=sys.stderr)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = stopped_early


@contextlib.contextmanager
def disk_errors(path):
    """A full disk, a missing permission and the like as an InputError."""
    try:
        yield
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror}); what was finished is kept, and a rerun goes on")


# ------------------------------------------------------------------------------------------------
# JSON and JSONL


def each_row(path, keys=()):
    """The rows of a JSONL file, one at a time: dicts with all of `keys`, unique ids, and `problem` for `question`."""
    seen = {}
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    row = json.loads(line.decode())
                except UnicodeDecodeError as e:
                    raise InputError(f"{where}: not UTF-8 text ({e.reason} at byte {e.start})")
                except (ValueError, RecursionError) as e:
                    torn = "" if line.endswith(b"\n") else "; the file ends in the middle of it"
                    raise InputError(f"{where}: not valid JSON ({e}){torn}")
                if not isinstance(row, dict):
                    raise InputError(f"{where}: not a JSON object but {line.decode().strip()[:40]!r}")
                if row.get("problem") is None and "question" in row:
                    row["problem"] = row.pop("question")
                for key in keys:
                    if key not in row or (key in ("id", "problem") and row[key] is None):
                        raise InputError(f"{where}: no {key!r} in it, only {', '.join(row)}")
                if not isinstance(row.get("problem", ""), str):
                    raise InputError(f"{where}: its problem is not a text but {str(row['problem'])[:40]!r}")
                check_id(row.get("id"), seen, where)
                yield row
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})")
    if not seen:
        raise InputError(f"{path}: no rows in it")


def check_id(identity, seen, where):
    """InputError unless an id (None: without one) is a string or an integer that is not in `seen`: {id: its place}."""
    if not isinstance(identity, (str, int, type(None))) or isinstance(identity, bool):
        raise InputError(f"{where}: its id is neither a string nor an integer but {str(identity)[:40]}")
    key = where if identity is None else str(identity)  # 1 and "1" would draw the same random numbers
    if (first := seen.setdefault(key, where)) != where:
        raise InputError(f"{where}: id {identity!r} already stands on {first.rpartition(', ')[2]}")


def read_jsonl(path, keys=()):
    """All rows of a JSONL file, as `each_row` gives them."""
    return list(each_row(path, keys))


def as_written(row, where):
    """A row as it is read again once it has been written; InputError where JSON has no such value."""
    for key, value in row.items():
        try:
            json.dumps({key: value}, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as e:
            raise InputError(f"{where}: {key!r} cannot be written as JSON ({e}); convert it or leave it out")
    return json.loads(json.dumps(row))


def read_json(path):
    """A JSON file that holds an object."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({e})")
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no JSON object but {str(found)[:40]!r}")
    return found


def write_through(path, mode, text):
    """Write or append a text; it is on the disk when this returns."""
    with open(path, mode, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_text(path, text):
    """Write a file so that a reader, and a run after a kill, sees the old one or the new one, never half of it."""
    partial = Path(f"{path}.partial")
    with disk_errors(path):
        partial.parent.mkdir(parents=True, exist_ok=True)
        write_through(partial, "w", text)
        os.replace(partial, path)


def write_json(path, data):
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def whole_lines(path):
    """The rows of a file that a kill may have torn: those of its whole lines -> (rows, their length in bytes)."""
    try:
        content = path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})")
    content = content[: content.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            rows.append(json.loads(line.decode()))
        except (ValueError, RecursionError):
            raise InputError(f"{path}, line {number}: damaged; delete this line, and the same command makes it anew")
    return rows, len(content)


# ------------------------------------------------------------------------------------------------
# Outputs


def meta_path(out):
    """The record beside an output: x.candidates.jsonl -> x.candidates.meta.json, folder -> folder.meta.json."""
    return Path(str(out).removesuffix(".jsonl") + ".meta.json")


def check_same(out, made_by, record=None):
    """InputError unless the output `out`, which exists, was made by what `made_by` says, after its record."""
    record = record or meta_path(out)
    old = read_json(record) if record.exists() else {}
    for key, value in made_by.items():
        if old.get(key) != value:
            was = f"made with {key} {old.get(key)!r}, not {value!r}"
            raise InputError(f"--out {out}: exists, and was {was}; choose another --out or delete it")


def lock(out):
    """Keep other commands off an output until `unlock`, or until the first process of this command ends."""
    path = Path(f"{out}.lock")
    if not FIRST or str(out) in LOCKS:
        return
    with disk_errors(f"--out {out}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        file = open(descriptor, "r+", encoding="utf-8", errors="replace")
        held = file.read(4096)
    if held and not held.startswith("process "):
        raise InputError(f"--out {out}: {path} is in the way, and not of this program; choose another --out")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"--out {out}: in use by {held or 'another command'}; wait, or choose another --out")
    except OSError:  # a file system that has no locks
        return
    if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
        file.close()
        return lock(out)  # its last holder has deleted the file meanwhile
    with disk_errors(f"--out {out}"):
        file.seek(0)
        file.truncate()
        print(f"process {os.getpid()} on {platform.node()} ({shlex.join(sys.argv)})", end="", file=file, flush=True)
    LOCKS[str(out)] = file


def unlock(out):
    if file := LOCKS.pop(str(out), None):
        Path(f"{out}.lock").unlink(missing_ok=True)
        file.close()


def claim(out):
    """Lock a file to be written, before any time is spent; InputError where it cannot be one of ours."""
    if os.path.lexists(out) and not Path(out).is_file():
        raise InputError(f"--out {out}: a folder or a device, not a file; choose another")
    partial = Path(f"{out}.partial")
    if partial.exists() and not meta_path(out).exists():
        raise InputError(f"--out {out}: {partial} is in the way, and not of this program; choose another --out")
    lock(out)


class Output:
    """A JSONL file that can be stopped at any moment and goes on.

    Each process appends the rows that it finishes to a part of its own, OUT.part0, OUT.part1, ...; `finish` makes
    them OUT, in the order of `rows`, the problems. `done` {id: row} is what is there already, in any part, of whichever
    process. `made_by` is all that the content depends on; InputError for an output that something else made.
    """

    def __init__(self, path, rows, made_by, rank=0):
        self.path, self.rows, self.made_by = Path(path), {row["id"]: row for row in rows}, made_by
        self.part, self.torn = Path(f"{path}.part{rank}"), True  # torn: its last line may be half of one
        claim(path)
        self.done = self.read()

    def parts(self):
        """The parts that are there, by a comparison of names: brackets in them are no patterns."""
        name = re.compile(re.escape(self.path.name) + r"\.part\d+")
        with disk_errors(f"--out {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return sorted(path for path in self.path.parent.iterdir() if name.fullmatch(path.name))

    def read(self):
        done, files = {}, [path for path in (self.path, *self.parts()) if path.exists() and path.stat().st_size]
        meta = meta_path(self.path)
        if files or (meta.exists() and "weights" not in read_json(meta)):  # a meta file of something else
            check_same(self.path, self.made_by)
        else:
            with disk_errors(f"--out {self.path}"), open(self.part, "ab"):
                pass
        for row in (row for path in files for row in whole_lines(path)[0]):
            known = isinstance(row, dict) and isinstance(row.get("id"), (str, int)) and self.rows.get(row["id"])
            if not known or (row | known) != row:
                raise InputError(f"--out {self.path}: exists, with other or more problems; choose another or delete it")
            if len(row.get("candidates", ())) >= len(done.get(row["id"], {}).get("candidates", ())):  # the latest wave
                done[row["id"]] = row
        return done

    def append(self, rows):
        """Add finished rows to the part of this process; they are on the disk when this returns."""
        with disk_errors(self.path):
            if self.torn and self.part.exists():
                os.truncate(self.part, whole_lines(self.part)[1])
            self.torn = True  # until the write below has gone well
            write_through(self.part, "a", as_lines(rows))
            self.torn = False

    def finish(self):
        """Make the parts of all processes the one file -> all its rows."""
        self.done = self.read()
        rows = [self.done[identity] for identity in self.rows]
        write_text(self.path, as_lines(rows))
        for part in self.parts():
            part.unlink()
        return rows
