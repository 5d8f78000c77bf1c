"""Install a built wheel where the source cannot be seen, and use it: ``python tests/packaging/smoke.py dist``.

Dependencies come from the environment that runs this script; the wheel is installed without them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = "quire-tiny"
READY_S = 90
STOP_S = 30


def main() -> int:
    """Check the newest wheel in the folder given."""
    (wheel,) = sorted(Path(sys.argv[1]).resolve().glob("quire-*.whl"))
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as name:
        elsewhere = Path(name)
        python = install(wheel, elsewhere / "venv")
        check_commands(python, elsewhere)
        check_serving(python, elsewhere)
    return 0


def check_contents(wheel: Path) -> None:
    """Every file of the three folders and of ``src`` is in the wheel, under its import name, and nothing else is."""
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    listed = subprocess.run(
        ["git", "ls-files", "core", "plugins", "server", "src"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    files = (name for name in listed.stdout.splitlines() if not (ROOT / name).is_symlink())
    expected = {name.removeprefix("src/") if name.startswith("src/") else f"quire/{name}" for name in files}
    missing, stray = sorted(expected - inside), sorted(n for n in inside if not n.startswith("quire/"))
    if missing or stray:
        raise SystemExit(f"{wheel.name}: missing {missing}, and stray {stray}")
    say(f"{wheel.name}: {len(inside)} files, {wheel.stat().st_size / 1e6:.1f} MB")


def install(wheel: Path, where: Path) -> str:
    """A virtual environment with the wheel, and this environment's packages behind it. Its Python."""
    venv.create(where, with_pip=False)
    python = where / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "--python", str(python)]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True, timeout=120)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    path = where / "lib" / version / "site-packages" / "dependencies.pth"
    path.write_text(sysconfig.get_path("purelib") + "\n")
    return str(python)


def check_commands(python: str, elsewhere: Path) -> None:
    """The console script and ``python -m`` run, import the installed files, and the doctor finds nothing."""
    script = str(Path(python).with_name("quire"))
    where = run([python, "-c", "import quire; print(quire.__file__)"], elsewhere)
    if not where.startswith(str(elsewhere.resolve())):
        raise SystemExit(f"quire was imported from {where.strip()}, not from the wheel")
    for command in ([script, "--version"], [python, "-m", "quire", "--version"]):
        say(run(command, elsewhere).strip())
    run([script, "plugins", "doctor"], elsewhere)
    json.loads(run([script, "plugins", "list", "--json"], elsewhere))
    say("quire plugins doctor: nothing to mend")


def check_serving(python: str, elsewhere: Path) -> None:
    """``quire serve`` answers a chat request and stops on SIGTERM with status 0."""
    log = elsewhere / "serve.log"
    command = [str(Path(python).with_name("quire")), "serve", MODEL, "--host", "127.0.0.1", "--port", "0"]
    start = time.monotonic()
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, cwd=elsewhere, env=clean(), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        url = wait_ready(server, log)
        say(f"ready after {time.monotonic() - start:.1f} s")
        say(f"answer: {ask(url)!r}")
        server.send_signal(signal.SIGTERM)
        status = server.wait(STOP_S)
        if status:
            raise SystemExit(f"the server ended with status {status} on SIGTERM\n{log.read_text()}")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemExit(f"{error}\n{log.read_text()}") from error
    finally:
        server.kill()
        server.wait()


def wait_ready(server: subprocess.Popen[bytes], log: Path) -> str:
    """The address in the ready line, once ``/health`` answers there."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and server.poll() is None:
        lines = [line for line in log.read_text().splitlines() if " ready on http" in line]
        if lines:
            url = lines[0].split(" ready on ")[1].split()[0]
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return url
        time.sleep(0.1)
    raise SystemExit(f"no ready line within {READY_S} s\n{log.read_text()}")


def ask(url: str) -> str:
    """One chat completion."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "What is 12 + 30?"}], "max_tokens": 24}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        answer = json.load(reply)
    if answer["usage"]["completion_tokens"] < 1:
        raise SystemExit(f"no token was generated: {answer}")
    return answer["choices"][0]["message"]["content"]


def run(command: list[str], elsewhere: Path) -> str:
    """What a command printed; its status must be 0."""
    result = subprocess.run(
        command, cwd=elsewhere, env=clean(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout


def clean() -> dict[str, str]:
    """This environment without what would lead Python back to the source."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def say(text: str) -> None:
    """A line that appears at once."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
