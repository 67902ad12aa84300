"""A disk that fills up while a fit saves its state: `python tests/reliability/full_disk.py`.

The run lies on a file system of its own in memory, mounted for this process alone (which takes root, or the right to
make user namespaces: `unshare -rm`), with room for two states and a half. The third save must fail with the error that
says what is left, the fit so far must come with it, and the same call must go on from the last state once there is
room. Exit status 1 if anything of that fails, 77 where nothing can be mounted.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

NOT_HERE = 77


def inside(folder: Path) -> None:
    from kills import digests, run

    import pyro_metassm as pm

    expected = digests(run(None, num_steps=12))
    with tempfile.TemporaryDirectory() as other:  # how large a state is
        run(Path(other), num_steps=12)
        size = max(path.stat().st_size for path in Path(other).glob("*.safetensors"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size)}", "tmpfs", folder], check=True)
    try:
        try:
            run(folder / "run", num_steps=12)
        except pm.CheckpointError as error:
            print(f"{error}\n")
            assert "No space left on device" in str(error) and "make room" in str(error)
            so_far = error.fit.history.sizes["step"]
        else:
            raise AssertionError("the disk was not full")
        left = sorted(path.name for path in (folder / "run").glob("*"))
        assert len([name for name in left if name.endswith(".safetensors")]) == 2, left
        assert not [name for name in left if name.endswith(".part")], left
        assert f"{so_far:08d}" > left[-1][5:13] and left[-1] in os.listdir(folder / "run")
        subprocess.run(["mount", "-o", f"remount,size={10 * size}", folder], check=True)
        assert digests(run(folder / "run", num_steps=12)) == expected
        print(f"the fit of {so_far} steps was in the error; {left} were left; it went on to the same bits")
    finally:
        subprocess.run(["umount", folder], check=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        inside(Path(sys.argv[1]))
        sys.exit()
    here = Path(__file__).resolve().parent
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        print("no file system can be mounted here")
        sys.exit(NOT_HERE)
    path = os.pathsep.join([str(here.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*unshare, sys.executable, __file__, folder], env=os.environ | {"PYTHONPATH": path}, check=False
        )
    sys.exit(done.returncode)
