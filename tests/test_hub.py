"""Loading from the hub, against a local server that answers the hub's file requests."""

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
from evaluate import read_jsonl


class Hub(BaseHTTPRequestHandler):
    """GET and HEAD of /{repo}/resolve/{revision}/{file}, with the headers that huggingface_hub reads."""

    def __init__(self, files, requests, *args):
        self.files, self.requests = files, requests
        super().__init__(*args)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        match = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        content = self.files.get(match.groups()) if match else None
        self.requests.append(self.path)
        if content is None:
            known = match and any(repo == match[1] for repo, _ in self.files)
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


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
    rows = [{"problem": f"{i}?", "answer": i, "unique_id": f"u{i}"} for i in range(3)]
    files["datasets/HuggingFaceH4/MATH-500", "test.jsonl"] = "".join(json.dumps(r) + "\n" for r in rows).encode()
    sink = pa.BufferOutputStream()
    table = pa.table({"question": ["How many?"], "answer": ["Two and two.\n#### 4"]})
    pyarrow.parquet.write_table(table, sink)
    files["datasets/openai/gsm8k", "main/test-00000-of-00001.parquet"] = sink.getvalue().to_pybytes()
    files["datasets/math-ai/amc23", "README.md"] = b"moved"
    requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, files, requests))
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
        (["--model", "org/sharded", "--data", "amc23"], "--data amc23: math-ai/amc23 on the hub has no test-00000"),
    ],
)
def test_what_the_hub_lacks(flags, message, hub, tmp_path):
    done = run(hub, tmp_path, *flags)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_sharded_folder_equals_whole(hub, tmp_path):
    sharded, _ = m.load(hub[1])
    (hub[1] / "whole").rename(hub[1] / "model.safetensors")
    try:
        whole, _ = m.load(hub[1])
    finally:
        (hub[1] / "model.safetensors").rename(hub[1] / "whole")
    for (name, a), (_, b) in zip(sharded.named_parameters(), whole.named_parameters()):
        assert torch.equal(a, b), name
