"""Loading from the hub, against a local server that answers what huggingface_hub asks the hub."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT, make_folder

import model as m
from files import read_jsonl

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """The hub: a revision's commit, the list of its files, and each file with the headers read.

    `files` maps (repository, name) to content. A repository in `gated` lists its files, no more.
    """

    def __init__(self, files, gated, requests, *args):
        self.files, self.gated, self.requests = files, gated, requests
        super().__init__(*args)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.requests.append(self.path)
        path, _, query = self.path.partition("?")
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if listing:
            repo, asked, revision = listing.groups()
        elif file:
            repo, revision, asked = file.groups()
        else:
            return self.answer(404)
        files = {name: content for (owner, name), content in self.files.items() if owner == repo}
        if not files:
            return self.answer(404, error="RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.answer(404, error="RevisionNotFound")
        if listing:
            content = tree(files, query) if asked == "tree" else {"id": repo, "sha": COMMIT}
            return self.answer(200, json.dumps(content).encode())
        if repo in self.gated:
            return self.answer(403, error="GatedRepo")
        if asked not in files:
            return self.answer(404, error="EntryNotFound")
        self.answer(200, files[asked])

    def answer(self, status, content=b"", error=None):
        headers = {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}
        headers |= {"X-Error-Code": error} if error else {}
        headers |= {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'} if status == 200 else {}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def tree(files, query):
    """The hub's list of files and folders; without recursive=true it stops at the top."""
    folders = {name.rpartition("/")[0] for name in files} - {""}
    found = [{"type": "directory", "oid": COMMIT, "size": 0, "path": name} for name in folders]
    for name, content in files.items():
        oid = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        found.append({"type": "file", "oid": oid, "size": len(content), "path": name})
    return [one for one in found if "recursive=true" in query or "/" not in one["path"]]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with a model in two shards and two data sets, one JSONL and one parquet -> environment for a subprocess."""
    import pyarrow as pa
    import pyarrow.parquet
    from safetensors.torch import load_file, save_file

    folder = make_folder(tmp_path_factory.mktemp("hub") / "model", max_position_embeddings=1024)
    state = load_file(folder / "model.safetensors")
    names, index = sorted(state), {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        shard = f"model-0000{i}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / shard)
        index |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "model.safetensors").rename(folder / "whole")
    files = {("org/sharded", path.name): path.read_bytes() for path in folder.iterdir() if path.name != "whole"}
    files["org/sharded", "consolidated.safetensors"] = b"the weights again"
    files["org/sharded", "original/model.safetensors"] = b"and again"
    files["org/gated", "config.json"] = files["org/sharded", "config.json"]
    files["org/notes", "README.md"] = b"no model"
    rows = [{"problem": f"{i}?", "answer": i, "unique_id": f"u{i}"} for i in range(3)]
    files["datasets/HuggingFaceH4/MATH-500", "test.jsonl"] = "".join(json.dumps(r) + "\n" for r in rows).encode()
    sink = pa.BufferOutputStream()
    table = pa.table({"question": ["How many?"], "answer": ["Two and two.\n#### 4"]})
    pyarrow.parquet.write_table(table, sink)
    files["datasets/openai/gsm8k", "main/test-00000-of-00001.parquet"] = sink.getvalue().to_pybytes()
    files["datasets/math-ai/amc23", "README.md"] = b"moved"
    requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, files, {"org/gated"}, requests))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}, folder, requests
    server.shutdown()


def run(hub, tmp_path, *flags):
    """sample.py against the hub, with a cache of its own."""
    environment = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", **hub[0]}
    command = [sys.executable, str(ROOT / "sample.py"), *flags, "--n", "2", "--out", str(tmp_path / "out.jsonl")]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize(("data", "answers"), [("math500", ["0", "1", "2"]), ("gsm8k", ["4"])])
def test_model_and_data_from_the_hub(data, answers, hub, tmp_path):
    """Guards against: shards or data files never asked for, by the names that the hub has them under."""
    done = run(hub, tmp_path, "--model", "org/sharded", "--data", data)
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert [row["answer"] for row in rows] == answers and rows[0]["id"] == f"{data}-0"
    (hub[1] / "whole").rename(hub[1] / "model.safetensors")  # the same weights in one file, from a local folder
    try:
        model, tokenizer = m.load(hub[1])
    finally:
        (hub[1] / "model.safetensors").rename(hub[1] / "whole")
    ids = tokenizer.encode_chat(
        rows[0]["problem"] + "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )[1]
    params = m.SamplingParams(max_new_tokens=24)
    [[first, _]] = m.generate(model, [ids], [[(0, f"{data}-0", j) for j in range(2)]], params, tokenizer.stop_ids)
    assert rows[0]["candidates"][0]["text"] == tokenizer.decode(first.ids)

    before = len(hub[2])  # the next time all comes from the cache, also without a network
    (tmp_path / "out.jsonl").unlink()
    again = run(({"HF_HUB_OFFLINE": "1"},), tmp_path, "--model", "org/sharded", "--data", data)
    assert again.returncode == 0, again.stderr
    assert len(hub[2]) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "org/nothing", "--data", "math500"], "org/nothing: no such model on the hub"),
        (["--model", "org/gated", "--data", "math500"], "org/gated: accept this model's terms on its page"),
        (["--model", "org/notes", "--data", "math500"], "org/notes: no config.json, so this is not a model folder"),
        (["--model", "org/sharded", "--data", "amc23"], "--data amc23: math-ai/amc23 on the hub has no test-00000"),
    ],
)
def test_what_the_hub_lacks(flags, message, hub, tmp_path):
    done = run(hub, tmp_path, *flags)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_no_network(tmp_path, problems):
    flags = ("--model", "org/sharded", "--data", str(problems))
    done = run(({"HF_ENDPOINT": "http://127.0.0.1:9"},), tmp_path, *flags)
    message = "the model could not be downloaded from the hub ([Errno"
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_weights_are_downloaded_once(hub, tmp_path, problems):
    """Guards against: consolidated.safetensors or original/, the same weights again, coming too."""
    before = len(hub[2])
    done = run(hub, tmp_path, "--model", "org/sharded", "--data", str(problems))
    assert done.returncode == 0, done.stderr
    asked = {path.partition(f"/resolve/{COMMIT}/")[2] for path in hub[2][before:]} - {""}
    assert asked == {path.name for path in hub[1].iterdir() if path.name != "whole"}


@pytest.mark.parametrize("listed", [True, False])
def test_an_incomplete_cache_is_not_used(listed, hub, tmp_path, problems):
    """Guards against: a model of which a part is missing; caches of older versions list no files."""
    flags = ("--model", "org/sharded", "--data", str(problems))
    assert run(hub, tmp_path, *flags).returncode == 0
    cached = tmp_path / "hf" / "hub" / "models--org--sharded"
    (cached / "snapshots" / COMMIT / "model-00002-of-00002.safetensors").unlink()
    if not listed:
        (cached / "trees" / f"{COMMIT}.json").unlink()
    (tmp_path / "out.jsonl").unlink()
    done = run(({"HF_HUB_OFFLINE": "1"},), tmp_path, *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "model-00002-of-00002.safetensors" in done.stderr.strip().splitlines()[-1]


def test_sharded_folder_equals_whole(hub, tmp_path):
    sharded, _ = m.load(hub[1])
    (hub[1] / "whole").rename(hub[1] / "model.safetensors")
    try:
        whole, _ = m.load(hub[1])
    finally:
        (hub[1] / "model.safetensors").rename(hub[1] / "whole")
    for (name, a), (_, b) in zip(sharded.named_parameters(), whole.named_parameters()):
        assert torch.equal(a, b), name
