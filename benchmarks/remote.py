"""How fast a model comes from a server that answers as the Hub does, and what it takes on the host.

    python benchmarks/remote.py --size gpt2-medium --json benchmarks/results/remote-cpu-gpt2-medium.json

The server, on the loopback, waits 20 ms before each answer and sends at most 200 MB/s over all connections
together; files lie on a second host, to which it redirects. Each way runs in a fresh process, by turns;
medians. Download: huggingface_hub's own client into an empty cache, then `stream` from there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from gpt2lite import GPTConfig, GPTModel
from gpt2lite.cli.bench import environment
from gpt2lite.cli.terminal import table
from gpt2lite.config import OFFICIAL_SIZES

TESTS = Path(__file__).resolve().parent.parent / "tests"
LATENCY, RATE = 0.02, 200e6  # seconds, bytes per second
REPO = "owner/model"

SERVE = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hub_server import Hub, sha256_of
hub = Hub(latency=float(sys.argv[2]), rate=float(sys.argv[3]))
hub.repos[sys.argv[4]] = {"main": {"model.safetensors": Path(sys.argv[5]).read_bytes()}}
sha256_of(hub.repos[sys.argv[4]]["main"]["model.safetensors"])
hub.serve()
print(hub.endpoint, hub.cdn, flush=True)
sys.stdin.read()
"""
# Each way: what is run; it prints seconds to open and to load, bytes loaded, and the host's peak beside them.
TRACKED = """
import json, sys, time, torch, tempfile
import gpt2lite
from gpt2lite import GPTModel, Tuning, open_model, track_memory
import gpt2lite.hub
gpt2lite.embedded()
def run(get, **options):
    began = time.perf_counter()
    opened = open_model(get())
    opening = time.perf_counter() - began
    with track_memory() as tracked:
        began = time.perf_counter()
        model = opened.load(**options)
        loading = time.perf_counter() - began
    nbytes = sum(span.nbytes for span in opened.reading.manifest.tensors.values())
    print(json.dumps([opening, loading, nbytes, tracked.peak_host_anonymous - opened.plan(
        dtype=options.get("dtype")).model_bytes]))
"""
WAYS = {
    "stream, in place": "run(lambda: REMOTE)",
    "stream, cast to bf16": "run(lambda: REMOTE, dtype=torch.bfloat16)",
    "stream, 1 reader": "run(lambda: REMOTE, tuning=Tuning(readers=1))",
    "stream, 4 readers": "run(lambda: REMOTE, tuning=Tuning(readers=4))",
    "download, then stream": "run(lambda: gpt2lite.hub.fetch(REPO))",
}
RAW = """
import http.client, json, sys, threading, time
host, path = CDN.removeprefix("http://").split("/", 1)
path = f"/{path}/{REPO}/main/model.safetensors"
def read(begin, end):
    connection = http.client.HTTPConnection(host)
    connection.request("GET", path, headers={"Range": f"bytes={begin}-{end - 1}"})
    answer, memory = connection.getresponse(), bytearray(1 << 20)
    while answer.readinto(memory):
        pass
    connection.close()
step = -(-SIZE // 8)
began = time.perf_counter()
threads = [threading.Thread(target=read, args=(at, min(at + step, SIZE))) for at in range(0, SIZE, step)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps([0.0, time.perf_counter() - began, SIZE, 0]))
"""


def measure(code: str, endpoint: str, names: dict[str, object], folder: Path) -> list[float]:
    """What one way prints, in a fresh process with an empty cache."""
    home = folder / "home"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    direct = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", "HF_HUB_DISABLE_XET": "1"}
    said = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    ran = subprocess.run(
        [sys.executable, "-c", said + code],
        env={**inherited, **direct, "HF_ENDPOINT": endpoint, "HF_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    shutil.rmtree(home, ignore_errors=True)
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    """Serve, measure by turns, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="gpt2-medium", choices=OFFICIAL_SIZES)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="WAY", help="ways whose names begin so")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        path = folder / "model.safetensors"
        config = GPTConfig.of(GPTConfig.named(args.size).as_dict() | {"tied_head": True})
        GPTModel(config).save_checkpoint(path)
        words = [str(TESTS), str(LATENCY), str(RATE), REPO, str(path)]
        with subprocess.Popen(
            [sys.executable, "-c", SERVE, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout is not None
            assert server.stdin is not None
            endpoint, cdn = server.stdout.readline().split()
            names = {"REMOTE": f"hf://{REPO}", "REPO": REPO, "CDN": cdn, "SIZE": path.stat().st_size}
            ways = {name: TRACKED + code for name, code in WAYS.items()} | {"http.client, 8 threads": RAW}
            ways = {name: ways[name] for name in ways if name.startswith(tuple(args.only or [""]))}
            found: dict[str, list[list[float]]] = {name: [] for name in ways}
            for _ in range(args.runs):
                for name, code in ways.items():
                    found[name].append(measure(code, endpoint, names, folder))
            server.stdin.close()
    rows: list[dict[str, Any]] = []
    for name, runs in found.items():
        opening, loading, nbytes, beside = (median(each) for each in zip(*runs, strict=True))
        rate = nbytes / loading / RATE
        if name.startswith("download"):
            rate = nbytes / (opening + loading) / RATE
        rows.append(
            {"way": name, "open_s": opening, "load_s": loading, "of_limit": rate, "host_beside_model": beside}
        )
    header = ("way", "open s", "load s", "of the limit", "host MiB beside the model")
    cells = [
        [r["way"], f"{r['open_s']:.2f}", f"{r['load_s']:.2f}", f"{r['of_limit']:.2f}",
         f"{r['host_beside_model'] / (1 << 20):.0f}"]
        for r in rows
    ]  # fmt: skip
    print(table(header, *cells))
    if args.json:
        record = {"size": args.size, "latency_s": LATENCY, "bytes_per_second": RATE, "runs": args.runs}
        text = json.dumps(record | {"environment": environment(), "results": rows}, indent=2)
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
