#!/usr/bin/env python3
"""Measures a built agent as a whole process: size, memory at rest and under load, time to the first result, frames per second.

It starts a real mosquitto and the given program, repeats a JPEG (SIZE, default 1920x1080) as fast as the model allows in STREAMS
streams (default 1), and reads the kernel's counters of the agent and its child processes, the agent's metrics, and the results.
ISOLATION=inProcess runs the models in the agent's process. The figures compare two builds or two settings on one machine in one
run; nothing is asserted.

    .venv/bin/python tests/figures.py target/release/lineside [MODEL.onnx ...]
"""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "surface-defects"
# Intervals of the measurement: until memory at rest is stable, until the load is stable, and the load itself.
REST_SECONDS = 3
WARM_UP_SECONDS = 2
MEASURE_SECONDS = 8
STREAMS = int(os.environ.get("STREAMS", "1"))
ISOLATION = os.environ.get("ISOLATION")
# Width and height of the JPEG in pixels.
SIZE = tuple(int(number) for number in os.environ.get("SIZE", "1920x1080").split("x"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(what, condition, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise SystemExit(f"timed out waiting for {what}")


def listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def processes(pid):
    """A process and its children."""
    tasks = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    children = {int(child) for task in tasks for child in task.read_text().split()}
    return [pid, *children]


def memory_mib(pid, key="VmRSS"):
    """Memory of a process and its children, in MiB. What they share is counted for each."""
    texts = (pathlib.Path(f"/proc/{one}/status").read_text() for one in processes(pid))
    return sum(int(re.search(rf"{key}:\s+(\d+)", text).group(1)) for text in texts) / 1024


def cpu_seconds(pid):
    texts = (pathlib.Path(f"/proc/{one}/stat").read_text() for one in processes(pid))
    fields = [text.rsplit(")", 1)[1].split() for text in texts]
    return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")


def latencies_ms(port, count):
    """Total latencies of results, sorted."""
    command = ["mosquitto_sub", "-p", str(port), "-C", str(count), "-t", "lineside/v1/+/+/line-1/result"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(json.loads(line)["latency_ms"]["total"] for line in lines)


def duration_series(text, suffix):
    prefix = f"lineside_inference_duration_seconds_{suffix} "
    return next(float(line[len(prefix):]) for line in text.splitlines() if line.startswith(prefix))


class Agent:
    def __init__(self, program, folder, mqtt_port):
        self.folder = pathlib.Path(folder)
        (self.folder / "manifests").mkdir(exist_ok=True)
        self.log = open(self.folder / "log", "w+")
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [program, "run", "--manifests", self.folder / "manifests", "--data-dir", self.folder / "data", "--node", "figures",
             "--mqtt", f"mqtt://127.0.0.1:{mqtt_port}", "--http", "127.0.0.1:0"], stderr=self.log,
            env={**os.environ, "LINESIDE_FILE_ROOTS": "/", "LINESIDE_CAMERA_HOSTS": "*,127.0.0.1"})
        self.pid = self.process.pid

    def http(self):
        def address():
            # Only complete lines; the agent may be writing the last one.
            for line in (self.folder / "log").read_text().split("\n")[:-1]:
                entry = json.loads(line)
                # Builds before the event codes are recognised by the message.
                if entry.get("event") == "agent_started" or entry.get("message") == "lineside starts":
                    return entry["http"]
        return wait_for("the agent", address)

    def metrics(self):
        with urllib.request.urlopen(f"http://{self.http()}/metrics") as answer:
            return answer.read().decode()

    def processed(self):
        found = re.findall(r'lineside_frames_total\{outcome="processed",stream="line-\d+"\} (\d+)', self.metrics())
        return sum(int(count) for count in found)

    def stop(self):
        self.process.terminate()
        self.process.wait()


def write_site(folder, model, mean, std):
    frames = folder / "frames"
    frames.mkdir()
    Image.open(EXAMPLE / "frames" / "part-012-scratch.jpg").resize(SIZE).save(frames / "frame.jpg", quality=90)
    head = "apiVersion: lineside.dev/v1alpha1\n"
    (folder / "manifests").mkdir()
    runtime = f"  runtime: {{isolation: {ISOLATION}}}\n" if ISOLATION else ""
    streams = "".join(
        f"---\n{head}kind: CameraStream\nmetadata: {{name: line-{index + 1}}}\nspec:\n"
        f"  source: {{uri: 'dir:../frames?loop=true'}}\n  model: m\n  fps: 0\n" for index in range(STREAMS))
    (folder / "manifests" / "all.yaml").write_text(
        f"{head}kind: EdgeModel\nmetadata: {{name: m}}\nspec:\n  version: 1\n  source: {{uri: 'file://{model}'}}\n"
        f"  task: classify\n  input: {{mean: [{mean}], std: [{std}]}}\n{runtime}{streams}")


def main():
    program = pathlib.Path(sys.argv[1]).resolve()
    models = [pathlib.Path(model).resolve() for model in sys.argv[2:]] or [EXAMPLE / "surface-defects.onnx"]
    print(f"binary                      {program.stat().st_size / 1e6:.1f} MB")
    port = free_port()
    mosquitto = "/usr/sbin/mosquitto" if os.path.exists("/usr/sbin/mosquitto") else "mosquitto"
    broker = subprocess.Popen([mosquitto, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for("mosquitto", lambda: listening(port))
        with tempfile.TemporaryDirectory() as folder:
            agent = Agent(program, folder, port)
            agent.http()
            time.sleep(REST_SECONDS)
            print(f"RSS at rest, no model       {memory_mib(agent.pid):.1f} MiB")
            agent.stop()
        for model in models:
            print(f"\n{model.name}, {model.stat().st_size / 1e6:.1f} MB, repeated {SIZE[0]}x{SIZE[1]} JPEG")
            with tempfile.TemporaryDirectory() as folder:
                folder = pathlib.Path(folder)
                write_site(folder, model, 127, 128)
                first = subprocess.Popen(
                    ["stdbuf", "-oL", "mosquitto_sub", "-p", str(port), "-C", "1", "-d", "-t", "lineside/v1/+/+/+/result"],
                    stdout=subprocess.PIPE, text=True)
                for line in first.stdout:
                    if "Subscribed (mid" in line:
                        break
                agent = Agent(program, folder, port)
                first.communicate()
                print(f"start to first result       {(time.monotonic() - agent.started) * 1e3:.0f} ms")
                time.sleep(WARM_UP_SECONDS)
                frames, cpu, started = agent.processed(), cpu_seconds(agent.pid), time.monotonic()
                time.sleep(MEASURE_SECONDS)
                frames, cpu = agent.processed() - frames, cpu_seconds(agent.pid) - cpu
                seconds = time.monotonic() - started
                print(f"frames per second           {frames / seconds:.1f}")
                print(f"frames per second of CPU    {frames / cpu:.1f}")
                agent_only = int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{agent.pid}/status").read_text()).group(1)) / 1024
                print(f"RSS under load              {memory_mib(agent.pid):.1f} MiB (the agent {agent_only:.1f})")
                sample = latencies_ms(port, 200)
                print(f"latency of a frame          P50 {sample[100]:.1f} ms, P99 {sample[198]:.1f} ms")
                text = agent.metrics()
                for phase in ["decode", "preprocess", "infer", "postprocess"]:
                    total, count = (duration_series(text, f"{part}{{model=\"m\",phase=\"{phase}\",version=\"1\"}}")
                                    for part in ("sum", "count"))
                    print(f"mean {phase:<22} {total / count * 1e3:.2f} ms")
                agent.stop()
    finally:
        broker.terminate()
        broker.wait()


main()
