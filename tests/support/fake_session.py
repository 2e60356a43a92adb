"""A session of short steps, without torch: python tests/support/fake_session.py FILE [FAULT]

In its first run it kills itself after two steps. FAULT: "forgets" begins with an empty file, "runs on"
leaves a process behind, "fails" ends with 1.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from measuring.supervision import run_command
from reporting.result_files import current_stage, note_begun, save_stage

FACTS = {"device": "rehearsal on the CPU", "kernels": "abc", "date": "2000-01-01T00:00:00+00:00"}
STEPS = [f"step {i}" for i in range(5)]


def main(file: Path, fault: str = "") -> int:
    is_first = not file.exists()
    if fault == "forgets":
        file.unlink(missing_ok=True)
    for done, name in enumerate(STEPS):
        if current_stage(file, name, FACTS):
            continue
        if fault == "runs on":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        note_begun(file, name, FACTS)
        run_command([sys.executable, "-c", "import time; time.sleep(0.1)"], 600.0)
        save_stage(file, name, {"ok": True, "summary": f"by {os.getpid()}"}, FACTS)
        if is_first and done == 1 and fault != "runs on":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "runs on":
            break
    return 1 if fault == "fails" else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
