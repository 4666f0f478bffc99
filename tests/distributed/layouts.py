"""Runs a recipe as one process or as several, with as many CPU devices as asked for, and compares what came of it.

    python tests/distributed/layouts.py configs/quickstart.py --out runs/layouts --layouts 1x1 1x8 2x2 4x1

A layout is processes × devices of each. Every run is the real command in processes of its own. Held against the first
layout (RELIABILITY): the order of the data and everything made on the host is the same to the byte (tier B), losses are
within 1e-5 (relatively where they are above 1), and float32 parameters within relative L2 1e-5 per 100 steps (tier C).
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def start(recipe, workdir, processes, devices, *arguments):
    """Starts a recipe as so many processes; each writes what it says to ``log_of(workdir, index)``."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, "-m", "jaxdraft.cli", "run", str(recipe), "--workdir", str(workdir), *arguments]
    workdir.parent.mkdir(parents=True, exist_ok=True)
    started = []
    for index in range(processes):
        own = {**environment, **job, "JAX_PROCESS_ID": str(index)} if processes > 1 else environment
        with log_of(workdir, index).open("w") as file:
            started.append(subprocess.Popen(command, stdout=file, stderr=file, env=own))
    return started


def log_of(workdir, index):
    return workdir.with_name(f"{workdir.name}.{index}.log")


def run(recipe, workdir, processes, devices, *arguments, timeout=3000):
    """Runs a recipe, returns what its processes wrote to standard error; raises RuntimeError with it if one fails."""
    started = start(recipe, workdir, processes, devices, *arguments)
    try:
        codes = [process.wait(timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    texts = [log_of(workdir, index).read_text() for index in range(processes)]
    if any(codes):
        raise RuntimeError(f"exit codes {codes}\n" + "\n".join(text[-3000:] for text in texts))
    return texts


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def differences(one, other):
    """What may differ between two layouts, as a dict of figures; raises AssertionError where what may not does."""
    found = {"loss": 0.0, "parameters": 0.0, "tokens": 0, "blocks": 0}
    records = {path.parent.name: json.loads(path.read_text()) for path in sorted(one.glob("*/stage.json"))}
    assert records.keys() == {path.parent.name for path in other.glob("*/stage.json")}
    for name, record in sorted(records.items(), key=lambda item: item[1]["kind"] != "Generate"):
        assert json.loads((other / name / "stage.json").read_text())["status"] == "done", name
        if record["kind"] in ("TrainTokenizer", "Prepare"):
            for file in record["outputs"]:
                assert (one / name / file).read_bytes() == (other / name / file).read_bytes(), f"{name}/{file}"
        if record["kind"] == "Train":
            for a, b in zip(lines(one / name / "metrics.jsonl"), lines(other / name / "metrics.jsonl"), strict=True):
                if not found["tokens"]:  # else the answers that are trained on differ
                    assert a["tokens"] == b["tokens"], f"{name}: another order of rows at step {a['step']}"
                found["loss"] = max(found["loss"], abs(a["loss"] - b["loss"]) / max(1.0, abs(a["loss"])))
            a, b = (load_file(run / name / "model" / "model.safetensors") for run in (one, other))
            flat = lambda tensors: np.concatenate([tensors[key].ravel() for key in sorted(tensors)]).astype(np.float64)
            distance = np.linalg.norm(flat(a) - flat(b)) / np.linalg.norm(flat(a))
            found["parameters"] = max(found["parameters"], distance / max(1.0, record["settings"]["steps"] / 100))
            if "block_efficiency.jsonl" in record["outputs"]:
                looks = (lines(run / name / "block_efficiency.jsonl") for run in (one, other))
                for a, b in zip(*looks, strict=True):
                    assert a.keys() == b.keys()
                    found["blocks"] += a.get("decoded_blocks") != b.get("decoded_blocks")
        if record["kind"] == "Generate":
            for path in sorted((one / name).glob("responses-*.jsonl")):
                for a, b in zip(lines(path), lines(other / name / path.name), strict=True):
                    assert [a[key] for key in _SAME] == [b[key] for key in _SAME]
                    found["tokens"] += a["tokens"] != b["tokens"]
    return found


_SAME = ("id", "writer", "temperature", "top_p", "seed", "prompt_tokens")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="gets a run directory per layout")
    parser.add_argument("--layouts", nargs="+", default=["1x1", "1x8", "2x2", "4x1"], metavar="PROCESSESxDEVICES")
    parser.add_argument("--set", action="append", default=[], help="as of jaxdraft run")
    options = parser.parse_args()
    settings = [word for value in options.set for word in ("--set", value)]
    for layout in options.layouts:
        run(options.recipe, options.out / layout, *map(int, layout.split("x")), *settings)
        print(layout, differences(options.out / options.layouts[0], options.out / layout), flush=True)


if __name__ == "__main__":
    main()
