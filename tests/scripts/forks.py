"""Start Python programs as forks of a process that has imported all they need: in 0.2 s instead of 8.

    process = Fork("train/train_dit.py", "--help")  # as subprocess.Popen([sys.executable, "train/train_dit.py", ...])
    out, err = process.communicate()

What a library reads from the environment when it is imported, such as HF_ENDPOINT, is the server's, whose environment
is that of the first test that starts a fork: programs that need another one need a process of their own.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
PR_SET_CHILD_SUBREAPER = 36
MAX_REQUEST = 1 << 20

#: Script -> module of its `main`.
SCRIPTS = {
    "train/train_dit.py": "sdt_diffusion.training.train_dit",
    "train/train_classifier.py": "sdt_diffusion.training.train_classifier",
    "train/encode_latents.py": "sdt_diffusion.data.latents.encode",
    "train/reconstruct_ema.py": "sdt_diffusion.training.reconstruct_ema",
    "train/share.py": "sdt_diffusion.hub.push",
    "sample/sample.py": "sdt_diffusion.sampling.sample",
    "sample/gallery.py": "sdt_diffusion.demo.gallery",
    "eval/fid.py": "sdt_diffusion.evaluation.fid",
    "eval/sweep.py": "sdt_diffusion.evaluation.sweep",
    "eval/make_reference.py": "sdt_diffusion.evaluation.make_reference",
    "eval/accuracy.py": "sdt_diffusion.evaluation.accuracy",
    "eval/label_accuracy.py": "sdt_diffusion.evaluation.label_accuracy",
    "eval/decay_maps.py": "sdt_diffusion.evaluation.decay_maps",
}
#: Modules that the scripts import late, and that each fork would otherwise import again.
LATE = (
    *("matplotlib.pyplot", "matplotlib.backends.backend_agg", "timm.data", "timm.optim", "torch_fidelity"),
    *("diffusers.guiders", "diffusers.pipelines.pipeline_loading_utils", "torch.utils.tensorboard"),
)


def import_all():
    """Import everything once, and start no thread."""
    import torch
    from PIL import Image
    from tqdm import tqdm

    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())  # its own is shared with forks: one that is killed would keep it forever
    torch.set_num_threads(1)
    for module in (*SCRIPTS.values(), *LATE):
        importlib.import_module(module)
    Image.init()
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, "a fork has none of the other threads, but all of their locks"


class Fork:
    """A program in a fork, to be used like a `subprocess.Popen` whose outputs are text.

    Args:
        *words: What would follow `python`: a script, or `-m` and a module, and arguments.
        env: The environment; this process's unless it is given.
        stdout: A file for the output, in place of one that `communicate` reads.
        stderr: The same for the output of errors.
        start_new_session: Whether to lead a group of processes, to which `os.killpg` sends signals.
    """

    def __init__(self, *words, env=None, stdout=None, stderr=None, start_new_session=False):
        self.args, self.returncode = [str(word) for word in words], None
        request = {"words": self.args, "env": dict(env or os.environ), "new_session": start_new_session}
        self._outputs = [output or tempfile.TemporaryFile() for output in (stdout, stderr)]  # noqa: SIM115
        self.pid = _server().fork(request, [output.fileno() for output in self._outputs])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()
        self.wait()

    def poll(self):
        """Return the exit code, negative for a signal, or `None` while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=300):
        """Wait for the end; return the exit code."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.005)
        return self.returncode

    def communicate(self, timeout=300):
        """Wait for the end; return what it has written to its two outputs."""
        self.wait(timeout)
        for output in self._outputs:
            output.seek(0)
        return tuple(output.read().decode().replace("\r\n", "\n") for output in self._outputs)

    def send_signal(self, number):
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        """End it by SIGKILL."""
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server():
    return Server()


class Server:
    """The process whose forks the programs are; it ends with the one that has started it."""

    def __init__(self):
        self.connection, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_REQUEST)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        environment["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow's thread, which no fork has
        environment["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's threads, neither
        command = [sys.executable, "-m", "tests.scripts.forks", str(other.fileno())]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL
        )
        other.close()
        atexit.register(process.wait)
        atexit.register(self.connection.close)

    def fork(self, request, outputs):
        """Start a program; return the number of its process, a child of this one."""
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # a process whose parent ends becomes a child of this one ...
        try:
            socket.send_fds(self.connection, [json.dumps(request).encode()], outputs)
            pid = int(self.connection.recv(32))
            assert self.connection.recv(32) == b"parent has ended"
        finally:
            libc.prctl(PR_SET_CHILD_SUBREAPER, 0)  # ... which is for forks only
        return pid


def serve(connection):
    """Fork at each request; return, in the fork only, the request."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests and the forks
    while True:
        message, outputs, _, _ = socket.recv_fds(connection, MAX_REQUEST, 2)
        if not message:
            os._exit(0)
        parent = os.fork()
        if parent == 0:
            pid = os.fork()
            if pid:
                connection.send(str(pid).encode())
                os._exit(0)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            connection.close()
            for number, output in enumerate(outputs, start=1):
                os.dup2(output, number)
                os.close(output)
            return json.loads(message)
        os.waitpid(parent, 0)
        for output in outputs:
            os.close(output)
        connection.send(b"parent has ended")


def run_program(words, env, new_session):
    """Do what `python` does with the words that follow it, in the root of the checkout."""
    if new_session:
        os.setsid()
    os.environ.clear()
    os.environ.update(env)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent.absolute()))
        runpy.run_path(words[0], run_name="__main__")


def end_with(program):
    """Run a program and end as the interpreter does: exit codes, tracebacks, threads, functions of `atexit`.

    The interpreter would then take apart what has been imported, for 2 s.
    """
    code = 0
    try:
        program()
    except SystemExit as stop:
        code = stop.code
        if code is None:
            code = 0
        elif not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        traceback.print_exc()
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
    server_end = socket.socket(fileno=int(sys.argv[1]))
    import_all()
    gc.collect()
    gc.freeze()  # what all forks share
    request = serve(server_end)
    end_with(lambda: run_program(**request))
